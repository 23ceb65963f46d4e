"""Bad data: the job that has them fails alone, before it starts; bad records can be left out; and `preview` lists them by kind."""

import json
from pathlib import Path

import oracle
import pytest
import runs
import yaml

from megatron_lora.__main__ import main
from megatron_lora.commands import launch
from megatron_lora.config.schema import load_config
from megatron_lora.errors import UserError

GOOD = {"prompt": "w1 w2", "completion": " w3 w4"}
BAD_LINES = {  # a line of a file that is no record that can be trained on -> what is said of it
    '{"prompt": "w1"': ":3: is not valid JSON",
    '["w1"]': ':3: holds ["w1"] where a record is an object',
    '{"prompt": "w1"}': ":3: has no 'completion'",
    '{"prompt": "w1", "completion": " "}': ":3: 'completion' is empty",
    '{"prompt": 5, "completion": "w1"}': ":3: 'prompt' is 5; write it as text",
    '{"prompt": "w1", "completion": "w2", "weight": 0}': ":3: 'weight' is 0; write a number from",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return oracle.make_model(tmp_path_factory.mktemp("bad-rows") / "model")


@pytest.fixture
def scene(model, tmp_path, monkeypatch) -> dict:
    """Three jobs; `odd.jsonl` of the second is the test's to write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGATRON_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    Path("rows.jsonl").write_text(f"{json.dumps(GOOD)}\n" * 4)
    jobs = [
        {"name": name, "datasets": [{"path": f"{file}.jsonl", "type": "prompt_completion"}], "global_batch_size": 2}
        for name, file in (("one", "rows"), ("two", "odd"), ("three", "rows"))
    ]
    return {"base_model": str(model), "output_dir": "runs/out", "precision": "fp32", "microbatch_tokens": 64, "jobs": jobs}


def write(scene: dict, bad: str) -> None:
    Path("odd.jsonl").write_text("\n".join([json.dumps(GOOD), "", bad, json.dumps(GOOD)]) + "\n")
    Path("config.yaml").write_text(yaml.safe_dump(scene))


def write_for_ranks(scene: dict, bad: str) -> Path:
    """Write the config with absolute paths, since the ranks work elsewhere."""
    for job in scene["jobs"]:
        job["datasets"][0]["path"] = str(Path(job["datasets"][0]["path"]).absolute())
    scene["output_dir"] = str(Path("runs/out").absolute())
    write(scene, bad)
    return Path("config.yaml").absolute()


def status() -> dict:
    return json.loads(Path("runs/out/status.json").read_text())


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_job_with_bad_data_fails_before_it_starts(scene, bad, monkeypatch, capfd):
    started = []
    monkeypatch.setattr(launch, "start_ranks", lambda *arguments: started.append(status()["jobs"]) or launch._Ending(status=0))
    write(scene, bad)
    main(["train", "config.yaml"])
    (jobs,) = started
    assert {name: job["state"] for name, job in jobs.items()} == {"one": "queued", "two": "failed", "three": "queued"}
    assert jobs["two"]["reason"].startswith("odd.jsonl" + BAD_LINES[bad])
    assert capfd.readouterr().err.startswith("megatron-lora: job two fails before it starts, the others train: odd.jsonl" + BAD_LINES[bad])


def test_the_others_train_to_their_end_and_the_run_ends_with_3(scene, pool):
    assert runs.start(pool, write_for_ranks(scene, '{"prompt": "w1"}'), {}) == 3
    assert {name: job["state"] for name, job in status()["jobs"].items()} == {"one": "done", "two": "failed", "three": "done"}
    assert len(runs.losses_of(Path("runs/out"), "three")) == 2 and not Path("runs/out/jobs/two").exists()


def test_plan_is_of_the_jobs_that_train(scene, capsys):
    write(scene, '{"prompt": "w1"}')
    assert main(["plan", "config.yaml"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("megatron-lora: job two fails before it starts, the others train: odd.jsonl:3: has no 'completion'")
    assert [line.split()[0] for line in out.splitlines() if line.startswith(("one ", "two", "three"))] == ["one", "three", "one"]
    write(scene, "{}")
    Path("rows.jsonl").write_text("{}\n")
    assert main(["plan", "config.yaml"]) == 2


@pytest.mark.parametrize("bad", [*list(BAD_LINES)[:3], None])
def test_where_all_jobs_are_bad_nothing_is_written(scene, bad, monkeypatch, capfd):
    monkeypatch.setattr(launch, "start_ranks", lambda *arguments: pytest.fail("torchrun was started"))
    for job in scene["jobs"]:
        job["datasets"][0]["path"] = "odd.jsonl"
    write(scene, bad or "")
    if bad is None:
        Path("odd.jsonl").write_text("")
    assert main(["train", "config.yaml"]) == 2
    assert not Path("runs").exists()
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and err.startswith("megatron-lora: odd.jsonl"), err


@pytest.mark.parametrize("bad", BAD_LINES)
def test_bad_records_can_be_left_out_and_are_counted(scene, bad, monkeypatch):
    from megatron_lora.commands.checks import check_run

    monkeypatch.setitem(scene, "defaults", {"bad_rows": "drop"})
    write(scene, bad)
    for _ in range(2):  # read, and found in the cache
        inputs = check_run(load_config("config.yaml"))
        data = inputs.data[1]
        assert not inputs.failed and (data.num_bad, data.num_records) == (1, 3)
        assert [sample.record for sample in data.samples] == [0, 2], "records are numbered before anything is left out"
        assert f"1 bad records left out, as odd.jsonl{BAD_LINES[bad]}" in data.describe()
    monkeypatch.setitem(scene, "defaults", {"bad_rows": "refuse"})
    write(scene, bad)
    assert check_run(load_config("config.yaml")).failed["two"].startswith("odd.jsonl" + BAD_LINES[bad]), "also where the cache has them"


def test_dropping_leaves_at_least_one_record(scene, monkeypatch):
    from megatron_lora.commands.checks import check_run

    monkeypatch.setitem(scene, "defaults", {"bad_rows": "drop"})
    write(scene, "")
    Path("odd.jsonl").write_text("{}\n[]\n")
    assert (
        check_run(load_config("config.yaml")).failed["two"].startswith("jobs.two.datasets: all of their 2 records are bad, as odd.jsonl:1:")
    )


def test_what_ends_a_file_is_never_dropped(scene, monkeypatch):
    from megatron_lora.commands.checks import check_run

    monkeypatch.setitem(scene, "defaults", {"bad_rows": "drop"})
    scene["jobs"][1]["datasets"][0]["path"] = "odd.json"
    write(scene, "")
    Path("odd.json").write_text(f"[{json.dumps(GOOD)},\n oops]")
    assert check_run(load_config("config.yaml")).failed["two"].startswith("odd.json:2: is not valid JSON")


def test_preview_lists_the_first_bad_records_of_each_kind(scene, capfd):
    write(scene, "")
    Path("odd.jsonl").write_text("\n".join([json.dumps(GOOD), *[line for line in BAD_LINES for _ in range(5)], json.dumps(GOOD)]))
    assert main(["preview", "config.yaml", "--job", "two"]) == 2
    out, err = capfd.readouterr()
    assert out.count("tokens, ") == 3 and "(record 31)" in out, "both good records, and the line about all"
    listed = out.split("bad records, the first of each kind:\n")[1].splitlines()
    assert len(listed) == 3 * len(BAD_LINES) and listed[0].startswith("odd.jsonl:2: ")
    for said in BAD_LINES.values():
        assert sum(said.removeprefix(":3") in line for line in listed) == 3
    assert err.startswith("megatron-lora: odd.jsonl:2: is not valid JSON")
    assert main(["preview", "config.yaml", "--job", "two", "defaults.bad_rows=drop"]) == 0
    assert main(["preview", "config.yaml", "--job", "one"]) == 0


def test_a_job_that_has_trained_is_not_failed_by_a_file_that_changed(scene, monkeypatch, pool):
    from megatron_lora.commands.checks import check_run

    for job in scene["jobs"]:
        job |= {"num_epochs": 40, "save_steps": 1}
    scene["microbatch_tokens"] = 16
    assert runs.start(pool, write_for_ranks(scene, json.dumps(GOOD)), {}, stop_after=4) == 75
    Path("odd.jsonl").write_text("oops\n")
    with pytest.raises(UserError, match="odd.jsonl:1: is not valid JSON"):
        check_run(load_config("config.yaml"))
