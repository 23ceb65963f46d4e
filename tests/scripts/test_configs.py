"""The example configs and the README: every example loads and opens with its command, the README knows every key."""

import dataclasses
import re
from pathlib import Path

import pytest

from megatron_lora.config.schema import JobConfig, RunConfig, load_config

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_loads_and_opens_with_its_command(file):
    config = load_config(file)
    assert len(config.jobs) >= 2
    lines = file.read_text(encoding="utf-8").splitlines()
    assert re.match(r"# (megatron-lora train|bash|sbatch) ", lines[0])
    comment = "\n".join(lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))])
    assert f"configs/{file.name}" in comment, "the opening command names another file"


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_says_only_what_differs_from_the_defaults(file):
    config = load_config(file)
    tree = re.sub(r"#.*", "", file.read_text(encoding="utf-8"))
    for kind, said in ((RunConfig, [config]), (JobConfig, config.jobs)):
        for field in dataclasses.fields(kind):
            if field.default is dataclasses.MISSING or not re.search(rf"\b{field.name}:", tree):
                continue
            assert any(getattr(value, field.name) != field.default for value in said), f"{field.name} is set to its default"


def test_the_readme_lists_every_example_and_every_key_that_works():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for file in EXAMPLES:
        assert f"](configs/{file.name})" in text
    later = {"val_datasets", "save_steps", "eval_steps", "early_stopping_patience"}  # refused until they do something
    for kind in (RunConfig, JobConfig):
        for field in dataclasses.fields(kind):
            assert re.search(rf"\b{field.name}\b", text) or field.name in later, f"README.md does not mention {field.name}"


def test_every_file_that_the_readme_names_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r"\b((?:scripts|configs)/[\w./]+\.\w+)\b", text):
        assert (ROOT / target).exists(), target
