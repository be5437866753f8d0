"""Projects what computing log-probs during generation saves on GPUs. A projection: nothing of it is measured on a GPU.

    python -m benchmarks.overlap_projection --out outputs/overlap_projection.json

Contract. Python, NumPy and the project's own code on a virtual clock; the assumptions are printed with the result.

1. Engines decode by `darts.latency.LatencyCurve`, each its share of the candidates, all together: a response's chunks
   and its end come when the curve says. Groups are `darts.group.CandidateGroup`, which says how likely a candidate is
   kept; calls are those of `darts.overlap.OverlapSchedule`.
2. A call lasts as long as its slowest rank. A forward takes a constant (FSDP's gathering), the tokens that it computes,
   padding included, over a throughput, and in `token` the copying of prefixes over the memory's bandwidth.
3. `off` forwards the kept after generation, spread over the ranks by length, in micro-batches; the update of all arms
   takes three times as long (forward and backward). `bypass` has no forward at all.
4. The CPU seconds of the scheduler (`grow`, `drop`, `next_call`, and the pickling of its calls) are measured, here.

The exit code is 1 if the scheduler takes a second or more of CPU in a step.
"""

import argparse
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks import common
from benchmarks.overlap_report import BYPASS, OFF, OVERLAPPED, TOKEN
from darts.actor_calls import RankCall, Row, SequenceKey
from darts.group import CandidateGroup
from darts.latency import LatencyCurve
from darts.overlap import Growth, OverlapSchedule
from darts.testbed.rollouts import say
from darts.testbed.summary import Check

GROUP_SIZE, NUM_LONG = 8, 1
GIB = 1 << 30
CPU_LIMIT_S = 1.0
POINTS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Running sequences at which a curve is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model, by its public configuration."""

    name: str
    parameters: float
    layers: int
    hidden: int
    kv_heads: int
    head_dim: int
    tensor_parallel: int  # of an engine (ours)

    @property
    def kv_bytes(self) -> int:
        """Of a token's keys and values, bfloat16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def forward_flops(self, tokens: float, attended: float) -> float:
        """Of a forward of `tokens` tokens which look at `attended` keys in all."""
        return 2 * self.parameters * tokens + 4 * self.layers * self.hidden * attended


