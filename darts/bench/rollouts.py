"""Measures rollouts on real servers, without a trainer: streaming, early stop, routing.

    python -m darts.bench rollouts --out outputs/rollouts.json

Contract: the arms of an experiment take turns within one run on the same servers, in an order that rotates, so that
what else happens on the machine hits all of them; only ratios within a run are compared.

1. `streaming`: requests of an exact length straight at one server, by verl's own `generate` and in chunks.
2. `early-stop`: the testbed's train prompts through DARTS's manager and one server. Every candidate is seeded, so the
   arms share their responses; new prompts for each seed and batch. The plain arms are DARTS off, without chunks.
3. `routing`: long random prompts and responses of an exact length through two servers.

Ratios are of totals over the records that the arms have in common (`PAIRED_BY`), with 95 % bootstrap intervals. Every
table is the whole of its experiment: no repetition is left out. The exit code is 1 if a check fails. `--out` gets the
settings, the machine and the figures of every repetition, after each experiment.
"""

import argparse
import asyncio
import dataclasses
import math
import random
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import numpy as np
import pandas as pd

from darts.bench import harness
from darts.bench.arms import BenchArm
from darts.bench.harness import ArmFigures, Bench, FlatRecords, Save
from darts.config import DartsConfig
from darts.evidence.log import say
from darts.evidence.tables import Check
from darts.testbed import LIMITS

STREAMING, EARLY_STOP, ROUTING = "streaming", "early-stop", "routing"
PAIRED_BY = {
    STREAMING: ["requests", "repetition"],
    EARLY_STOP: ["seed", "batch"],
    ROUTING: ["limit", "repetition"],
}
"""By experiment, the keys that records of different arms have in common."""
PLAIN = "plain"
PLAIN_M = "plain n=M"
OFF, EAGER, EXACT = "shortest off", "shortest eager", "shortest exact"
BALANCED, GROUP = "balanced", "group"
BASE = {STREAMING: PLAIN, EARLY_STOP: PLAIN_M, ROUTING: BALANCED}
"""By experiment, the arm that the others are compared with."""
STREAMING_TARGET = 0.97

CHUNKS = (256, 16)
BLOCK_SIZE = 16
NOTHING_ELSE = 1 << 20
"""A chunk size that no response reaches."""


def streaming(running_servers: Any, options: argparse.Namespace) -> FlatRecords:
    """Runs the experiment on a running server."""
    from darts.bench.serving import stream_once
    from darts.rollout.client import DartsServerClient

    server_client = DartsServerClient.of(running_servers.get_client())
    log_probs = running_servers.config.actor_rollout_ref.rollout.calculate_log_probs
    arms = {PLAIN: None} | {f"chunk {chunk_size}": chunk_size for chunk_size in CHUNKS}

    def once(arm_name: str, requests: int, repetition: int) -> dict[str, Any]:
        request_tokens = options.tokens if repetition >= 0 else options.tokens // 8
        return loop.run_until_complete(stream_once(server_client, requests, request_tokens, arms[arm_name], log_probs))

    turn_places = harness.repetitions(options.repetitions, requests=options.requests)
    with closing(asyncio.new_event_loop()) as loop:
        return harness.take_turns(turn_places, list(arms), once, shown="tokens_per_s")


def early_stop_arms(group_size: int, candidates: int, chunk_tokens: int) -> dict[str, DartsConfig]:
    """The settings of each arm, but for the seed."""
    darts_block = {
        "allocation": {"mode": "off", "mean_candidates": max(group_size, candidates), "high": candidates + 1},
        "streaming": {"chunk_tokens": NOTHING_ELSE},
        "early_stop": "off",
        "progress_s": 0,
        "timeout_s": 300,
    }
    redundant = {"allocation.mode": "uniform", "streaming.chunk_tokens": chunk_tokens}
    shortest = redundant | {"selection.mode": "shortest_only"}
    dual_end = redundant | {"selection.mode": "dual_end", "selection.num_long": 1}
    arms: dict[str, tuple[int, dict[str, Any]]] = {
        PLAIN_M: (group_size, {}),
        f"plain n={candidates}": (candidates, {}),
        OFF: (group_size, shortest),
        EAGER: (group_size, shortest | {"early_stop": "eager"}),
        EXACT: (group_size, shortest | {"early_stop": "exact"}),
        "dual all": (group_size, dual_end | {"selection.long_wait": "all"}),
        "dual deadline": (group_size, dual_end | {"selection.long_wait": "deadline"}),
    }
    return {
        name: BenchArm(name=name, strategy="darts", changes=changes).config(darts_block, size)
        for name, (size, changes) in arms.items()
    }


