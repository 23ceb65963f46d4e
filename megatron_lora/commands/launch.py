"""The process that a user starts: check everything, start torchrun with the ranks that the config needs, exit with the run's status.

    check config, files, model, data, machine -> make the output directory -> torchrun (torchrun.py) -> ranks (rank.py) -> train.run

After a crash all of that is done again, as often as restarts.py allows.

Nothing is written before every check has passed. The ranks have a session of their own, so that
Ctrl-C and a closed terminal reach this process alone. It forwards every request to stop to
the ranks as SIGTERM, and they stop and save; at a second request torchrun ends them. On several
SLURM nodes (`srun` with one task per node) each node runs this, and the first node owns the output
directory.
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

from megatron_lora.commands.checks import check_run, choice, config_to_repeat, say_failed
from megatron_lora.commands.rank import LAUNCHED
from megatron_lora.commands.restarts import Restarts
from megatron_lora.commands.stop_signals import StopSignals, stop_reason
from megatron_lora.commands.torchrun import END_RANKS
from megatron_lora.config.live import Live
from megatron_lora.config.schema import RunConfig, load_config
from megatron_lora.environment import environment, num_cores
from megatron_lora.errors import UserError
from megatron_lora.output.lock_file import is_in_use
from megatron_lora.output.run_directory import RunDirectory, has_begun, job_states
from megatron_lora.training.stop_request import STOP_SIGNALS


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The machines of a run, and the index of this one."""

    count: int = 1
    index: int = 0
    address: str = ""
    port: str = ""


def train(config_path: str, overrides: list[str], signals: StopSignals, live: Live = Live()) -> int:  # noqa: B008  it is frozen
    """Run a config to its end; returns the recorded 0, 3 or 75, 2 for wrong input that a rank found, 1 for a crash.

    Raises Stopped where `signals` ask for it before anything is written.
    """
    config = load_config(config_path, overrides)
    config = config_to_repeat(config, live)
    nodes, restarts = find_nodes(os.environ), Restarts(live)
    if live.max_restarts and (nodes.count > 1 or live.replay is not None):
        raise UserError(
            f"--max-restarts: {live.max_restarts} needs a run on one node that repeats no other; leave it out, and run the command again"
        )
    ending = _start(config, config_path, overrides, signals, live, nodes)
    while ending.status == 1 and not ending.signals and (said := restarts.again(ending.out_of_memory)) is not None:
        print(f"megatron-lora: {said}", file=sys.stderr, flush=True)
        wait_until_free(Path(config.output_dir))
        try:
            ending = _start(config, config_path, overrides, signals, restarts.live, nodes)
        except UserError as error:
            return report_ending(_Ending(status=1, reason=f"the run cannot be resumed: {error}")).status
    return ending.status


def wait_until_free(path: Path, seconds: float = 60.0) -> None:
    """Wait until the processes of a run that has crashed are gone, though not for ever."""
    end = time.monotonic() + seconds
    while is_in_use(path) and time.monotonic() < end:
        time.sleep(0.1)


def _start(config: RunConfig, config_path: str, overrides: list[str], signals: StopSignals, live: Live, nodes: Nodes) -> "_Ending":
    """Start or resume a run, and report how it ends."""
    ranks_here = split_ranks(config, nodes)
    inputs = check_run(config, ranks_here, nodes.index == 0, live.from_older, live.keep_alive)
    command = [*torchrun_arguments(ranks_here, nodes), "-m", "megatron_lora", "train", config_path, *overrides, *live.words()]
    if nodes.index > 0:
        return report_ending(start_ranks(command, ranks_here, None, signals))
    say_failed(inputs)
    described = environment()
    signals.hold()
    with RunDirectory.create(config, described, inputs.failed, choice(live.from_older), inputs.rests_on, live.keep_alive) as run:
        ending = start_ranks(command, ranks_here, run.lock, signals)
        recorded = run.status()["exit_status"]
        if recorded is not None:
            return _Ending(status=recorded, signals=ending.signals)
        has_started = "running" in job_states(run.path).values()
        if ending.signals and not has_started and ending.status != 2:  # a rank that is asked to stop before it trains ends in its own way
            status = 75 if len(ending.signals) == 1 else 128 + ending.signals[0]
            ending = _Ending(status=status, reason=stop_reason(ending.signals[0], "it took a step"))
        if ending.status == 2 and not has_begun(run.path):
            run.discard()
            return report_ending(ending)
        try:
            run.finish(ending.status, ending.reason or "the run ended without a report")
        except OSError as error:
            print(f"megatron-lora: {run.path / 'status.json'} could not be written ({error.strerror})", file=sys.stderr)
        return report_ending(ending)


