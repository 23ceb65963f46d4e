"""Promise 3: each sample of each step is used exactly once, across stops, crashes and other layouts; and what may change in between."""

from __future__ import annotations

import json
import shutil

import oracle
import pytest
import runs
from safetensors.torch import load_file, save_file

from megatron_lora.commands.checks import check_run
from megatron_lora.config import schema
from megatron_lora.config.schema import load_config
from megatron_lora.errors import UserError
from megatron_lora.files import sealed, unsealed
from megatron_lora.output.resume import changed_key
from megatron_lora.output.standing import resume_point_of

STEPS, EVERY = 7, 3


@pytest.fixture(scope="module")
def scene(tmp_path_factory, pool) -> dict:
    """A model, records, two jobs with dropout that save, and their results without a stop."""
    root = tmp_path_factory.mktemp("resume")
    files = [oracle.make_rows(root / f"rows-{i}.jsonl", num_rows=10, seed=20 + i) for i in range(3)]
    shared = {"learning_rate": 1e-3, "warmup_ratio": 0.3, "max_steps": STEPS, "lora_dropout": 0.1, "adam_epsilon": 1e-6}
    jobs = [
        {"name": name, "datasets": [{"path": str(path), "type": "prompt_completion"}], "r": r, "global_batch_size": 3, "save_steps": EVERY}
        | shared
        for name, path, r in (("a", files[0], 4), ("b", files[1], 8))
    ]
    made = {"root": root, "model": oracle.make_model(root / "model"), "files": files, "jobs": jobs}
    assert runs.start(pool, config_of(made, root, "unstopped", {}), {}) == 0
    return made


def config_of(scene: dict, folder, name: str, parallel: dict, jobs: list[dict] | None = None, tokens: int = 96):
    """Write a config whose output directory is `folder`/`name`."""
    return runs.write_config(folder / f"{name}.yaml", scene["model"], folder / name, jobs or scene["jobs"], parallel, tokens)


def steps_of(run, job: str) -> list[dict]:
    return [json.loads(line) for line in (run / "jobs" / job / "metrics.jsonl").read_text().splitlines()]


def assert_as_never_stopped(scene: dict, run) -> None:
    """Every step is there once, with the loss, the numbers and the adapter of the run that was not stopped."""
    for job in ("a", "b"):
        found, expected = steps_of(run, job), steps_of(scene["root"] / "unstopped", job)
        for key in ("step", "epoch", "learning_rate", "tokens", "target_tokens", "samples", "skipped"):
            assert [step[key] for step in found] == [step[key] for step in expected], key
        assert [step["loss"] for step in found] == pytest.approx([step["loss"] for step in expected], rel=1e-5)
        mine, theirs = (load_file(path / "jobs" / job / "adapter_model.safetensors") for path in (run, scene["root"] / "unstopped"))
        assert all(oracle.distance(mine, theirs, kind) < 1e-4 for kind in ("lora_A", "lora_B"))


def states(run) -> dict[str, str]:
    return {name: job["state"] for name, job in json.loads((run / "status.json").read_text())["jobs"].items()}


def as_after_a_crash(scene: dict, folder, checkpoints: dict[str, int]):
    """Copy the unstopped run to `folder`/run, as if it had been killed after it wrote these checkpoints."""
    run = folder / "run"
    shutil.copytree(scene["root"] / "unstopped", run)
    for job, last in checkpoints.items():
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            (run / "jobs" / job / file).unlink()
        for path in (run / "jobs" / job).glob("checkpoint-*"):
            if int(path.name.partition("-")[2]) > last:
                shutil.rmtree(path)
    status = unsealed((run / "status.json").read_text()) | {"exit_status": None}
    status["jobs"] |= {job: {"state": "running", "reason": ""} for job in checkpoints}
    (run / "status.json").write_text(json.dumps(status))
    return run


LAYOUTS = [({"pp": 2}, {}), ({}, {"tp": 2, "sequence": True}), ({"tp": 2}, {"pp": 2}), ({"dp": 2}, {"dp": 2})]


