"""What a run rests on: a base model whose files have changed is another one, and its weights are read once."""

import os

import pytest

from megatron_lora.errors import UserError
from megatron_lora.huggingface import base_files
from megatron_lora.huggingface.base_files import check_same_base, digests_of_base


@pytest.fixture
def model(tmp_path):
    """A directory with the files of a base model, whose content does not matter."""
    folder = tmp_path / "hub" / "snapshots" / "c0ffee"
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors", "README.md"):
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize(
    ("name", "said"),
    [("model.safetensors", "base weights"), ("tokenizer.json", "tokenizer.json"), ("chat_template.jinja", "chat_template.jinja")],
)
def test_another_file_is_named(model, tmp_path, name, said):
    before = digests_of_base(model, True, tmp_path / "cache")
    check_same_base(before, digests_of_base(model, True, tmp_path / "cache"), model)
    (model / name).write_text("another")
    with pytest.raises(
        UserError, match=rf"base_model: {said} in '.*' \(hub commit c0ffee then, c0ffee now\) differ from when the run began; restore"
    ):
        check_same_base(before, digests_of_base(model, True, tmp_path / "cache"), model)


def test_what_is_not_read_may_change_and_a_run_that_recorded_nothing_is_resumed(model, tmp_path):
    before = digests_of_base(model, True, tmp_path / "cache")
    (model / "README.md").write_text("another")
    now = digests_of_base(model, True, tmp_path / "cache")
    check_same_base(before, now, model)
    check_same_base({}, now, model)
    (model / "model.safetensors").unlink()
    check_same_base(before, digests_of_base(model, False, tmp_path / "cache"), model)  # load_weights: false


def test_weights_are_read_once_for_each_identity_of_the_file(model, tmp_path, monkeypatch):
    read, real = [], base_files.digest_of_file
    monkeypatch.setattr(base_files, "digest_of_file", lambda path: read.append(path.name) or real(path))
    weights = model / "model.safetensors"
    first = [digests_of_base(model, True, tmp_path / "cache") for _ in range(2)]
    assert first[0] == first[1] and read.count(weights.name) == 1
    content = weights.read_bytes()
    weights.write_bytes(content[::-1])  # of the same size
    os.utime(weights, ns=(0, 0))
    assert digests_of_base(model, True, tmp_path / "cache") != first[0] and read.count(weights.name) == 2
