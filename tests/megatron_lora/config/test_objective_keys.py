"""What may be said of an objective, and each contradiction refused in one line that names its key."""

import json

import pytest

from megatron_lora.config.schema import config_of, dump_config, load_config
from megatron_lora.errors import UserError
from megatron_lora.output.resume import changed_key

DPO = {"type": "dpo"}


def tree(objective, dataset="preference", **settings) -> dict:
    job = {"name": "a", "datasets": [{"path": "a.jsonl", "type": dataset}], "objective": objective, **settings}
    return {"base_model": "m", "output_dir": "o", "jobs": [job]}


def test_a_config_reads_back_as_it_was(tmp_path):
    several = {"type": "dpo", "loss_type": ["ipo", "sft"], "loss_weights": [1, 0.5], "reference": "init_adapter"}
    for made in (
        tree("dpo"),
        tree(several, init_adapter="x"),
        tree("sft", "text"),
        tree(DPO, "lengths", metric="eval_rewards/margins"),
        tree({"type": "kto", "beta": 0.3}, "kto", metric="eval_rewards/margins"),
    ):
        config = config_of(made)
        (tmp_path / "config.yaml").write_text(dump_config(config))
        assert load_config(tmp_path / "config.yaml") == config
    assert config_of(tree({"type": "dpo", "loss_type": "hinge"})).jobs[0].preference.weights == (("hinge", 1.0),)  # type: ignore[union-attr]
    assert config_of(tree("sft", "text")).jobs[0].preference is None
    assert config_of(tree(DPO, metric="eval_rewards/margins", val_set_size=3)).jobs[0].mode == "max"


def test_a_run_is_resumed_with_its_objective_alone():
    before, other = (config_of(tree({"type": "dpo", "label_smoothing": e, "loss_type": "robust"})) for e in (0.1, 0.2))
    assert changed_key(before, before) is None
    assert changed_key(before, config_of(tree("simpo"))) == "jobs.a.objective: 'simpo' differs from 'dpo'"
    assert changed_key(config_of(tree("sft", "text")), config_of(tree("kto", "kto"))) == "jobs.a.objective: 'kto' differs from 'sft'"
    assert changed_key(before, other) == "jobs.a.objective.label_smoothing: 0.2 differs from 0.1"


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (tree("grpo"), "objective: 'grpo' is no objective (did you mean orpo?); use sft, dpo, cpo, simpo, orpo, kto, or {type: dpo"),
        (tree("kto"), "jobs.a.datasets.0.type: preference is not for the job's objective; use kto"),
        (tree("kto", "lengths"), "jobs.a.datasets.0.type: lengths is not for the job's objective; use kto"),
        (tree(DPO, "kto"), "jobs.a.datasets.0.type: kto is not for the job's objective; use preference"),
        (tree("sft", "kto"), "use another type, or set objective: {type: kto}"),
        (tree("kto", "kto", global_batch_size=1), "jobs.a.global_batch_size: 1 leaves kto no other completion"),
        (
            tree("kto", "kto", metric="eval_rewards/accuracies"),
            "metric: eval_rewards/accuracies is none of its objective's; use eval_loss or eval_rewards/margins",
        ),
        (
            tree({"type": "kto", "undesirable_weight": 1e308}, "kto"),
            "objective.undesirable_weight: 1e+308 is not a weight; use a number above 0 to 1e+06",
        ),
        (tree({"type": "kto", "desirable_weight": 0}, "kto"), "objective.desirable_weight: 0"),
        (tree({"type": "kto", "reference": "init_adapter"}, "kto"), "objective.reference: init_adapter needs jobs.a.init_adapter"),
        (tree({"type": "grpo"}), "objective.type: 'grpo' is unknown"),
        (tree({"beta": 0.2}), "jobs.a.objective.type: is missing; use dpo or cpo or simpo or orpo or kto"),
        (tree({"type": "orpo", "reference": "base"}), "objective.reference: unknown key"),
        (tree({"type": "dpo", "gamma": 1}), "objective.gamma: unknown key"),
        (tree({"type": "dpo", "loss_type": "apo_zero"}), "objective.loss_type.0: 'apo_zero' is unknown"),
        (tree({"type": "dpo", "loss_type": ["ipo", "ipo"]}), "names a loss twice"),
        (tree({"type": "dpo", "loss_weights": [1, 2]}), "objective.loss_weights: has 2 weights, and loss_type 1 losses"),
        (tree({"type": "dpo", "loss_weights": [0]}), "objective.loss_weights: all are 0"),
        (tree({"type": "dpo", "label_smoothing": 0.1}), "objective.label_smoothing: 0.1 is used by loss_type robust alone"),
        (tree({"type": "dpo", "reference": "init_adapter"}), "objective.reference: init_adapter needs jobs.a.init_adapter"),
        (tree("sft"), "jobs.a.datasets.0.type: preference is not for the job's objective"),
        (tree(DPO, "messages"), "jobs.a.datasets.0.type: messages is not for the job's objective; use preference or preference_chat"),
        (tree(DPO, val_datasets=[{"path": "b.jsonl", "type": "text"}]), "jobs.a.val_datasets.0.type: text is not for"),
        (tree(DPO, metric="eval_perplexity"), "jobs.a.metric: eval_perplexity is none of its objective's"),
        (tree("sft", "text", metric="eval_rewards/margins"), "jobs.a.metric: eval_rewards/margins is none of its objective's"),
        (tree(DPO, train_on_inputs=True), "jobs.a.train_on_inputs: true is for objective sft"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(made, words):
    with pytest.raises(UserError) as refused:
        config_of(made)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_key_of_another_objective_is_not_said_to_be_one_of_objective(tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps(tree({"type": "orpo", "cpo_alpha": 1})))
    with pytest.raises(UserError, match=r"^jobs.a.objective.cpo_alpha: unknown key; the keys are beta, type$"):
        load_config(tmp_path / "config.yaml")
