"""An agent loop whose sampling is reproducible per row of the batch, whoever the trainer is."""

import hashlib
from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop


class SeededAgentLoop(SingleTurnAgentLoop):
    """verl's single-turn loop with a seed made of the prompt and `priority`, which numbers the rows of a batch."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        name = f"{kwargs['raw_prompt'][0]['content']}|{int(kwargs['priority'])}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        return await super().run({**sampling_params, "seed": seed}, **kwargs)
