"""Ray on one node of a Slurm job: `ray_node.py --name n1 --temp DIR --logs DIR (--head FILE | --address HOST:PORT)`.

Contract: runs `ray start --block` in the foreground with free ports and a temporary folder of the job's own, so that
jobs and other Rays on the same node do not meet. The head writes its address into FILE once it can be reached. Ray is
ended in order when the standard input ends, or on SIGTERM. Then the logs of Ray's own processes are copied to
`LOGS/ray-NAME/`, and the temporary folder is removed. Exit code 0 if it was asked to end, 1 if Ray ended by itself.
"""

import argparse
import contextlib
import fcntl
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

END_S = 15  # limit for Ray to end in order
OWN_LOGS = ("raylet.*", "gcs_server.*", "ray_process_exit.log")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        open_sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for open_socket in open_sockets:
            open_socket.bind(("", 0))
        return [open_socket.getsockname()[1] for open_socket in open_sockets]


def own_address(other_node: str | None) -> str:
    """The address that this node reaches another one from; without one, or on a loopback, what Ray takes by itself."""
    if other_node is not None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe_socket:
            probe_socket.connect((other_node, 9))  # sends nothing
            address = probe_socket.getsockname()[0]
        if not address.startswith("127."):
            return address
    from ray.util import get_node_ip_address

    return get_node_ip_address()


def ray_start(options: argparse.Namespace) -> tuple[list[str], str]:
    """The command, and the address of the cluster."""
    ray_command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-name={options.name}",
        f"--temp-dir={options.temp}", f"--num-cpus={options.num_cpus}", "--min-worker-port=0", "--max-worker-port=0",
    ]  # fmt: skip
    if options.num_gpus is not None:
        ray_command.append(f"--num-gpus={options.num_gpus}")
    agent_port, port, client_port = free_ports(3)
    ray_command.append(f"--dashboard-agent-listen-port={agent_port}")
    if options.address is not None:
        return [*ray_command, f"--address={options.address}"], options.address
    node_ip = own_address(options.toward)
    ray_command += ["--head", f"--node-ip-address={node_ip}", f"--port={port}", "--include-dashboard=false"]
    return [*ray_command, f"--ray-client-server-port={client_port}"], f"{node_ip}:{port}"


def can_be_reached(address: str) -> bool:
    """Whether somebody listens there."""
    host, port = address.rsplit(":", 1)
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False


def main() -> int:
    """Runs Ray until it ends or is asked to end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="Slurm's name of the node, and Ray's")
    parser.add_argument("--temp", required=True, type=Path, help="for Ray's sessions; removed at the end")
    parser.add_argument("--logs", required=True, type=Path)
    parser.add_argument("--num-cpus", required=True, type=int)
    parser.add_argument("--num-gpus", type=int, help="without it Ray counts them")
    parser.add_argument("--head", type=Path, help="file that gets the address")
    parser.add_argument("--toward", help="another node of the job")
    parser.add_argument("--address", help="of the head")
    options = parser.parse_args()

    # 1. Ray starts; a head that can be reached writes its address.
    end_asked = False

    def on_sigterm(*_: Any) -> None:
        nonlocal end_asked
        end_asked = True

    signal.signal(signal.SIGTERM, on_sigterm)
    options.temp.mkdir(parents=True, exist_ok=True)
    users_lock = (options.temp / ".users").open("w")  # virtual nodes on one machine share the folder
    fcntl.flock(users_lock, fcntl.LOCK_SH)
    ray_command, address = ray_start(options)
    # Ray's own wait for what runs on the node when it is ended: that is over by then.
    ray_environment = os.environ | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    ray_process = subprocess.Popen(ray_command, env=ray_environment, stdin=subprocess.DEVNULL)
    address_file = options.head
    while ray_process.poll() is None and not end_asked:
        if address_file and can_be_reached(address):
            partial_file = address_file.with_suffix(".partial")
            partial_file.write_text(address)
            partial_file.replace(address_file)
            address_file = None
        if select.select([sys.stdin], [], [], 0.2)[0] and not os.read(sys.stdin.fileno(), 4096):
            end_asked = True  # nobody is left at the other end
    # 2. Ray ends in order, or by force.
    if ray_process.poll() is None:
        ray_process.terminate()
        try:
            ray_process.wait(END_S)
        except subprocess.TimeoutExpired:
            ray_process.kill()
            ray_process.wait()
    # 3. The logs of its own processes stay (what workers say is in COMMAND's), its folder does not.
    for log_path in (path for pattern in OWN_LOGS for path in options.temp.glob(f"session_2*/logs/{pattern}")):
        kept_logs = options.logs / f"ray-{options.name}"
        kept_logs.mkdir(parents=True, exist_ok=True)
        shutil.copy(log_path, kept_logs)
    with contextlib.suppress(BlockingIOError):  # another node uses it
        fcntl.flock(users_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(options.temp, ignore_errors=True)
    return 0 if end_asked else 1


if __name__ == "__main__":
    sys.exit(main())
