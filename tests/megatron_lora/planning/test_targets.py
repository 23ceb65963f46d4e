"""Which linears a job's patterns come to, with which rank and alpha: what peft makes of the same keys; and what is refused."""

import oracle
import pytest

from megatron_lora.config.schema import dump_config, load_config
from megatron_lora.errors import UserError
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.planning.targets import jobs_of, targeted

PATTERNS = {
    "all-linear": {"target_modules": "all-linear"},
    "an expression": {"target_modules": r"model\.layers\.[02]\..*_proj", "exclude_modules": r".*\.(up|k)_proj"},
    "ends of paths": {"target_modules": ["layers.1.self_attn.q_proj", "mlp.up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
    "layers": {"layers_to_transform": [3, 1], "exclude_modules": ["lm_head", "o_proj"]},
    "one layer": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 2},
    "ranks": {"rank_pattern": {"q_proj": 8, r"layers\.[12]\..*": 3, "mlp.up_proj": 5}, "use_rslora": True},
    "alphas": {"target_modules": ["k_proj", "v_proj"], "alpha_pattern": {"layers.1.self_attn.k_proj": 5.5, "k_proj": 7}},
    "both": {"rank_pattern": {".*_proj": 6}, "alpha_pattern": {"layers.0.*": 12, "(q|v)_proj": 2.5}},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return oracle.make_model(tmp_path_factory.mktemp("targets") / "model")


@pytest.fixture
def load(model, tmp_path):
    """Return a function keys of a job -> config."""

    def loaded(keys: dict):
        import json

        job = {"name": "one", "datasets": [{"path": "d.jsonl", "type": "text"}], "r": 4, "lora_alpha": 6.0, **keys}
        (tmp_path / "config.yaml").write_text(json.dumps({"base_model": str(model), "output_dir": str(tmp_path / "run"), "jobs": [job]}))
        return load_config(tmp_path / "config.yaml")

    return loaded


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_come_to_what_peft_makes_of_them(name, model, load, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = targeted(load(PATTERNS[name]), read_architecture(model))
    job = config.jobs[0]
    given = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], **PATTERNS[name]}
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(r=4, lora_alpha=6.0, task_type="CAUSAL_LM", **given))
    prefix, wanted = "base_model.model.", {}
    for path, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            wanted[path.removeprefix(prefix)] = module.r["default"], module.scaling["default"]
    assert job.linears is not None
    paths = read_architecture(model).module_path
    found = {paths(n, each.module): (each.r, job.scale_of(each.r, each.lora_alpha)) for each in job.linears.of for n in each.layers}
    assert found == wanted and job.lora_rank == max(r for r, _ in wanted.values())
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config == targeted(config, read_architecture(model))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules: lm_head cannot be adapted here"),
        ({"target_modules": "model.embed_tokens"}, "target_modules: embed_tokens cannot be adapted here"),
        ({"target_modules": ".*"}, "target_modules: '.*' names the head of a llama, lm_head, which stays frozen"),
        ({"target_modules": "q_proj"}, "'q_proj' is no linear of a llama; write a name such as q_proj, or for complete paths"),
        ({"target_modules": ["layers.9.self_attn.q_proj"]}, "'layers.9.self_attn.q_proj' is no linear of a llama"),
        ({"target_modules": "(q_proj"}, "target_modules: '(q_proj' is no regular expression"),
        ({"target_modules": ["q_proj"], "exclude_modules": [".self_attn.q_proj"]}, "exclude_modules: '.self_attn.q_proj' is no linear"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "exclude_modules: leaves no linear of jobs.one.target_modules"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["v_proj"]}, "exclude_modules: 'v_proj' leaves out what the job does not adapt"),
        ({"layers_to_transform": 1, "exclude_modules": ["layers.0.self_attn.q_proj"]}, "leaves out what the job does not adapt anyway"),
        ({"layers_to_transform": [1, 4]}, "layers_to_transform: 4 is none of the 4 layers; they count from 0"),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, "is not for target_modules that are 'all-linear'"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 4}}, "rank_pattern: 'k_proj' decides for no linear"),
        ({"rank_pattern": {"q_proj": 300}}, "rank_pattern.q_proj: 300 is not a LoRA rank"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern.q_proj: 0 is not a LoRA alpha"),
        ({"rank_pattern": {}}, "rank_pattern: {} is no mapping of modules to ranks"),
        ({"layers_pattern": "layers"}, "layers_pattern: unknown key; it does not work yet: these base models have one list of layers"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: unknown key; it does not work yet: embedding and head stay frozen"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices: unknown key; it does not work yet"),
        ({"experts": True, "rank_pattern": {"q_proj": 4}}, "rank_pattern: {'q_proj': 4} does not work yet with experts: true"),
        ({"experts": True, "init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' does not work yet with experts: true"),
        ({"linears": [1]}, "linears: [1] is written by a run alone"),
        ({"linears": {"target_modules": None, "of": []}}, "linears: is what a run wrote for other keys of the job"),
        ({"init_lora_weights": False}, "init_lora_weights: false is no start of an adapter"),
        ({"init_lora_weights": "pissa_niter_0"}, "init_lora_weights: 'pissa_niter_0' is unknown"),
        ({"init_lora_weights": "olora", "init_adapter": "d"}, "init_lora_weights: olora is in place of jobs.one.init_adapter"),
        ({"init_lora_weights": "pissa", "lora_dropout": 0.1}, "init_lora_weights: pissa does not work yet with lora_dropout: 0.1"),
        ({"init_lora_weights": "pissa", "r": 129}, "init_lora_weights: pissa takes twice the rank, and 256 is the largest"),
        ({"init_lora_weights": "pissa", "r": 65}, "init_lora_weights: pissa cuts rank 65 out of q_proj, whose is 64"),
    ],
)  # fmt: skip
def test_what_decides_nothing_or_contradicts_is_refused(keys, message, model, load):
    with pytest.raises(UserError) as caught:
        targeted(load(keys), read_architecture(model))
    assert message in str(caught.value) and "\n" not in str(caught.value) and str(caught.value).startswith("jobs.one.")


def test_what_a_run_wrote_is_refused_beside_other_keys(model, load):
    """A config.yaml of a run is a config too: a key that is changed in it is not passed over in silence."""
    import dataclasses

    architecture = read_architecture(model)
    config = targeted(load({"target_modules": ["layers.1.self_attn.q_proj"], "rank_pattern": {"q_proj": 8}}), architecture)
    for change in ({"r": 5, "rank_pattern": None}, {"rank_pattern": {"q_proj": 9}}, {"target_modules": ("k_proj",)}, {"lora_alpha": 2.0}):
        changed = dataclasses.replace(config, jobs=(dataclasses.replace(config.jobs[0], **change),))
        for of in (targeted, jobs_of):
            with pytest.raises(UserError, match=r"jobs.one.linears: .* set target_modules to \['layers.1.self_attn.q_proj'\], as it was"):
                of(changed, architecture)
