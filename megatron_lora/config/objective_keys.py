"""The keys of a job's objective, and what of a job does not go with it.

    objective: sft                                    # the default: cross-entropy over the targets
    objective: {type: dpo, beta: 0.1}                 # Direct Preference Optimization: TRL's keys, names and formulas
    objective: {type: dpo, loss_type: [sigmoid, sft], loss_weights: [1, 0.2], reference: init_adapter}
    objective: {type: cpo, cpo_alpha: 0.5}            # no reference: the answers' own log-probabilities, and the chosen one's
    objective: {type: simpo, beta: 2, simpo_gamma: 1}
    objective: {type: orpo, beta: 0.1}                # no reference: the odds of the answers, and all tokens of the chosen sequence
    objective: {type: kto, desirable_weight: 1.3}     # single answers, each desirable or not

training/objectives.py has the formulas.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

from megatron_lora.config.dataset_paths import LABELLED_TYPES, PREFERENCE_TYPES, DatasetConfig
from megatron_lora.config.keys import build, key, required
from megatron_lora.config.rules import PAIR_METRICS, accepts, list_of, null_or, number, one_of, show, suggest
from megatron_lora.errors import UserError

LOSS_TYPES = ("sigmoid", "hinge", "ipo", "robust", "sft")
MOST_WEIGHT = 1e6  # of a label's answers, as of a record: what float32 bears beside the others
BETA = number("a beta", 0, 1e6, above=True)  # beyond, float32 has no number for a loss of long answers
LARGE_RATE = 1e-4  # of learning: SFT's size, which preference losses do not bear


@accepts(f"one of {', '.join(f'`{each}`' for each in LOSS_TYPES)}, or a list of some")
def loss_types(path: str, value: object) -> tuple[str, ...]:
    """Accept one of TRL's losses, or several, whose weighted sum is the loss."""
    found = list_of("losses", one_of(*LOSS_TYPES))(path, value if isinstance(value, list) else [value])
    if len(set(found)) < len(found):
        raise UserError(f"{path}: {show(value)} names a loss twice; add up its weights")
    return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DpoConfig:
    """Direct Preference Optimization."""

    type: str = required(one_of("dpo"), "`dpo`: Direct Preference Optimization, over pairs of answers (datasets of type `preference`)")
    beta: float = key(0.1, BETA, "how strongly the policy is held to its reference; of `ipo` the regularization tau")
    loss_type: tuple[str, ...] = key(
        ("sigmoid",), loss_types, "TRL's losses; `robust` is `sigmoid` with `label_smoothing`, `sft` the chosen answers' cross-entropy"
    )
    loss_weights: tuple[float, ...] | None = key(
        None, null_or(list_of("weights", number("a weight of a loss", 0))), "what each loss of `loss_type` is multiplied by; null: 1"
    )
    label_smoothing: float = key(
        0.0, number("a label smoothing", 0, 0.5, below=True), "of `robust`: how likely a pair is labelled the wrong way round"
    )
    reference: str = key(
        "base",
        one_of("base", "init_adapter"),
        "what the policy is held to: the base model, or the adapter that the job starts from, `init_adapter`",
    )

    @property
    def weights(self) -> tuple[tuple[str, float], ...]:
        """Each loss with its weight."""
        return tuple(zip(self.loss_type, self.loss_weights or (1.0,) * len(self.loss_type), strict=True))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CpoConfig:
    """Contrastive Preference Optimization."""

    reference: ClassVar[None] = None
    type: str = required(one_of("cpo"), "`cpo`: Contrastive Preference Optimization, without a reference")
    beta: float = key(0.1, BETA, "what log-probabilities are multiplied by; of `ipo` the regularization tau")
    loss_type: str = key("sigmoid", one_of("sigmoid", "hinge", "ipo"), "TRL's losses; `ipo` takes means over targets")
    label_smoothing: float = key(
        0.0, number("a label smoothing", 0, 0.5, below=True), "of `sigmoid`: how likely a pair is labelled the wrong way round"
    )
    cpo_alpha: float = key(1.0, number("a weight", 0), "weight of the chosen answers' cross-entropy, over the targets of the batch")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SimpoConfig:
    """Simple Preference Optimization."""

    reference: ClassVar[None] = None

    type: str = required(one_of("simpo"), "`simpo`: Simple Preference Optimization, over means of log-probabilities, without a reference")
    beta: float = key(0.1, BETA, "what means of log-probabilities are multiplied by; its paper uses 2 to 2.5")
    simpo_gamma: float = key(0.5, number("a margin", 0), "margin by which the chosen answer's reward is to be the larger one")
    label_smoothing: float = key(0.0, number("a label smoothing", 0, 0.5, below=True), "how likely a pair is labelled the wrong way round")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OrpoConfig:
    """Odds Ratio Preference Optimization."""

    reference: ClassVar[None] = None

    type: str = required(one_of("orpo"), "`orpo`: Odds Ratio Preference Optimization, with cross-entropy, without a reference")
    beta: float = key(0.1, BETA, "weight of the odds ratio beside the cross-entropy; its paper's lambda")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KtoConfig:
    """Kahneman-Tversky Optimization."""

    type: str = required(one_of("kto"), "`kto`: Kahneman-Tversky Optimization, over single answers with a label (datasets of type `kto`)")
    beta: float = key(0.1, BETA, "how strongly the policy is held to its reference")
    desirable_weight: float = key(
        1.0, number("a weight", 0, MOST_WEIGHT, above=True), "what losses of answers with label true are multiplied by"
    )
    undesirable_weight: float = key(
        1.0, number("a weight", 0, MOST_WEIGHT, above=True), "what losses of answers with label false are multiplied by"
    )
    reference: str = key(
        "base",
        one_of("base", "init_adapter"),
        "what the policy is held to: the base model, or the adapter that the job starts from, `init_adapter`",
    )


