"""The keys of a job that say what its adapter is: which linears it adapts, with which rank and scale, and how it starts.

PEFT's names. schema.py's JobConfig has them beside the others. Where the keys choose linears by more than module names, or give some
a rank or an alpha of their own, `linears` has what they come to on the run's base model (planning/targets.py).
"""

import dataclasses
import math
import re
from typing import Any

from megatron_lora.config.keys import build, key, required
from megatron_lora.config.rules import (
    MODULES,
    Rule,
    accepts,
    job_name,
    list_of,
    null_or,
    number,
    one_of,
    path_of,
    show,
    subset_of,
    text,
    truth,
    whole_number,
)
from megatron_lora.errors import UserError

ALL_LINEAR = "all-linear"
MAX_RANK = 256
NOT_ADAPTED = ("embed_tokens", "lm_head")
RANK = whole_number("a LoRA rank", 1, MAX_RANK)
ALPHA = number("a LoRA alpha", 0, 1e6, above=True)
NITER = re.compile(r"pissa_niter_[1-9]\d{0,2}")


def _expression(path: str, value: str, form: str = "{}") -> str:
    try:
        re.compile(form.replace("{}", value))
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{path}: {show(value)} is no regular expression ({error}); correct it") from None
    return value


@accepts(f"a list of module names or ends of paths, `{ALL_LINEAR}`, or a regular expression for complete paths")
def chosen_modules(path: str, value: object) -> str | tuple[str, ...]:
    """Accept what PEFT's `target_modules` takes; names alone come in our order."""
    names = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    for name in NOT_ADAPTED:
        if any(isinstance(each, str) and each.rpartition(".")[2] == name for each in names):
            raise UserError(f"{path}: {name} cannot be adapted here; name linears of the layers")
    if isinstance(value, str):
        return ALL_LINEAR if value.lower() == ALL_LINEAR else _expression(path, text("a regular expression")(path, value))
    if not any(isinstance(each, str) and "." in each for each in names):
        return subset_of("module names", MODULES)(path, value)
    ends = list_of("module names", text("the end of a path"))(path, value)
    return tuple(dict.fromkeys(ends))


@accepts("a list of module names or ends of paths, or a regular expression for complete paths")
def left_out_modules(path: str, value: object) -> str | tuple[str, ...]:
    """Accept what PEFT's `exclude_modules` takes."""
    if isinstance(value, str):
        return _expression(path, text("a regular expression")(path, value))
    return list_of("module names", text("the end of a path"))(path, value)


@accepts("a layer, counted from 0, or a list of layers")
def layers(path: str, value: object) -> tuple[int, ...]:
    """Accept one layer or several."""
    layer = whole_number("a layer", 0)
    return tuple(sorted(set(list_of("layers", layer)(path, value)))) if isinstance(value, list) else (layer(path, value),)


def pattern_of(what: str, rule: Rule) -> Rule:
    """Accept a mapping of regular expressions for ends of paths to what `rule` accepts."""

    @accepts(f"a mapping of module names, or regular expressions for ends of paths, to {what}")
    def mapping(path: str, value: object) -> dict[str, Any]:
        if not isinstance(value, dict) or not value or not all(isinstance(name, str) and name for name in value):
            raise UserError(f"{path}: {show(value)} is no mapping of modules to {what}; write {{q_proj: 8}}")
        return {_expression(path, name, r"(.*\.)?({})$"): rule(f"{path}.{name}", item) for name, item in value.items()}

    return mapping


@accepts("`true`, `gaussian`, `pissa`, `pissa_niter_N` with a number N, or `olora`")
def init_weights(path: str, value: object) -> bool | str:
    """Accept one of PEFT's ways to start that are there."""
    if value is True or (isinstance(value, str) and NITER.fullmatch(value)):
        return value
    if value is False or not isinstance(value, str):
        raise UserError(f"{path}: {show(value)} is no start of an adapter; use true, gaussian, pissa, pissa_niter_16 or olora")
    return one_of("gaussian", "pissa", "pissa_niter_16", "olora")(path, value)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """Linears of one name that a job adapts alike."""

    module: str = dataclasses.field(metadata={"rule": one_of(*MODULES)})
    layers: tuple[int, ...] = dataclasses.field(metadata={"rule": layers})
    r: int = dataclasses.field(metadata={"rule": RANK})
    lora_alpha: float = dataclasses.field(metadata={"rule": ALPHA})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Linears:
    """What a job's patterns come to on its base model, and the `target_modules` that were written."""

    target_modules: str | tuple[str, ...] | None
    of: tuple[Linear, ...]


