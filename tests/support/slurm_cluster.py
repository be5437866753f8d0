"""A Slurm of its own on this machine: munged, slurmctld and virtual slurmd nodes, all of whose files lie in one folder.

Contract: `start(folder)` starts the daemons on free ports of 127.0.0.1, `stop()` ends exactly them. Nothing in /etc is
read but the list of users; the machine's own Slurm, if it has one, is not touched. `unavailable()` says why this cannot
be done here, and installs Debian's packages where that is allowed and they are not there.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
INSTALL_S = 180
NODES = ("n1", "n2")
CPUS = 32
"""Of a node, as Slurm counts them: what verl's actors ask for, more than there are."""

CONFIG = """
ClusterName=darts
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits for cred_expire seconds; by default 120.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=10
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs={cpus} RealMemory={memory}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs={cpus} RealMemory={memory} Gres=gpu:1
PartitionName=main Nodes=ALL Default=YES PriorityTier=1
PartitionName=first Nodes=ALL PriorityTier=9
"""


def unavailable() -> str | None:
    """Why there can be no Slurm here, or None."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "munged and slurmctld are started as root here"
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        if len(missing) < len(PROGRAMS):
            return f"{', '.join(missing)} are not installed, but other parts of a Slurm are, which is left alone"
        if shutil.which("apt-get") is None:
            return f"{', '.join(missing)} are not installed, and there is no apt-get"
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]):
            try:
                run = subprocess.run(command, env=quiet, capture_output=True, text=True, timeout=INSTALL_S)
            except subprocess.TimeoutExpired:
                return f"{' '.join(command[:2])} took more than {INSTALL_S} s"
            if run.returncode != 0:
                return f"{' '.join(command[:2])} failed: {run.stderr.strip()[-200:]}"
    return None


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class SlurmCluster:
    """Daemons in `folder`, whose path must be short: sockets lie in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen] = []
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Raises if the nodes are not idle after 30 s."""
        port, *node_ports = free_ports(1 + len(NODES))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 // 2
        values = dict(zip(NODES, node_ports, strict=True)) | {"port": port, "memory": memory, "cpus": CPUS}
        config = CONFIG.format(folder=self.folder, host=socket.gethostname().split(".")[0], user="root", **values)
        (self.folder / "slurm.conf").write_text(config)
        # A device that is always there: Slurm only counts it.
        (self.folder / "gres.conf").write_text("NodeName=n2 Name=gpu File=/dev/null\n")
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        munge = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        paths = [f"--{option}={self.folder}/munge.{end}" for option, end in munge.items()]
        self._start("munged", "--foreground", "--force", *paths)
        self._await((self.folder / "munge.socket").exists, "munged")
        self._start("slurmctld", "-D", "-i")
        for node in NODES:
            self._start("slurmd", "-D", "-N", node)
        self._await(lambda: self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split() == ["idle"] * 2, "nodes")

    def stop(self) -> None:
        """Ends the jobs, then the daemons."""
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--user=root")
            self._await(lambda: not self.run("squeue", "-h", "-o", "%i"), "jobs", limit=250)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        end = time.monotonic() + 100
        while any(daemon.poll() is None for daemon in self.daemons):
            if time.monotonic() > end:
                for daemon in self.daemons:
                    daemon.kill()
            time.sleep(0.1)

    def run(self, *command: str, **environment: str) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(
            command, env=self.environment | environment, capture_output=True, text=True, timeout=300, cwd=self.folder
        )
        if done.returncode != 0:
            raise subprocess.SubprocessError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout.strip()

    def _start(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "a") as log:
            settings = {"env": self.environment, "stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.daemons.append(subprocess.Popen(command, start_new_session=True, **settings))

    def _await(self, condition, what: str, limit: float = 300) -> None:
        end = time.monotonic() + limit
        while True:
            with contextlib.suppress(subprocess.SubprocessError):
                if condition():
                    return
            if time.monotonic() > end:
                raise subprocess.SubprocessError(f"{what}: not there after {limit} s, see {self.folder}")
            time.sleep(0.2)


class Job:
    """A job whose logs lie in `folder`, the one it was submitted from."""

    def __init__(self, cluster: SlurmCluster, number: str, folder: Path) -> None:
        self.cluster, self.number, self.folder = cluster, number, folder

    def field(self, name: str) -> str:
        """What `scontrol show job` says, e.g. JobState, ExitCode, Restarts."""
        shown = self.cluster.run("scontrol", "show", "job", self.number)
        return re.search(rf"(?<!\S){name}=(\S*)", shown).group(1)

    def ended(self) -> bool:
        return self.field("JobState") not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED")

    def wait(self, limit: float, condition: Callable[[], bool] | None = None) -> None:
        """Until the job has ended, or the condition holds; raises after `limit` seconds, or if it ended before."""
        end = time.monotonic() + limit
        while not (condition or self.ended)():
            if time.monotonic() > end or (condition is not None and self.ended()):
                raise TimeoutError(f"job {self.number}: {self.field('JobState')}\n{self.output()[-3000:]}")
            time.sleep(0.5)

    def output(self) -> str:
        """What sbatch wrote."""
        path = self.folder / f"slurm-{self.number}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def log(self, name: str, attempt: int = 1) -> str:
        """A file of an attempt, empty if it is not there."""
        path = self.folder / "slurm_logs" / self.number / f"attempt-{attempt}" / name
        return path.read_text(errors="replace") if path.exists() else ""