@pytest.mark.parametrize(("first", "then"), LAYOUTS, ids=["pp-one", "one-tp", "tp-pp", "dp-dp"])
def test_a_stopped_run_resumes_in_any_layout_as_if_it_had_not_been(first, then, scene, pool, tmp_path):
    run = tmp_path / "run"
    assert runs.start(pool, config_of(scene, tmp_path, "run", first, tokens=48), first, stop_after=2) == 75
    assert states(run) == {"a": "paused", "b": "paused"}
    taken = {job: len(steps_of(run, job)) for job in ("a", "b")}
    assert 0 < sum(taken.values()) < 2 * STEPS
    for job, steps in taken.items():
        assert resume_point_of(run / "jobs" / job).step == steps
    assert runs.start(pool, config_of(scene, tmp_path, "run", then), then) == 0
    assert states(run) == {"a": "done", "b": "done"}
    assert_as_never_stopped(scene, run)
    assert list((run / "plan" / "start-1").glob("window-*.json")) and (run / "plan" / "start-1" / "timeline.json.gz").exists()


def test_a_run_may_be_stopped_again_and_again(scene, pool, tmp_path):
    config, statuses = config_of(scene, tmp_path, "run", {"pp": 2}, tokens=48), []
    while not statuses or statuses[-1] == 75:
        statuses.append(runs.start(pool, config, {"pp": 2}, stop_after=1))
        assert len(statuses) < 2 * STEPS, "each start must get somewhere"
    assert statuses[-1] == 0 and statuses.count(75) > 1
    assert_as_never_stopped(scene, tmp_path / "run")


def test_after_a_crash_each_job_resumes_from_its_last_checkpoint(scene, pool, tmp_path):
    run = as_after_a_crash(scene, tmp_path, {"a": EVERY, "b": 2 * EVERY})
    half_written = run / "jobs" / "a" / ".checkpoint-6.new"
    half_written.mkdir()
    assert runs.start(pool, config_of(scene, tmp_path, "run", {}), {}) == 0
    assert_as_never_stopped(scene, run)
    assert not half_written.exists()


def test_a_job_that_has_ended_is_not_touched_and_one_without_a_checkpoint_starts_again(scene, pool, tmp_path):
    run = as_after_a_crash(scene, tmp_path, {"b": 0})
    before = {file: file.read_bytes() for file in (run / "jobs" / "a").rglob("*") if file.is_file()}
    assert runs.start(pool, config_of(scene, tmp_path, "run", {}), {}) == 0
    assert {file: file.read_bytes() for file in (run / "jobs" / "a").rglob("*") if file.is_file()} == before
    assert_as_never_stopped(scene, run)


def test_a_job_may_join_a_run_that_resumes(scene, pool, tmp_path):
    run = as_after_a_crash(scene, tmp_path, {"b": EVERY})
    third = scene["jobs"][0] | {"name": "c", "datasets": [{"path": str(scene["files"][2]), "type": "prompt_completion"}]}
    assert runs.start(pool, config_of(scene, tmp_path, "run", {}, [third, *scene["jobs"]]), {}) == 0
    assert_as_never_stopped(scene, run)
    assert states(run) == {"a": "done", "b": "done", "c": "done"} and len(steps_of(run, "c")) == STEPS


def test_a_checkpoint_is_a_peft_directory_with_adams_state(scene):
    checkpoint = scene["root"] / "unstopped" / "jobs" / "a" / "checkpoint-3"
    adapter, moments = load_file(checkpoint / "adapter_model.safetensors"), load_file(checkpoint / "optimizer.safetensors")
    assert {name: tensor.shape for name, tensor in moments.items()} == {
        f"{name}.{moment}": tensor.shape for name, tensor in adapter.items() for moment in ("exp_avg", "exp_avg_sq")
    }
    assert all((tensor >= 0).all() for name, tensor in moments.items() if name.endswith("_sq"))
    assert (checkpoint / "adapter_config.json").exists() and resume_point_of(checkpoint.parent).step == 6
    assert {path.name for path in checkpoint.parent.glob("*checkpoint*")} == {"checkpoint-3", "checkpoint-6"}


def changed(scene: dict, **keys) -> list[dict]:
    return [scene["jobs"][0] | keys, scene["jobs"][1]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda scene: changed(scene, learning_rate=2e-3), "jobs.a.learning_rate: 0.002 differs from 0.001"),
        (lambda scene: changed(scene, max_steps=9), "jobs.a.max_steps: 9 differs from 7"),
        (lambda scene: scene["jobs"][1:], "jobs: 'a', which the run has, is not among them"),
        (lambda scene: changed(scene, datasets=scene["jobs"][1]["datasets"]), "jobs.a.datasets: have other records"),
    ],
    ids=["rate", "steps", "fewer", "records"],
)
def test_what_would_change_a_jobs_updates_is_refused_and_nothing_is_touched(change, words, scene, tmp_path):
    run = as_after_a_crash(scene, tmp_path, {"a": EVERY, "b": EVERY})
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    config = load_config(config_of(scene, tmp_path, "run", {}, change(scene)))
    with pytest.raises(UserError, match=words):
        check_run(config)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_a_run_is_not_resumed_over_weights_that_are_stored_otherwise():
    def stored(base_weights):
        jobs = [{"name": "a", "datasets": [{"path": "a.jsonl", "type": "text"}]}]
        return schema.config_of({"base_model": "m", "output_dir": "o", "base_weights": base_weights, "jobs": jobs})

    for now, words in (({"storage": "bf16"}, None), ({"storage": "nf4"}, "'nf4/bf16'"), ("fp8", "'fp8'"), ("fp8/fp8", "'fp8/fp8'")):
        assert changed_key(stored("native"), stored(now)) == (words and f"base_weights: {words} differs from 'native'")


