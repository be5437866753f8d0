"""The overlapped actor's session within a real rollout: manager, workers and verl's balancer real, lengths and ranks
scripted. What each rank was told is compared with what the batch holds."""

import threading
import time
import types
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from fakes import Turn, prompts
from scripted_actor import ScriptedActor, scripted_log_probs
from scripted_cluster import kill
from verl.protocol import DataProto

from darts.config import OverlapConfig
from darts.metrics import METRICS
from darts.overlap.join import OverlappedLogProbs, sequence_keys
from darts.overlap.session import ActorLimits, OverlapSession, _failure_text
from darts.rollout.worker import candidate_seed

GROUP_SIZE, CANDIDATES, PROMPTS = 4, 6, 5
LIMITS = ActorLimits(
    num_ranks=2, max_tokens=600, max_rows=None, padded=False, sequence_parallel=1, longest=80, temperature=1.0,
    with_reference=True, sum_pi_squared=False, timeout_s=300.0,
)  # fmt: skip


@pytest.fixture(scope="module", params=["token", pytest.param("sequence", marks=pytest.mark.slow)])
def cluster(request, scripted, make_config):
    """Two servers, two workers, one manager that overlaps; groups are shortest-only, so losers are aborted."""
    config = make_config(
        "actor_rollout_ref.rollout.agent.num_workers=2",
        f"darts.allocation.mean_candidates={CANDIDATES}",
        "darts.selection.mode=shortest_only",
        "darts.early_stop=eager",
        "darts.streaming.chunk_tokens=4",
        f"darts.overlap.mode={request.param}",
    )
    manager = scripted.manager(config)
    return types.SimpleNamespace(manager=manager, servers=scripted.servers, mode=request.param, step=0)


@pytest.fixture(scope="module")
def actor(local_ray):
    """Ranks for all tests after which they are as before."""
    actor = ScriptedActor(LIMITS.num_ranks)
    yield actor
    actor.kill()


@pytest.fixture
def overlap(cluster, actor, monkeypatch):
    """Gives the cluster's manager an actor of scripted ranks; `mortal` ones are for this test alone."""
    mortals = []

    def make(limits=LIMITS, kv_cache_gib=1.0, mortal=False, **script):
        ranks = ScriptedActor(limits.num_ranks) if mortal else actor
        mortals.extend([ranks] if mortal else [])
        ranks.begin(**script)
        lines: list[str] = []
        session = OverlapSession(ranks, OverlapConfig(mode=cluster.mode, kv_cache_gib=kv_cache_gib), limits)
        with monkeypatch.context() as patch:
            patch.setattr("darts.overlap.session.logger.warning", lines.append)
            session.prepare()
        # As the trainer does.
        rules = cluster.manager.rules
        cluster.manager.begin_round(replace(rules, overlap=replace(rules.overlap, mode=session.mode)))
        cluster.manager.overlap_with(session)
        log_probs = OverlappedLogProbs(session, limits)
        return types.SimpleNamespace(actor=ranks, session=session, said=lines, log_probs=log_probs)

    yield make
    cluster.manager.overlap_with(None)
    for ranks in mortals:
        ranks.kill()


def roll(cluster, seed, delay=0.4, turn=None, release_when=None):
    """A rollout as a step of its own; returns verl's batch as the trainer has it, rows in another order.

    Lengths are random, unless `turn(prompt, candidate)` says what a candidate does. What is held goes on once
    `release_when()` is true.
    """
    step = cluster.step = cluster.step + 1
    dice = np.random.default_rng(seed)
    lengths = dice.integers(2, 31, size=(PROMPTS, CANDIDATES))
    turns = {
        candidate_seed(0, step, prompt, candidate): [
            turn(prompt, candidate) if turn else Turn(int(length), delay=delay * length / 30)
        ]
        for (prompt, candidate), length in np.ndenumerate(lengths)
    }
    ray.get([server.load.remote(turns) for server in cluster.servers])
    over = threading.Event()

    def release() -> None:
        while not over.wait(0.05) and not release_when():
            pass
        ray.get([server.release.remote() for server in cluster.servers])

    releasing = threading.Thread(target=release if release_when else lambda: None)
    releasing.start()
    try:
        batch = cluster.manager.generate_sequences(prompts([f"{n}+2=" for n in range(PROMPTS)], GROUP_SIZE, step=step))
    finally:
        over.set()
        releasing.join()
    batch = batch.select_idxs(dice.permutation(len(batch)))
    batch.meta_info = {"temperature": 1.0}
    return batch