PairObjective = DpoConfig | CpoConfig | SimpoConfig | OrpoConfig
Preference = PairObjective | KtoConfig
OBJECTIVES: dict[str, type] = {"dpo": DpoConfig, "cpo": CpoConfig, "simpo": SimpoConfig, "orpo": OrpoConfig, "kto": KtoConfig}


@accepts("`sft`, or a mapping of [a preference objective's keys](#preference-objectives)")
def objective(path: str, value: object) -> Preference | str:
    """Accept sft, or the keys of a preference objective."""
    if value == "sft" or value == {"type": "sft"}:
        return "sft"
    if isinstance(value, str) and value in OBJECTIVES:
        value = {"type": value}
    if not isinstance(value, dict):
        close = suggest(value, OBJECTIVES) if isinstance(value, str) else ""
        raise UserError(f"{path}: {show(value)} is no objective{close}; use sft, {', '.join(OBJECTIVES)}, or {{type: dpo, beta: 0.1}}")
    if "type" not in value:
        raise UserError(f"{path}.type: is missing; use {' or '.join(OBJECTIVES)}")
    kind = one_of(*OBJECTIVES)(f"{path}.type", value["type"])
    found: Preference = build(OBJECTIVES[kind], path, value)
    if isinstance(found, DpoConfig) and found.loss_weights is not None and len(found.loss_weights) != len(found.loss_type):
        named = f"{path}.loss_weights: has {len(found.loss_weights)} weights, and loss_type {len(found.loss_type)} losses"
        raise UserError(f"{named}; give one weight for each")
    if isinstance(found, DpoConfig) and found.loss_weights is not None and not any(found.loss_weights):
        raise UserError(f"{path}.loss_weights: all are 0, so that nothing is trained; give one above 0")
    taken = {"dpo": "robust", "cpo": "sigmoid"}.get(kind)  # the loss that has a label smoothing
    if isinstance(found, DpoConfig | CpoConfig) and found.label_smoothing and taken not in _losses(found):
        raise UserError(f"{path}.label_smoothing: {found.label_smoothing:g} is used by loss_type {taken} alone; set loss_type: {taken}")
    return found


def _losses(found: DpoConfig | CpoConfig) -> tuple[str, ...]:
    return (found.loss_type,) if isinstance(found.loss_type, str) else found.loss_type


def check_objective(where: str, job: Any) -> None:
    """Raise UserError where a job's data or keys are not for its objective; `job`: a JobConfig."""
    preferred, labelled = job.objective != "sft", isinstance(job.objective, KtoConfig)
    for name in ("datasets", "val_datasets"):
        _check_types(f"{where}.{name}", getattr(job, name), job.objective)
    own = [name for name in PAIR_METRICS if preferred and not (labelled and name == "eval_rewards/accuracies")]
    if job.metric not in ("eval_loss", "eval_accuracy", *(own if preferred else ["eval_perplexity"])):
        raise UserError(f"{where}.metric: {job.metric} is none of its objective's; use {' or '.join(['eval_loss', *own[:1]])}")
    if preferred and job.train_on_inputs:
        raise UserError(f"{where}.train_on_inputs: true is for objective sft; a preference is between answers: remove it")
    if labelled and job.global_batch_size < 2:
        raise UserError(f"{where}.global_batch_size: 1 leaves kto no other completion to compare with; use 2 or more")
    if preferred and job.objective.reference == "init_adapter" and job.init_adapter is None:
        raise UserError(f"{where}.objective.reference: init_adapter needs {where}.init_adapter; name a PEFT directory, or use base")


def _check_types(where: str, datasets: Iterable[DatasetConfig], of: Preference | str) -> None:
    for position, dataset in enumerate(datasets):
        if isinstance(of, KtoConfig):
            fits, wanted = dataset.type in LABELLED_TYPES, "kto, or set another objective"
        elif of != "sft":
            fits, wanted = dataset.type in (*PREFERENCE_TYPES, "lengths"), "preference or preference_chat, or set objective: sft"
        else:
            fits = dataset.type not in (*PREFERENCE_TYPES, *LABELLED_TYPES)
            wanted = f"another type, or set objective: {{type: {'kto' if dataset.type in LABELLED_TYPES else 'dpo'}}}"
        if not fits:
            raise UserError(f"{where}.{position}.type: {dataset.type} is not for the job's objective; use {wanted}")
