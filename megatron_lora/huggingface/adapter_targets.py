"""Which linears an adapter_config.json adapts, and with which rank and alpha: PEFT's rules for its fields.

    target_modules       names, each the end of a path; or one regular expression for complete paths; or "all-linear"
    exclude_modules      the same for paths that are left out
    layers_to_transform  layers that are adapted (none or empty: all); layers_pattern: the name before the layer's number
    rank_pattern         regular expression for the end of a path -> rank; alpha_pattern: -> alpha

The reader compares them with the weights of the file: a field that says what the weights say anyway
is harmless, and one that says otherwise is refused.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lora.errors import UserError, one_line

COMPLETE, END_OF_PATH, BEFORE_LAYER = "{}", r"(.*\.)?({})$", r"(?:.*?\.)?{}\.(\d+)\."  # what regular expressions are a part of
NOT_LINEAR_LAYERS = ("lm_head", "embed_tokens")  # what "all-linear" leaves out


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The fields of an adapter_config.json that choose linears, their ranks and their alphas."""

    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    @property
    def choose_by_more_than_names(self) -> bool:
        """Whether a list of module names does not say which linears they are."""
        named = not isinstance(self.target_modules, str) and not any("." in name for name in self.target_modules)
        return not named or bool(self.exclude_modules or self.layers_to_transform)

    def choice(self) -> dict[str, object]:
        """Return the fields of an adapter_config.json that choose linears."""
        fields = {name: getattr(self, name) for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")}
        return {name: value if isinstance(value, str) else list(value) for name, value in fields.items() if value}

    def covers(self, path: str) -> bool:
        """Return whether PEFT adapts the linear at `path` of the Hugging Face model."""
        if self.excludes(path):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return not path.endswith(NOT_LINEAR_LAYERS)
            return re.fullmatch(self.target_modules, path) is not None
        return _ends_with(path, self.target_modules) and (not self.layers_to_transform or self._layer_of(path) in self.layers_to_transform)

    def excludes(self, path: str) -> bool:
        """Return whether exclude_modules names the path."""
        if isinstance(self.exclude_modules, str):
            return re.fullmatch(self.exclude_modules, path) is not None
        return _ends_with(path, self.exclude_modules)

    def _layer_of(self, path: str) -> int | None:
        for name in self.layers_pattern or (r"[^.]*",):
            match = re.match(BEFORE_LAYER.replace("{}", name), path)
            if match is not None:
                return int(match[match.re.groups])
        return None


def read_targets(file: Path, config: Mapping[str, object]) -> Targets:
    """Read the fields from the values of `file`; UserError for a value of another form."""
    given = config.get("layers_to_transform")
    layers: list = [] if given is None else given if isinstance(given, list) else [given]
    if not all(type(layer) is int and layer >= 0 for layer in layers):
        raise _error(file, "layers_to_transform", given, "a list of layers")
    targets = config.get("target_modules")
    if not targets and targets != []:
        raise _error(file, "target_modules", targets, "a list of module names")
    excluded, pattern = config.get("exclude_modules"), config.get("layers_pattern")
    return Targets(
        target_modules=_names(file, "target_modules", targets),
        exclude_modules=_names(file, "exclude_modules", excluded) if excluded else (),
        layers_to_transform=tuple(layers),
        layers_pattern=tuple(
            _checked(file, "layers_pattern", name, BEFORE_LAYER) for name in _as_list(file, "layers_pattern", pattern or [])
        ),
        rank_pattern=_patterns(file, "rank_pattern", config.get("rank_pattern"), int),
        alpha_pattern=_patterns(file, "alpha_pattern", config.get("alpha_pattern"), (int, float)),
    )


def _names(file: Path, key: str, value: object) -> str | tuple[str, ...]:
    """Return a regular expression or a tuple of names."""
    return _checked(file, key, value, COMPLETE) if isinstance(value, str) else tuple(_as_list(file, key, value))


def _as_list(file: Path, key: str, value: object) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(name, str) for name in values):
        raise _error(file, key, value, "a list of module names")
    return values


def _patterns(file: Path, key: str, value: object, kind) -> dict:
    """Return regular expressions with their numbers."""
    patterns = {} if value is None else value
    if not isinstance(patterns, dict) or not all(isinstance(n, kind) and not isinstance(n, bool) and n > 0 for n in patterns.values()):
        raise _error(file, key, value, "a mapping from module names to positive numbers")
    return {_checked(file, key, name, END_OF_PATH): number for name, number in patterns.items()}


def _checked(file: Path, key: str, pattern: str, form: str) -> str:
    """Return a regular expression that can be a part of `form`."""
    try:
        re.compile(form.replace("{}", pattern))
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{file}: {key}: {one_line(pattern, 100)} is no regular expression ({error}); save the adapter again") from None
    return pattern


def _error(file: Path, key: str, value: object, form: str) -> UserError:
    return UserError(f"{file}: {key}: {one_line(json.dumps(value), 160)} is not {form}; save the adapter again")


def _ends_with(path: str, names: tuple[str, ...]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def pattern_key(patterns: Collection[str], path: str) -> str | None:
    """Return the first pattern that fits a path, of `rank_pattern` or `alpha_pattern`; None where none does."""
    return next((pattern for pattern in patterns if re.match(END_OF_PATH.replace("{}", pattern), path)), None)


def first_match(patterns: Mapping[str, float], path: str, default):
    """Return the number of the first pattern that fits a path, else the default."""
    key = pattern_key(patterns, path)
    return default if key is None else patterns[key]
