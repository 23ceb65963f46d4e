"""The models that whole-trainer benchmarks run: their shapes as config.json has them (shapes.json), with random weights.

    write_config("llama-3.1-8b", Path("model"))         # its config.json
    config = hf_config("llama-3.1-8b")                  # the same shape for transformers

`num_layers` cuts a model short, for measuring the layers of one that does not fit.
"""

import json
from pathlib import Path

SHAPES: dict[str, dict] = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))


def _values(shape: str, num_layers: int | None) -> dict:
    return SHAPES[shape] | ({} if num_layers is None else {"num_hidden_layers": num_layers})


def write_config(shape: str, model_dir: Path, num_layers: int | None = None) -> None:
    """Write a shape's config.json into a model's directory."""
    (model_dir / "config.json").write_text(json.dumps(_values(shape, num_layers)), encoding="utf-8")


def hf_config(shape: str, num_layers: int | None = None):
    """Return a shape as a transformers config."""
    from transformers import AutoConfig

    values = _values(shape, num_layers)
    return AutoConfig.for_model(**values)