def forwarded(actor):
    """Every row that a rank was given, by call."""
    return [row for rank in actor.seen() for call in rank["calls"] for row in (*call.whole, *call.growing)]


def wait_until_stopped(cluster):
    """Nothing runs at the servers any more, and the workers can take another rollout."""
    deadline = time.monotonic() + 300
    while True:
        running = ray.get([server.count_running.remote() for server in cluster.servers])
        open_groups = ray.get([worker.progress.remote() for worker in cluster.manager.agent_loop_workers])
        if running == [0, 0] and open_groups == [None, None]:
            return
        assert time.monotonic() < deadline, (running, open_groups)
        time.sleep(0.1)


def expected(batch):
    """What the scripted ranks say to the tokens that the batch holds."""
    wide = torch.zeros(batch.batch["responses"].shape)
    for row in range(len(batch)):
        mask = batch.batch["attention_mask"][row].bool()
        prompt = int(mask[: batch.batch["prompts"].shape[1]].sum())
        values = scripted_log_probs(batch.batch["input_ids"][row][mask].numpy(), prompt)
        wide[row, : len(values)] = torch.from_numpy(values)
    return wide


def nothing_left(part):
    raise AssertionError(f"{len(part)} rows were left to verl")


def test_every_kept_row_has_the_result_of_its_own_tokens(cluster, overlap):
    made = overlap()
    for seed in (1, 2):
        batch = roll(cluster, seed)
        assert made.session.begun
        old, mfu = made.log_probs.old(batch, nothing_left)
        wide = expected(batch)
        assert torch.equal(old.batch["old_log_probs"], wide)
        ends = batch.batch["attention_mask"][:, batch.batch["prompts"].shape[1] :].bool()
        assert torch.equal(old.batch["entropys"], (wide + 0.5) * ends)
        ref = made.log_probs.reference(batch, nothing_left)
        assert torch.equal(ref.batch["ref_log_prob"], -wide)
        assert mfu == 0.25
        for rank in made.actor.seen():
            assert rank["open"] == [], "cleared"
            assert rank["steps"][-1] == cluster.step
        metrics = made.log_probs.metrics(cluster.manager.pop_rollout())
        assert set(metrics) <= set(METRICS)
        assert metrics["darts/overlap/late_rows"] == metrics["darts/overlap/tokens_twice"] == 0
        assert metrics["darts/overlap/tokens_forwarded"] > 0


def test_losers_are_dropped_and_complete_ones_go_whole(cluster, overlap):
    made = overlap()
    batch = roll(cluster, 3)
    made.log_probs.old(batch, nothing_left)
    kept, told = set(sequence_keys(batch)), set()
    for rank in made.actor.seen():
        calls = rank["calls"]
        forwarded = {row.key for call in calls for row in (*call.whole, *call.growing)}
        dropped = {key for call in calls for key in call.drop}
        assert dropped <= forwarded - kept, "those of the last decisions are cleared with the step"
        told |= dropped
        assert bool([row for call in calls for row in call.growing]) == (cluster.mode == "token")
        assert all(row.start == 0 and row.last for call in calls for row in call.whole)
    if cluster.mode == "token":  # in `sequence` those that are complete before the decision are the kept
        assert len({key.uid for key in told}) >= PROMPTS - 2, "the losers of all groups but the last to decide"