SHAPES = (
    Shape(name="0.5B", parameters=0.49e9, layers=24, hidden=896, kv_heads=2, head_dim=64, tensor_parallel=1),
    Shape(name="7B", parameters=7.6e9, layers=28, hidden=3584, kv_heads=4, head_dim=128, tensor_parallel=4),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A GPU and what is got out of it; see `ASSUMPTIONS`."""

    flops: float = 148e12
    bandwidth: float = 4.0e12  # bytes/s
    train_share: float = 0.4  # of flops, forward and backward
    decode_share: float = 0.5  # of flops
    memory_share: float = 0.7  # of the bandwidth
    step_s: float = 0.006  # of a decoding step, whatever it computes
    gather: float = 30e9  # bytes/s into one GPU
    call_s: float = 0.02  # of a call besides its forwards
    report_s: float = 0.05  # from a chunk's last token to the scheduler
    fetch: float = 1e9  # bytes/s of results


ASSUMPTIONS = (
    ("GPU", "H20's data sheet: 148 TFLOP/s bfloat16, 4.0 TB/s; the paper's GPU"),
    ("GPUs", "32 train (one data-parallel rank each) and 32 serve: half of each node, as the paper"),
    ("training", "40 % of the FLOP/s, forward and backward; 2 x parameters per token and attention (ours)"),
    ("decoding", "per step 6 ms, and the larger of weights and cache at 70 % of the bandwidth, FLOPs at 50 % (ours)"),
    ("FSDP", "parameters in bfloat16 gathered at 30 GB/s for every forward, not hidden behind compute (ours)"),
    ("copies", "prefixes: 3 x the padded cache of a forward, at 70 % of the bandwidth (ours)"),
    ("control", "20 ms per call, 50 ms from a chunk to the scheduler, results fetched at 1 GB/s (ours)"),
    ("lengths", "log-normal, std of the log 0.4 between and 0.6 within prompts, cut at the limit (ours)"),
    ("selection", "7 shortest and the longest of a prompt's candidates, dual-end; every candidate runs to its end"),
    ("step", "generation, log-probs, update of 3 x a forward over the kept; nothing else"),
    ("published", "old log-probs take 14-19 % of a step at 7B in verl's published runs (H100, colocated)"),
)


def curve_of(shape: Shape, gpu: Hardware, context: float) -> LatencyCurve:
    """Seconds of an engine's decoding step, by a roofline; `context` is the mean length of a running sequence."""
    seconds = []
    for running in POINTS:
        moved = 2 * shape.parameters + running * context * shape.kv_bytes
        computed = shape.forward_flops(running, running * context)
        memory_s = moved / (gpu.bandwidth * gpu.memory_share * shape.tensor_parallel)
        compute_s = computed / (gpu.flops * gpu.decode_share * shape.tensor_parallel)
        seconds.append(gpu.step_s + max(memory_s, compute_s))
    return LatencyCurve(POINTS, seconds)


def draw(options: argparse.Namespace, rng: np.random.Generator) -> NDArray[np.int64]:
    """Response lengths [prompts, candidates]."""
    medians = options.median * np.exp(rng.normal(0, 0.4, (options.prompts, 1)))
    drawn = np.ceil(medians * np.exp(rng.normal(0, 0.6, (options.prompts, options.candidates))))
    return np.clip(drawn, 1, options.limit).astype(np.int64)


class Event(NamedTuple):
    """Tokens of a response that the scheduler hears of."""

    at: float
    prompt: int
    candidate: int
    start: int  # response tokens told before
    end: int
    last: bool


def generation(
    lengths: NDArray[np.int64], engines: int, curve: LatencyCurve, chunk: int, late_s: float
) -> tuple[list[Event], float]:
    """All reports in the order of their time, and when generation ends. Candidates go to the engines in turn."""
    events, ended = [], 0.0
    flat = lengths.ravel()
    for engine in range(engines):
        own = np.arange(engine, len(flat), engines)
        if not len(own):
            continue
        steps = np.arange(1, flat[own].max() + 1)
        running = len(own) - np.searchsorted(np.sort(flat[own]), steps, side="left")
        at = np.cumsum(curve(running))  # of each step's end
        ended = max(ended, float(at[-1]))
        for number in own.tolist():
            prompt, candidate = divmod(number, lengths.shape[1])
            length = int(flat[number])
            for start in range(0, length, chunk):
                end = min(start + chunk, length)
                events.append(Event(float(at[end - 1]) + late_s, prompt, candidate, start, end, end == length))
    return sorted(events), ended


class Actor:
    """The ranks on the virtual clock: how long calls take, and what is held meanwhile.

    Args:
        shape: The model.
        gpu: Each rank's.
        ranks: Data-parallel.
    """

    def __init__(self, shape: Shape, gpu: Hardware, ranks: int) -> None:
        self._shape, self._gpu = shape, gpu
        self._held: list[dict[SequenceKey, int]] = [{} for _ in range(ranks)]  # tokens of prefixes
        self.tokens = 0
        self.calls = 0
        self.peak_tokens = 0
        """Of prefixes, kept and in use at once, on the fullest rank."""

    @property
    def gather_s(self) -> float:
        """Of one forward."""
        return 2 * self._shape.parameters / self._gpu.gather

    def seconds(self, calls: Sequence[RankCall]) -> float:
        """Of one call; all ranks run as many forwards as the one with the most, and wait for the slowest."""
        ranks = [self._rank(call, held) for call, held in zip(calls, self._held, strict=True)]
        self.calls += 1
        forwards = max(forwards for forwards, _ in ranks)
        return self._gpu.call_s + forwards * self.gather_s + max(seconds for _, seconds in ranks)

    def packed_s(self, lengths: Sequence[int]) -> float:
        """Of one rank's packed forward, without the gathering."""
        flops = self._shape.forward_flops(sum(lengths), sum(length**2 for length in lengths) / 2)
        return flops / (self._gpu.flops * self._gpu.train_share)

    def _rank(self, call: RankCall, held: dict[SequenceKey, int]) -> tuple[int, float]:
        """Forwards of a rank, and their seconds without the gathering."""
        for key in call.drop:
            held.pop(key, None)
        whole = [len(row.token_ids) for row in call.whole]
        forwards, seconds = int(bool(whole)), self.packed_s(whole)
        growing = [(row.key, held.get(row.key, 0), len(row.token_ids)) for row in call.growing if len(row.token_ids)]
        if growing:
            widest, longest = max(new for _, _, new in growing), max(before for _, before, _ in growing)
            padded = len(growing) * (widest + longest)
            flops = self._shape.forward_flops(len(growing) * widest, widest * padded)
            seconds += flops / (self._gpu.flops * self._gpu.train_share)
            seconds += 3 * padded * self._shape.kv_bytes / (self._gpu.bandwidth * self._gpu.memory_share)
            ended = {row.key for row in call.growing if row.last}  # their new tokens are not kept
            held |= {key: before + new for key, before, new in growing if key not in ended}
            self.peak_tokens = max(self.peak_tokens, sum(held.values()) + padded)
            forwards += 1
        for row in call.growing:
            if row.last:
                held.pop(row.key, None)
        self.tokens += sum(whole) + sum(new for _, _, new in growing)
        return forwards, seconds


class Stopwatch:
    """CPU seconds of this thread, by what they were spent on; and how often."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.longest: dict[str, float] = {}

    def run(self, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """Does the work."""
        start = time.thread_time()
        result = work(*arguments)
        spent = time.thread_time() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        self.longest[name] = max(self.longest.get(name, 0.0), spent)
        return result


def kept_of(groups: Sequence[CandidateGroup]) -> set[SequenceKey]:
    """The kept sequences of all groups, which are complete."""
    return {SequenceKey(f"{prompt}", candidate) for prompt, group in enumerate(groups) for candidate in group.kept}


def after_generation_s(lengths: Sequence[int], actor: Actor, ranks: int, max_tokens: int) -> float:
    """Seconds of verl's own forward over complete sequences, the longest first to the rank with the fewest tokens."""
    own: list[list[int]] = [[] for _ in range(ranks)]
    for length in sorted(lengths, reverse=True):
        min(own, key=sum).append(length)
    forwards = max(-(-sum(some) // max_tokens) for some in own)
    return forwards * actor.gather_s + max(actor.packed_s(some) for some in own)


def overlapped(
    mode: str, lengths: NDArray[np.int64], events: Sequence[Event], ended: float, actor: Actor, options: Any
) -> dict[str, float]:
    """One step with log-probs computed during generation.

    Args:
        mode: `sequence` or `token`.
        lengths: As `draw` gives them.
        events: As `generation` gives them.
        ended: When generation ends.
        actor: New.
        options: The command's.
    """
    shape, watch = actor._shape, Stopwatch()
    cache = int(options.kv_cache_gib * GIB / shape.kv_bytes) if mode == TOKEN else 0
    schedule = OverlapSchedule(1, options.ranks, options.max_tokens, cache)
    groups = [CandidateGroup(options.candidates, GROUP_SIZE, NUM_LONG) for _ in lengths]
    responses = np.random.default_rng(0).integers(0, 150_000, options.prompt_tokens + options.limit, dtype=np.int32)
    computed: dict[SequenceKey, list[tuple[float, int]]] = {}
    finished_at: dict[SequenceKey, float] = {}

    def hear(event: Event) -> None:
        key, group = SequenceKey(f"{event.prompt}", event.candidate), groups[event.prompt]
        if event.last:
            group.finish(event.candidate, event.end, truncated=False)
            finished_at[key] = event.at
        else:
            group.progress(event.candidate, event.end)
        if event.last or mode == TOKEN:
            told = event.start if mode == TOKEN else 0
            start = told + options.prompt_tokens if told else 0
            tokens = responses[start : options.prompt_tokens + event.end]
            row = Row(key=key, prompt_tokens=options.prompt_tokens, start=start, token_ids=tokens, last=event.last)
            watch.run("grow", schedule.grow, Growth(row, group.chance(event.candidate)))
        if group.complete:
            for candidate in set(range(options.candidates)) - set(group.kept):
                watch.run("drop", schedule.drop, SequenceKey(f"{event.prompt}", candidate))

    now = hidden = 0.0
    told = 0
    chosen = False
    while True:
        while told < len(events) and events[told].at <= now:
            hear(events[told])
            told += 1
        if told == len(events) and not chosen:
            watch.run("keep_only", schedule.keep_only, kept_of(groups))
            chosen = True
        calls = watch.run("next_call", schedule.next_call)
        if calls is None:
            if chosen:
                break
            now = events[told].at
            continue
        watch.run("pickle", lambda calls=calls: [pickle.dumps(call, 5) for call in calls])
        began, now = now, now + actor.seconds(calls)
        hidden += max(min(now, ended) - began, 0.0)
        for call in calls:
            for row in (*call.whole, *call.growing):
                fresh = row.start + len(row.token_ids) - max(row.start, row.prompt_tokens)
                computed.setdefault(row.key, []).append((now, max(fresh, 0)))
    kept = kept_of(groups)
    tokens = sum(int(lengths[int(key.uid), key.candidate]) for key in kept)
    parts = [(key, at, fresh) for key, some in computed.items() for at, fresh in some]
    return {
        "hidden_s": hidden,
        "exposed_s": max(now - ended, 0.0) + 2 * 4 * tokens / actor._gpu.fetch,
        "before_end_share": sum(n for key, at, n in parts if key in kept and at <= finished_at[key]) / tokens,
        "in_rollout_share": sum(n for key, at, n in parts if key in kept and at <= ended) / tokens,
        "wasted": sum(n for key, _, n in parts if key not in kept),
        "forwarded_per_kept": actor.tokens / tokens,
        "calls": actor.calls,
        "peak_gib": actor.peak_tokens * shape.kv_bytes / GIB,
        "reports": len(finished_at) if mode != TOKEN else len(events),
        "cpu_s": sum(watch.seconds.values()),
        "longest_cpu_s": max(watch.longest.values()),
    } | {f"cpu_{name}_s": spent for name, spent in watch.seconds.items()}


def project(shape: Shape, gpu: Hardware, options: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """A step of each arm on the same generation, as records."""
    lengths = draw(options, np.random.default_rng(seed))
    # Half of a response is there on average, weighted by how long it takes.
    context = options.prompt_tokens + float((lengths**2).sum() / lengths.sum()) / 2
    curve = curve_of(shape, gpu, context)
    engines = options.servers // shape.tensor_parallel
    events, ended = generation(lengths, engines, curve, options.chunk_tokens, gpu.report_s)
    groups = [CandidateGroup(options.candidates, GROUP_SIZE, NUM_LONG) for _ in lengths]
    for event in (event for event in events if event.last):
        groups[event.prompt].finish(event.candidate, event.end, truncated=False)
    own = [int(lengths[int(key.uid), key.candidate]) + options.prompt_tokens for key in kept_of(groups)]

    def new_actor() -> Actor:
        return Actor(shape, gpu, options.ranks)

    forward_s = after_generation_s(own, new_actor(), options.ranks, options.max_tokens)
    same = {"model": shape.name, "seed": seed, "gen_s": ended, "update_s": 3 * forward_s, "off_s": forward_s}
    arms = {OFF: {"exposed_s": forward_s}, BYPASS: {"exposed_s": 0.0}}
    arms |= {mode: overlapped(mode, lengths, events, ended, new_actor(), options) for mode in OVERLAPPED}
    return [
        {"arm": arm} | same | {"hidden_s": 0.0} | arms[arm] | {"step_s": ended + 3 * forward_s + arms[arm]["exposed_s"]}
        for arm in (OFF, *OVERLAPPED, BYPASS)
    ]


def table(records: Sequence[common.Record]) -> str:
    """Means over the seeds, by model and arm."""
    rows = []
    for model in dict.fromkeys(record["model"] for record in records):
        of_model = [record for record in records if record["model"] == model]
        off_s = common.mean([record["step_s"] for record in of_model if record["arm"] == OFF])
        for arm in common.arms_of(of_model):
            own = [record for record in of_model if record["arm"] == arm]
            average = {
                key: common.mean([r[key] for r in own]) for key, value in own[0].items() if key not in ("arm", "model")
            }
            cells = [
                f"{average['gen_s']:.0f}", f"{average['hidden_s']:.1f}", f"{average['exposed_s']:.1f}",
                f"{average['exposed_s'] / average['step_s']:.1%}", f"{average['step_s'] / off_s:.3f}",
            ]  # fmt: skip
            if arm in OVERLAPPED:
                share = average["hidden_s"] / (average["hidden_s"] + average["exposed_s"])
                cells += [
                    f"{share:.3f}", f"{1 - average['exposed_s'] / average['off_s']:.3f}",
                    f"{average['before_end_share']:.2f}", f"{average['forwarded_per_kept']:.2f}",
                    f"{average['wasted'] / 1e6:.2f} M", f"{average['calls']:.0f}",
                    f"{max(r['peak_gib'] for r in own):.2f}",
                ]  # fmt: skip
            rows.append([model, arm, *cells, *["-"] * (12 - len(cells))])
    columns = [
        "model", "arm", "generation, s", "hidden, s", "exposed, s", "share of the step", "step over off",
        "hidden / (hidden + exposed)", "1 - exposed / off", "before their end", "forwarded per kept", "wasted tokens",
        "calls", "cache peak, GiB",
    ]  # fmt: skip
    return common.table(columns, rows)


def cpu_table(records: Sequence[common.Record]) -> str:
    """CPU seconds of the scheduler in a step, means over the seeds."""
    names, rows = ("grow", "drop", "keep_only", "next_call", "pickle"), []
    for record in records:
        if record["arm"] not in OVERLAPPED or record["seed"]:
            continue
        own = [r for r in records if (r["model"], r["arm"]) == (record["model"], record["arm"])]
        parts = [f"{common.mean([r.get(f'cpu_{name}_s', 0.0) for r in own]):.3f}" for name in names]
        worst, longest = max(r["cpu_s"] for r in own), max(r["longest_cpu_s"] for r in own)
        cells = [f"{record['reports']:,}", f"{record['calls']:.0f}", *parts, f"{worst:.3f}", f"{1000 * longest:.1f}"]
        rows.append([record["model"], record["arm"], *cells])
    columns = ["model", "arm", "reports", "calls", *(f"{n}, s" for n in names), "all, worst step, s", "longest, ms"]
    return common.table(columns, rows)


def assumed(options: argparse.Namespace) -> str:
    """The assumptions and settings, with what they give for the models."""
    rows = [*ASSUMPTIONS]
    rows += [
        ("batch", f"{options.prompts} prompts x {options.candidates} candidates, prompts of {options.prompt_tokens}"),
        ("responses", f"median {options.median:g}, at most {options.limit} tokens, chunks of {options.chunk_tokens}"),
        ("forward", f"at most {options.max_tokens} tokens; cache {options.kv_cache_gib:g} GiB on each rank"),
    ]
    for shape in SHAPES:
        actor, curve = Actor(shape, Hardware(), 1), curve_of(shape, Hardware(), 2000)
        steps = ", ".join(f"{n}: {1000 * curve(n):.0f} ms" for n in (1, 64, 256))
        rows.append((
            f"Qwen2.5-{shape.name}",
            f"{shape.parameters / 1e9:g} G parameters, {shape.kv_bytes / 1024:.0f} KiB per cached token; decoding "
            f"(tensor parallel {shape.tensor_parallel}, context 2,000) {steps}; a forward {actor.gather_s:.2f} s and "
            f"{1 / actor.packed_s([1]):,.0f} tokens/s",
        ))  # fmt: skip
    return common.table(["assumption", ""], rows)


def main(given: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = common.parser(__doc__)
    parser.add_argument("--prompts", type=int, default=256, help="of a step (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=12, help="per prompt (default: %(default)s)")
    parser.add_argument("--median", type=float, default=1500, help="response length (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=8192, help="longest response (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--chunk-tokens", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=32, help="of the actor (default: %(default)s)")
    parser.add_argument("--servers", type=int, default=32, help="GPUs that serve (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=16384, help="of a forward (default: %(default)s)")
    parser.add_argument("--kv-cache-gib", type=float, default=8, help="on a rank (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=12, help="steps with lengths of their own (default: %(default)s)")
    options = parser.parse_args(given)
    opening = common.document(options)
    records = []
    for shape in SHAPES:
        for seed in range(options.seeds):
            records += project(shape, Hardware(), options, seed)
        say(f"{shape.name}: {options.seeds} steps projected")
    common.save(options, opening, assumptions=dict(ASSUMPTIONS), records=records)
    print(f"\nA projection, not measured: no GPU has run this.\n\n{assumed(options)}\n\n{table(records)}")
    print(f"\nThe scheduler's CPU seconds, measured on this machine\n\n{cpu_table(records)}\n")
    worst = max(record["cpu_s"] for record in records if record["arm"] in OVERLAPPED)
    check = Check(name="scheduler, CPU seconds of the worst step", value=worst, low=0, high=CPU_LIMIT_S)
    print(check)
    return 0 if check.passed else 1


if __name__ == "__main__":
    sys.exit(main())
