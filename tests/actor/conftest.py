"""Two groups of real FSDP ranks, of one and of two processes, which all tests of the tier share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from verl_patches.device import is_cpu_only

# The processes import the helpers of this folder by name.
sys.path.insert(0, str(Path(__file__).parent))

from actor_ranks import ranks


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def one_rank(models):
    with ranks(1, models) as group:
        yield group


@pytest.fixture(scope="session")
def two_ranks(models):
    if not is_cpu_only() and torch.cuda.device_count() < 2:
        pytest.skip("two ranks need two GPUs")
    with ranks(2, models) as group:
        yield group


@pytest.fixture(params=[1, 2], ids=["1 rank", "2 ranks"])
def group(request):
    return request.getfixturevalue({1: "one_rank", 2: "two_ranks"}[request.param])