def test_a_finished_run_stays_finished(scene):
    with pytest.raises(UserError, match="holds a finished run"):
        check_run(load_config(config_of(scene, scene["root"], "unstopped", {})))


def test_a_done_job_needs_its_records_no_more(scene, tmp_path):
    as_after_a_crash(scene, tmp_path, {"b": EVERY})
    check_run(load_config(config_of(scene, tmp_path, "run", {}, changed(scene, datasets=[{"path": "gone.jsonl", "type": "text"}]))))


def cut(file) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def says(**keys):
    return lambda file: file.write_text(sealed(json.dumps(unsealed(file.read_text()) | keys)))


def flip(file) -> None:
    """Change the lowest bit of the last byte."""
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def with_lines(change):
    def damage(file) -> None:
        file.write_text("".join(change(file.read_text().splitlines(keepends=True))))

    return damage


def swap(path, other) -> None:
    path.rename(path.with_name("aside"))
    other.rename(path)
    path.with_name("aside").rename(other)


STATE, OPTIMIZER, ADAPTER = (f"jobs/a/checkpoint-3/{name}" for name in ("state.json", "optimizer.safetensors", "adapter_model.safetensors"))
METRICS = "jobs/b/metrics.jsonl"


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        (STATE, cut, "state.json: cannot be read .*no checkpoint before it is whole: train --from-older begins"),
        (STATE, says(step="3"), "after 3 steps; no checkpoint before it is whole: train --from-older begins"),
        (STATE, says(step=2), "after 3 steps; no checkpoint before it is whole: train --from-older begins"),
        (STATE, says(num_steps=3), "after 3 steps; no checkpoint before it is whole: train --from-older begins"),
        (STATE, says(num_updates=None), "after 3 steps; no checkpoint before it is whole: train --from-older begins"),
        (STATE, says(num_steps=99), "jobs.a.datasets: have other records"),
        (OPTIMIZER, cut, "optimizer.safetensors: (is damaged|cannot be read) .*no checkpoint before it is whole"),
        (ADAPTER, cut, "adapter_model.safetensors: (is damaged|cannot be read) .*no checkpoint before it is whole"),
        (ADAPTER, lambda file: file.unlink(), "adapter_model.safetensors: (is damaged|cannot be read) .*no checkpoint before it is whole"),
        (ADAPTER, flip, "adapter_model.safetensors: is damaged .its SHA-256"),
        (OPTIMIZER, flip, "optimizer.safetensors: is damaged .its SHA-256"),
        (STATE, lambda file: file.write_text(file.read_text().replace('"num_updates": 3', '"num_updates": 1')), "of another text"),
        ("jobs/b", lambda path: swap(path, path.with_name("a")), "a/checkpoint-3: was written for name 'b', and name of this job is 'a'"),
        ("jobs/b/checkpoint-3", lambda path: swap(path, path.parents[1] / "a" / path.name), "differs from what was logged by step 3"),
        (METRICS, lambda file: file.write_text("{}\n"), "metrics.jsonl: has the lines of 0 steps, of 3 .KeyError"),
        (METRICS, lambda file: file.write_text('{"step": null}\n'), "has the lines of 0 steps, of 3 .step None"),
        (METRICS, lambda file: file.write_bytes(b"\xff\n"), "has the lines of 0 steps"),
        (METRICS, lambda file: file.unlink(), "has the lines of 0 steps, of 3 .*No such file"),
        (METRICS, with_lines(lambda lines: lines[:1] + lines[2:]), "has the lines of 1 steps, of 3 .step 3 behind step 1"),
        (METRICS, with_lines(lambda lines: lines[:2] + lines[1:]), "has the lines of 2 steps, of 3 .step 2 behind step 2"),
        (METRICS, with_lines(lambda lines: [lines[0][:-1] + "\f", *lines[1:]]), "has the lines of 0 steps, of 3 .Extra data"),
        (METRICS, with_lines(lambda lines: [lines[0].replace('"tokens": ', '"tokens": 1'), *lines[1:]]), "differs from what was logged by"),
        (
            "config.yaml",
            lambda file: file.write_text(file.read_text().replace("microbatch_tokens: 96", "microbatch_tokens: 98")),
            "is of anot",
        ),
        ("status.json", lambda file: file.write_text("[" * 100_000), "status.json cannot be read"),
        ("status.json", says(jobs={"a": {"state": "paused", "reason": ""}}), "status.json lacks the job 'b'"),
    ],
)
def test_damage_is_named_with_the_remedy_before_anything_is_touched(name, damage, words, scene, tmp_path):
    run = as_after_a_crash(scene, tmp_path, {"a": EVERY, "b": EVERY})
    damage(run / name)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=words):
        check_run(load_config(config_of(scene, tmp_path, "run", {})))
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_what_nobody_reads_back_may_be_damaged(scene, tmp_path):
    run = as_after_a_crash(scene, tmp_path, {"a": EVERY, "b": EVERY})
    for name in ("checkpoint-3/README.md", "README.md"):
        flip(run / "jobs" / "a" / name)
    with open(run / "jobs" / "b" / "metrics.jsonl", "ab") as file:
        file.write(b"\x00" * 100 + b"\n")  # behind the checkpoint
    check_run(load_config(config_of(scene, tmp_path, "run", {})))


