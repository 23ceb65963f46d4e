"""The process a user starts: check everything, start torchrun with the ranks that the config needs, end with the run's status.

    check config, files, model, data, machine -> make the output directory -> agent (torchrun) -> ranks (rank.py) -> train.run

Nothing is written before every check has passed. The ranks live in a session of their own, so that Ctrl-C reaches this process
alone; it passes SIGTERM, SIGUSR1 and Ctrl-C on to the ranks as SIGTERM, which stop and save; the second time torchrun ends them. On several
SLURM nodes (`srun` with one task per node) each node runs this; the first node owns the output directory.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_lora.commands.checks import check_run
from megatron_lora.commands.rank import LAUNCHED
from megatron_lora.config.schema import RunConfig, load_config
from megatron_lora.environment import environment, num_cores
from megatron_lora.errors import UserError
from megatron_lora.output.run_directory import RunDirectory, has_trained, job_states

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_S = 3.0  # signals this soon after another are of the same request: SLURM tells the batch script and the step


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The machines of a run, and which one this is."""

    count: int = 1
    index: int = 0
    address: str = ""
    port: str = ""


def train(config_path: str, overrides: list[str]) -> int:
    """Run a config to its end; returns 0, 3 or 75 as the run recorded it, 2 for wrong input found by a rank, 1 for a crash."""
    config = load_config(config_path, overrides)
    nodes = find_nodes(os.environ)
    ranks_here = split_ranks(config, nodes)
    check_run(config, ranks_here, owner=nodes.index == 0)
    command = [*torchrun_arguments(ranks_here, nodes), "-m", "megatron_lora", "train", config_path, *overrides]
    if nodes.index > 0:
        return reported(start_ranks(command, ranks_here, lock=None))
    with RunDirectory.create(config, environment()) as run:
        ending = start_ranks(command, ranks_here, run.lock)
        recorded = run.status()["exit_status"]
        if recorded is not None:
            return recorded
        begun = "running" in job_states(run.path).values()
        if ending.signals and not begun and ending.status != 2:  # ranks that are asked before they train end each in its own way
            status = 75 if len(ending.signals) == 1 else 128 + ending.signals[0]
            ending = _Ending(status=status, reason=_stop_reason(ending.signals[0], begun))
        if ending.status == 2 and not has_trained(run.path):
            run.discard()
            return reported(ending)
        try:
            run.finish(ending.status, ending.reason or "the run ended without saying how")
        except OSError as error:
            print(f"megatron-lora: {run.path / 'status.json'} could not be brought up to date ({error.strerror})", file=sys.stderr)
        return reported(ending)


def _stop_reason(number: int, begun: bool) -> str:
    """Say what a signal came to that ended a run."""
    return f"stopped by {signal.Signals(number).name} before {'its state was saved' if begun else 'it took a step'}"


def find_nodes(environ: Mapping[str, str]) -> Nodes:
    """Read the machines from SLURM's step (one task per node) and MASTER_ADDR, MASTER_PORT; one machine without SLURM."""
    count = int(environ.get("SLURM_STEP_NUM_NODES", "1"))
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", count))
    if tasks != count:
        raise UserError(f"srun: started {tasks} tasks on {count} nodes; use srun --ntasks-per-node=1, each task starts its own ranks")
    if count == 1:
        return Nodes()
    if not environ.get("MASTER_ADDR"):
        raise UserError(
            f"MASTER_ADDR: is not set, and {count} nodes need a place to meet; export the first node's host name as MASTER_ADDR"
        )
    port = environ.get("MASTER_PORT") or str(20000 + int(environ.get("SLURM_JOB_ID", "0")) % 10000)
    return Nodes(count=count, index=int(environ["SLURM_NODEID"]), address=environ["MASTER_ADDR"], port=port)