def early_stop(bench: Any, options: argparse.Namespace) -> FlatRecords:
    """Runs the experiment on a bench with one running server."""
    from darts.bench.serving import train_questions

    questions = train_questions(options.testbed)
    arms = early_stop_arms(options.group_size, options.candidates, options.chunk_tokens)

    def once(arm: str, seed: int, batch: int) -> dict[str, Any]:
        first = (seed * options.batches + batch) * options.prompts
        prompts = np.take(questions, range(first, first + options.prompts), mode="wrap").tolist()
        return bench.rollout(dataclasses.replace(arms[arm], seed=seed), prompts, step=batch % options.batches)[1]

    turn_places = harness.repetitions(options.batches, "batch", seed=range(options.seeds))
    return harness.take_turns(turn_places, list(arms), once)


def routing(servers: Any, bench: Any, options: argparse.Namespace) -> FlatRecords:
    """Runs the experiment on a bench with several running servers behind a `CountingBalancer`."""
    import ray

    settings = early_stop_arms(options.group_size, options.candidates, NOTHING_ELSE)[OFF]
    arms = {name: dataclasses.replace(settings, seed=0, routing=name) for name in (BALANCED, GROUP)}

    def once(arm: str, limit: int, repetition: int) -> dict[str, Any]:
        digits = random.Random(f"routing {repetition}")
        prompts = ["".join(digits.choices("0123456789", k=options.digits)) for _ in range(options.prompts)]
        ray.get(servers.global_load_balancer.take_counts.remote(), timeout=30)
        sampling = {"max_tokens": limit, "ignore_eos": True}
        _, record = bench.rollout(arms[arm], prompts, repetition + 1, sampling)
        counts = ray.get(servers.global_load_balancer.take_counts.remote(), timeout=30)
        return record | {"requests_by_server": counts, "imbalance": max(counts) / (sum(counts) / len(counts))}

    return harness.take_turns(harness.repetitions(options.rounds, limit=options.limits), list(arms), once)


def measure(options: argparse.Namespace, save: Save) -> dict[str, FlatRecords]:
    """Runs the chosen experiments; the document gets the records of each when it has ended."""
    harness.set_environment()
    from darts.bench.serving import serving
    from darts.engines.start import ENGINE, local_ray

    results: dict[str, FlatRecords] = {}
    common = [f"testbed={options.testbed}", *options.override]
    lengths = LIMITS[options.testbed]
    with local_ray(num_gpus=3):
        if {STREAMING, EARLY_STOP} & set(options.only):
            # As the testbed's runs have it, but with room for the requests of `streaming`.
            response = options.response or lengths.response
            longest = max(options.tokens + 64, lengths.prompt + response)
            say("starting one server ...")
            with serving(*common, response_length=response, max_model_len=longest) as (servers, bench):
                for name, run, engine in ((STREAMING, streaming, servers), (EARLY_STOP, early_stop, bench)):
                    if name in options.only:
                        results[name] = run(engine, options)
                        save(records=results)
        if ROUTING in options.only:
            # Small blocks, and room for the long prompts; the chat template takes 19.
            prompt, response = options.digits + 20, max(options.limits)
            blocks = [f"data.max_prompt_length={prompt}", f"+{ENGINE}.block_size={BLOCK_SIZE}"]
            limits = {"response_length": response, "max_model_len": prompt + response}
            say("starting two servers ...")
            with serving(*blocks, *common, replicas=2, **limits) as (servers, bench):
                results[ROUTING] = routing(servers, bench, options)
    return results


