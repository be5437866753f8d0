"""The schedule's own calls on real ranks, in caches that hold everything, some of it, or two sequences."""

import numpy as np
import pytest
from actor_cases import SETTINGS, collect, extend, finished, full, largest, random_scripts

from darts.messages import Growth
from darts.schedule import OverlapSchedule

LONGEST = 75
"""Tokens of a random script, at most."""


@pytest.mark.parametrize("max_cache_tokens", [10_000, 3 * LONGEST, 2 * LONGEST])
def test_results_are_exact_and_the_cache_keeps_its_budget(group, max_cache_tokens):
    group.build("qwen2")
    waited = 0
    for seed in (11, 12, 13):
        random = np.random.default_rng(seed)
        scripts = [one for some in range(3) for one in random_scripts(10 * seed + some, group.size)]
        for number, one in enumerate(scripts):
            one.key = one.key._replace(uid=f"{number}")
        ability = group.all("call", "overlap_open", SETTINGS)[0]
        schedule = OverlapSchedule(SETTINGS.step, group.size, 4096, max_cache_tokens)

        def call(schedule=schedule, ability=ability) -> bool:
            calls = schedule.next_call()
            if calls is not None:
                for report in extend(group, calls):
                    assert report.peak_cache_bytes <= max_cache_tokens * ability.bytes_per_token
            return calls is not None

        told = dict.fromkeys(range(len(scripts)), 0)
        while told:
            number = int(random.choice(list(told)))
            one = scripts[number]
            if one.dropped_after == told[number]:
                schedule.drop(one.key)
                del told[number]
                continue
            row = one.row(told[number])
            schedule.grow(Growth(row, random.random()))
            told[number] += 1
            if row.last:
                del told[number]
            if random.random() < 0.5:
                call()
                waited += sum(len(sequence.waiting) > 1 for sequence in schedule._sequences.values())
        kept = finished(scripts)
        schedule.keep_only([one.key for one in kept])
        while call():
            pass
        found = collect(group, SETTINGS.step, [one.key for one in scripts])
        assert largest(found, full(group, kept)) <= 1e-4
        group.all("call", "overlap_clear", SETTINGS.step)
    assert bool(waited) == (max_cache_tokens < 10_000), "prefixes waited where the cache was full, and only there"