def find_nodes(environ: Mapping[str, str]) -> Nodes:
    """Read the machines from the variables of SLURM's step (one task per node), MASTER_ADDR and MASTER_PORT; one without SLURM."""
    count = int(environ.get("SLURM_STEP_NUM_NODES", "1"))
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", count))
    if tasks != count:
        raise UserError(f"srun: started {tasks} tasks on {count} nodes; use srun --ntasks-per-node=1, each task starts its own ranks")
    if count == 1:
        return Nodes()
    if not environ.get("MASTER_ADDR"):
        raise UserError(
            f"MASTER_ADDR: is not set, and {count} nodes need a common address; export the first node's host name as MASTER_ADDR"
        )
    port = environ.get("MASTER_PORT") or str(20000 + int(environ.get("SLURM_JOB_ID", "0")) % 10000)
    return Nodes(count=count, index=int(environ["SLURM_NODEID"]), address=environ["MASTER_ADDR"], port=port)


def split_ranks(config: RunConfig, nodes: Nodes) -> int:
    """Return the number of ranks per node; UserError when the ranks do not divide evenly."""
    ranks = config.parallel.world_size
    if ranks % nodes.count:
        raise UserError(f"parallel: {ranks} ranks do not divide over {nodes.count} nodes; use a number of nodes that divides {ranks}")
    return ranks // nodes.count


def torchrun_arguments(ranks_here: int, nodes: Nodes) -> list[str]:
    """Return torchrun's arguments for this node: a free port for one node, the first node's address for several."""
    if nodes.count == 1:
        return ["--standalone", "--nproc-per-node", str(ranks_here)]
    rendezvous = ["--master-addr", nodes.address, "--master-port", nodes.port]
    return ["--nnodes", str(nodes.count), "--node-rank", str(nodes.index), "--nproc-per-node", str(ranks_here), *rendezvous]


def rank_environment(environ: Mapping[str, str], ranks_here: int) -> dict[str, str]:
    """Return the environment of the ranks: this process's, with OMP_NUM_THREADS set to each rank's share of the cores if it is unset."""
    threads = str(max(1, min(16, num_cores() // ranks_here)))
    defaults = {
        "OMP_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # torch warns of process groups that connect at their first message, as ours do on purpose
    }
    offline = {"HF_HUB_OFFLINE": "1"}  # the checks have fetched the model
    return defaults | dict(environ) | offline


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Ending:
    """How torchrun ended: status 0, 1 (a crash), 2 (wrong input) or 128 + signal, the reason, and the signals that were forwarded."""

    status: int
    reason: str = ""
    traceback: str = ""
    signals: tuple[int, ...] = ()
    out_of_memory: bool = False


def report_ending(ending: _Ending) -> _Ending:
    """Print why a run ended, if there is a reason; return it."""
    if ending.reason:
        print(f"{ending.traceback}megatron-lora: {ending.reason}", file=sys.stderr, flush=True)
    return ending


def start_ranks(
    command: list[str], ranks_here: int, lock: int | None, signals: StopSignals, undone: str = "its state was saved"
) -> _Ending:
    """Run torchrun to its end and forward requests to it; return what its report says. It inherits the lock, also if this process dies.

    `undone` is what was not done yet if a signal ends it.
    """
    with tempfile.TemporaryDirectory(prefix="megatron-lora-") as folder:
        report_file = Path(folder) / "report.json"
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # torchrun and the ranks keep them blocked
        try:
            if signals.received:  # before there was anybody to stop
                return _Ending(status=128 + signals.received[0], signals=tuple(signals.received))
            torchrun = subprocess.Popen(
                [sys.executable, "-m", "megatron_lora.commands.torchrun", str(report_file), "--log-dir", folder, *command],
                env=rank_environment(os.environ, ranks_here) | {LAUNCHED: folder},
                pass_fds=() if lock is None else (lock,),
                start_new_session=True,
            )

            def forward() -> None:
                ranks = children_of(torchrun.pid) if len(signals.received) == 1 else []
                for process in ranks:
                    _send(process, signal.SIGTERM)
                if not ranks:
                    _send(torchrun.pid, END_RANKS)

            signals.pass_on(forward)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            status = torchrun.wait()
        finally:
            signals.hold()
            if torchrun.poll() is None:
                _send(torchrun.pid, END_RANKS)
        report = json.loads(report_file.read_text(encoding="utf-8")) if report_file.exists() else None
    received = tuple(signals.received)
    if report is not None and report["kind"] != "signal":
        status, out_of_memory = 2 if report["kind"] == "user" else 1, report["kind"] == "out of memory"
        words = {"reason": report["line"], "traceback": report["traceback"]}
        return _Ending(status=status, signals=received, out_of_memory=out_of_memory, **words)
    if received and status:
        return _Ending(status=128 + received[0], reason=stop_reason(received[0], undone), signals=received)
    if report is not None:
        return _Ending(status=1, reason=report["line"])
    return _Ending(status=0) if status == 0 else _Ending(status=1, reason=f"torchrun ended with status {status}")


def children_of(parent: int) -> list[int]:
    """Process ids of the children of a process, from /proc; empty where there is none."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()  # after "pid (name)": state, parent, ...
        except OSError:
            continue  # it has ended since
        if int(fields[1]) == parent:
            found.append(int(entry.parent.name))
    return found


def _send(process: int, number: int) -> None:
    """Signal a process that may have ended already."""
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return
