"""Everything of this project that reaches into verl or vLLM: registrations and small patches.

Importing this package does nothing. verl loads ``verl_patches.register`` (entry point group ``verl.plugins``), vLLM
calls ``verl_patches.vllm_plugin.register`` (group ``vllm.general_plugins``).
"""