def split_ranks(config: RunConfig, nodes: Nodes) -> int:
    """Ranks per node; UserError when the nodes cannot have the same number."""
    ranks = config.parallel.world_size
    if ranks % nodes.count:
        raise UserError(f"parallel: {ranks} ranks do not divide over {nodes.count} nodes; use a number of nodes that divides {ranks}")
    return ranks // nodes.count


def torchrun_arguments(ranks_here: int, nodes: Nodes) -> list[str]:
    """How torchrun starts this node's ranks: alone on a free port, or at the first node's address."""
    if nodes.count == 1:
        return ["--standalone", "--nproc-per-node", str(ranks_here)]
    meeting = ["--master-addr", nodes.address, "--master-port", nodes.port]
    return ["--nnodes", str(nodes.count), "--node-rank", str(nodes.index), "--nproc-per-node", str(ranks_here), *meeting]


def rank_environment(environ: Mapping[str, str], ranks_here: int) -> dict[str, str]:
    """The environment of the ranks: this process's, with the machine's cores shared out unless OMP_NUM_THREADS says otherwise."""
    threads = str(max(1, min(16, num_cores() // ranks_here)))
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # torch warns of links that connect at their first message, which ours are meant to do
    fetched = {"HF_HUB_OFFLINE": "1"}  # the checks have fetched the model
    usual = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    return usual | quiet | dict(environ) | fetched | {LAUNCHED: "1"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Ending:
    """How torchrun ended: 0, 1 (crash), 2 (a user's mistake) or 128 + signal, and why; and the signals that were passed on."""

    status: int
    reason: str = ""
    traceback: str = ""
    signals: tuple[int, ...] = ()


def reported(ending: _Ending) -> int:
    """Print why a run ended, once; return its status."""
    if ending.reason:
        print(f"{ending.traceback}megatron-lora: {ending.reason}", file=sys.stderr)
    return ending.status


def start_ranks(command: list[str], ranks_here: int, lock: int | None) -> _Ending:
    """Run the agent to its end with signals passed on; return what its report says. It inherits the lock, and keeps it if we die."""
    received: list[tuple[int, float]] = []  # signals, and when they came
    with tempfile.TemporaryDirectory(prefix="megatron-lora-") as folder:
        report_file = Path(folder) / "report.json"
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until both processes can tell what a signal is to do
        agent = subprocess.Popen(
            [sys.executable, "-m", "megatron_lora.commands.torchrun", str(report_file), *command],
            env=rank_environment(os.environ, ranks_here),
            pass_fds=() if lock is None else (lock,),
            start_new_session=True,
        )

        def forward(number: int, frame: object) -> None:
            if received and time.monotonic() < received[-1][1] + SAME_S:
                return
            ranks = [] if received else _children(agent.pid)
            received.append((number, time.monotonic()))
            for process in ranks:
                _send(process, signal.SIGTERM)
            if not ranks:
                _send(agent.pid, signal.SIGINT)

        before = {number: signal.signal(number, forward) for number in FORWARDED}
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            status = agent.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if agent.poll() is None:
                _send(agent.pid, signal.SIGINT)
        report = json.loads(report_file.read_text(encoding="utf-8")) if report_file.exists() else None
    signals = tuple(number for number, _ in received)
    if report is not None and report["kind"] != "signal":
        return _Ending(status=2 if report["kind"] == "user" else 1, reason=report["line"], traceback=report["traceback"], signals=signals)
    if signals and status:
        return _Ending(status=128 + signals[0], reason=_stop_reason(signals[0], True), signals=signals)
    if report is not None:
        return _Ending(status=1, reason=report["line"])
    return _Ending(status=0) if status == 0 else _Ending(status=1, reason=f"torchrun ended with status {status}")


def _children(parent: int) -> list[int]:
    """Process ids of the children of a process, from /proc; empty where there is none."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()  # after "pid (name)": state, parent, ...
        except OSError:
            continue  # it has ended meanwhile
        if int(fields[1]) == parent:
            found.append(int(entry.parent.name))
    return found


def _send(process: int, number: int) -> None:
    """Signal a process that may have ended already."""
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return
