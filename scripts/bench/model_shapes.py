"""The models that whole-trainer benchmarks run: their shapes as config.json has them (shapes.json), with random weights.

    write_config("llama-3.1-8b", Path("model"))         # its config.json
    values_of("llama-3.1-8b")                           # the same, as AutoConfig.for_model takes it

`num_layers` cuts a model short, for measuring the layers of one that does not fit.
"""

import json
from pathlib import Path

SHAPES: dict[str, dict] = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))


def values_of(shape: str, num_layers: int | None = None) -> dict:
    """Return a shape's fields of config.json."""
    return SHAPES[shape] | ({} if num_layers is None else {"num_hidden_layers": num_layers})


def write_config(shape: str, model_dir: Path, num_layers: int | None = None) -> None:
    """Write a shape's config.json into a model's directory."""
    (model_dir / "config.json").write_text(json.dumps(values_of(shape, num_layers)), encoding="utf-8")
