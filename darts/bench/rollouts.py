"""Measures rollouts on real servers, without a trainer: streaming, early stop, routing.

    python -m darts.bench.rollouts --out outputs/rollouts.json

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
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from darts.bench import rollouts_report as report
from darts.bench.harness import ENVIRONMENT, machine, rotated
from darts.bench.prompts import train_questions
from darts.evidence.log import say
from darts.evidence.tables import Check
from darts.testbed import LIMITS

EXPERIMENTS = tuple(report.PAIRED_BY)
CHUNKS = (256, 16)
BLOCK_SIZE = 16
NOTHING_ELSE = 1 << 20
"""A chunk size that no response reaches."""


# --- streaming -------------------------------------------------------------------------------------------------------


def streaming(servers: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the experiment on a running server."""
    from darts.bench.rollouts_run import stream_once
    from darts.rollout.client import DartsServerClient

    client = DartsServerClient.of(servers.get_client())
    log_probs = servers.config.actor_rollout_ref.rollout.calculate_log_probs
    arms = {report.PLAIN: None} | {f"chunk {chunk}": chunk for chunk in CHUNKS}

    async def run() -> list[dict[str, Any]]:
        records = []
        for requests in options.requests:
            for chunk in arms.values():
                await stream_once(client, requests, options.tokens // 8, chunk, log_probs)  # warms up
            for repetition in range(options.repetitions):
                for arm in rotated(list(arms), repetition):
                    record = await stream_once(client, requests, options.tokens, arms[arm], log_probs)
                    records.append({"arm": arm, "requests": requests, "repetition": repetition} | record)
                    say(f"streaming: {requests} requests, {arm}: {record['tokens_per_s']:,.0f} tokens/s")
        return records

    return asyncio.run(run())


# --- early stop ------------------------------------------------------------------------------------------------------


def early_stop_arms(group_size: int, candidates: int, chunk_tokens: int) -> dict[str, Callable[[int], Any]]:
    """The settings of each arm, by the seed."""
    from darts.config import DartsConfig

    def settings(size: int = group_size, mode: str = "off", chunk: int = NOTHING_ELSE, **changes: Any) -> Any:
        block = {
            "allocation": {"mode": mode, "mean_candidates": max(size, candidates), "high": candidates + 1},
            "selection": changes.pop("selection", {}),
            "streaming": {"chunk_tokens": chunk},
            "progress_s": 0,
            "timeout_s": 300,
        }
        config = DartsConfig.from_block(block | {"early_stop": "off"} | changes, group_size=size)
        return lambda seed: dataclasses.replace(config, seed=seed)

    redundant = {"mode": "uniform", "chunk": chunk_tokens}
    shortest = {"mode": "shortest_only"}
    dual = {"mode": "dual_end", "num_long": 1}
    return {
        report.PLAIN_M: settings(),
        f"plain n={candidates}": settings(size=candidates),
        report.OFF: settings(**redundant, selection=shortest),
        report.EAGER: settings(**redundant, selection=shortest, early_stop="eager"),
        report.EXACT: settings(**redundant, selection=shortest, early_stop="exact"),
        "dual all": settings(**redundant, selection=dual | {"long_wait": "all"}),
        "dual deadline": settings(**redundant, selection=dual | {"long_wait": "deadline"}),
    }


def early_stop(bench: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the experiment on a bench with one running server."""
    questions = train_questions(options.testbed)
    arms = early_stop_arms(options.group_size, options.candidates, options.chunk_tokens)
    for arm in (report.PLAIN_M, report.EAGER):
        bench.rollout(arms[arm](0), questions[-options.prompts :], step=0)  # warms up
    records = []
    for seed in range(options.seeds):
        for batch in range(options.batches):
            turn = seed * options.batches + batch
            some = [questions[(turn * options.prompts + n) % len(questions)] for n in range(options.prompts)]
            for arm in rotated(list(arms), turn):
                record = bench.rollout(arms[arm](seed), some, step=batch).record()
                records.append({"arm": arm, "seed": seed, "batch": batch} | record)
            seconds = ", ".join(f"{record['arm']} {record['seconds']:.2f}" for record in records[-len(arms) :])
            say(f"early-stop: seed {seed}, batch {batch}, seconds: {seconds}")
    # as the arms are listed, for the tables
    return sorted(records, key=lambda record: list(arms).index(record["arm"]))


# --- routing ---------------------------------------------------------------------------------------------------------


def routing(servers: Any, bench: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the experiment on a bench with several running servers behind a `CountingBalancer`."""
    import ray

    settings = early_stop_arms(options.group_size, options.candidates, NOTHING_ELSE)[report.OFF]
    arms = {name: dataclasses.replace(settings(0), routing=name) for name in (report.BALANCED, report.GROUP)}
    digits = random.Random("routing")
    records = []
    for repetition in range(-1, options.rounds):  # the first warms up
        questions = ["".join(digits.choices("0123456789", k=options.digits)) for _ in range(options.prompts)]
        for limit in options.limits:
            for arm in rotated(list(arms), repetition):
                ray.get(servers.global_load_balancer.take_counts.remote(), timeout=30)
                sampling = {"max_tokens": limit, "ignore_eos": True}
                record = bench.rollout(arms[arm], questions, repetition + 1, sampling).record()
                record["requests_by_server"] = ray.get(servers.global_load_balancer.take_counts.remote(), timeout=30)
                say(
                    f"routing: {limit} tokens, {arm}: {record['seconds']:.2f} s, "
                    f"{record['computed_tokens']:,} prompt tokens computed, requests {record['requests_by_server']}"
                )
                if repetition >= 0:
                    records.append({"arm": arm, "limit": limit, "repetition": repetition} | record)
    return sorted(records, key=lambda record: list(arms).index(record["arm"]))


# --- all -------------------------------------------------------------------------------------------------------------


@contextmanager
def one_server(options: argparse.Namespace) -> Iterator[tuple[Any, Any]]:
    """One server as the testbed's runs have it, but with room for the requests of `streaming`, and a bench on it."""
    from darts.bench.rollouts_run import Bench
    from darts.engines.start import engine_config, start_servers
    from verl_patches.vllm_stream_server import StreamingReplica

    response = options.response or LIMITS[options.testbed].response
    config = engine_config(
        f"testbed={options.testbed}",
        *options.override,
        response_length=response,
        max_model_len=max(options.tokens + 64, LIMITS[options.testbed].prompt + response),
    )
    with start_servers(config, StreamingReplica) as servers:
        yield servers, Bench(servers, config)


@contextmanager
def two_servers(options: argparse.Namespace) -> Iterator[tuple[Any, Any]]:
    """Two servers with small blocks and room for the prompts of `routing`, and a bench on them."""
    from darts.bench.rollouts_run import Bench, CountingBalancer
    from darts.engines.start import ENGINE, engine_config, start_servers
    from verl_patches.vllm_stream_server import StreamingReplica

    prompt, response = options.digits + 20, max(options.limits)  # the chat template takes 19
    config = engine_config(
        f"testbed={options.testbed}",
        f"data.max_prompt_length={prompt}",
        f"+{ENGINE}.block_size={BLOCK_SIZE}",
        *options.override,
        replicas=2,
        response_length=response,
        max_model_len=prompt + response,
    )
    with start_servers(config, StreamingReplica, start_rank=1, load_balancer_class=CountingBalancer) as servers:
        yield servers, Bench(servers, config)


def run(options: argparse.Namespace, save: Callable[[dict[str, list[dict[str, Any]]]], None]) -> dict[str, Any]:
    """Runs the chosen experiments; `save` is called after each with all records so far, by experiment."""
    from darts.engines.start import local_ray

    results: dict[str, list[dict[str, Any]]] = {}
    with local_ray(num_gpus=3):
        if {"streaming", "early-stop"} & set(options.only):
            say("starting one server ...")
            with one_server(options) as (servers, bench):
                if "streaming" in options.only:
                    results["streaming"] = streaming(servers, options)
                    save(results)
                if "early-stop" in options.only:
                    results["early-stop"] = early_stop(bench, options)
                    save(results)
                bench.close()
        if "routing" in options.only:
            say("starting two servers ...")
            with two_servers(options) as (servers, bench):
                results["routing"] = routing(servers, bench, options)
                save(results)
                bench.close()
    return results


def summary(results: dict[str, list[dict[str, Any]]]) -> tuple[str, list[Check]]:
    """The tables with their notes, and all checks."""
    parts: list[str] = []
    checks: list[Check] = []
    if "streaming" in results:
        parts.append(report.streaming_table(results["streaming"]))
        checks += report.streaming_checks(results["streaming"])
    if "early-stop" in results:
        records = results["early-stop"]
        parts += [report.early_stop_table(records), report.early_stop_note(records), report.overhead_table(records)]
        checks += report.early_stop_checks(records)
    if "routing" in results:
        parts.append(report.routing_table(results["routing"]))
    return "\n\n".join(parts), checks


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command's options, with `--quick` worked in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=EXPERIMENTS, nargs="+", default=list(EXPERIMENTS), help="default: all")
    parser.add_argument("--testbed", choices=sorted(LIMITS), default="overthink")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON (default: nowhere)")
    parser.add_argument("--quick", action="store_true", help="few and small repetitions, to try it out")
    parser.add_argument("--override", action="append", default=[], help="of the servers' Hydra configuration")
    parser.add_argument("--repetitions", type=int, default=6, help="streaming (default: %(default)s)")
    parser.add_argument("--requests", type=int, nargs="+", default=[32, 96], help="streaming (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="of a request, streaming (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=8, help="of a rollout (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=8, help="M (default: %(default)s)")
    parser.add_argument("--candidates", type=int, default=12, help="per prompt (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="early-stop (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=10, help="per seed, early-stop (default: %(default)s)")
    parser.add_argument("--response", type=int, help="limit of a response, early-stop (default: the testbed's)")
    parser.add_argument("--chunk-tokens", type=int, default=16, help="early-stop (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=12, help="routing (default: %(default)s)")
    parser.add_argument("--digits", type=int, default=280, help="of a prompt, routing (default: %(default)s)")
    parser.add_argument("--limits", type=int, nargs="+", default=[32, 256], help="routing (default: %(default)s)")
    if "--quick" in (given if given is not None else sys.argv[1:]):
        parser.set_defaults(repetitions=2, rounds=2, requests=[32], tokens=256, seeds=1, batches=2)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    options = arguments(given)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    document: dict[str, Any] = {"settings": vars(options) | {"out": str(options.out)}, "machine": machine()}

    def save(results: dict[str, list[dict[str, Any]]]) -> None:
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(document | {"records": results}) + "\n")

    start = time.monotonic()
    results = run(options, save)
    text, checks = summary(results)
    print(f"\n{text}\n")
    print("\n".join(map(str, checks)))
    say(f"done in {time.monotonic() - start:.0f} s")
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
