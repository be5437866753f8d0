"""Ranks of an actor that compute nothing but remember everything: log-probs are checksums of what they were told.

What cannot be scripted otherwise: a rank that fails, hangs or is slow at a given call. The real ranks are tested in
tests/actor.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

from darts.messages import RankAbility, RankCall, RankReport, RankResults, SequenceKey, StepSettings, checksum


def scripted_log_probs(tokens: np.ndarray, prompt_tokens: int) -> np.ndarray:
    """One number per response token that depends on all tokens up to it."""
    ends = range(prompt_tokens + 1, len(tokens) + 1)
    return np.array([checksum(np.asarray(tokens[:end], dtype=np.int32)) % 4093 for end in ends], dtype=np.float32)


@ray.remote
class ScriptedRank:
    """One rank; `trouble` names what happens at which call: ("raise" | "hang" | "die", number)."""

    def begin(self, refusal: str | None = None, seconds: float = 0.0, gate: Path | None = None) -> None:
        """Forgets what was before; with `gate` every call waits until that file is there."""
        self.refusal, self.seconds, self.gate = refusal, seconds, gate
        self.trouble: tuple[str, int] | None = None
        self.steps: list[int] = []
        self.calls: list[RankCall] = []
        self.tokens: dict[SequenceKey, list[int]] = {}
        self.prompts: dict[SequenceKey, int] = {}
        self.wrong: set[SequenceKey] = set()

    def overlap_open(self, settings: StepSettings) -> RankAbility:
        self.settings = settings
        self.steps.append(settings.step)
        self.tokens, self.calls = {}, []
        return RankAbility(
            refusal=self.refusal, bytes_per_token=1 << 10, device_bytes=0, free_bytes=0, gathered_bytes=0,
            optimizer_bytes=0,
        )  # fmt: skip

    def overlap_extend(self, call: RankCall) -> RankReport:
        began = time.time()
        assert (call.step, call.number) == (self.settings.step, len(self.calls))
        self.calls.append(call)
        if self.trouble is not None and self.trouble[1] == call.number:
            match self.trouble[0]:
                case "raise":
                    raise ValueError("scripted: out of memory")
                case "hang":
                    time.sleep(3600)
                case "die":
                    ray.actor.exit_actor()
        while self.gate is not None and not self.gate.exists():
            time.sleep(0.01)
        time.sleep(self.seconds)
        for key in call.drop:
            self.tokens.pop(key, None)
        for row in (*call.whole, *call.growing):
            known = self.tokens.get(row.key, []) if row.start else []
            assert len(known) == row.start
            self.tokens[row.key] = known + row.token_ids.tolist()
            self.prompts[row.key] = row.prompt_tokens
        tokens = sum(len(row.token_ids) for row in (*call.whole, *call.growing))
        return RankReport(began=began, ended=time.time(), tokens=tokens, cache_bytes=0, peak_cache_bytes=tokens << 10)

    def overlap_collect(self, step: int, keys: list[SequenceKey]) -> RankResults:
        assert step == self.settings.step
        values: dict[SequenceKey, dict[str, np.ndarray]] = {}
        for key in keys:
            old = scripted_log_probs(np.array(self.tokens[key]), self.prompts[key])
            values[key] = {"old_log_probs": old, "entropys": old + 0.5, "ref_log_prob": -old}
        return RankResults(values=values, mfu=0.25)

    def overlap_clear(self, step: int) -> None:
        assert step == self.settings.step
        self.tokens = {}

    def set_trouble(self, trouble: tuple[str, int] | None) -> None:
        self.trouble = trouble

    def seen(self) -> dict[str, Any]:
        """Steps, calls and open sequences."""
        return {"steps": self.steps, "calls": self.calls, "open": list(self.tokens)}


class ScriptedActor:
    """The part of verl's worker group that `darts.overlap.session` calls, over scripted ranks."""

    def __init__(self, num_ranks: int) -> None:
        self.ranks = [ScriptedRank.remote() for _ in range(num_ranks)]

    def begin(self, **script: Any) -> None:
        """As `ScriptedRank.begin`; returns when all ranks have started."""
        ray.get([rank.begin.remote(**script) for rank in self.ranks])

    def kill(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)

    def overlap_open(self, settings: StepSettings) -> list[Any]:
        return [rank.overlap_open.remote(settings) for rank in self.ranks]

    def overlap_extend(self, calls: list[RankCall]) -> list[Any]:
        return [rank.overlap_extend.remote(call) for rank, call in zip(self.ranks, calls, strict=True)]

    def overlap_collect(self, step: int, keys: list[list[SequenceKey]]) -> list[Any]:
        return [rank.overlap_collect.remote(step, some) for rank, some in zip(self.ranks, keys, strict=True)]

    def overlap_clear(self, step: int) -> list[Any]:
        return [rank.overlap_clear.remote(step) for rank in self.ranks]

    def seen(self) -> list[dict[str, Any]]:
        """As `ScriptedRank.seen`, of each rank."""
        return ray.get([rank.seen.remote() for rank in self.ranks])
