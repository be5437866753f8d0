"""Which log-probs the actor computes next, while generation runs.

Contract: pure, no clock and no I/O. What candidates report goes in, calls for the actor's ranks come out. It runs in
the process of the rollout manager (`darts.overlap.session`): that process hears of all candidates, holds the handles of
the actor's ranks, and does little else while a rollout runs. In an agent-loop worker the ranks, which must forward
together, would have many masters; in the actor nobody would know what the others have.

1. A call is at most one forward of complete sequences (verl's own, packed where verl packs) and one that continues
   cached prefixes, on every rank. `max_tokens` bounds both, as the forward computes them: with padding where there is
   padding. `max_rows` bounds the complete sequences. A single row always goes. So a call is short and has verl's
   memory, and the next one has what came since.
2. A sequence stays on the rank that began it; one that begins goes to the rank that was given the fewest tokens among
   those that have room for it in this call.
3. What is likely to be kept comes first, and of what is equally likely the shortest prefix: each row of a forward is
   padded to the deepest. What cannot be kept is not computed. `drop` ends a sequence: it is forgotten here at once, and
   on its rank with the next call that has rows, before these take any room. No call is made to drop alone: what lingers
   on a rank is within the budget, and goes at the latest when the step is cleared.
4. On each rank, half of `max_cache_tokens` holds prefixes; the other half is for the rows that a forward works on, each
   with room for the longest prefix and the most new tokens among them. A prefix that does not fit does not grow: its
   sequence waits until it is complete, and goes on from there. One that ends keeps its room until the call is over. So
   nothing is evicted, and no token is forwarded twice.
5. Each sequence has a checksum of the tokens that were reported; whoever uses its log-probs compares.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from darts.messages import Extras, Growth, RankCall, Row, SequenceKey, Tokens, checksum


@dataclass(slots=True, eq=False)
class _OpenSequence:
    key: SequenceKey
    order: int  # of its first report
    prompt_tokens: int
    chance: float = 0.0
    kept: bool = False  # its group has decided so: the chance stays 1
    complete: bool = False  # no more tokens come
    checksum: int = 0
    rank: int | None = None  # that owns it; None: nothing was sent
    sent: int = 0  # tokens
    held: int = 0  # of them, those in the rank's cache
    done: bool = False  # all was sent
    waiting: list[Tokens] = field(default_factory=list)  # reported, not sent
    extras: Extras | None = None  # reported with them

    @property
    def num_waiting(self) -> int:
        return sum(len(token_part) for token_part in self.waiting)

    @property
    def whole(self) -> bool:
        """Whether its next row is all of it, without a prefix."""
        return self.complete and not self.sent

    def take(self) -> Row:
        """All that waits, as the next row."""
        tokens = np.concatenate(self.waiting) if self.waiting else np.empty(0, dtype=np.int32)
        row = Row(
            key=self.key, prompt_tokens=self.prompt_tokens, start=self.sent, token_ids=tokens, last=self.complete,
            extras=self.extras,
        )  # fmt: skip
        self.waiting, self.extras = [], None
        self.sent += len(tokens)
        self.done = self.complete
        return row


@dataclass(slots=True)
class _Rank:
    """A rank, and what it is to do in the call that is being made."""

    given: int = 0  # tokens in this step
    held: int = 0  # tokens of prefixes in its cache, until the call is over
    ending: int = 0  # of them, those of rows that end in the call
    drop: list[SequenceKey] = field(default_factory=list)
    whole: list[Row] = field(default_factory=list)
    whole_tokens: int = 0
    longest: int = 0  # tokens of the longest whole row
    growing: list[Row] = field(default_factory=list)
    widest: int = 0  # new tokens of the longest growing row
    deepest: int = 0  # cached tokens of the longest prefix among them


@dataclass(eq=False)
class OverlapSchedule:
    """The sequences of one step, and the calls for the ranks; a `ValueError` where a number is below its least."""

    step: int  # number of the training step
    num_ranks: int  # data-parallel ranks of the actor
    max_tokens: int  # of one forward on one rank (verl's limit of a micro-batch, which no sequence exceeds)
    max_cache_tokens: int  # of prefixes on one rank, kept and in use; 0: complete sequences alone (mode `sequence`)
    max_rows: int | None = None  # complete sequences in one forward on one rank; None: any number
    padded: bool = False  # whether verl pads them to the longest of the forward, instead of packing them
    restarted_tokens: int = 0  # sent for sequences that began again: forwarded twice

    def __post_init__(self) -> None:
        for name, least_value in {"num_ranks": 1, "max_tokens": 1, "max_cache_tokens": 0, "max_rows": 1}.items():
            if (value := getattr(self, name)) is not None and value < least_value:
                raise ValueError(f"{name}={value}: must be at least {least_value}.")
        self._max_held = self.max_cache_tokens // 2
        self._ranks = [_Rank() for _ in range(self.num_ranks)]
        self._sequences: dict[SequenceKey, _OpenSequence] = {}
        self._dropped: set[SequenceKey] = set()
        self._calls = 0
        self._reported = 0

    def grow(self, growth: Growth) -> None:
        """A candidate has new tokens. What comes after its `drop` is ignored.

        Raises:
            ValueError: the tokens do not continue those that were reported, or the sequence was complete.
        """
        row = growth.row
        if row.key in self._dropped:
            return
        sequence = self._sequences.get(row.key)
        if sequence is None or (row.start == 0 and len(row.token_ids)):
            sequence = self._begin(row, sequence)
        num_reported = sequence.sent + sequence.num_waiting
        if sequence.complete or row.start != num_reported:
            raise ValueError(
                f"{row.key}: tokens from {row.start} on, after {num_reported} tokens"
                f"{' and the end' if sequence.complete else ''} were reported; they must continue each other."
            )
        sequence.chance = 1.0 if sequence.kept else growth.chance
        sequence.complete = row.last
        sequence.extras = row.extras
        if len(row.token_ids):
            sequence.checksum = checksum(row.token_ids, sequence.checksum)
            sequence.waiting.append(row.token_ids)

    def drop(self, key: SequenceKey) -> None:
        """The sequence is not needed, and will not be."""
        self._dropped.add(key)
        sequence = self._sequences.pop(key, None)
        if sequence is not None:
            self._forget(sequence)

    def keep(self, key: SequenceKey) -> None:
        """The sequence's group keeps it: its chance is 1 from now on. One that is unknown or dropped is ignored."""
        sequence = self._sequences.get(key)
        if sequence is not None:
            sequence.kept, sequence.chance = True, 1.0

    def keep_only(self, keys: Iterable[SequenceKey]) -> None:
        """Generation has ended, and these are the kept: all others are dropped."""
        kept_keys = set(keys)
        for key in list(self._sequences):
            if key in kept_keys:
                self.keep(key)
            else:
                self.drop(key)

    def next_call(self) -> list[RankCall] | None:
        """What the ranks do next, one call each; None if no row can go. The caller sends it, in order."""
        ready_sequences = [sequence for sequence in self._sequences.values() if self._is_ready(sequence)]
        no_room: dict[bool, int] = {}  # tokens of the shortest first row, whole or not, for which no rank has room
        for sequence in sorted(ready_sequences, key=lambda sequence: (-sequence.chance, sequence.sent, sequence.order)):
            is_first, is_whole, num_tokens = sequence.rank is None, sequence.whole, sequence.num_waiting
            if is_first and num_tokens >= no_room.get(is_whole, sys.maxsize):
                continue
            if not self._place(sequence) and is_first:
                no_room[is_whole] = num_tokens
        if not any(rank.whole or rank.growing for rank in self._ranks):
            return None
        rank_calls = [
            RankCall(step=self.step, number=self._calls, drop=rank.drop, whole=rank.whole, growing=rank.growing)
            for rank in self._ranks
        ]
        self._ranks = [_Rank(given=rank.given, held=rank.held - rank.ending) for rank in self._ranks]
        self._calls += 1
        return rank_calls

    def complete(self, keys: Iterable[SequenceKey]) -> list[list[SequenceKey]]:
        """By rank, those of `keys` whose tokens have all been sent."""
        by_rank: list[list[SequenceKey]] = [[] for _ in self._ranks]
        for key in keys:
            sequence = self._sequences.get(key)
            if sequence is not None and sequence.done and sequence.rank is not None:
                by_rank[sequence.rank].append(key)
        return by_rank

    def checksum(self, key: SequenceKey) -> int | None:
        """The checksum of all tokens that were reported for a sequence; None for one that is unknown or dropped."""
        sequence = self._sequences.get(key)
        return None if sequence is None else sequence.checksum

    def _begin(self, row: Row, known_sequence: _OpenSequence | None) -> _OpenSequence:
        """A new sequence, or a known one that begins again, on the rank that has its first beginning."""
        sequence = _OpenSequence(row.key, self._reported, row.prompt_tokens)
        self._reported += 1
        if known_sequence is not None:
            self._forget(known_sequence)
            self.restarted_tokens += known_sequence.sent
            sequence.rank, sequence.kept = known_sequence.rank, known_sequence.kept
        self._sequences[row.key] = sequence
        return sequence

    def _forget(self, sequence: _OpenSequence) -> None:
        if sequence.rank is not None and sequence.sent:
            rank = self._ranks[sequence.rank]
            rank.held -= sequence.held
            rank.drop.append(sequence.key)

    def _is_ready(self, sequence: _OpenSequence) -> bool:
        if sequence.done or sequence.chance <= 0:
            return False
        return sequence.complete or (bool(self._max_held) and bool(sequence.waiting))

    def _place(self, sequence: _OpenSequence) -> bool:
        """Adds the sequence's next row to the call, if it fits."""
        rank_numbers = range(len(self._ranks)) if sequence.rank is None else (sequence.rank,)
        fits_rank = self._fits_whole if sequence.whole else self._fits_growing
        for rank_number in sorted(rank_numbers, key=lambda rank_number: self._ranks[rank_number].given):
            if fits_rank(self._ranks[rank_number], sequence):
                self._add(rank_number, sequence)
                return True
        return False

    def _fits_whole(self, rank: _Rank, sequence: _OpenSequence) -> bool:
        num_rows, num_tokens = len(rank.whole) + 1, sequence.num_waiting
        if num_rows == 1:
            return True
        forward_tokens = num_rows * max(rank.longest, num_tokens) if self.padded else rank.whole_tokens + num_tokens
        return forward_tokens <= self.max_tokens and (self.max_rows is None or num_rows <= self.max_rows)

    def _fits_growing(self, rank: _Rank, sequence: _OpenSequence) -> bool:
        rows, num_tokens = len(rank.growing) + 1, sequence.num_waiting
        if not sequence.complete and rank.held + num_tokens > self._max_held:
            return False
        widest, deepest = max(rank.widest, num_tokens), max(rank.deepest, sequence.held)
        return rows == 1 or (rows * widest <= self.max_tokens and rows * (deepest + widest) <= self._max_held)

    def _add(self, rank_number: int, sequence: _OpenSequence) -> None:
        rank, num_tokens = self._ranks[rank_number], sequence.num_waiting
        if sequence.whole:
            rank.longest = max(rank.longest, num_tokens)
            rank.whole_tokens += num_tokens
            rank.whole.append(sequence.take())
        else:
            rank.widest, rank.deepest = max(rank.widest, num_tokens), max(rank.deepest, sequence.held)
            if sequence.complete:
                rank.ending += sequence.held
                sequence.held = 0
            else:
                rank.held += num_tokens
                sequence.held += num_tokens
            rank.growing.append(sequence.take())
        sequence.rank = rank_number
        rank.given += num_tokens
