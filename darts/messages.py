"""What the rollout's process and the ranks of the overlapped actor say to each other.

Contract: records without behaviour, pickled by Ray in every call. A sequence is a prompt and its response as one list
of tokens; it is named by (uid, candidate), never by a row. Every call carries the step it belongs to. Images come by
reference: no call grows with their pixels.
"""

import zlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class SequenceKey(NamedTuple):
    """Names a sequence within a step."""

    uid: str
    candidate: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """How the log-probs of a step are computed, e.g. `StepSettings(step=3, mode="token", temperature=1.0)`."""

    step: int
    mode: str  # sequence or token
    temperature: float
    with_reference: bool = False
    sum_pi_squared: bool = False  # as verl's actor.calculate_sum_pi_squared


@dataclass(frozen=True, slots=True, kw_only=True)
class RankAbility:
    """What a rank can do in this step."""

    refusal: str | None  # why it cannot continue a prefix (mode token); None: it can
    bytes_per_token: int  # of keys and values on one rank, of actor and reference; 0 with a refusal
    device_bytes: int  # memory of the device
    free_bytes: int  # of it, not in use while the actor's shard is there
    gathered_bytes: int  # of parameters, for a forward
    optimizer_bytes: int  # of the state that the optimizer does not have yet


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Extras:
    """What a model with a processor takes of a complete sequence besides its tokens, as verl's agent loop makes it.

    Each field is the value or Ray's reference of it (`darts.overlap.images`).
    """

    position_ids: Any  # integers [layers, tokens]: 4 layers with M-RoPE (text, time, height, width), else 1
    multi_modal_inputs: Any  # dict by verl's names, as pixel_values and image_grid_thw; empty without images


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """The next tokens of one sequence, for the rank that owns it.

    Example: prompt of 20 tokens, 64 generated, then 30 more and the end:
        >>> Row(key=SequenceKey("a", 0), prompt_tokens=20, start=0, token_ids=np.arange(84, dtype=np.int32), last=False)
        >>> Row(key=SequenceKey("a", 0), prompt_tokens=20, start=84, token_ids=np.arange(30, dtype=np.int32), last=True)
    """

    key: SequenceKey
    prompt_tokens: int
    start: int  # tokens of the sequence that came in earlier rows; 0 begins it, again if the rank knew it
    token_ids: np.ndarray  # int32 [new tokens]
    last: bool  # the sequence ends here: its prefix is not kept
    extras: Extras | None = None  # of a whole sequence, where the model has a processor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankCall:
    """What one rank is to do now. All ranks get a call at the same time, most of them with rows of their own."""

    step: int
    number: int  # of the call within the step, from 0
    drop: list[SequenceKey] = field(default_factory=list)  # forget these first, results too
    whole: list[Row] = field(default_factory=list)  # complete (start 0, last): one forward, verl's own
    growing: list[Row] = field(default_factory=list)  # one forward that continues cached prefixes


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """What one rank did in a call; times are `time.time()` on its host."""

    began: float
    ended: float
    tokens: int  # forwarded through the actor for rows that were asked for, not for padding or company
    cache_bytes: int  # kept now
    peak_cache_bytes: int  # kept and in use at once, at most, so far in the step


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankResults:
    """The finished sequences that a rank was asked for; one that it does not have is left out.

    `values[key]` has, by verl's names, float32 [response tokens]: `old_log_probs`, `entropys`, and where asked for
    `ref_log_prob` and `sum_pi_squared`.
    """

    values: dict[SequenceKey, dict[str, np.ndarray]]
    mfu: float  # of all forwards of the step, as verl's perf/mfu/actor_infer


class Chunk(NamedTuple):
    """New tokens of one request."""

    request_id: str
    offset: int  # tokens of the request before this chunk
    token_ids: list[int]
    made_at: float  # `time.time()` at the server
    running: float  # sequences that an engine ran in its last step, whoever's; mean over the server's engines
    steps: int  # decoding steps that an engine of the server has made so far, mean over them


# Columns of the batch between manager and worker. Agent loops never see them.
BUDGET, PROMPT, CANDIDATE = "darts_budget", "darts_prompt", "darts_candidate"
MAX_TOKENS = "max_tokens"
"""In the batch's `meta_info`: the longest response of this rollout, where that is below the run's."""

Tokens = NDArray[np.int32]


class Growth(NamedTuple):
    """New tokens of a candidate, and how likely it is kept (0 to 1)."""

    row: Row
    chance: float


@dataclass(frozen=True, slots=True)
class ActorCall:
    """A call that the ranks have answered."""

    began: float  # `time.time()` at the first rank that began
    ended: float  # at the last that ended
    tokens: int  # over all ranks


def checksum(token_ids: Tokens, before: int = 0) -> int:
    """CRC-32 of tokens, going on from that of the tokens `before` them."""
    return zlib.crc32(np.ascontiguousarray(token_ids, dtype=np.int32).tobytes(), before)


@dataclass(slots=True)
class Progress:
    """What was reported since the last call."""

    growths: list[Growth] = field(default_factory=list)
    kept: list[SequenceKey] = field(default_factory=list)  # certain from now on
    dropped: list[SequenceKey] = field(default_factory=list)
    ended: bool = False  # nothing comes any more


class Node(NamedTuple):
    """What a node has, or has left."""

    gpus: float
    cpus: float
