"""What a run wrote is known again: texts by their seals, a job's final files by status.json; pipes and planted links are refused."""

import contextlib
import hashlib
import json
import os

import pytest

from megatron_lora.errors import UserError
from megatron_lora.files import check_regular, check_yaml, read_regular, sealed, sealed_yaml, unsealed, write_atomically
from megatron_lora.output.final_files import check_job_files, check_run_files, digests_of_run


@pytest.mark.parametrize("value", [{"a": 1}, {"a": {"digest": 2}, "b": [1.5, None]}, {"a": "é\u2028"}])
def test_any_change_of_a_sealed_text_is_found(value):
    text = sealed(json.dumps(value, indent=1))
    assert unsealed(text) == value and json.loads(text)["digest"], "it is JSON for everybody else"
    assert unsealed(json.dumps(value)) == value, "one without a seal is taken as it is"
    for place in range(len(text.rstrip("\n"))):
        for other in ("0", "}", ""):
            changed = text[:place] + other + text[place + 1 :]
            with contextlib.suppress(ValueError):
                found = unsealed(changed)
                assert {key: found[key] for key in value} == value, changed  # the seal's own key may have changed


def test_a_config_is_sealed_by_its_last_line():
    text = sealed_yaml(sealed_yaml("a: 1\n"))
    assert check_yaml(text) == text and text.count("digest") == 1 and check_yaml("a: 1\n") == "a: 1\n"
    for changed in (text.replace("a: 1", "a: 2"), text + "b: 1\n", text.replace("# digest: ", "# digest: 0")):
        with pytest.raises(ValueError, match="its digest is of another text"):
            check_yaml(changed)


@pytest.fixture
def run(tmp_path):
    """The directory of a run of one job that is done, one of an earlier version, and one that has not begun."""
    files = {"metrics.jsonl": '{"step": 1}\n', "adapter_model.safetensors": "weights", "README.md": "a card"}
    for name in ("done", "old"):
        (tmp_path / "jobs" / name).mkdir(parents=True)
        for file, text in files.items():
            (tmp_path / "jobs" / name / file).write_text(text)
    digests = {file: hashlib.sha256(text.encode()).hexdigest() for file, text in files.items() if file != "README.md"}
    jobs = {"done": {"state": "done", "files": digests}, "old": {"state": "done"}, "new": {"state": "queued"}}
    (tmp_path / "status.json").write_text(sealed(json.dumps({"jobs": jobs})))
    return tmp_path


@pytest.mark.parametrize("name", ["metrics.jsonl", "adapter_model.safetensors"])
def test_a_final_file_that_has_changed_is_named(run, name):
    check_run_files(run)
    (run / "jobs" / "done" / "README.md").write_text("another")
    (run / "jobs" / "old" / name).write_text("unknown")
    check_run_files(run)
    (run / "jobs" / "done" / name).write_text("another")
    for check in (lambda: check_run_files(run), lambda: check_job_files(run / "jobs" / "done")):
        with pytest.raises(UserError, match=f"done/{name}: is not what the run wrote"):
            check()
    (run / "jobs" / "done" / name).unlink()
    with pytest.raises(UserError, match=f"done/{name}: cannot be read"):
        check_run_files(run)


@pytest.mark.parametrize("change", ["removed", "changed", "exchanged"])
def test_files_of_the_run_as_a_whole_are_compared_once_it_has_ended(run, change):
    (run / "plan").mkdir()
    for number in range(2):
        (run / "plan" / f"window-{number:04d}.json").write_text(str(number))
    (run / "events.jsonl").write_text("{}\n")
    (run / "status.json").write_text(sealed(json.dumps({"jobs": {}, "files": digests_of_run(run)})))
    check_run_files(run)
    if change == "removed":
        (run / "events.jsonl").unlink()
    elif change == "changed":
        (run / "events.jsonl").write_text("")
    else:
        for number in range(2):
            (run / "plan" / f"window-{number:04d}.json").write_text(str(1 - number))
    with pytest.raises(UserError, match=r"(events.jsonl|plan/window-\*.json): is not what the run wrote"):
        check_run_files(run)


def test_an_adapter_of_no_run_has_nothing_to_be_compared_with(tmp_path):
    (tmp_path / "status.json").write_text("of another program")
    check_job_files(tmp_path / "a" / "b")


def test_pipes_and_endless_files_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(OSError, match="it is no file"):
        read_regular(tmp_path / "config.json")
    with pytest.raises(UserError, match="config.json: is a pipe or a device"):
        check_regular(tmp_path)
    (tmp_path / "config.json").unlink()
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="more than 268,435,456 bytes"):
        read_regular(tmp_path / "config.json")
    with pytest.raises(UserError, match="config.json: .*more than 268,435,456 bytes"):
        check_regular(tmp_path)


def test_a_planted_link_is_not_written_through_and_files_follow_the_umask(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / f".status.json.{os.getpid()}").symlink_to(tmp_path / "mine")
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "status.json", "new")
    finally:
        os.umask(before)
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "status.json").read_text() == "new"
    assert (tmp_path / "status.json").stat().st_mode & 0o777 == 0o640 and not list(tmp_path.glob(".status*"))
