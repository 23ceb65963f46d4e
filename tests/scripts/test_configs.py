"""The example configs: every one loads, opens with its command, says only what differs from the defaults, and is listed."""

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
            if field.name == "sweep" or field.default is dataclasses.MISSING or not re.search(rf"\b{field.name}:", tree):
                continue
            assert any(getattr(value, field.name) != field.default for value in said), f"{field.name} is set to its default"


def test_every_example_is_listed():
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    for file in EXAMPLES:
        assert f"](../configs/{file.name})" in text
