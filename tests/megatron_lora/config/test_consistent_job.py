"""What a job targets once its base model is known, and the keys of experts that contradict others."""

import pytest

from megatron_lora.config.consistent_job import same_targets, with_targets
from megatron_lora.config.rules import EXPERT_MODULES, TARGET_MODULES
from megatron_lora.config.schema import load_jobs
from megatron_lora.errors import UserError

DENSE, MIXTURE = (TARGET_MODULES, ()), (TARGET_MODULES[:4], EXPERT_MODULES)


def targets(keys: dict, own, of_experts) -> tuple[str, ...]:
    (job,) = load_jobs(None, [{"name": "one", "datasets": [{"path": "d.jsonl", "type": "text"}], **keys}], 0)
    return with_targets(job, own, of_experts, "kind").target_modules


def test_null_is_all_that_the_base_model_has():
    assert targets({}, *DENSE) == TARGET_MODULES
    assert targets({}, ("qkv_proj", "o_proj"), ()) == ("o_proj", "qkv_proj")
    assert targets({}, *MIXTURE) == TARGET_MODULES[:4]
    assert targets({"experts": True}, *MIXTURE) == TARGET_MODULES
    assert targets({"experts": True, "target_modules": ["q_proj"]}, *MIXTURE) == ("q_proj", *EXPERT_MODULES)
    assert targets({"experts": True, "target_modules": ["down_proj"]}, *MIXTURE) == ("down_proj",)


@pytest.mark.parametrize(
    ("keys", "modules", "message"),
    [
        ({"experts": True}, DENSE, "jobs.one.experts: true, and a kind has no experts; remove it"),
        (
            {"target_modules": ["up_proj"]},
            MIXTURE,
            "target_modules: up_proj is of a kind's experts, which are frozen; set experts: true",
        ),
        ({"target_modules": ["qkv_proj"]}, DENSE, "qkv_proj is no linear of a kind; set target_modules: [q_proj, k_proj"),
        ({"experts": True, "target_modules": ["q_proj", "gate_proj"]}, MIXTURE, "gate_proj of experts without up_proj, which PEFT refuses"),
        ({"experts": True, "target_modules": ["up_proj"]}, MIXTURE, "up_proj of experts without gate_proj"),
        ({"expert_r": 4}, MIXTURE, "jobs.one.expert_r: 4 is the rank of experts' adapters; set experts: true"),
        ({"experts": True, "use_rslora": True}, MIXTURE, "jobs.one.use_rslora: true gives experts another scale in PEFT"),
    ],
)
def test_what_contradicts_is_refused(keys, modules, message):
    with pytest.raises(UserError) as caught:
        targets(keys, *modules)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({}, {"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "o_proj"]}, False),
        ({"experts": True, "target_modules": ["q_proj"]}, {"experts": True, "target_modules": ["q_proj", *EXPERT_MODULES]}, True),
        ({"experts": True, "target_modules": ["q_proj"]}, {"experts": True, "target_modules": ["q_proj", "down_proj"]}, False),
        ({"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", *EXPERT_MODULES]}, False),
    ],
)
def test_a_resumed_job_may_leave_open_what_its_run_completed(one, other, same):
    job = {"name": "one", "datasets": [{"path": "d.jsonl", "type": "text"}]}
    first, second = (load_jobs(None, [job | keys], 0)[0] for keys in (one, other))
    assert same_targets(first, second) == same_targets(second, first) == same


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("lora_dropout", 0.1, "0"),
        ("experts", True, "false"),
        ("export", "portable", "peft, since no LoRA adapter computes the same"),
        ("init_lora_weights", "olora", "true, or gaussian"),
        ("objective", {"type": "dpo", "reference": "init_adapter"}, "base"),
    ],
)
def test_what_does_not_go_with_dora(key, value, remedy):
    datasets = [{"path": "d.jsonl", "type": "preference" if key == "objective" else "text"}]
    keys = {"name": "one", "datasets": datasets, "init_adapter": "a" if key == "objective" else None, key: value}
    load_jobs(None, [keys], 0)
    named = "objective.reference" if key == "objective" else key
    with pytest.raises(UserError, match=f"jobs.one.{named}: does not go with jobs.one.adapter: dora; set {named}: {remedy}$"):
        load_jobs(None, [keys | {"adapter": "dora"}], 0)
