"""A weight update that fails in vLLM ends the run instead of hanging it. For GPU and CPU alike.

Contract:
1. Importing this module applies the patches in this process, and registers the checkpoint engine ``gloo``. verl does so
   in every process that moves weights (actor workers, the workers beside servers of their own, the trainer) where
   ``actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=verl_patches.weight_sync``; not sooner, since
   the patched modules import vLLM.
2. A failure of the receiving side is raised where weights are sent (``weights.watch``): in the actor worker where
   trainer and servers share GPUs, else in the server's own worker, from which it reaches the trainer.
3. The sockets are this run's own on the machine (``weights.run_id``).
"""

from __future__ import annotations

import verl_patches.weights.gloo  # noqa: F401  (registers it)
from verl_patches.patches import patch_server_adapter, patch_weight_sender

patch_server_adapter()
patch_weight_sender()
