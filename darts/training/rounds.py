"""The batches of strategies that choose their prompts, in the place of verl's train dataloader: `RoundLoader`.

Contract.
1. It yields one batch for each round of the strategy, without end: the queued prompts, then new ones in the sampler's
   order. Epochs follow one another within a round; no row is left out at an epoch's end. The trainer's number of steps
   ends the training.
2. A strategy is asked for its next round when the batch of the one before has been trained on.
3. Where it stands is its `position`, for JSON: a loader over the same dataset and seed goes on from there (`go_to`)
   with the same prompts. It counts rows; verl's own position in the data, by steps, does not fit, and is left empty.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from darts.strategy import Round


@dataclass(eq=False)
class RoundLoader:
    """Batches by rounds."""

    dataset: Any  # rows by number, as verl's datasets
    sampler: Any  # gives an order of the rows for each epoch; seeded, or a resumed run has another order
    collate: Callable[[list[Any]], dict[str, Any]]  # rows to a batch, verl's `collate_fn`
    next_round: Callable[[], Round]  # the strategy's
    epoch: int = 0
    round: Round | None = None  # of the last batch
    launched: tuple[int, ...] = ()  # its rows of the dataset

    def __post_init__(self) -> None:
        self._drawn = 0  # rows of this epoch
        self._order = iter(self.sampler)

    def __len__(self) -> int:
        """For verl's loop, which asks in which epoch to go on: in the first, which does not end."""
        return sys.maxsize

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield self.next()

    def next(self) -> dict[str, Any]:
        """The batch of the next round, which is `round` from then on."""
        self.round = self.next_round()
        self.launched = (*self.round.queued, *self._draw(self.round.new))
        return self.collate([self.dataset[row] for row in self.launched])

    def state_dict(self) -> dict[str, Any]:
        """For verl, which saves it: nothing."""
        return {}

    def load_state_dict(self, state: Any) -> None:
        """For verl, which loads it."""

    @property
    def position(self) -> dict[str, int]:
        """Where it stands."""
        return {"epoch": self.epoch, "drawn": self._drawn}

    def go_to(self, position: Any) -> None:
        """Goes on from a `position`; to be called once, before the first batch.

        Raises:
            ValueError: not a position, or one in another dataset.
        """
        saved_position = position if isinstance(position, dict) else {}
        epoch, num_drawn = saved_position.get("epoch"), saved_position.get("drawn")
        if not (type(epoch) is int and type(num_drawn) is int and epoch >= 0 and 0 <= num_drawn <= len(self.dataset)):
            raise ValueError(
                f"position={position!r:.80}: must be an epoch, and how many of {len(self.dataset)} rows were drawn."
            )
        for _ in range(epoch):
            self._skip(len(self.dataset) + 1)  # to its end, where a sampler may draw the next order
            self._order = iter(self.sampler)
        self._skip(num_drawn)
        self.epoch, self._drawn = epoch, num_drawn

    def _skip(self, rows: int) -> None:
        for _ in islice(self._order, rows):
            pass

    def _draw(self, rows: int) -> Sequence[int]:
        drawn_rows: list[int] = []
        while len(drawn_rows) < rows:
            epoch_rows = list(islice(self._order, rows - len(drawn_rows)))
            drawn_rows += epoch_rows
            self._drawn += len(epoch_rows)
            if len(drawn_rows) < rows:
                self._order = iter(self.sampler)
                self.epoch, self._drawn = self.epoch + 1, 0
        return drawn_rows
