"""Best weights and checkpoints: complete or absent, kept as long as something needs them, and taken back where a job resumes."""

import dataclasses
import json
import shutil

import pytest
import torch

from megatron_lora.errors import UserError
from megatron_lora.files import unsealed
from megatron_lora.huggingface.adapter_files import AdapterFile, read_adapter
from megatron_lora.output import best as best_module
from megatron_lora.output.best import check_best, remove_outdated, write_best
from megatron_lora.output.checkpoint import write_checkpoint
from megatron_lora.output.metrics import read_lines
from megatron_lora.output.resume import rewind
from megatron_lora.output.standing import Best, CheckpointState, ResumePoint, resume_point_of

PATH = "model.layers.0.self_attn.q_proj"


def adapter(value: float) -> AdapterFile:
    weights = {PATH: (torch.full((2, 4), float(value)), torch.full((4, 2), float(value)))}
    return AdapterFile(r=2, lora_alpha=4, use_rslora=False, target_modules=("q_proj",), weights=weights)


def save(job_dir, step: int, best: Best | None = None, num_steps: int = 20, **keys) -> CheckpointState:
    state = CheckpointState(step=step, num_steps=num_steps, num_updates=step, skipped_in_a_row=0, samples="", best=best, **keys)
    write_checkpoint(job_dir, adapter(step), "base", [adapter(0).weights, adapter(0).weights], state)
    return state


def names(job_dir) -> set[str]:
    return {path.name for path in job_dir.iterdir()}


def test_best_weights_are_a_peft_directory_with_what_made_them_the_best(tmp_path):
    (tmp_path / ".best-4.new").mkdir()  # of a run that was killed
    write_best(tmp_path, adapter(8), "base", Best(8, 1.25), "eval_loss")
    assert names(tmp_path) == {"best-8"}
    assert names(tmp_path / "best-8") == {"adapter_config.json", "adapter_model.safetensors", "README.md", "state.json"}
    state = unsealed((tmp_path / "best-8" / "state.json").read_text())
    assert set(state.pop("files")) == names(tmp_path / "best-8") - {"state.json"}
    assert state == {"step": 8, "metric": "eval_loss", "value": 1.25, "job": tmp_path.name}
    write_best(tmp_path, adapter(9), "base", Best(8, 1.0), "eval_loss")  # after a rewind to an earlier step
    assert read_adapter(tmp_path / "best-8").weights[PATH][0].unique().tolist() == [9] and names(tmp_path) == {"best-8"}


def test_a_run_that_ends_while_it_writes_leaves_the_old_best(tmp_path, monkeypatch):
    write_best(tmp_path, adapter(8), "base", Best(8, 1.25), "eval_loss")

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(best_module, "sync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_best(tmp_path, adapter(12), "base", Best(12, 1.0), "eval_loss")
    assert {name for name in names(tmp_path) if not name.startswith(".")} == {"best-8"}


def test_a_best_goes_when_no_checkpoint_names_it(tmp_path):
    first, second = Best(4, 2.0), Best(8, 1.0)
    write_best(tmp_path, adapter(4), "base", first, "eval_loss")
    save(tmp_path, 6, first)
    write_best(tmp_path, adapter(8), "base", second, "eval_loss")
    remove_outdated(tmp_path, second, None)
    assert names(tmp_path) == {"best-4", "checkpoint-6", "best-8"}, "a crash now would resume after step 6, where 4 is the best"
    save(tmp_path, 9, second)
    remove_outdated(tmp_path, second, None)
    assert names(tmp_path) == {"best-4", "checkpoint-6", "best-8", "checkpoint-9"}, "the user may resume from either checkpoint"
    shutil.rmtree(tmp_path / "checkpoint-6")
    remove_outdated(tmp_path, second, None)
    assert names(tmp_path) == {"best-8", "checkpoint-9"}


def test_of_a_job_that_is_over_the_newest_checkpoint_alone_keeps_its_best(tmp_path):
    for step in (4, 8, 12):
        write_best(tmp_path, adapter(step), "base", Best(step, 10 / step), "eval_loss")
        if step < 12:
            save(tmp_path, step + 1, Best(step, 10 / step))
    remove_outdated(tmp_path, Best(12, 0.5), None, is_over=True)
    assert names(tmp_path) == {"best-8", "best-12", "checkpoint-5", "checkpoint-9"}
    assert resume_point_of(tmp_path).best == Best(8, 1.25), "a run that is killed before it records the end resumes"


@pytest.mark.parametrize(("limit", "kept"), [(None, {2, 4, 6, 8, 10}), (1, {4, 8, 10}), (2, {4, 6, 8, 10}), (9, {2, 4, 6, 8, 10})])
def test_save_total_limit_counts_neither_the_newest_checkpoint_nor_that_of_the_best_step(tmp_path, limit, kept):
    for step in (2, 4, 6, 8, 10):
        save(tmp_path, step)
    (tmp_path / "checkpoint-6" / "state.json").write_text("{")  # a damaged one names no best, and ends nothing
    remove_outdated(tmp_path, Best(4, 1.0), limit)
    assert names(tmp_path) == {f"checkpoint-{step}" for step in kept}


def test_a_checkpoint_says_what_was_best_and_what_is_due(tmp_path):
    write_best(tmp_path, adapter(4), "base", Best(4, 2.0), "eval_loss")
    state = save(tmp_path, 6, Best(4, 2.0), evaluations_without_improvement=1, evaluation_due=True)
    point = resume_point_of(tmp_path)
    assert point.state is not None and dataclasses.replace(point.state, files={}) == state and len(point.state.files) == 4
    assert (point.best, point.step, point.evaluation_due) == (Best(4, 2.0), 6, True)
    assert (ResumePoint().best, ResumePoint().evaluation_due) == (None, True)
    save(tmp_path, 20, evaluation_due=True)  # after the last step, before the last evaluation
    assert resume_point_of(tmp_path).step == 20
    file = tmp_path / "checkpoint-20" / "state.json"
    older = {"step": 3, "num_steps": 20, "num_updates": 3, "skipped_in_a_row": 0, "samples": ""}  # before there were evaluations
    shutil.copytree(tmp_path / "checkpoint-20", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "state.json").write_text(json.dumps(older))
    for step in (6, 20):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    point = resume_point_of(tmp_path)
    assert (point.step, point.best, point.evaluation_due) == (3, None, False) and not file.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluation_due": False, "step": 20}, "does not describe a job after 20 steps"),
        ({"evaluation_due": 1}, "does not describe"),
        ({"best": {"step": 21, "value": 1.0}}, "does not describe"),
        ({"best": {"step": "4", "value": 1.0}}, "does not describe"),
        ({"best": {"step": 4, "value": None}}, "does not describe"),
        ({"best": {"step": 4}}, "cannot be read"),
        ({"best": [4, 1.0]}, "cannot be read"),
        ({"evaluations_without_improvement": -1}, "does not describe"),
        ({"best": {"step": 4, "value": 1.0}}, "best-4: is missing, the best weights by then"),
    ],
)
def test_a_state_that_cannot_be_is_named_with_the_remedy(tmp_path, changes, words):
    state = save(tmp_path, 20, evaluation_due=True)
    (tmp_path / "checkpoint-20" / "state.json").write_text(json.dumps(dataclasses.asdict(state) | changes))
    with pytest.raises(UserError, match=f"{words}.*--from-older .* before .*checkpoint-20"):
        resume_point_of(tmp_path)


