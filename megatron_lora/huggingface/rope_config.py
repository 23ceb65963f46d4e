"""Which rotary position embedding config.json gives each layer. No tensors: rope.py computes with what is read here.

`rope_parameters` holds an embedding's kind and numbers. Before transformers 5 that was `rope_scaling`, which goes
before it, and `rope_theta`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_lora.errors import UserError
from megatron_lora.huggingface import config_fields
from megatron_lora.huggingface.families import Family


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding: base frequency `theta` and how it is stretched to longer contexts (`kind`)."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    share: float = 1.0  # of a head's features that are rotated: its first ones
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def max_positions(self) -> int:
        """The positions that YaRN stretches its original context to, which model cards leave out of max_position_embeddings; else 0."""
        return int(self.factor * self.original_max_positions) if self.kind == "yarn" else 0


class Reader(Protocol):
    """Typed access to a config.json (architecture.py); `error` makes a UserError that names file, key and value."""

    family: Family
    model_type: str
    values: dict[str, Any]

    def with_values(self, values: dict[str, Any]) -> Any: ...

    def error(self, key: str, value: object, hint: str) -> UserError: ...
    def get(self, key: str, default: Any = None) -> Any: ...
    def count(self, key: str, least: int = 1) -> int: ...
    def flag(self, key: str) -> bool: ...
    def number(self, values: Mapping[str, Any], key: str, prefix: str = "") -> float: ...


def read_ropes(
    reader: Reader, head_dim: int, layers_with_rope: Sequence[bool], layers_with_window: Sequence[bool]
) -> tuple[Rope | None, ...]:
    """Return each layer's rotary embedding, None where it has none."""
    ropes = [read_rope(each, head_dim) for each in rope_readers(reader)]
    found = zip(layers_with_rope, layers_with_window, strict=True)
    return tuple(ropes[has_window and len(ropes) > 1] if has_rope else None for has_rope, has_window in found)


def rope_readers(reader: Reader) -> list[Reader]:
    """Return a reader for each rotary embedding of a model: for all layers or, where they have two, those without and with a window."""
    if not reader.family.local_rope:
        return [reader]
    kinds = ("full_attention", "sliding_attention")
    both = {kind: {"rope_type": "default"} for kind in kinds} if reader.get("rope_parameters") is None else reader.get("rope_parameters")
    if not isinstance(both, dict) or both.keys() - {*kinds} or not all(isinstance(one, dict | None) for one in both.values()):
        raise reader.error("rope_parameters", both, f"numbers for {' and for '.join(kinds)} are needed")
    full, local = ({**reader.values, "rope_parameters": both.get(kind) or {}} for kind in kinds)
    if reader.get("rope_scaling") and isinstance(reader.get("rope_scaling"), dict):
        full["rope_parameters"], full["rope_scaling"] = {**full["rope_parameters"], **full["rope_scaling"]}, None
    own = local["rope_parameters"].get("rope_theta", reader.get("rope_local_base_freq"))
    local |= {"rope_theta": own, "rope_scaling": None}
    return [reader.with_values(full), reader.with_values(local)]


def rope_values(reader: Reader) -> tuple[str, dict[str, Any], str]:
    """Return `rope_scaling` (before transformers 5) or `rope_parameters`: the key, its values, and the kind."""
    where = "rope_scaling" if reader.get("rope_scaling") else "rope_parameters"
    for key in ("rope_scaling", "rope_parameters"):
        values = {} if reader.get(key) is None else reader.get(key)
        if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
            raise reader.error(key, values, "one set of numbers for all layers is supported")
    values = reader.get(where) or {}
    kind = values.get("rope_type", values.get("type", "default"))
    known = reader.family.ropes
    if not isinstance(kind, str) or kind not in known:
        raise reader.error(f"{where}.rope_type", kind, f"supported are {', '.join(known)}")
    return where, values, kind


def read_rope(reader: Reader, head_dim: int) -> Rope:
    """Read the rotary embedding, with transformers' defaults."""
    where, values, kind = rope_values(reader)
    theta = values.get("rope_theta", reader.get("rope_theta", 10000.0))
    partial = "partial_rotary_factor"
    given = values.get(partial, reader.get(partial, 1.0))
    if given not in (1, None) and partial not in reader.family.keys:
        raise reader.error(f"{where}.{partial}", given, "only 1.0 is supported")
    share = 1.0 if given is None else reader.number({partial: given}, partial)
    if share > 1 or int(head_dim * share) < 2 or int(head_dim * share) % 2:
        raise reader.error(partial, given, f"a share that gives an even number of a head's {head_dim} features is needed")
    values = {"original_max_position_embeddings": reader.get("max_position_embeddings"), **values}
    original = reader.get("original_max_position_embeddings")  # at the top level it overrides the nested one, as in transformers
    if original is not None and kind in ("llama3", "yarn", "longrope"):
        values["original_max_position_embeddings"] = original
    if kind == "yarn" and "factor" in values and values["factor"] is None:
        values["factor"] = reader.count("max_position_embeddings") / reader.number(values, "original_max_position_embeddings", f"{where}.")
    needed = {key: reader.number(values, key, f"{where}.") for key in config_fields.ROPE_NUMBERS[kind]}
    if reader.number({"rope_theta": theta}, "rope_theta") <= 1:
        raise reader.error("rope_theta", theta, "a number above 1 is needed")
    fields: dict[str, Any] = {key.replace("position_embeddings", "positions"): number for key, number in needed.items()}
    if kind == "yarn":
        fields |= _yarn_options(reader, where, values)
    elif kind == "longrope":
        fields |= _longrope_options(reader, where, values, int(head_dim * share) // 2)
    return Rope(theta=float(theta), kind=kind, share=share, **fields)


def _longrope_options(reader: Reader, where: str, values: Mapping[str, Any], pairs: int) -> dict[str, Any]:
    """Return LongRoPE's factors for short and for long samples, and the scale of cos and sin, whose default depends on the stretch."""
    options: dict[str, Any] = {}
    for key in config_fields.LONGROPE_LISTS:
        given = values.get(key)
        if not isinstance(given, list) or len(given) != pairs:
            raise reader.error(f"{where}.{key}", given, f"a list of {pairs} numbers is needed")
        options[key] = tuple(reader.number({key: number}, key, f"{where}.") for number in given)
    original = reader.number(values, "original_max_position_embeddings", f"{where}.")
    stretched = values.get("factor") is None
    factor = reader.count("max_position_embeddings") / original if stretched else reader.number(values, "factor", f"{where}.")
    if values.get("attention_factor") is not None:
        options["attention_factor"] = reader.number(values, "attention_factor", f"{where}.")
    elif factor > 1 and original <= 1:
        raise reader.error("original_max_position_embeddings", original, "a number above 1 is needed")
    else:
        options["attention_factor"] = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return options


def _yarn_options(reader: Reader, where: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return YaRN's optional fields; 0 and null are transformers' defaults, except of attention_factor, which only null is."""
    truncate = values.get("truncate", True)
    if truncate not in (True, False, None):
        raise reader.error(f"{where}.truncate", truncate, "true or false is needed")
    options: dict[str, Any] = {"truncate": bool(truncate)}
    for key in config_fields.YARN_OPTIONS:
        unset = (None,) if key == "attention_factor" else (None, 0)
        if key != "truncate" and values.get(key) not in unset:
            options[key] = reader.number(values, key, f"{where}.")
    return options
