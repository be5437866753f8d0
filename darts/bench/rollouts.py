"""Measures rollouts on real servers, without a trainer: streaming, early stop, routing.

    python -m darts.bench rollouts --out outputs/rollouts.json

Contract: the arms of an experiment take turns within one run on the same servers, in an order that rotates, so that
what else happens on the machine hits all of them; only ratios within a run are compared.

1. `streaming`: requests of an exact length straight at one server, by verl's own `generate` and in chunks.
2. `early-stop`: the testbed's train prompts through DARTS's manager and one server. Every candidate is seeded, so the
   arms share their responses; new prompts for each seed and batch. The plain arms are DARTS off, without chunks.
3. `routing`: long random prompts and responses of an exact length through two servers.

The exit code is 1 if a check fails. `--out` gets the settings, the machine and the figures of every repetition, after
each experiment.
"""

import argparse
import asyncio
import dataclasses
import random
from collections.abc import Callable
from contextlib import closing
from typing import Any

from darts.bench import harness
from darts.bench import rollouts_report as report
from darts.bench.harness import Bench, Save
from darts.config import DartsConfig
from darts.evidence.log import say
from darts.testbed import LIMITS

CHUNKS = (256, 16)
BLOCK_SIZE = 16
NOTHING_ELSE = 1 << 20
"""A chunk size that no response reaches."""


def streaming(running_servers: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the experiment on a running server."""
    from darts.bench.serving import stream_once
    from darts.rollout.client import DartsServerClient

    server_client = DartsServerClient.of(running_servers.get_client())
    log_probs = running_servers.config.actor_rollout_ref.rollout.calculate_log_probs
    arms = {report.PLAIN: None} | {f"chunk {chunk_size}": chunk_size for chunk_size in CHUNKS}

    def once(arm_name: str, requests: int, repetition: int) -> dict[str, Any]:
        request_tokens = options.tokens if repetition >= 0 else options.tokens // 8
        return loop.run_until_complete(stream_once(server_client, requests, request_tokens, arms[arm_name], log_probs))

    turn_places = harness.repetitions(options.repetitions, requests=options.requests)
    with closing(asyncio.new_event_loop()) as loop:
        return harness.take_turns(turn_places, list(arms), once, shown="tokens_per_s")


def early_stop_arms(group_size: int, candidates: int, chunk_tokens: int) -> dict[str, Callable[[int], DartsConfig]]:
    """The settings of each arm, by the seed."""

    def settings(size: int = group_size, mode: str = "off", chunk: int = NOTHING_ELSE, **changes: Any) -> Any:
        settings_block = {
            "allocation": {"mode": mode, "mean_candidates": max(size, candidates), "high": candidates + 1},
            "streaming": {"chunk_tokens": chunk},
            "early_stop": "off",
            "progress_s": 0,
            "timeout_s": 300,
        }
        darts_config = DartsConfig.from_block(settings_block | changes, group_size=size)
        return lambda seed_number: dataclasses.replace(darts_config, seed=seed_number)

    redundant_arm = {"mode": "uniform", "chunk": chunk_tokens}
    shortest_arm = redundant_arm | {"selection": {"mode": "shortest_only"}}
    dual_end = {"mode": "dual_end", "num_long": 1}
    return {
        report.PLAIN_M: settings(),
        f"plain n={candidates}": settings(size=candidates),
        report.OFF: settings(**shortest_arm),
        report.EAGER: settings(**shortest_arm, early_stop="eager"),
        report.EXACT: settings(**shortest_arm, early_stop="exact"),
        "dual all": settings(**redundant_arm, selection=dual_end | {"long_wait": "all"}),
        "dual deadline": settings(**redundant_arm, selection=dual_end | {"long_wait": "deadline"}),
    }


def early_stop(bench: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the experiment on a bench with one running server."""
    from darts.bench.serving import train_questions

    questions = train_questions(options.testbed)
    arms = early_stop_arms(options.group_size, options.candidates, options.chunk_tokens)

    def once(arm: str, seed: int, batch: int) -> dict[str, Any]:
        first_question = (seed * options.batches + batch) * options.prompts
        prompts = [
            questions[(first_question + question_number) % len(questions)] for question_number in range(options.prompts)
        ]
        return bench.rollout(arms[arm](seed), prompts, step=batch % options.batches).record()

    turn_places = harness.repetitions(options.batches, "batch", seed=range(options.seeds))
    return harness.take_turns(turn_places, list(arms), once)


def routing(servers: Any, bench: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the experiment on a bench with several running servers behind a `CountingBalancer`."""
    import ray

    settings = early_stop_arms(options.group_size, options.candidates, NOTHING_ELSE)[report.OFF]
    arms = {name: dataclasses.replace(settings(0), routing=name) for name in (report.BALANCED, report.GROUP)}

    def once(arm: str, limit: int, repetition: int) -> dict[str, Any]:
        digits = random.Random(f"routing {repetition}")
        prompts = ["".join(digits.choices("0123456789", k=options.digits)) for _ in range(options.prompts)]
        ray.get(servers.global_load_balancer.take_counts.remote(), timeout=30)
        sampling = {"max_tokens": limit, "ignore_eos": True}
        record = bench.rollout(arms[arm], prompts, repetition + 1, sampling).record()
        counts = ray.get(servers.global_load_balancer.take_counts.remote(), timeout=30)
        return record | {"requests_by_server": counts, "imbalance": max(counts) / (sum(counts) / len(counts))}

    return harness.take_turns(harness.repetitions(options.rounds, limit=options.limits), list(arms), once)


def measure(options: argparse.Namespace, save: Save) -> dict[str, list[dict[str, Any]]]:
    """Runs the chosen experiments; the document gets the records of each when it has ended."""
    harness.set_environment()
    from darts.bench.serving import serving
    from darts.engines.start import ENGINE, local_ray

    results: dict[str, list[dict[str, Any]]] = {}
    common = [f"testbed={options.testbed}", *options.override]
    lengths = LIMITS[options.testbed]
    with local_ray(num_gpus=3):
        if {report.STREAMING, report.EARLY_STOP} & set(options.only):
            # As the testbed's runs have it, but with room for the requests of `streaming`.
            response = options.response or lengths.response
            longest = max(options.tokens + 64, lengths.prompt + response)
            say("starting one server ...")
            with serving(*common, response_length=response, max_model_len=longest) as (servers, bench):
                for name, run in ((report.STREAMING, lambda: streaming(servers, options)),
                                  (report.EARLY_STOP, lambda: early_stop(bench, options))):  # fmt: skip
                    if name in options.only:
                        results[name] = run()
                        save(records=results)
        if report.ROUTING in options.only:
            # Small blocks, and room for the long prompts; the chat template takes 19.
            prompt, response = options.digits + 20, max(options.limits)
            blocks = [f"data.max_prompt_length={prompt}", f"+{ENGINE}.block_size={BLOCK_SIZE}"]
            limits = {"response_length": response, "max_model_len": prompt + response}
            say("starting two servers ...")
            with serving(*blocks, *common, replicas=2, **limits) as (servers, bench):
                results[report.ROUTING] = routing(servers, bench, options)
    return results


BENCH = Bench(
    name="rollouts",
    about=__doc__,
    options={
        "--only": (list(report.PAIRED_BY), "experiments", {"choices": tuple(report.PAIRED_BY)}),
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
    tables=report.tables,
    checks=report.checks,
)