def test_work_is_done_while_the_rollout_runs(cluster, overlap):
    """All are told of but for their last chunks before the first ends; the last ends after the others are computed."""
    made = overlap()
    chunks, growing = 6 * 4, cluster.mode == "token"

    def turn(prompt, candidate):
        return Turn(25 + candidate % 4, delay=0.5, held=growing or (prompt == 0 and candidate > 2))

    def is_computed() -> bool:
        rows = forwarded(made.actor)
        if growing:
            told = Counter()
            for row in rows:
                told[row.key] += len(row.token_ids) - (0 if row.start else row.prompt_tokens)
            return len(told) == PROMPTS * CANDIDATES and min(told.values()) >= chunks
        return len({row.key for row in rows}) >= PROMPTS * GROUP_SIZE - 1

    batch = roll(cluster, 4, turn=turn, release_when=is_computed)
    made.log_probs.old(batch, nothing_left)
    metrics = made.log_probs.metrics(cluster.manager.pop_rollout())
    assert metrics["darts/overlap/in_rollout_share"] > 0.8
    assert metrics["darts/overlap/hidden_share"] > 0.5
    if cluster.mode == "sequence":
        assert metrics["darts/overlap/before_end_share"] == 0
    else:
        assert 0.6 < metrics["darts/overlap/before_end_share"] <= metrics["darts/overlap/in_rollout_share"] <= 1


def test_a_truncated_one_that_fills_its_group_is_computed_as_soon_as_that_is_decided(cluster, overlap):
    """Three of six are valid, four are kept. Prompt 0 ends when the others' truncated ones have been computed."""
    made = overlap()

    def turn(prompt, candidate):
        return Turn(5 + candidate if candidate % 2 else 30, cut=candidate % 2 == 0, delay=0.2, held=prompt == 0)

    def are_computed() -> bool:
        complete = {row.key for row in forwarded(made.actor) if row.last and row.key.candidate % 2 == 0}
        return len(complete) == PROMPTS - 1

    batch = roll(cluster, 14, turn=turn, release_when=are_computed)
    old, _ = made.log_probs.old(batch, nothing_left)
    assert torch.equal(old.batch["old_log_probs"], expected(batch))
    rollout, outcome = cluster.manager.pop_rollout(), made.log_probs._joined.outcome
    filled = [key for key in sequence_keys(batch) if key.candidate % 2 == 0 and key.uid != rollout.uids[0]]
    assert len(filled) == PROMPTS - 1
    assert all(outcome.computed[key][-1][0] < rollout.ended for key in filled)


def test_a_slow_actor_does_not_hold_the_rollout_up(cluster, overlap, tmp_path):
    """It answers no call before the rollout is over."""
    made = overlap(gate=tmp_path / "over")
    batch = roll(cluster, 5)
    (tmp_path / "over").touch()
    old, _ = made.log_probs.old(batch, nothing_left)
    assert torch.equal(old.batch["old_log_probs"], expected(batch))


def test_a_model_that_cannot_continue_prefixes_falls_back_and_says_so_once(cluster, overlap):
    made = overlap(refusal="scripted: it has no cache")
    for seed in (6, 7):
        batch = roll(cluster, seed)
        old, _ = made.log_probs.old(batch, nothing_left)
        assert torch.equal(old.batch["old_log_probs"], expected(batch))
    assert not [row for rank in made.actor.seen() for call in rank["calls"] for row in call.growing]
    assert len(made.said) == (cluster.mode == "token")
    assert all("scripted: it has no cache" in line for line in made.said)


def test_a_small_cache_falls_back_and_names_the_setting(cluster, overlap):
    if cluster.mode == "sequence":
        pytest.skip("has no cache")
    made = overlap(kv_cache_gib=100 * 1024 / (1 << 30))  # 100 tokens
    batch = roll(cluster, 8)
    old, _ = made.log_probs.old(batch, nothing_left)
    assert torch.equal(old.batch["old_log_probs"], expected(batch))
    assert "darts.overlap.kv_cache_gib" in made.said[0]
    assert "100 tokens" in made.said[0]


def test_over_budget_nothing_is_lost(cluster, overlap):
    made = overlap(kv_cache_gib=200 * 1024 / (1 << 30))  # 100 tokens of prefixes on each rank
    batch = roll(cluster, 9)
    old, _ = made.log_probs.old(batch, nothing_left)
    assert torch.equal(old.batch["old_log_probs"], expected(batch))


