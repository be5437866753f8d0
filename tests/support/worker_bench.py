"""One agent-loop worker over one scripted server, both in this process, with the real client between them."""

import asyncio
from typing import Any

import numpy as np
from fakes import CountingReward, Script, ScriptedServer, Turn, handle, in_process_client, prompts
from omegaconf import DictConfig
from verl.protocol import DataProto

from darts.checks.run import darts_config
from darts.messages import BUDGET, PROMPT
from darts.pool import CandidatePool
from darts.rollout.worker import DartsAgentLoopWorker, candidate_seed

CALL = '<tool_call>\n{"name": "lookup", "arguments": {"key": "a"}}\n</tool_call>'
STEP = 1


class Bench:
    """One worker over one scripted server, both in this process."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config
        self.darts = darts_config(config)
        self.number = 0  # of the last rollout
        self.reward = CountingReward()
        self.server = ScriptedServer(Script(end_token=0))
        client = in_process_client(config, self.server)
        self.worker = DartsAgentLoopWorker(config, client, None, [handle(self.reward)])
        self.server.script.end_token = self.worker.tokenizer.eos_token_id

    def script(self, groups: list[list[Turn | list[Turn]]]) -> None:
        self.server.script.turns = {
            candidate_seed(self.darts.seed, STEP, number, candidate): turn if isinstance(turn, list) else [turn]
            for number, group in enumerate(groups)
            for candidate, turn in enumerate(group)
        }

    def batch(self, budgets: list[int], **columns: Any) -> DataProto:
        group_size = self.darts.group_size
        batch = prompts([f"{number}+1=" for number in range(len(budgets))], group_size, step=STEP)
        batch = batch.select_idxs(np.arange(0, len(batch), group_size))
        batch.non_tensor_batch |= {
            BUDGET: np.array(budgets),
            PROMPT: np.arange(len(budgets)),
            "priority": np.cumsum(budgets) - budgets,
            **columns,
        }
        return batch

    def run(self, budgets: list[int], **columns: Any) -> tuple[DataProto, CandidatePool]:
        self.number += 1
        groups = self.worker.generate_groups(self.batch(budgets, **columns), self.darts, self.number)
        output, pool, self.step_times = asyncio.run(groups)
        return output, pool

    def run_until(
        self, budgets: list[int], num_settled: int, trained: list[str] | None = None, **columns: Any
    ) -> tuple[DataProto, CandidatePool]:
        """As `run`, but the waits end once so many groups are settled, as the manager ends them."""
        self.number += 1

        async def live() -> tuple[DataProto, CandidatePool]:
            groups = self.worker.generate_groups(self.batch(budgets, **columns), self.darts, self.number)
            rollout = asyncio.ensure_future(groups)
            num_known = 0
            while num_known < num_settled:
                num_known += len(await self.worker.settled(self.number, num_known))
            await self.worker.end_waits(self.number, trained)
            output, pool, _ = await rollout
            return output, pool

        return asyncio.run(live())

    def served(self) -> list[dict[str, Any]]:
        """What the server served, one record per request, in the order of the candidates."""
        return sorted(self.server.served, key=lambda record: record["priority"])

    def responses(self, output: DataProto) -> list[str]:
        """Decoded responses, one string per row."""
        tokenizer = self.worker.tokenizer
        return [tokenizer.decode(row, skip_special_tokens=True) for row in output.batch["responses"]]


def lengths_of(output: DataProto) -> list[int]:
    return output.batch["response_mask"].sum(dim=1).tolist()