@accepts("written by a run")
def linears(path: str, value: object) -> Linears | None:
    """Accept what a run has written, or null."""
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != {"target_modules", "of"} or not isinstance(value["of"], list):
        raise UserError(f"{path}: {show(value)} is written by a run alone; remove it, and use target_modules and rank_pattern")
    of = tuple(build(Linear, f"{path}.of.{position}", each) for position, each in enumerate(value["of"]))
    return Linears(target_modules=null_or(chosen_modules)(f"{path}.target_modules", value["target_modules"]), of=of)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AdapterKeys:
    """A job by its name, and what it adds to the frozen model."""

    name: str = required(job_name, "names the job and its directory; unique, upper and lower case being the same")
    adapter: str = key(
        "lora",
        one_of("lora", "dora"),
        "`dora`: each output of an adapted linear gets a trained magnitude in place of the norm of its weights, B A included; the "
        "magnitudes start as these norms. It takes `lora_dropout: 0`, and no experts. [What it costs](performance.md#what-dora-costs)",
    )
    r: int = key(16, RANK, "rank of A and B")
    lora_alpha: float = key(32.0, ALPHA, "the adapter's output is multiplied by `lora_alpha / r`")
    lora_dropout: float = key(
        0.0, number("a dropout probability", 0, 1, below=True), "share of the adapter's input features that are dropped"
    )
    use_rslora: bool = key(False, truth(), "true: the adapter's output is multiplied by `lora_alpha / sqrt(r)`")
    target_modules: tuple[str, ...] = key(  # names once the base model is known (planning/targets.py)
        None,
        null_or(chosen_modules),
        "linears of each layer that get an adapter; a Phi-3 has `qkv_proj`, `o_proj`, `gate_up_proj` and `down_proj`. null: all of "
        "the base model's, those of its experts where `experts` is true. Also [as PEFT resolves them](#which-linears), by paths",
    )
    exclude_modules: str | tuple[str, ...] | None = key(
        None, null_or(left_out_modules), "linears that `target_modules` names and that get no adapter"
    )
    layers_to_transform: tuple[int, ...] | None = key(
        None, null_or(layers), "layers whose linears get an adapter; null: all. Not with a regular expression, as in PEFT"
    )
    rank_pattern: dict[str, int] | None = key(
        None, null_or(pattern_of("ranks", RANK)), "linears that have another rank than `r`; the first that fits a path counts"
    )
    alpha_pattern: dict[str, float] | None = key(
        None, null_or(pattern_of("alphas", ALPHA)), "linears that have another alpha than `lora_alpha`; the first that fits a path counts"
    )
    experts: bool = key(
        False,
        truth(),
        "of a mixture of experts, true: `gate_proj`, `up_proj` and `down_proj` of each expert get an adapter too, or those of them that "
        "`target_modules` names; the PEFT directory says `lora_dropout: 0`, which is all that PEFT takes there",
    )
    expert_r: int | None = key(
        None,
        null_or(RANK),
        "rank of A and B of each expert, with the scale `lora_alpha / expert_r`; null: `r`",
    )
    init_lora_weights: bool | str = key(
        True,
        init_weights,
        "how A and B start. `true`: A kaiming-uniform, B zero; `gaussian`: A normal with deviation 1 / r; `pissa`, `pissa_niter_N` and "
        "`olora`: [both from the base weight](#starts-from-the-base-weights), and the adapter that is written has rank 2 r",
    )
    init_adapter: str | None = key(
        None,
        null_or(path_of("a PEFT directory")),
        "adapter that the job starts from, of the same `r`, `lora_alpha`, `use_rslora` and `target_modules`; null: as "
        "`init_lora_weights` says. `adapter: dora` may start from a LoRA adapter, too",
    )
    linears: Linears | None = key(None, linears, "what patterns come to on the base model; never set by hand")

    @property
    def expert_rank(self) -> int:
        """The rank of experts' adapters; 0 where they are frozen."""
        return (self.expert_r or self.r) * self.experts

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied by: alpha / r, or alpha / sqrt(r) with rsLoRA; without patterns of all linears."""
        return self.scale_of(self.r, self.lora_alpha)

    def scale_of(self, r: int, lora_alpha: float) -> float:
        """Return the scale of a linear with this rank and alpha."""
        return lora_alpha / (math.sqrt(r) if self.use_rslora else r)

    @property
    def has_frozen_half(self) -> bool:
        """Whether each adapter holds, frozen and at minus the scale, the factors that it starts from."""
        return isinstance(self.init_lora_weights, str) and self.init_lora_weights != "gaussian"

    @property
    def lora_rank(self) -> int:
        """The rank that is computed with: the largest of its linears, twice as much with a frozen half."""
        return max((each.r for each in self.linears.of), default=self.r) * self.halves if self.linears else self.r * self.halves

    @property
    def halves(self) -> int:
        """How many times its rank an adapter has rows of A and B: 2 with a frozen half."""
        return 1 + self.has_frozen_half

    @property
    def times_alpha(self) -> float:
        """What an alpha is multiplied by where the rank is with the frozen half, so that the scale is the same."""
        return self.halves**0.5 if self.use_rslora else float(self.halves)

    def rank_at(self, module: str, layer: int) -> int:
        """Return the rank of a targeted module's linear in a layer; 0 where it is not adapted."""
        return self._linear_at(module, layer).r

    def alpha_at(self, module: str, layer: int) -> float:
        """Return the alpha of a linear that the job adapts."""
        return self._linear_at(module, layer).lora_alpha

    def _linear_at(self, module: str, layer: int) -> Linear:
        alike = Linear(module=module, layers=(layer,), r=0 if self.linears else self.r, lora_alpha=self.lora_alpha)
        of = self.linears.of if self.linears else ()
        return next((each for each in of if each.module == module and layer in each.layers), alike)

    @property
    def largest_alpha(self) -> float:
        """The largest alpha of its linears."""
        return max((each.lora_alpha for each in self.linears.of), default=0.0) if self.linears else self.lora_alpha

    @property
    def has_patterns(self) -> bool:
        """Whether it chooses linears by more than names of modules, or gives some a rank or an alpha of their own."""
        given = (self.exclude_modules, self.layers_to_transform, self.rank_pattern, self.alpha_pattern)
        by_path = isinstance(self.target_modules, str) or any("." in name for name in self.target_modules or ())
        return by_path or any(each is not None for each in given)


