"""A real SLURM cluster of two nodes inside this machine, and nothing of it outside: `with cluster(folder) as
slurm: slurm.run(["sinfo"])`.

    pytest ─▶ unshare ─▶ controller: python cluster.py FOLDER
                              ├─▶ node1: unshare ─▶ slurmd
                              └─▶ node2: unshare ─▶ slurmd

The controller has its own PID, network, mount, UTS and IPC namespaces, and in them munged, slurmctld and a
bridge. A node has its own again, joined to the bridge: an address (10.83.0.1, …), a host name, /dev/shm, a
disk at /mnt.

When the controller's namespace ends, however that comes about, the kernel ends every process and undoes every
mount and device in it. Needs root, util-linux, iproute2 and SLURM with munge. Files outside FOLDER are shared
with the machine, as on a cluster's file system. Nodes lose power and get it back; jobs of the partition
`urgent` take nodes from others, who get GRACE_S to leave.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

NODES = 2
NET = "10.83.0"
CONTROLLER = f"{NET}.100"
PROGRAMS = (
    "slurmctld",
    "slurmd",
    "munged",
    "sbatch",
    "srun",
    "scontrol",
    "unshare",
    "nsenter",
    "ip",
    "hostname",
)
UNSHARE = ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
START_S = 60.0  # two busy cores; about 1 s on free ones
GRACE_S = 200  # jobs leave when they have saved, which takes a second or two on free cores
CPUS = 32

# cred_expire: a requeued job waits that long and 1 s; 120 s by default, 5 s at least
SLURM_CONF = """\
ClusterName=gensrtest
SlurmctldHost=controller({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=300
MessageTimeout=60
KillWait=2
JobRequeue=1
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace_s}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why a cluster cannot be started here; "" = it can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs Linux and root, for namespaces"
    absent = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install slurmctld slurmd slurm-client munge)"
    try:
        trial = subprocess.run(
            [*UNSHARE, "ip", "link", "add", "trial", "type", "bridge"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except subprocess.TimeoutExpired:
        return "unshare does not answer"
    return f"no namespaces or bridges here: {trial.stderr.strip()}" if trial.returncode else ""


def search_path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass(frozen=True)
class Slurm:
    """A running cluster. `pid` is the controller's, as this machine numbers it."""

    folder: Path
    pid: int
    switch: IO[bytes]  # the controller's stdin

    def run(
        self,
        command: Sequence[str],
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        timeout_s: float = 60,
    ) -> str:
        """What `command` printed on the controller. Raises RuntimeError with its messages when it fails."""
        enter = [
            "nsenter",
            "--target",
            str(self.pid),
            "--mount",
            "--net",
            "--uts",
            "--ipc",
            "--pid",
            f"--wd={cwd or self.folder}",
            "--",
        ]
        result = subprocess.run(
            [*enter, *command],
            env={**os.environ, "PATH": search_path(), **slurm_env(self.folder), **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if result.returncode:
            raise RuntimeError(
                f"{' '.join(command)}: exit code {result.returncode}\n{result.stdout}{result.stderr}"
            )
        return result.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, …"""
        words = self.run(["scontrol", "--oneliner", "show", "job", job_id]).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def power(self, node: int, on: bool) -> None:
        """Cut a node's power: every process, connection and device of it is gone at once. Or switch it on
        again: it boots into slurmd."""
        done = self.folder / f"power-{node}"
        done.unlink(missing_ok=True)
        self.switch.write(f"{node} {int(on)}\n".encode())
        self.switch.flush()
        deadline_s = time.monotonic() + START_S
        while not done.exists():
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"node{node} does not answer its switch\n" + logs(self.folder))
            time.sleep(0.02)

    def configure(self, name: str, value: object) -> None:
        """Change one setting of slurm.conf on the running cluster."""
        path = self.folder / "slurm.conf"
        lines = [
            f"{name}={value}" if line.startswith(f"{name}=") else line
            for line in path.read_text().splitlines()
        ]
        path.write_text("\n".join(lines) + "\n")
        self.run(["scontrol", "reconfigure"])


def slurm_env(folder: Path) -> dict[str, str]:
    return {"SLURM_CONF": str(folder / "slurm.conf")}


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Start a cluster that keeps its files in `folder` (a new one), and end it with the block. Raises
    RuntimeError with the logs when it does not start."""
    folder.mkdir(parents=True)
    with (folder / "controller.log").open("w") as log:
        command = [*UNSHARE, sys.executable, str(Path(__file__).resolve()), str(folder)]
        outer = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline_s = time.monotonic() + START_S
        while not (folder / "ready").exists():
            if outer.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError("the cluster did not start\n" + logs(folder))
            time.sleep(0.05)
        assert outer.stdin is not None
        yield Slurm(folder, _only_child(outer.pid), outer.stdin)
    finally:
        # --kill-child: the namespace's first process goes, and everything in it
        with contextlib.suppress(ProcessLookupError):
            outer.send_signal(signal.SIGKILL)
        outer.wait()


def logs(folder: Path) -> str:
    """Last lines of all logs, for a failure's message."""
    return "\n".join(
        f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in sorted(folder.glob("*.log"))
    )


def _only_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


# ---- inside the namespaces ---------------------------------------------------------------------------------


def controller(folder: Path) -> None:
    """Bring the cluster up, say so by the file `ready`, and live until stdin closes (with pytest, at the
    latest)."""
    os.environ.update(slurm_env(folder), PATH=search_path())
    _sh("hostname controller")
    _names(folder)
    _sh(
        f"ip link set lo up; ip link add br0 type bridge; ip addr add {CONTROLLER}/24 dev br0; ip link set "
        "br0 up"
    )
    nodes = "\n".join(
        f"NodeName=node{i} NodeAddr={NET}.{i} NodeHostname=node{i} CPUs={CPUS} State=UNKNOWN"
        for i in range(1, NODES + 1)
    )
    (folder / "slurm.conf").write_text(
        SLURM_CONF.format(controller=CONTROLLER, folder=folder, nodes=nodes, grace_s=GRACE_S)
    )
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    _sh(
        f"munged --force --key-file={key} --socket={folder}/munge.socket --pid-file={folder}/munged.pid "
        f"--log-file={folder}/munged.log --seed-file={folder}/munge.seed"
    )
    _sh("slurmctld -c")
    running = {i: _node(i, folder) for i in range(1, NODES + 1)}
    deadline_s = time.monotonic() + START_S
    while _sh("sinfo --noheader --states=idle --format=%D || true") != str(NODES):
        assert time.monotonic() < deadline_s, _sh("sinfo --long --Node")
        time.sleep(0.05)
    (folder / "ready").touch()
    for line in sys.stdin:
        number, on = map(int, line.split())
        if on:
            running[number] = _node(number, folder)
        else:
            running[number].kill()
            running[number].wait()
        (folder / f"power-{number}").touch()
    for node in running.values():
        node.kill()


def _node(number: int, folder: Path) -> "subprocess.Popen[bytes]":
    """A machine of its own: it waits for its end of the cable, takes its name and address, and becomes
    slurmd."""
    boot = f"""
        until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
        hostname node{number}; mount -t tmpfs tmpfs /dev/shm; mount --bind {folder}/disk-{number} /mnt
        ip link set lo up; ip addr add {NET}.{number}/24 dev eth0; ip link set eth0 up
        ip route add default via {CONTROLLER}
        exec slurmd -D"""
    (folder / f"disk-{number}").mkdir(exist_ok=True)
    with (folder / f"node{number}.log").open("a") as log:
        node = subprocess.Popen(
            [*UNSHARE, "bash", "-c", boot], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    while os.readlink(f"/proc/{node.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
        time.sleep(0.01)
    # the one of a node without power goes with its namespace
    _sh(f"while ip link show cable{number} 2>/dev/null; do sleep 0.02; done")
    _sh(
        f"ip link add cable{number} type veth peer name eth0 netns {node.pid}; ip link set cable{number} "
        "master br0 up"
    )
    return node


def _names(folder: Path) -> None:
    """Host names come from a file alone: no name server is in reach, and torch's rendezvous asks for the name
    of every connection's other end."""
    lines = [
        "127.0.0.1 localhost",
        f"{CONTROLLER} controller",
        *(f"{NET}.{i} node{i}" for i in range(1, NODES + 1)),
    ]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    _sh(f"mount --bind {folder}/hosts /etc/hosts")
    switch = Path("/etc/nsswitch.conf")
    if switch.exists():
        kept = [line for line in switch.read_text().splitlines() if not line.startswith("hosts:")]
        (folder / "nsswitch.conf").write_text("\n".join([*kept, "hosts: files"]) + "\n")
        _sh(f"mount --bind {folder}/nsswitch.conf {switch}")


def _sh(command: str) -> str:
    return subprocess.run(
        ["bash", "-ec", command], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


if __name__ == "__main__":
    controller(Path(sys.argv[1]))