def test_best_weights_prove_themselves(tmp_path):
    best = Best(4, 2.0)
    write_best(tmp_path, adapter(4), "base", best, "eval_loss")
    check_best(tmp_path, best, tmp_path.name)
    (tmp_path / "best-4" / "README.md").write_text("nobody reads it back")
    check_best(tmp_path, best, tmp_path.name)
    for other, job in ((Best(4, 2.5), tmp_path.name), (best, "another")):
        with pytest.raises(UserError, match="best-4: is not of"):
            check_best(tmp_path, other, job)
    weights, state = tmp_path / "best-4" / "adapter_model.safetensors", tmp_path / "best-4" / "state.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"best-4/adapter_model.safetensors: is damaged \(its SHA-256"):
        check_best(tmp_path, best, tmp_path.name)
    weights.write_bytes(whole)
    state.write_text(state.read_text().replace("2.0", "2.5"))
    with pytest.raises(UserError, match="best-4: cannot be read .*its digest is of another text"):
        check_best(tmp_path, Best(4, 2.5), tmp_path.name)


@pytest.mark.parametrize(
    ("step", "due", "lines", "bests"),
    [(4, False, "s1 s2 e2 s3 s4 e4", {2, 4}), (4, True, "s1 s2 e2 s3 s4", {2}), (3, False, "s1 s2 e2 s3", {2}), (0, None, "", set())],
)
def test_a_rewind_keeps_what_was_recorded_by_the_resume_point(tmp_path, step, due, lines, bests):
    job_dir = tmp_path / "jobs" / "a"
    for number in (2, 4, 6):
        write_best(job_dir, adapter(number), "base", Best(number, 1.0), "eval_loss")
    recorded = [(0, True), *((n // 2, n % 2 == 1) for n in range(2, 14) if n % 2 == 0 or n % 4 == 1)]
    (job_dir / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": number} | ({"eval_loss": 1.0} if is_evaluation else {})) + "\n" for number, is_evaluation in recorded)
    )
    point = ResumePoint() if due is None else ResumePoint(checkpoint=job_dir, state=save(tmp_path / "other", step, evaluation_due=due))
    rewind(tmp_path, {"a": point})
    found = [f"{'e' if 'eval_loss' in line else 's'}{line['step']}" for line in read_lines(job_dir / "metrics.jsonl")]
    assert found == (["e0"] if lines else []) + lines.split()
    assert {path.name for path in job_dir.glob("best-*")} == {f"best-{number}" for number in bests}