@pytest.mark.parametrize(
    ("trouble", "cause"), [("raise", "ValueError: scripted: out of memory"), ("die", r"Actor(Died|Unavailable)Error")]
)
@pytest.mark.parametrize("call", [0, 2])
def test_a_rank_that_fails_ends_the_step_with_the_cause(cluster, overlap, trouble, cause, call):
    """The first prompt's candidates would never have ended."""

    def turn(prompt, candidate):
        length = 4 + PROMPTS * candidate + prompt
        return Turn(length, delay=length / 10, held=prompt == 0)

    made = overlap(mortal=True, seconds=0.02)
    ray.get(made.actor.ranks[1].set_trouble.remote((trouble, call)))
    with pytest.raises(RuntimeError, match=f"overlapped actor failed: {cause}"):
        made.log_probs.old(roll(cluster, 10, turn=turn), nothing_left)
    wait_until_stopped(cluster)
    cancelled = ray.get([server.count_cancelled.remote() for server in cluster.servers])
    assert cancelled == [0, 0], "what runs is aborted: cancelled calls leave holes in the queues of Ray's actors"


def test_a_dead_rank_is_the_cause_of_what_others_say(local_ray):
    ranks = ScriptedActor(2).ranks
    kill(ranks[1])
    refs = [ranks[0].overlap_clear.remote(0), ranks[1].overlap_clear.remote(0)]  # no step has begun
    with pytest.raises(ray.exceptions.RayTaskError) as heard:
        ray.get(refs[0])
    failure_text = _failure_text(refs, heard.value)
    assert failure_text.startswith("ActorDiedError: ")
    assert "(heard first: AttributeError: " in failure_text
    assert _failure_text(refs[:1], heard.value).startswith("AttributeError: ")
    ray.kill(ranks[0])


def test_a_rank_that_hangs_ends_the_step_in_time(cluster, overlap):
    made = overlap(limits=replace(LIMITS, timeout_s=1.5), mortal=True)
    ray.get(made.actor.ranks[0].set_trouble.remote(("hang", 1)))
    with pytest.raises(TimeoutError, match="the overlapped actor did not answer"):
        made.log_probs.old(roll(cluster, 11, delay=1.0), nothing_left)
    wait_until_stopped(cluster)


def test_a_replayed_rollout_is_computed_by_verl(cluster, overlap):
    made = overlap()
    asked = []

    def compute(part):
        asked.append(len(part))
        return part, 0.5

    batch = DataProto.from_dict(non_tensors={"uid": np.array(["a"]), "darts_candidate": np.array([0])})
    assert made.log_probs.old(batch, compute) == (batch, 0.5)
    assert made.log_probs.reference(batch, lambda part: part) is batch
    assert asked == [1]


def test_rows_with_other_tokens_are_computed_by_verl(cluster, overlap):
    """A batch that somebody changed after generation, a row that the actor never had."""
    made = overlap()
    batch = roll(cluster, 12)
    width = batch.batch["prompts"].shape[1]
    batch.batch["responses"][3, 0] += 1
    batch.batch["input_ids"][3, width] += 1
    batch.non_tensor_batch["darts_candidate"][7] = 77
    parts = []

    def compute(part):
        parts.append(part)
        return DataProto.from_single_dict({"old_log_probs": expected(part), "entropys": expected(part) + 0.5}), 0.5

    old, mfu = made.log_probs.old(batch, compute)
    assert torch.equal(old.batch["old_log_probs"], expected(batch))
    (part,) = parts
    assert part.meta_info["use_dynamic_bsz"]
    assert part.meta_info["max_token_len_per_gpu"] == LIMITS.max_tokens
    assert len(part) == 2
    assert torch.equal(part.batch["input_ids"], batch.batch["input_ids"][[3, 7]])
    assert mfu == 0.25
    assert made.log_probs.metrics(cluster.manager.pop_rollout())["darts/overlap/late_rows"] == 2


def test_one_missing_row_is_padded_for_two_ranks(cluster, overlap):
    made = overlap()
    batch = roll(cluster, 13)
    batch.non_tensor_batch["darts_candidate"][2] = 77
    sizes = []

    def compute(part):
        sizes.append(len(part))
        return DataProto.from_single_dict({"old_log_probs": expected(part), "entropys": expected(part) + 0.5}), 0.5

    old, _ = made.log_probs.old(batch, compute)
    assert sizes == [2]
    assert torch.equal(old.batch["old_log_probs"], expected(batch))
