"""Which rank a failed run names, where a hung one was, and when a run is started again after a crash."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from killed import killed_at_every_change

from megatron_lora.__main__ import main
from megatron_lora.commands import launch, torchrun
from megatron_lora.errors import UserError


def status_file() -> dict:
    return json.loads(Path("out/status.json").read_text())


PEER, LATE = "RuntimeError: [..] Connection closed by peer [127.0.0.1]:31337", "RuntimeError: Timed out waiting 5ms for recv operation"


def failure(exitcode: int, at: float = 0.0, **data) -> SimpleNamespace:
    recorded = (
        {"time": at, "user": False, "message": "T", "out_of_memory": False, **data} if data else {"message": "<NONE>"}
    )  # as torch says that there is none
    return SimpleNamespace(exitcode=exitcode, timestamp=int(at), error_file_data=recorded)


@pytest.mark.parametrize(
    ("failures", "kind", "line"),
    [
        ({0: failure(1, 5.2, line=PEER), 1: failure(1, 5.1, line="torn")}, "crash", "rank 1: torn"),
        ({0: failure(1, 5.1, line=PEER), 1: failure(1, 5.2, line="torn")}, "crash", "rank 1: torn"),
        ({0: failure(1, 5.2, line="torn"), 1: failure(1, 5.1, line="rent")}, "crash", "rank 1: rent"),
        ({0: failure(1, 1.0, line=PEER), 1: failure(2, 5.1, line="r: 0", user=True)}, "user", "r: 0"),
        ({0: failure(1, 1.0, line=PEER), 1: failure(-9)}, "signal", "rank 1 was ended by SIGKILL"),
        ({0: failure(-6, 5.0), 1: failure(-9, 5.0)}, "signal", "rank 1 was ended by SIGKILL"),
        ({0: failure(-11, 5.0), 1: failure(-6, 5.0)}, "signal", "rank 0 was ended by SIGSEGV"),
        ({0: failure(-9, 35.0), 1: failure(1, 5.0, line="torn")}, "crash", "rank 1: torn"),  # it did not end on SIGTERM
        ({0: failure(-9, 35.0), 1: failure(-11, 5.0)}, "signal", "rank 1 was ended by SIGSEGV"),
        ({0: failure(-6, 5.0), 1: failure(1, 5.0, line="torn")}, "crash", "rank 1: torn"),
        ({0: failure(-15), 1: failure(1, 9.0, line="torn")}, "crash", "rank 1: torn"),
        ({0: failure(1, 8.0, line=PEER), 1: failure(-15, 9.0, line="torn")}, "crash", "rank 1: torn"),
        ({0: failure(-15), 1: failure(7)}, "crash", "rank 1: ended with status 7"),
        ({0: failure(1, 1.0, line=LATE), 1: failure(-9, 31.0)}, "signal", "rank 1 hung: rank 0"),
        ({0: failure(-6, 1.0), 1: failure(-9, 31.0), 2: failure(-15)}, "signal", "rank 1 hung: rank 0 timed out waiting for it"),
        ({0: failure(-15), 1: failure(-6)}, "signal", "rank 1 was ended by SIGABRT, which mostly means that NCCL failed, or waited"),
    ],
)
def test_of_several_failures_the_one_that_explains_the_others_is_reported(failures, kind, line):
    report = torchrun.explain(failures, {})
    assert report["kind"] == kind and report["line"].startswith(line)


def test_who_hung_and_where_is_told():
    from megatron_lora.output.whereabouts import Whereabout

    places = {0: Whereabout(5.0, "B", 16), 1: Whereabout(6.0, "wait F", 17), 2: Whereabout(4.0, "F", 17), 3: Whereabout(1.0, "wait B", 9)}
    failures = {1: failure(1, 9.0, line=LATE)} | {rank: failure(-15, 9.0) for rank in (0, 2, 3)}
    said = "rank 2 hung: rank 1 timed out waiting for it; rank 2 was in the forward of slot 17; rank 1 was waiting for the forward "
    assert torchrun.explain(failures, places)["line"] == said + "message of slot 17"
    killed = torchrun.explain(failures | {0: failure(-9, 40.0)}, places)
    assert killed["rank"] == 0 and "did not end on SIGTERM; rank 0 was in the backward of slot 16; rank 1" in killed["line"]
    nobody = torchrun.explain({1: failure(-6, 9.0), 3: failure(-15, 9.0)}, places)["line"]  # all wait: the network, mostly
    assert nobody.startswith("rank 1 was ended by SIGABRT") and nobody.endswith("; rank 1 was waiting for the forward message of slot 17")


def test_a_rank_that_is_killed_while_it_records_its_failure_leaves_a_whole_record_or_none(tmp_path, monkeypatch):
    file = tmp_path / "error.json"
    monkeypatch.setenv(torchrun.ERROR_FILE, str(file))

    def clear() -> None:
        file.unlink(missing_ok=True)

    for _ in killed_at_every_change(lambda: torchrun.record_failure(RuntimeError("torn" * 9999)), tmp_path, clear):
        assert not file.exists() or json.loads(file.read_text())["user"] is False
    assert json.loads(file.read_text())["line"].endswith("torn")


@pytest.mark.parametrize(
    ("error", "is_so"),
    [(MemoryError(), True), (RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"), True),
     (torch.OutOfMemoryError("CUDA out of memory"), True), (RuntimeError("matrix is torn"), False)],
)  # fmt: skip
def test_a_rank_that_runs_out_of_memory_is_known(error, is_so, tmp_path, monkeypatch):
    monkeypatch.setenv(torchrun.ERROR_FILE, str(tmp_path / "error.json"))
    torchrun.record_failure(error)
    recorded = json.loads((tmp_path / "error.json").read_text())
    report = torchrun.explain({0: failure(1, **recorded)}, {})
    assert report["kind"] == ("out of memory" if is_so else "crash")


def crashes(monkeypatch, *endings: dict) -> list[float]:
    """Have runs end in these ways, one after another; return a list of the memory that each start was given."""
    shares, left = [], list(endings)

    def start_ranks(command, *rest):
        shares.append(float(command[command.index("--memory-share") + 1]) if "--memory-share" in command else 1.0)
        return launch._Ending(**left.pop(0))

    monkeypatch.setattr(launch, "start_ranks", start_ranks)
    return shares


CRASH = {"status": 1, "reason": "rank 1 was ended by SIGKILL"}


def test_a_run_that_crashes_is_started_again_so_often_and_no_more(scene, monkeypatch, capfd):
    shares = crashes(monkeypatch, *[CRASH] * 3)
    assert main(["train", "config.yaml", "--max-restarts", "2"]) == 1 and len(shares) == 3
    err = capfd.readouterr().err.splitlines()
    assert [line for line in err if "restart" in line] == [
        f"megatron-lora: restart {number} of at most 2 within 3600 s, from the newest checkpoints" for number in (1, 2)
    ]
    assert err.count("megatron-lora: rank 1 was ended by SIGKILL") == 3 and status_file()["exit_status"] == 1


def test_restarts_are_counted_within_a_time(scene, monkeypatch):
    shares = crashes(monkeypatch, *[CRASH] * 4, {"status": 2, "reason": "base_model: is damaged"})
    assert main(["train", "config.yaml", "--max-restarts", "1", "--restart-window-s", "1e-9"]) == 2 and len(shares) == 5


@pytest.mark.parametrize("ending", [{"status": 2}, {"status": 143, "signals": (15,)}, {"status": 1, "signals": (15,)}])
def test_nothing_but_a_crash_is_started_again(ending, scene, monkeypatch):
    shares = crashes(monkeypatch, ending)
    main(["train", "config.yaml", "--max-restarts", "9"])
    assert len(shares) == 1


def test_after_running_out_of_memory_less_of_it_is_counted_on(scene, monkeypatch, capfd):
    shares = crashes(monkeypatch, CRASH | {"out_of_memory": True}, CRASH, CRASH | {"out_of_memory": True}, {"status": 2})
    assert main(["train", "config.yaml", "--max-restarts", "9"]) == 2
    assert shares == [1.0, 0.85, 0.85, 0.85**2]
    assert capfd.readouterr().err.count("; what is auto is now chosen for 85% of the memory") == 1


def test_a_run_that_cannot_be_resumed_after_a_crash_says_so(scene, monkeypatch, capfd):
    crashes(monkeypatch, CRASH)
    function = launch.check_run
    calls = []

    def damaged(*arguments, **keys):
        calls.append(0)
        if len(calls) == 2:
            raise UserError("checkpoint-3: is damaged")
        return function(*arguments, **keys)

    monkeypatch.setattr(launch, "check_run", damaged)
    assert main(["train", "config.yaml", "--max-restarts", "9"]) == 1 and capfd.readouterr().err.endswith("checkpoint-3: is damaged\n")


@pytest.mark.parametrize("flags", ["--max-restarts -1", "--restart-window-s 0", "--memory-share 1.5", "--memory-share nan"])
def test_wrong_options_of_restarts_are_one_line(flags, scene, capfd):
    assert main(["train", "config.yaml", *flags.split()]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and flags.split()[0] in err, err


def test_restarts_are_of_one_node(scene, monkeypatch, capfd):
    for name, value in {"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "0", "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, value)
    assert (
        main(["train", "config.yaml", "--max-restarts", "1"]) == 2 and "--max-restarts: 1 needs a run on one node" in capfd.readouterr().err
    )