def test_a_damaged_checkpoint_is_named_with_the_whole_one_before_it_and_from_older_takes_that(scene, pool, tmp_path):
    run, config = as_after_a_crash(scene, tmp_path, {"a": 2 * EVERY, "b": 2 * EVERY}), config_of(scene, tmp_path, "run", {})
    flip(run / "jobs" / "a" / "checkpoint-6" / "optimizer.safetensors")
    with pytest.raises(UserError, match="the newest whole checkpoint before it is checkpoint-3: train --from-older resumes from that"):
        check_run(load_config(config))
    assert runs.start(pool, config, {}, from_older=True) == 0
    assert_as_never_stopped(scene, run)
    assert {path.name for path in (run / "jobs" / "a").glob("*checkpoint*")} == {"checkpoint-3", "checkpoint-6", "damaged-checkpoint-6-1"}


def test_a_checkpoint_of_an_earlier_version_is_taken_with_a_warning(scene, tmp_path, capsys):
    run = as_after_a_crash(scene, tmp_path, {"a": EVERY, "b": EVERY})
    state = unsealed((run / STATE).read_text())
    (run / STATE).write_text(json.dumps({key: value for key, value in state.items() if key not in ("files", "job", "metrics")}))
    check_run(load_config(config_of(scene, tmp_path, "run", {})))
    assert capsys.readouterr().err.count("checkpoint-3: was written by an earlier version, without digests") == 1


@pytest.mark.parametrize(("name", "said"), [("model.safetensors", "base weights"), ("tokenizer_config.json", "tokenizer_config.json")])
def test_a_base_model_that_was_replaced_is_named_and_nothing_is_touched(name, said, scene, tmp_path):
    run, file = as_after_a_crash(scene, tmp_path, {"a": EVERY, "b": EVERY}), scene["model"] / name
    before, content = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}, file.read_bytes()
    if name.endswith(".json"):
        file.write_bytes(content + b"\n")
    else:
        flip(file)
    try:
        with pytest.raises(UserError, match=f"base_model: {said} in '.*model' differ from when the run began; restore them"):
            check_run(load_config(config_of(scene, tmp_path, "run", {})))
    finally:
        file.write_bytes(content)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_moments_of_another_adapter_are_refused(scene, tmp_path):
    from megatron_lora.output.checkpoint import read_checkpoint

    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(scene["root"] / "unstopped" / "jobs" / "a" / "checkpoint-3", checkpoint)
    tensors = load_file(checkpoint / "optimizer.safetensors")
    name = next(name for name in tensors if name.endswith("lora_A.weight.exp_avg"))
    for changed_tensors in ({**tensors, name: tensors[name][:, 1:].contiguous()}, {key: tensors[key] for key in tensors if key != name}):
        save_file(changed_tensors, checkpoint / "optimizer.safetensors")
        with pytest.raises(UserError, match=rf"has no {name} of shape \[4, .*--from-older resumes"):
            read_checkpoint(checkpoint)
    with pytest.raises(UserError, match="is not there on this machine"):
        read_checkpoint(tmp_path / "elsewhere")
