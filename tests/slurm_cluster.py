"""A real SLURM of a head and some nodes on this machine, in namespaces of their own: other hosts by name, network and process ids.

cluster = SlurmCluster(folder, ["node1", "node2"])        # as root; `missing()` says what it would need
cluster.run("sbatch", "--nodes=2", "scripts/train.sbatch", "config.yaml", folder=root)
cluster.kill("node2")                                     # as when its power is cut
cluster.close()

All hosts share one network namespace, whose loopback has an address of each; files are this machine's. Nothing outlives the process
that made the cluster: the kernel kills the first process of each host with it, and with that one all of the host's.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

from waiting import wait_for

from megatron_lora.commands.torchrun import die_with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare", "nsenter", "ip")
SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
HOST = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
HEAD = """
set -e
hostname head
ip link set lo up
while read -r address name; do ip address add "$address" dev lo; done <addresses
mount --bind hosts /etc/hosts
munged --force --key-file="$PWD/munge.key" --socket="$PWD/munge.socket" --pid-file="$PWD/munge.pid" \
    --log-file="$PWD/munge.log" --seed-file="$PWD/munge.seed"
exec slurmctld -D
"""
# A requeued job waits for `cred_expire` seconds. As by default, a node is taken to be dead long after its run has failed. A preempted
# job has GraceTime to end; who is killed has KillWait.
SETTINGS = """
ClusterName=tests
SlurmctldHost=head
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ReturnToService=2
SlurmdTimeout=300
MessageTimeout=5
KillWait=8
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL PriorityTier=2
"""


def missing() -> str:
    """Say what this machine lacks for a cluster; empty if nothing."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    if absent:
        return f"SLURM: {', '.join(absent)} not installed; apt-get install slurm-wlm munge iproute2"
    tried = subprocess.run([*HOST, "--net", "true"], env=os.environ | {"PATH": SYSTEM_PATH}, capture_output=True, text=True)
    return f"SLURM: no namespaces for its hosts here: {tried.stderr.strip()}" if tried.returncode else ""


class SlurmCluster:
    """A head and nodes that keep their files in `folder`; ready when it is made."""

    def __init__(self, folder: Path, nodes: list[str], environment: dict[str, str]):
        """Start it, and wait until all nodes are idle; `environment` is added to this process's, for those that submit jobs."""
        self.folder = folder
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.environment = inherited | environment | {"PATH": SYSTEM_PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self.hosts: dict[str, subprocess.Popen] = {}
        addresses = "".join(f"192.0.2.{number} {name}\n" for number, name in enumerate(["head", *nodes], 1))  # of no network: RFC 5737
        lines = [f"NodeName={name} Port={7000 + number} CPUs=1" for number, name in enumerate(nodes)]
        (folder / "addresses").write_text(addresses)
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + addresses)
        (folder / "slurm.conf").write_text(SETTINGS.format(folder=folder) + "\n".join([*lines, ""]))
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        for name in ("state", *(f"spool-{name}" for name in nodes)):
            (folder / name).mkdir()
        self._begin("head", [*HOST, "--net", "sh", "-c", HEAD])
        wait_for(lambda: (folder / "slurmctld.pid").exists(), 60)
        for name in nodes:
            self.start(name)
        wait_for(lambda: self.run("sinfo", "--noheader", "--states=idle", "--format=%D").strip() == str(len(nodes)), 60)

    def _begin(self, name: str, command: list[str]) -> None:
        with open(self.folder / f"{name}.out", "a") as output:
            self.hosts[name] = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, preexec_fn=lambda: die_with_parent(signal.SIGKILL),
            )  # fmt: skip

    def _inside(self, host: str) -> int:
        """Return the id, outside, of a host's first process."""
        return int(Path(f"/proc/{self.hosts[host].pid}/task/{self.hosts[host].pid}/children").read_text().split()[0])

    def start(self, node: str) -> None:
        """Boot a node."""
        enter = ["nsenter", f"--target={self._inside('head')}", "--mount", "--net", f"--wd={self.folder}"]
        self._begin(node, [*enter, *HOST, "sh", "-c", f"hostname {node} && exec slurmd -D"])

    def kill(self, host: str) -> None:
        """End all processes of a host at once."""
        process = self.hosts.pop(host)
        process.kill()
        process.wait()

    def run(self, *command: str, folder: Path | None = None) -> str:
        """Run a command on the head, in a folder, and return what it prints; raises CalledProcessError when it fails."""
        enter = ["nsenter", f"--target={self._inside('head')}", "--all", f"--wd={folder or self.folder}"]
        return subprocess.run([*enter, *command], env=self.environment, check=True, stdout=subprocess.PIPE, text=True).stdout

    def close(self) -> None:
        """End all hosts."""
        for name in list(self.hosts):
            self.kill(name)
