"""The example configs: every one loads, opens with its command, says only what differs from the defaults, and is listed."""

import dataclasses
import re
from pathlib import Path

import pytest

from megatron_lora.config.schema import JobConfig, RunConfig, load_config
from megatron_lora.errors import UserError
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.planning.predict import predicted_peaks
from megatron_lora.planning.resolve import resolve
from scheduling.cost import DEVICES
from scheduling.memory import usable_bytes
from scripts.bench.model_shapes import write_config

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


def test_a_70b_is_planned_for_one_gpu_of_80_gb(tmp_path):
    """In 4 bits its longest samples fit; in 8 bits they do not."""
    write_config("llama-3.1-70b", tmp_path)
    architecture, device, lengths = read_architecture(tmp_path), DEVICES["h100"], [[(4096, 300, 1200, 64) * 4] * 8] * 4

    def planned(*overrides):
        return resolve(load_config(ROOT / "configs" / "one_gpu_70b.yaml", overrides), architecture, lengths, device)

    config = planned()
    assert config.microbatch_tokens >= 4096 and 70e9 < predicted_peaks(config, architecture, device)[0] <= usable_bytes(device)
    with pytest.raises(UserError, match="memory allows 0 per microbatch on h100"):
        planned("base_weights=fp8/fp8")
