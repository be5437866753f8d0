"""What an agent-loop worker tells the overlapped actor about its candidates' tokens.

Contract. One `GrowthOutbox` per rollout and worker, filled by the worker's groups, emptied by the rollout manager,
which has one call per worker open at a time: calls do not grow with candidates or tokens.

1. Of a growing candidate, `grow` tells the tokens of each chunk (mode `token`, agent loops with one request). `finish`
   tells prompt and response as the agent loop returned them: what was not told before, or everything again where what
   was told is not how they begin.
2. Once a group has decided, `keep` names the candidates that stay; one that is not kept is dropped once, and nothing is
   told of it afterwards.
3. Where the model takes more than tokens (a processor), complete sequences alone are sent, each at once and with its
   extras.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from darts.messages import Extras, Growth, Progress, Row, SequenceKey, checksum


@dataclass(slots=True)
class _Sent:
    """What was told of a candidate."""

    tokens: int = 0
    checksum: int = 0
    over: bool = False  # complete or dropped


@dataclass(slots=True, eq=False)
class GrowthOutbox:
    """Reports of one rollout that the manager has not fetched."""

    growing: bool  # tell of growing candidates too
    _sent: dict[SequenceKey, _Sent] = field(default_factory=dict)
    _news: Progress = field(default_factory=Progress)
    _filled: asyncio.Event = field(default_factory=asyncio.Event)

    def grow(
        self, key: SequenceKey, prompt_ids: Sequence[int], offset: int, token_ids: Sequence[int], chance: float
    ) -> None:
        """A running response has new tokens, `offset` of it before them; a gap waits for `finish`."""
        sent = self._sent.setdefault(key, _Sent())
        if not self.growing or sent.over or sent.tokens != (len(prompt_ids) + offset if offset else 0):
            return
        tokens = _array(token_ids if offset else [*prompt_ids, *token_ids])
        row = Row(key=key, prompt_tokens=len(prompt_ids), start=sent.tokens, token_ids=tokens, last=False)
        self._tell(sent, Growth(row, chance))

    def finish(
        self,
        key: SequenceKey,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        chance: float,
        extras: Callable[[], Extras] | None = None,
    ) -> None:
        """A response is complete. `extras` makes what the model takes besides tokens, and runs only if it is sent."""
        sent = self._sent.setdefault(key, _Sent())
        if sent.over:
            return
        tokens = _array([*prompt_ids, *response_ids])
        if extras is not None or sent.tokens > len(tokens) or checksum(tokens[: sent.tokens]) != sent.checksum:
            sent.tokens = sent.checksum = 0
        row = Row(
            key=key,
            prompt_tokens=len(prompt_ids),
            start=sent.tokens,
            token_ids=tokens[sent.tokens :],
            last=True,
            extras=None if extras is None else extras(),
        )
        self._tell(sent, Growth(row, chance))

    def keep(self, keys: Iterable[SequenceKey]) -> None:
        """The candidates that a group keeps."""
        self._news.kept.extend(keys)
        self._filled.set()

    def drop(self, key: SequenceKey) -> None:
        """A candidate is not kept."""
        sent = self._sent.pop(key, None)
        self._sent[key] = _Sent(over=True)
        if sent is not None and sent.tokens:
            self._news.dropped.append(key)
            self._filled.set()

    def end(self) -> None:
        """The rollout has ended."""
        self._news.ended = True
        self._filled.set()

    async def take(self, wait_s: float) -> Progress:
        """The reports since the last call, at once if there are any; none after `wait_s` seconds."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._filled.wait(), wait_s)
        self._filled.clear()
        progress, self._news = self._news, Progress(ended=self._news.ended)
        return progress

    def _tell(self, sent: _Sent, growth: Growth) -> None:
        row = growth.row
        self._news.growths.append(growth)
        sent.checksum = checksum(row.token_ids, sent.checksum)
        sent.tokens += len(row.token_ids)
        sent.over = row.last
        self._filled.set()


def _array(token_ids: Sequence[Any]) -> np.ndarray:
    return np.asarray(token_ids, dtype=np.int32)
