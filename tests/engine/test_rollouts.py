"""The rollout benchmark in small, on the tier's server."""

import pandas as pd
import pytest
from engine_state import EngineState

from darts.bench import rollouts
from darts.bench.serving import CountingBalancer, RolloutBench

SMALL = ["--prompts=2", "--group-size=2", "--candidates=3", "--seeds=1", "--batches=2", "--chunk-tokens=4",
         "--requests", "4", "--tokens=64", "--repetitions=2"]  # fmt: skip


@pytest.fixture
def bench(engine):
    bench = RolloutBench(engine, engine.config)
    yield bench
    bench.close()


@pytest.mark.slow
def test_early_stop(bench, server):
    records = rollouts.early_stop(bench, rollouts.BENCH.parse(SMALL))
    by_arm = {arm: [r for r in records if r["arm"] == arm] for arm in dict.fromkeys(r["arm"] for r in records)}
    assert list(by_arm) == [
        "plain n=M", "plain n=3", "shortest off", "shortest eager", "shortest exact", "dual all", "dual deadline",
    ]  # fmt: skip
    for arm, own in by_arm.items():
        assert len(own) == 2
        for record in own:
            kept, launched = {"plain n=M": (2, 2), "plain n=3": (3, 3)}.get(arm, (2, 3))
            assert [len(group) for group in record["kept"]] == [kept] * 2
            assert [len(group) for group in record["lengths"]] == [launched] * 2
            assert record["tokens/generated"] == sum(map(sum, record["lengths"]))
            assert record["candidates/aborted"] == sum(map(sum, record["aborted_by_candidate"]))
            most_aborted = {"shortest eager": 2, "shortest exact": 2, "dual deadline": 2}.get(arm, 0)
            assert record["candidates/aborted"] <= most_aborted
            assert 0 <= record["rollout/tail_s"] < record["seconds"]
            assert 0 <= record["after_s"] < record["seconds"]
            assert record["cpu_engine_s"] > 0
    # equal seeds, equal responses: the first M of plain n=3 are those of plain n=M
    assert by_arm["plain n=M"][0]["lengths"] == [lengths[:2] for lengths in by_arm["plain n=3"][0]["lengths"]]
    frames = {"early-stop": pd.DataFrame(records)}
    checks = rollouts.checks(frames)
    assert all(check.passed for check in checks), checks
    assert all(arm in rollouts.tables(frames) for arm in by_arm)
    EngineState.wait_idle(server)


def test_streaming(engine, server):
    records = rollouts.streaming(engine, rollouts.BENCH.parse(SMALL))
    assert [record["tokens"] for record in records] == [4 * 64] * 6
    chunks = {record["arm"]: record["chunks"] for record in records}
    assert chunks["plain"] == chunks["chunk 256"] == 0
    assert 0 < chunks["chunk 16"] <= 4 * 3, "the last tokens come as the answer, and chunks after it are dropped"
    assert "| 4 | chunk 16 | 2 |" in rollouts.tables({"streaming": pd.DataFrame(records)})


def test_the_balancer_counts_what_it_hands_out():
    balancer = CountingBalancer(servers={"a": None, "b": None})
    for request in ("1", "2", "1", "1"):
        balancer.acquire_server(request)
    assert sorted(balancer.take_counts()) == [1, 3]
    assert balancer.take_counts() == [0, 0]