STREAMING_COLUMNS: harness.Columns = (
    ("repetitions", lambda arm: len(arm.known("seconds"))),
    ("tokens/s, median", lambda arm: f"{arm.median('tokens_per_s'):,.0f}"),
    ("over plain", lambda arm: arm.speed_up(form=".3f")),
    ("chunks", lambda arm: f"{arm.mean('chunks'):,.0f}"),
)
EARLY_STOP_COLUMNS: harness.Columns = (
    ("seconds, median", lambda arm: f"{arm.median('seconds'):.3f}"),
    ("seconds, total", lambda arm: f"{arm.total('seconds'):.1f}"),
    ("speed-up over plain n=M", lambda arm: arm.speed_up()),
    ("tokens", lambda arm: f"{arm.total('tokens/generated'):,.0f}"),
    ("kept", lambda arm: f"{arm.total('tokens/kept'):,.0f}"),
    ("aborted", lambda arm: f"{arm.total('candidates/aborted'):,.0f} of {arm.total('candidates/launched'):,.0f}"),
    ("tokens after the decision", lambda arm: "{:,.0f} ({:.2%})".format(*_after_decision(arm))),
    ("tail, s", lambda arm: f"{arm.mean('rollout/tail_s'):.3f}"),
    ("kept length", lambda arm: f"{arm.mean('length/kept_mean'):.1f}"),
)
OVERHEAD_COLUMNS: harness.Columns = (
    ("speed-up of the engine's CPU time", lambda arm: arm.speed_up("cpu_engine_s")),
    ("share outside of the engine", lambda arm: f"{1 - arm.total('cpu_engine_s') / arm.total('seconds'):.2f}"),
    ("after the last request", lambda arm: f"{arm.total('after_s') / arm.total('seconds'):.3f}"),
    ("CPU of engine", lambda arm: f"{arm.total('cpu_engine_s') / arm.total('seconds'):.2f}"),
    ("CPU of server", lambda arm: f"{arm.total('cpu_server_s') / arm.total('seconds'):.2f}"),
    ("CPU of worker", lambda arm: f"{arm.total('cpu_worker_s') / arm.total('seconds'):.2f}"),
    ("CPU of driver", lambda arm: f"{arm.total('cpu_driver_s') / arm.total('seconds'):.2f}"),
)
"""Where an arm's seconds went. On a quiet machine an engine with one thread is idle while it uses no CPU."""
ROUTING_COLUMNS: harness.Columns = (
    ("prefix cached", lambda arm: f"{arm.mean('rollout/prefix_cached_share'):.3f}"),
    ("prompt tokens computed", lambda arm: f"{arm.mean('computed_tokens'):,.0f} of {arm.mean('prompt_tokens'):,.0f}"),
    ("imbalance", lambda arm: f"{arm.mean('imbalance'):.2f}"),
    ("seconds, median", lambda arm: f"{arm.median('seconds'):.3f}"),
    ("speed-up over balanced", lambda arm: arm.speed_up()),
)
TABLES: dict[str, list[tuple[harness.Columns, str | None]]] = {
    STREAMING: [(STREAMING_COLUMNS, "requests")],
    EARLY_STOP: [(EARLY_STOP_COLUMNS, None), (OVERHEAD_COLUMNS, None)],
    ROUTING: [(ROUTING_COLUMNS, "limit")],
}
"""By experiment, its tables, and the key whose values have rows of their own."""


def _after_decision(arm: ArmFigures) -> tuple[float, float]:
    tokens_after = arm.total("early_stop/tokens_after")
    return tokens_after, tokens_after / arm.total("tokens/generated")


