"""The command line from start to exit status: help, doctor, plan, preview, and what `train` makes of how its ranks end.

The ranks here are real processes under torchrun with a stand-in for train.py, put in place by a sitecustomize on PYTHONPATH, so that
they end in the ways that matter without loading a model.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import oracle
import pytest
import yaml

from megatron_lora import agent, doctor, launch
from megatron_lora.__main__ import main
from megatron_lora.config import load_config
from megatron_lora.errors import UserError
from megatron_lora.plan_report import measure
from megatron_lora.run_dir import RunDirectory
from megatron_lora.worker import LAUNCHED
from scheduling.slot_cost import SlotCost
from scheduling.types import Microbatch, Segment

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = """
import os, signal, sys, time, types

def run(config):
    from megatron_lora.errors import UserError
    from megatron_lora.run_dir import RunDirectory
    mode, rank = os.environ["STAND_IN"], int(os.environ["RANK"])
    open(f"rank{rank}.pid", "w").write(str(os.getpid()))
    if mode == "wait":
        asked = []
        signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
        open(f"rank{rank}.ready", "w").close()
        while not asked:
            time.sleep(0.02)
        return 75
    if mode == "done" and rank == 0:
        with RunDirectory.join(config) as directory:
            directory.set_job("a", "done")
            directory.set_job("b", "failed", "not finite")
    if mode in ("mistake", "crash") and rank == 1:
        time.sleep(0.3)  # the other is waiting by now
        raise UserError("base_model: shard 2 is damaged; fetch it again") if mode == "mistake" else RuntimeError("matrix is torn")
    if mode in ("mistake", "crash"):
        time.sleep(60)
    return 3 if mode == "done" else 0

