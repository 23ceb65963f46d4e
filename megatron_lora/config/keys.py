"""How the keys of a config's sections are declared, and how a mapping becomes a section, every key checked.

A section is a frozen dataclass (schema.py); each field is declared with its default, the rule that guards it, its meaning and its unit:

    r: int = key(16, whole_number("a LoRA rank", 1, 256), "rank of A and B")

    build(DatasetConfig, "jobs.one.datasets.0", {"path": "a.jsonl", "type": "text"})      # a DatasetConfig, or a UserError in one line
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from megatron_lora.config.rules import OTHER_WORDS, Rule, key_name, show, suggest
from megatron_lora.errors import UserError


def key(default: object, rule: Rule, meaning: str, unit: str = "") -> Any:
    """Declare a key that has a default."""
    return dataclasses.field(default=default, metadata={"rule": rule, "meaning": meaning, "unit": unit})


def required(rule: Rule, meaning: str, unit: str = "") -> Any:
    """Declare a key that every config must set."""
    return dataclasses.field(metadata={"rule": rule, "meaning": meaning, "unit": unit})


NOT_YET = {  # keys of others -> why they are refused
    "layers_pattern": "these base models have one list of layers, which layers_to_transform counts",
    "modules_to_save": "embedding and head stay frozen",
    "trainable_token_indices": "embedding and head stay frozen",
}


class UnknownKey(UserError):
    """A key that a section does not have."""

    def __init__(self, kind: type, path: str, name: str, known: Collection[str], homes: Mapping[type, str] | None = None):
        """Say what was meant, or with `homes` (section -> its name) where the key belongs."""
        self.missed = kind, path, name, known
        hint, meant = suggest(name, known), OTHER_WORDS.get(name.lower(), name)
        home = next((where for other, where in (homes or {}).items() if not path.endswith(where) and meant in names_of(other)), None)
        if home and (meant == name or not hint):
            hint = f" here; {'it' if meant == name else meant} is a key of {home}"
        if name in NOT_YET:
            hint = f"; it does not work yet: {NOT_YET[name]}; remove it"
        listed = "" if hint else f"; the keys are {', '.join(sorted(known))}"
        super().__init__(f"{path}.{key_name(name)}".lstrip(".") + f": unknown key{hint}{listed}")


def names_of(kind: type) -> frozenset[str]:
    """Names of a section's keys."""
    return frozenset(field.name for field in dataclasses.fields(kind))


def check_keys(kind: type, path: str, tree: dict, extra: tuple[str, ...] = ()) -> None:
    """Raise UnknownKey for a key that `kind` does not have."""
    known = names_of(kind) | set(extra)
    for name in tree:
        if name not in known:
            raise UnknownKey(kind, path, name, known)


def values(kind: type, path: str, tree: dict, skip: Collection[str] = ()) -> dict:
    """Check the value of each field of `kind` that `tree` gives; a missing one takes its default or is an error."""
    checked = {}
    for field in dataclasses.fields(kind):
        where = f"{path}.{field.name}".lstrip(".")
        if field.name in skip:
            continue
        if field.name in tree:
            checked[field.name] = field.metadata["rule"](where, tree[field.name])
        elif field.default is dataclasses.MISSING:
            raise UserError(f"{where}: is missing; every {kind.__name__.removesuffix('Config').lower()} needs it")
    return checked


def build(kind: type, path: str, tree: object):
    """Make the section `kind` from a mapping, every key checked."""
    if not isinstance(tree, dict):
        raise UserError(f"{path}: {show(tree)} is not a mapping; its keys are {', '.join(sorted(names_of(kind)))}")
    check_keys(kind, path, tree)
    return kind(**values(kind, path, tree))
