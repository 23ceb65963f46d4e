"""The command line from start to exit status: help, doctor, plan, preview, and how `train` reports the ways in which its ranks end.

The ranks here are real processes under torchrun. A sitecustomize on PYTHONPATH replaces train.py by a stand-in, so that they end in
the ways that matter without loading a model.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from waiting import wait_for

from megatron_lora.__main__ import EXAMPLES, main
from megatron_lora.commands import doctor, launch, rank
from megatron_lora.commands.rank import LAUNCHED
from megatron_lora.config.schema import ParallelConfig, load_config
from megatron_lora.errors import UserError
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.model import backends
from megatron_lora.output.run_directory import RunDirectory
from megatron_lora.planning.calibration import subject_of
from megatron_lora.planning.forecast import Workload, forecast
from scheduling.cost import DEVICES, CostModel, PassCost, StageCost
from scheduling.data_parallel import deal
from scheduling.slot_cost import SlotCost
from scheduling.types import Microbatch, Segment

ROOT = Path(__file__).resolve().parents[3]


def status_file() -> dict:
    return json.loads(Path("out/status.json").read_text())


def alive(process: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second: it ended between open and read
        return False


# ---- how a run ends ----


def test_a_run_ends_with_the_status_it_recorded_and_leaves_its_directory_described(scene, monkeypatch, capfd):
    monkeypatch.setenv("STAND_IN", "done")
    assert main(["train", "config.yaml", "jobs.a.r=4"]) == 3
    jobs = {"a": {"state": "done", "reason": ""}, "b": {"state": "failed", "reason": "not finite"}}
    status = status_file()
    assert {key: status[key] for key in ("exit_status", "reason", "jobs")} == {"exit_status": 3, "reason": "", "jobs": jobs}
    assert status.keys() == {"exit_status", "reason", "jobs", "rests_on", "files", "digest"} and "base weights" in status["rests_on"]
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
    assert {job["state"] for job in status_file()["jobs"].values()} == {"paused"}


def test_a_mistake_that_only_a_rank_can_find_is_one_line_and_leaves_nothing(scene, monkeypatch, capfd):
    monkeypatch.setenv("STAND_IN", "mistake")
    assert main(["train", "config.yaml"]) == 2
    assert capfd.readouterr().err == "megatron-lora: base_model: shard 2 is damaged; fetch it again\n"
    assert not Path("out").exists()


def test_a_crash_is_reported_once_with_its_traceback_and_recorded(scene, monkeypatch, capfd):
    monkeypatch.setenv("STAND_IN", "crash")
    assert main(["train", "config.yaml"]) == 1
    err = capfd.readouterr().err
    assert err.count("Traceback") == 1 and err.count("RuntimeError: matrix is torn") == 2
    assert err.endswith("megatron-lora: rank 1: RuntimeError: matrix is torn\n")
    job = status_file()["jobs"]["a"]
    assert (job["state"], job["reason"]) == ("paused", "rank 1: RuntimeError: matrix is torn")


def test_no_rank_outlives_a_killed_launcher(scene, monkeypatch):
    monkeypatch.setenv("STAND_IN", "wait")
    monkeypatch.setenv(LAUNCHED, str(scene))
    RunDirectory.create(load_config("config.yaml")).close()
    command = ["report.json", "--standalone", "--nproc-per-node", "2", "-m", "megatron_lora", "train", "config.yaml"]
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-m', 'megatron_lora.commands.torchrun', *{command}])"
    launcher = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: all(Path(f"rank{rank}.ready").exists() for rank in (0, 1)))
    ranks = [int(Path(f"rank{rank}.pid").read_text()) for rank in (0, 1)]
    assert all(map(alive, ranks))
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(map(alive, ranks)), 30)


def test_a_wrong_number_of_ranks_under_a_bare_torchrun_is_refused(scene):
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}
    ran = subprocess.run(
        [sys.executable, "-m", "megatron_lora", "train", "config.yaml"], env=os.environ | ranks, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1
    assert "needs 2 ranks and torchrun started 3; start it with --nproc-per-node 2" in ran.stderr
    assert not Path("out").exists()


@pytest.mark.parametrize("line", [line.strip() for text in EXAMPLES.values() for line in text.splitlines() if " configs/" in line])
def test_examples_of_the_help_are_good_configs(line, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[3])
    found = []
    monkeypatch.setattr("megatron_lora.__main__.run", lambda arguments: found.append(arguments) or 0)
    assert main(line.split()[1:]) == 0
    (arguments,) = found
    config = load_config(arguments.config, arguments.overrides)
    assert arguments.command != "preview" or arguments.job in {job.name for job in config.jobs}


# ---- where ranks start ----


def test_ranks_share_the_cores_unless_the_user_says_otherwise():
    assert launch.rank_environment({}, ranks_here=10_000)["OMP_NUM_THREADS"] == "1"
    assert launch.rank_environment({"OMP_NUM_THREADS": "5"}, ranks_here=2)["OMP_NUM_THREADS"] == "5"


GIVEN = {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}


@pytest.mark.parametrize("role", [{}, {"RANK": "0", "LOCAL_RANK": "0"}], ids=["launcher", "rank"])
@pytest.mark.parametrize(("given", "setting"), [({}, "expandable_segments:True"), (GIVEN[0], "backend:cudaMallocAsync"), (GIVEN[1], None)])
def test_segments_of_the_allocator_grow_unless_the_user_says_otherwise(monkeypatch, role, given, setting):
    monkeypatch.setattr(os, "environ", role | given)
    found = []
    for module, name in ((launch, "train"), (rank, "main")):
        monkeypatch.setattr(module, name, lambda *_: found.extend((os.environ, launch.rank_environment(os.environ, 1))))
    main(["train", "config.yaml"])
    assert [environ.get("PYTORCH_CUDA_ALLOC_CONF") for environ in found] == [setting, setting]


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


@pytest.mark.parametrize("command", list(EXAMPLES))
def test_help_shows_examples_and_loads_nothing_heavy(command):
    code = "import sys, megatron_lora.__main__ as m\ntry: m.main()\nfinally: print({'torch', 'transformers', 'yaml'} & sys.modules.keys())"
    ran = subprocess.run([sys.executable, "-c", code, command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and f"megatron-lora {command} " in ran.stdout + " " and "example" in ran.stdout
    assert ran.stdout.endswith("set()\n")


def planned(capsys, *arguments: str) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]], list[str]]:
    """Run plan; returns its table of jobs, its table of stages, and its sentences."""
    assert main(["plan", "config.yaml", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [number for number, line in enumerate(lines) if line.split()[-1:] in (["gain"], ["memory"])]
    jobs, stages = ({}, {})
    for table, head in zip((jobs, stages), heads, strict=True):
        columns = lines[head].split()
        for number in range(head + 1, len(lines)):
            cells = re.split(
                r"(?<!together,) +", lines[number].replace("one by one", "one-by-one").replace(" GB", "GB").replace(" MB", "MB").strip()
            )
            if not lines[number] or lines[number].startswith("Too much"):
                break
            table[cells[0]] = dict(zip(columns, cells[1:] if table is jobs else cells, strict=False))
    return jobs, stages, lines[: heads[0]] + lines[heads[1] + 1 + len(stages) :]


def test_plan_shows_each_job_each_stage_and_what_co_training_gains(scene, capsys):
    jobs, stages, words = planned(capsys)
    assert list(jobs) == ["a", "b", "one-by-one", "together, ours"] and list(stages) == ["0", "1"]
    one_by_one, together = jobs["one-by-one"], jobs["together, ours"]
    assert together["steps"] == one_by_one["steps"] == "6" and together["tokens"] == one_by_one["tokens"]
    assert int(jobs["a"]["slots"]) + int(jobs["b"]["slots"]) == int(one_by_one["slots"])
    seconds = {name: float(row["seconds"]) for name, row in jobs.items()}
    assert seconds["a"] + seconds["b"] == pytest.approx(seconds["one-by-one"], rel=0.01)
    gain = float(together["gain"].rstrip("x"))
    assert gain == pytest.approx(seconds["one-by-one"] / seconds["together, ours"], rel=0.02) and gain > 1.1
    assert f"expect {gain:.2f}x over the jobs one by one." in "\n".join(words)
    assert sum(int(row["layers"]) for row in stages.values()) == 4
    assert any("This machine has no GPU: seconds and memory are predicted for h100" in line for line in words)
    assert not Path("out").exists()


def test_plan_takes_a_policy_a_device_and_a_measured_cost(scene, capsys):
    together = "together, ours"
    ours = float(planned(capsys)[0][together]["seconds"])
    assert float(planned(capsys, "--policy", "flush")[0]["together, flush"]["gain"].rstrip("x")) == 1.0
    assert float(planned(capsys, "--policy", "round-robin")[0]["together, round-robin"]["seconds"]) >= ours
    on_cpu, _, words = planned(capsys, "--device", "cpu")
    assert float(on_cpu[together]["seconds"]) > ours and any("predicted for cpu" in line for line in words)
    cost = {side: {"per_token": 0.0, "per_square": 0.0, "per_rank_token": 0.0, "fixed": 0.5} for side in ("forward", "backward")}
    none = {side: terms | {"fixed": 0.0} for side, terms in cost.items()}  # a stage has two layers: a second there, a second back
    model = read_architecture(yaml.safe_load(Path("config.yaml").read_text())["base_model"])
    of = subject_of(load_config("config.yaml"), model, DEVICES["cpu"])
    table = {"format": 1, "of": of, "layers": dict.fromkeys(("none", "cheap", "full"), cost), "head": none, "step_s": 0.0, "links": {}}
    Path("cost.json").write_text(json.dumps(table | {"about": {"date": "today", "memory_bytes": 8e9}}))
    measured, _, words = planned(capsys, "--cost", "cost.json", "parallel.layers_per_stage=[2,2]")
    assert float(measured[together]["seconds"]) == 2 * (int(measured[together]["slots"]) + 1)  # and one to fill and drain
    assert any("by the calibration of cpu of today" in line for line in words)


def test_plan_resolves_what_is_open_and_warns_of_too_little_memory(scene, capsys):
    _, stages, words = planned(capsys, "microbatch_tokens=auto", "parallel.layers_per_stage=[3, 1]")
    assert any(line.startswith("microbatch_tokens: auto is ") for line in words) and stages["0"]["layers"] == "3"
    huge = ["load_weights=false", "defaults.r=256", "defaults.lora_alpha=1"]
    config = json.loads(Path(yaml.safe_load(Path("config.yaml").read_text())["base_model"], "config.json").read_text())
    Path("wide").mkdir()
    for file in Path(yaml.safe_load(Path("config.yaml").read_text())["base_model"]).glob("token*"):
        Path("wide", file.name).write_bytes(file.read_bytes())
    Path("wide/config.json").write_text(json.dumps(config | {"intermediate_size": 10**7}))
    assert any(
        "Too much for 8.0 GB on cpu: stage 0 needs" in line for line in planned(capsys, *huge, "base_model=wide", "--device", "cpu")[2]
    )


def test_plan_counts_replicas_and_padding(scene, capsys):
    alone = planned(capsys, "parallel.pipeline=1")[0]["together, ours"]
    both = planned(capsys, "parallel.pipeline=1", "parallel.data=2")[0]["together, ours"]
    assert both["tokens"] == alone["tokens"] and int(both["fill"][:-1]) < int(alone["fill"][:-1])  # of twice the slots
    assert both["padding"] == "0.0%"
    padded = planned(capsys, "parallel.pipeline=1", "parallel.tensor=2", "parallel.sequence=true")[0]["together, ours"]
    assert padded["padding"] != "0.0%"


def test_plan_counts_the_loss_for_targets_alone(scene, capsys):
    model = Path(yaml.safe_load(Path("config.yaml").read_text())["base_model"])
    Path("wide").mkdir()
    for file in model.glob("token*"):
        Path("wide", file.name).write_bytes(file.read_bytes())
    Path("wide/config.json").write_text(json.dumps(json.loads((model / "config.json").read_text()) | {"vocab_size": 10**6}))
    Path("even.jsonl").write_text('{"prompt": "a b c d e f", "completion": " g h"}\n' * 40)
    even = [f"jobs.{name}.datasets.0.path=even.jsonl" for name in ("a", "b")]
    wide = ["base_model=wide", "load_weights=false", "microbatch_tokens=900", "parallel.pipeline=1", "--device", "cpu"]
    some, every = (planned(capsys, *wide, *even, f"defaults.train_on_inputs={inputs}") for inputs in ("false", "true"))
    assert any("The loss is counted for 33% of the tokens" in line for line in some[2])
    assert any("The loss is counted for 89% of the tokens" in line for line in every[2])
    ratio = float(some[0]["together, ours"]["seconds"]) / float(every[0]["together, ours"]["seconds"])
    assert ratio == pytest.approx((900 / 3 + 75 / 2) / (900 * 8 / 9 + 75 / 2), rel=0.06)  # chunks of 75 rows; all else counts little


def test_plan_says_when_co_training_gains_nothing(scene, capsys):
    Path("even.jsonl").write_text('{"prompt": "a b c d e f", "completion": " g h"}\n' * 5)
    even = [f"jobs.{name}.datasets.0.path=even.jsonl" for name in ("a", "b")]
    words = planned(capsys, "parallel.pipeline=1", "microbatch_tokens=10", *even)[2]  # one sample fills a slot
    assert words[-1] == "One GPU, and each job fills its microbatches: expect 1.0x."
    assert planned(capsys, "parallel.pipeline=2", "--policy", "flush")[2][-1] == "2 stages: expect 1.0x."


def test_a_plan_in_figures_by_hand():
    second = PassCost(per_token=0.01, per_square=0.0, per_rank_token=0.0, fixed=0.0)
    lengths = [[[100]], [[50, 50]]]

    def workload(num_stages: int, replicas: int = 1) -> Workload:
        return Workload(
            config=SimpleNamespace(
                parallel=ParallelConfig(pipeline=num_stages, data=replicas), jobs=[SimpleNamespace(lora_rank=8)] * 2, microbatch_tokens=200
            ),
            dealt=deal(lengths, replicas),
            cost=CostModel((StageCost(second, second),) * num_stages),
            weights=SlotCost(),
        )

    full, half = Microbatch((Segment(0, 0, (0,), 100),)), Microbatch((Segment(1, 0, (0, 1), 100),))
    once = forecast(((full, Microbatch(), half),), workload(1))
    f = once.figures
    assert (f.tokens, f.slots, f.noops, f.fill, f.uneven, f.padding) == (200, 3, 1, 200 / 600, 0.0, 0.0)
    assert f.seconds == pytest.approx(4.0) and f.bubble == pytest.approx(0.0) and once.shares() == [0.5, 0.5]
    assert forecast(((full,),), workload(3)).figures.bubble == pytest.approx(2 / 3)
    assert forecast(((full,),), workload(2), hop_s=0.5).figures.seconds == pytest.approx(4.0 + 2 * 0.5)
    assert forecast(((full,), (half,)), workload(1), step_s=0.25).figures.seconds == pytest.approx(4.0 + 2 * 0.25)
    flushed = forecast(((full,), (half,)), workload(3))
    assert flushed.figures.seconds == pytest.approx(12.0) and flushed.of_job(1).seconds == pytest.approx(6.0)
    assert flushed.tokens_in_flight(0) == 100 and once.tokens_in_flight(0) == 100 and once.largest_slot == 100
    dealt = forecast(((full, Microbatch((Segment(1, 0, (0,), 50),))),), workload(1, replicas=2)).figures
    assert dealt.tokens == 200 and dealt.seconds == pytest.approx(3.0)  # 100 tokens on one replica, then 50 on both


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
    records = [json.loads(line) for line in (materials / "b.jsonl").read_text().splitlines()[:2]]
    for record in records:
        assert record["prompt"] in out and f"«{record['completion'].strip()}" in out.replace("« ", "«")
    assert out.count("«") == 2 and "\x1b" not in out


@pytest.mark.parametrize("matrix", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tokens_that_the_base_model_never_trained_are_named(scene, materials, capsys, matrix):
    shutil.copytree(materials / "model", "own")
    tensors = load_file("own/model.safetensors")
    for scale, named in ((1.0, False), (1e-3, True)):
        tensors[matrix][2] *= scale  # of </s>, which ends each record
        save_file(tensors, "own/model.safetensors", metadata={"format": "pt"})
        assert main(["plan", "config.yaml", "base_model=own"]) == 0
        warning = "warning: base_model: has untrained rows for </s>, which stand in the data of a, b; such tokens can hardly be learnt"
        assert (warning in capsys.readouterr().err) == named


def test_doctor_names_versions_and_backends(capsys):
    assert doctor.main() == 0
    found = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}

    assert torch.__version__.split("+")[0] in found["torch"] and (torch.version.cuda or "CPU") in found["torch built for"]
    assert {"python", "megatron-core", "transport", "attention", "fused kernels", "precision auto", "NVIDIA apex"} <= found.keys()


@pytest.mark.parametrize(
    ("cudnn", "attention", "tried", "says"),
    [
        ("1.32.0", "cuDNN's, of variable length", "tried on the GPU", "for backend: auto"),
        (None, "torch's, of variable length", "", "less speed"),
    ],
)
def test_doctor_says_whose_attention(cudnn, attention, tried, says, monkeypatch):
    monkeypatch.setattr(backends, "this_machine", lambda: backends.Machine(capability=(9, 0), cudnn=cudnn))
    found = {finding.subject: finding for finding in doctor.backends()}
    assert found["attention"].found == attention and found["attention"].missing.startswith(tried)
    assert says in found["cuDNN's attention"].missing


def test_doctor_says_what_a_triton_that_is_not_known_costs_on_hopper():
    assert not doctor.hopper_kernels((9, 0), (3, 6)) and not doctor.hopper_kernels((10, 0), (3, 10)) and not doctor.hopper_kernels(None)
    for version in ((3, 5), (3, 10)):
        assert "7% longer" in doctor.hopper_kernels((9, 0), version)


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
     ("megatron-core", "0.20.0", False), ("megatron-core", "0.19.2", True), ("numpy", "1.0", True),
     ("transformers", "5.15.2", False), ("transformers", "5.16.0", True)],
)  # fmt: skip
def test_doctor_knows_the_supported_versions(name, version, fits):
    assert (doctor.out_of_range(name, version) == "") is fits