def tables(records: Mapping[str, pd.DataFrame]) -> str:
    """All that there are, with their notes."""
    parts = []
    for name, found in records.items():
        parts += [
            harness.arms_table(found, columns, PAIRED_BY[name], BASE[name], split) for columns, split in TABLES[name]
        ]
        if name == EARLY_STOP:
            same, agree = compared_groups(found, EAGER, EXACT)
            parts.append(
                f"eager keeps what exact keeps in {agree.mean():.3f} of {agree.size} groups, in "
                f"{agree[same].mean():.3f} of the {same.sum()} with the same responses"
            )
    return "\n\n".join(parts)


def checks(records: Mapping[str, pd.DataFrame]) -> list[Check]:
    """The aim of streaming in chunks of 256, and that `exact` keeps what a run without early stop keeps."""
    made_checks = []
    for requests, part in records[STREAMING].groupby("requests") if STREAMING in records else ():
        speed_ratio = harness.ratio(part, PLAIN, "chunk 256", PAIRED_BY[STREAMING]).value
        check_name = f"tokens/s with chunks of 256 over plain, {requests} requests"
        made_checks.append(Check(name=check_name, value=speed_ratio, low=STREAMING_TARGET, high=math.inf))
    if EARLY_STOP in records:
        same, agree = compared_groups(records[EARLY_STOP], OFF, EXACT)
        shares = {
            "share of groups with the same responses, off and exact": (same.mean(), 0.95),
            "of them, share in which exact keeps what off keeps": (agree[same].mean(), 1),
        }
        made_checks += [Check(name=name, value=share, low=least, high=1) for name, (share, least) in shares.items()]
    return made_checks


def compared_groups(records: pd.DataFrame, first_arm: str, second_arm: str) -> tuple[np.ndarray, np.ndarray]:
    """Which groups had the same responses in two arms, as far as both ran; and in which both kept the same; [groups].

    Equal seeds should see to the first. But the engine computes a sequence in a batch with others, and which ones
    changes the last bits of its log-probs: now and then another token is drawn. Such a group says nothing about the
    decision.
    """
    per_group = ["lengths", "aborted_by_candidate", "kept"]
    groups = records[["arm", *PAIRED_BY[EARLY_STOP], *per_group]].explode(per_group)
    groups = groups.sort_values(PAIRED_BY[EARLY_STOP], kind="stable")
    pairs = list(
        zip(*(groups.loc[groups["arm"] == arm, per_group].to_numpy() for arm in (first_arm, second_arm)), strict=True)
    )
    same = [_agree(*map(np.array, (a[0], a[1], b[0], b[1]))) for a, b in pairs]
    return np.array(same), np.array([list(a[2]) == list(b[2]) for a, b in pairs])


def _agree(first: np.ndarray, first_aborted: np.ndarray, second: np.ndarray, second_aborted: np.ndarray) -> bool:
    """Whether lengths can belong to the same responses; of an aborted one, its length is a lower bound."""
    fits_aborted = np.where(second_aborted, second <= first, first == second)
    return bool(np.where(first_aborted, second_aborted | (first <= second), fits_aborted).all())


BENCH = Bench(
    name="rollouts",
    about=__doc__,
    options={
        "--only": (list(PAIRED_BY), "experiments", {"choices": tuple(PAIRED_BY)}),
        "--testbed": ("overthink", "its model and prompts", {"choices": sorted(LIMITS)}),
        **harness.OVERRIDE,
        "--repetitions": (6, "streaming"),
        "--requests": ([32, 96], "at once, streaming"),
        "--tokens": (1024, "of a request, streaming"),
        "--prompts": (8, "of a rollout"),
        "--group-size": (8, "M"),
        "--candidates": (12, "per prompt"),
        "--seeds": (3, "early-stop"),
        "--batches": (10, "per seed, early-stop"),
        "--response": (None, "limit of a response, early-stop; None: the testbed's", {"type": int}),
        "--chunk-tokens": (16, "early-stop"),
        "--rounds": (12, "routing"),
        "--digits": (280, "of a prompt, routing"),
        "--limits": ([32, 256], "tokens of a response, routing"),
    },
    quick={"repetitions": 2, "rounds": 2, "requests": [32], "tokens": 256, "seeds": 1, "batches": 2},
    measure=measure,
    tables=tables,
    checks=checks,
)
