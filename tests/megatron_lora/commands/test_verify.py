"""`verify` says 0 where a job trains among others as it does alone, and 1 where another job changes it; the runs are on the pool's rank."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys

import oracle
import pytest
import runs

from megatron_lora.__main__ import main
from megatron_lora.commands import launch, verify
from megatron_lora.commands.stop_signals import StopSignals
from megatron_lora.config.schema import load_config

STEPS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The file of a config of three jobs, which has other ends than `verify` wants."""
    root, jobs = tmp_path_factory.mktemp("verify"), []
    for k, name in enumerate(("first", "mine", "last")):
        rows = oracle.make_rows(root / f"rows-{k}.jsonl", num_rows=12, seed=10 + k)
        job = {"name": name, "datasets": [{"path": str(rows), "type": "prompt_completion"}], "r": 4 + 4 * k, "num_epochs": 3}
        jobs.append(job | {"learning_rate": 1e-3, "global_batch_size": 3, "adam_epsilon": 1e-6, "warmup_ratio": 0.0, "save_steps": 1})
    jobs[1] |= {"lora_dropout": 0.1, "val_set_size": 3, "early_stopping_patience": 1, "loss_watchdog_threshold": 1e-3}
    return runs.write_config(root / "config.yaml", oracle.make_model(root / "model"), root / "run", jobs, {}, 96)


@pytest.fixture
def trained(pool, monkeypatch):
    """Have `verify` train on the pool; return what it trained."""
    found = []

    def train(path, overrides, signals):
        found.append(load_config(path, overrides))
        return runs.start(pool, path, {})

    monkeypatch.setattr(launch, "train", train)
    return found


def test_a_job_is_the_same_alone_and_among_others(config, trained, capsys):
    assert main(["verify", str(config), "--job", "mine", "--steps", str(STEPS)]) == 0
    assert [[job.name for job in each.jobs] for each in trained] == [["mine"], ["mine", "first", "last"]]
    for each in trained:
        assert each.precision == "fp32" and {job.max_steps for job in each.jobs} == {STEPS} and {job.save_steps for job in each.jobs} == {0}
    out = capsys.readouterr().out
    assert f"mine: alone and among 2 others, {STEPS} steps in fp32" in out and "trains among the others as it does alone" in out
    assert not (config.parent / "run").exists()


def test_the_command_on_real_ranks_leaves_nothing_behind(config, tmp_path):
    """Two stages are two processes; the runs, and what torchrun writes beside them, are gone when it ends."""
    command = [sys.executable, "-m", "megatron_lora", "verify", str(config), "--job", "mine", "--steps", "2", "parallel.pipeline=2"]
    environ = os.environ | {"TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("megatron-lora: ")] == [
        f"megatron-lora: mine {how}, 2 steps in fp32" for how in ("alone", "among 2 others")
    ]
    assert lines[-1] == "  the job trains among the others as it does alone" and not done.stderr
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("torchinductor_")]


def test_a_verification_that_is_stopped_does_not_go_on(config, capsys, monkeypatch):
    signals = StopSignals()
    monkeypatch.setattr(launch, "train", lambda *words: signals.received.append(signal.SIGTERM) or 75)
    assert verify.main(str(config), [], "mine", 2, signals) == 128 + signal.SIGTERM
    assert "nothing is kept" in capsys.readouterr().err


def test_a_job_that_others_change_is_beyond_the_bounds(config, trained, capsys, monkeypatch):
    in_steps = verify.in_steps

    def spoilt(*arguments):
        found = in_steps(*arguments)
        return dataclasses.replace(found, jobs=Jobs(found.jobs))

    class Jobs(tuple):
        def __getitem__(self, places):  # the jobs that train alone
            return tuple(dataclasses.replace(job, learning_rate=1.1e-3) for job in tuple(self)[places])

    monkeypatch.setattr(verify, "in_steps", spoilt)
    assert main(["verify", str(config), "--job", "mine", "--steps", str(STEPS)]) == 1
    assert "beyond the bounds" in capsys.readouterr().out


def test_what_is_trained_twice_is_compared_in_fp32_and_given_to_nobody(config):
    loaded = load_config(config, ["on_save.url=http://host", "defaults.export=portable", "defaults.export_dtype=bf16"])
    found = verify.in_steps(loaded, "mine", 3, "fp32")
    assert not found.on_save and {(job.export, job.export_dtype) for job in found.jobs} == {("peft", "fp32")}


def test_a_loss_that_is_not_finite_is_no_agreement(tmp_path):
    for name, losses in {"one": [1.0, 2.0], "near": [1.0, 2.002], "none": [1.0, None]}.items():
        (tmp_path / name).mkdir()
        lines = (json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses, 1))
        (tmp_path / name / "metrics.jsonl").write_text("".join(lines))
    assert verify.loss_difference(tmp_path / "one", tmp_path / "near") == pytest.approx(1e-3)
    assert verify.loss_difference(tmp_path / "one", tmp_path / "none") == math.inf


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--job", "mime"], "no job is called 'mime' (did you mean mine?)"),
        (["--job", "mine", "--steps", "0"], "--steps: 0 trains nothing"),
        (["--job", "mine", "jobs=[{name: mine, datasets: [{path: a.jsonl, type: text}]}]"], "'mine' is the config's only job"),
    ],
)
def test_wrong_words_are_one_line(words, says, config, capsys):
    assert main(["verify", str(config), *words]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