sys.modules["megatron_lora.train"] = types.SimpleNamespace(run=run)
"""


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("materials")
    oracle.make_model(root / "model")
    for seed, name in enumerate(("a", "b")):
        oracle.make_rows(root / f"{name}.jsonl", num_rows=12, seed=seed, longest=20)
    return root


@pytest.fixture
def scene(materials, tmp_path, monkeypatch) -> Path:
    """A folder with config.yaml for two jobs on two stages, and the stand-in in the way of train.py."""
    datasets = {name: [{"path": str(materials / f"{name}.jsonl"), "type": "prompt_completion"}] for name in ("a", "b")}
    config = {
        "base_model": str(materials / "model"),
        "output_dir": "out",
        "microbatch_tokens": 64,
        "parallel": {"pipeline": 2},
        "jobs": [{"name": name, "datasets": datasets[name], "global_batch_size": 4} for name in ("a", "b")],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "stand_in").mkdir()
    (tmp_path / "stand_in" / "sitecustomize.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "stand_in"), str(ROOT)]))
    monkeypatch.setenv("MEGATRON_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return tmp_path


def status_file() -> dict:
    return json.loads(Path("out/status.json").read_text())


def alive(process: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# ---- how a run ends ----


def test_a_run_ends_with_the_status_it_recorded_and_leaves_its_directory_described(scene, monkeypatch, capfd):
    monkeypatch.setenv("STAND_IN", "done")
    assert main(["train", "config.yaml", "jobs.a.r=4"]) == 3
    jobs = {"a": {"state": "done", "reason": ""}, "b": {"state": "failed", "reason": "not finite"}}
    assert status_file() == {"exit_status": 3, "reason": "", "jobs": jobs}
    assert load_config("out/config.yaml") == load_config("config.yaml", ["jobs.a.r=4"])
    environment = json.loads(Path("out/env.json").read_text())
    assert environment["packages"]["torch"] and environment["packages"]["megatron-core"] and environment["cores"] >= 1
    assert capfd.readouterr().err == ""


def test_sigusr1_reaches_the_ranks_as_sigterm_and_a_saved_run_gives_75(scene, monkeypatch):
    monkeypatch.setenv("STAND_IN", "wait")

    def ask():
        wait_for(lambda: all(Path(f"rank{rank}.ready").exists() for rank in (0, 1)))
        os.kill(os.getpid(), signal.SIGUSR1)

    asker = threading.Thread(target=ask)
    asker.start()
    status = main(["train", "config.yaml"])
    asker.join()
    assert status == 75 and status_file()["exit_status"] == 75
    assert {job["state"] for job in status_file()["jobs"].values()} == {"queued"}


def test_a_mistake_that_only_a_rank_can_find_is_one_line_and_leaves_nothing(scene, monkeypatch, capfd):
    monkeypatch.setenv("STAND_IN", "mistake")
    assert main(["train", "config.yaml"]) == 2
    assert capfd.readouterr().err == "megatron-lora: base_model: shard 2 is damaged; fetch it again\n"
    assert not Path("out").exists()


def test_a_crash_is_told_once_with_its_traceback_and_recorded(scene, monkeypatch, capfd):
    monkeypatch.setenv("STAND_IN", "crash")
    assert main(["train", "config.yaml"]) == 1
    err = capfd.readouterr().err
    assert err.count("Traceback") == 1 and err.count("RuntimeError: matrix is torn") == 2
    assert err.endswith("megatron-lora: rank 1: RuntimeError: matrix is torn\n")
    assert status_file()["jobs"]["a"] == {"state": "failed", "reason": "rank 1: RuntimeError: matrix is torn"}


def test_no_rank_outlives_a_killed_launcher(scene, monkeypatch):
    monkeypatch.setenv("STAND_IN", "wait")
    monkeypatch.setenv(LAUNCHED, "1")
    RunDirectory.create(load_config("config.yaml")).close()
    command = ["report.json", "--standalone", "--nproc-per-node", "2", "-m", "megatron_lora", "train", "config.yaml"]
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-m', 'megatron_lora.agent', *{command}])"
    launcher = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: all(Path(f"rank{rank}.ready").exists() for rank in (0, 1)))
    ranks = [int(Path(f"rank{rank}.pid").read_text()) for rank in (0, 1)]
    assert all(map(alive, ranks))
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(map(alive, ranks)), 30)


def failure(exitcode: int, at: float = 0.0, **data) -> SimpleNamespace:
    return SimpleNamespace(exitcode=exitcode, timestamp=int(at), error_file_data={"time": at, **data} if data else {})


@pytest.mark.parametrize(
    ("failures", "kind", "line"),
    [
        ({0: failure(1, 5.2, line="peer closed", message="T"), 1: failure(1, 5.1, line="torn", message="T")}, "crash", "rank 1: torn"),
        ({0: failure(1, 1.0, line="peer closed", message="T"), 1: failure(2, 5.1, line="r: 0", user=True)}, "user", "r: 0"),
        ({0: failure(1, 1.0, line="peer closed", message="T"), 1: failure(-9)}, "signal", "rank 1 was ended by SIGKILL"),
        ({0: failure(-15), 1: failure(1, 9.0, line="torn", message="T")}, "crash", "rank 1: torn"),
        ({0: failure(-15), 1: failure(7)}, "crash", "rank 1: ended with status 7"),
    ],
)
def test_of_several_failures_the_one_that_explains_the_others_is_told(failures, kind, line):
    report = agent.explain(failures)
    assert report["kind"] == kind and report["line"].startswith(line)


def test_a_wrong_number_of_ranks_under_a_bare_torchrun_is_refused(scene):
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}
    ran = subprocess.run(
        [sys.executable, "-m", "megatron_lora", "train", "config.yaml"], env=os.environ | ranks, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1
    assert "needs 2 ranks and torchrun started 3; start it with --nproc-per-node 2" in ran.stderr
    assert not Path("out").exists()


# ---- where ranks start ----


def test_ranks_share_the_cores_unless_the_user_says_otherwise():
    assert launch.rank_environment({}, ranks_here=10_000)["OMP_NUM_THREADS"] == "1"
    assert launch.rank_environment({"OMP_NUM_THREADS": "5"}, ranks_here=2)["OMP_NUM_THREADS"] == "5"


def test_slurm_nodes_meet_at_the_first_and_split_the_ranks(scene):
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "1", "MASTER_ADDR": "node7", "SLURM_JOB_ID": "123"}
    nodes = launch.find_nodes(step)
    assert launch.split_ranks(load_config("config.yaml", ["parallel.pipeline=8"]), nodes) == 4
    arguments = " ".join(launch.torchrun_arguments(4, nodes))
    assert arguments == "--nnodes 2 --node-rank 1 --nproc-per-node 4 --master-addr node7 --master-port 20123"
    assert launch.find_nodes({"SLURM_NNODES": "4"}) == launch.Nodes()  # an allocation without srun: this machine alone
    for broken, words in [({"MASTER_ADDR": ""}, "MASTER_ADDR: is not set"), ({"SLURM_STEP_NUM_TASKS": "8"}, "--ntasks-per-node=1")]:
        with pytest.raises(UserError, match=words):
            launch.find_nodes(step | broken)
    with pytest.raises(UserError, match="3 ranks do not divide over 2 nodes"):
        launch.split_ranks(load_config("config.yaml", ["parallel.pipeline=3"]), nodes)


# ---- the other commands ----


@pytest.mark.parametrize("command", ["train", "plan", "preview", "doctor"])
def test_help_shows_examples_and_loads_nothing_heavy(command):
    code = "import sys, megatron_lora.__main__ as m\ntry: m.main()\nfinally: print({'torch', 'transformers', 'yaml'} & sys.modules.keys())"
    ran = subprocess.run([sys.executable, "-c", code, command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and f"megatron-lora {command} " in ran.stdout + " " and "example" in ran.stdout
    assert ran.stdout.endswith("set()\n")


def test_plan_shows_each_job_and_what_co_training_gains(scene, capsys):
    assert main(["plan", "config.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["a", "b", "together"]
    assert "2 stages, 64 tokens per microbatch" in lines[5] and "less time than one after another" in lines[7]
    together = dict(zip(lines[0].split(), lines[3].split()[1:], strict=True))
    alone = [dict(zip(lines[0].split(), line.split()[1:], strict=True)) for line in lines[1:3]]
    assert together["steps"] == "6" and int(together["slots"]) < sum(int(job["slots"]) for job in alone)
    assert not Path("out").exists()


def test_plan_says_when_co_training_gains_nothing(scene, capsys):
    Path("even.jsonl").write_text('{"prompt": "a b c d e f", "completion": " g h"}\n' * 5)
    even = [f"jobs.{name}.datasets.0.path=even.jsonl" for name in ("a", "b")]
    assert main(["plan", "config.yaml", "parallel.pipeline=1", "microbatch_tokens=10", *even]) == 0  # one sample fills a slot
    assert "Co-training gains nothing here" in capsys.readouterr().out
    config = yaml.safe_load(Path("config.yaml").read_text())
    Path("config.yaml").write_text(yaml.safe_dump(config | {"jobs": config["jobs"][:1]}))
    assert main(["plan", "config.yaml"]) == 0
    assert "nothing to co-train it with" in capsys.readouterr().out


def test_figures_count_fill_no_ops_and_bubble():
    full = Microbatch((Segment(0, 0, (0,), 100),))
    slot = SlotCost().slot([100])
    figures = measure((full, Microbatch(), full), [[[100]]], num_stages=1, budget=200)
    assert (figures.tokens, figures.slots, figures.noops) == (200, 3, 1)
    assert figures.fill == 200 / 600 and figures.bubble == 0.0 and figures.time == pytest.approx(2 * 2 * slot)
    assert measure((full,), [[[100]]], num_stages=3, budget=100).bubble == pytest.approx(2 / 3)


def test_plan_draws_a_new_picture_and_overwrites_none(scene, capsys):
    assert main(["plan", "config.yaml", "--plot", "plan.png"]) == 0
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")
    for name, words in [("plan.png", "exists"), ("plan.doc", "no kind of picture"), ("no/plan.png", "make 'no' first")]:
        assert main(["plan", "config.yaml", "--plot", name]) == 2
        err = capsys.readouterr().err
        assert f"--plot: '{name}'" in err and words in err and err.count("\n") == 1


def test_preview_marks_what_the_loss_counts(scene, materials, capsys):
    assert main(["preview", "config.yaml", "--job", "b", "--samples", "2", "jobs.b.seed=1"]) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in (materials / "b.jsonl").read_text().splitlines()[:2]]
    for row in rows:
        assert row["prompt"] in out and f"«{row['completion'].strip()}" in out.replace("« ", "«")
    assert out.count("«") == 2 and "\x1b" not in out


def test_doctor_names_versions_and_backends(capsys):
    assert doctor.main() == 0
    found = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    import torch

    assert torch.__version__.split("+")[0] in found["torch"] and (torch.version.cuda or "CPU") in found["torch built for"]
    assert {"python", "megatron-core", "transport", "attention", "fused kernels", "precision auto", "NVIDIA apex"} <= found.keys()


def test_doctor_does_not_take_another_apex_for_nvidias(tmp_path, monkeypatch):
    (tmp_path / "pypi" / "apex").mkdir(parents=True)
    (tmp_path / "pypi" / "apex" / "__init__.py").write_text("import pyramid")  # importing it would fail
    (tmp_path / "nvidia" / "apex" / "multi_tensor_apply").mkdir(parents=True)
    (tmp_path / "nvidia" / "apex" / "__init__.py").write_text("raise RuntimeError('imported')")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path / "pypi")
        assert doctor.apex()[0].found == "missing" and "another project" in doctor.apex()[0].missing
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path / "nvidia")
        assert doctor.apex()[0].found == "present"


@pytest.mark.parametrize(
    ("name", "version", "fits"),
    [("torch", "2.11.0+cu128", True), ("torch", "2.7.1", False), ("megatron-core", "0.16.1", True), ("megatron-core", "0.16.0", False),
     ("megatron-core", "0.20.0", False), ("megatron-core", "0.19.2", True), ("numpy", "1.0", True)],
)  # fmt: skip
def test_doctor_knows_the_supported_versions(name, version, fits):
    assert (doctor.out_of_range(name, version) == "") is fits