def check_adapter_keys(where: str, job: AdapterKeys) -> None:
    """Raise UserError where the keys of a job's adapter contradict."""
    if isinstance(job.target_modules, str) and job.layers_to_transform is not None:
        raise UserError(
            f"{where}.layers_to_transform: is not for target_modules that are {show(job.target_modules)}, in PEFT either; name modules in "
            "a list, or the layers in the expression"
        )
    if job.experts and (job.has_patterns or job.init_lora_weights is not True):
        names = ("exclude_modules", "layers_to_transform", "rank_pattern", "alpha_pattern")
        which = next((name for name in names if getattr(job, name) is not None), "target_modules" if job.has_patterns else "")
        named = which or "init_lora_weights"
        raise UserError(f"{where}.{named}: {show(getattr(job, named))} does not work yet with experts: true; remove one of the two")
    if job.init_adapter is not None and job.init_lora_weights is not True:
        raise UserError(f"{where}.init_lora_weights: {job.init_lora_weights} is in place of {where}.init_adapter, which is given; keep one")
    if job.has_frozen_half:
        how = f"{where}.init_lora_weights: {job.init_lora_weights}"
        if job.lora_dropout:
            raise UserError(
                f"{how} does not work yet with lora_dropout: {job.lora_dropout:g}, which would drop its frozen half; set it to 0"
            )
        if max(job.r, *(job.rank_pattern or {"": 1}).values()) > MAX_RANK // 2:
            raise UserError(f"{how} takes twice the rank, and {MAX_RANK} is the largest; use an r of at most {MAX_RANK // 2}")
