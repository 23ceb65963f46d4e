"""PEFT directories, with peft itself as the oracle on both sides, and every way in which one can be unusable."""

import dataclasses
import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lora.errors import UserError
from megatron_lora.huggingface.adapter_files import (
    DESCRIPTIVE,
    OF_TARGETS,
    WITHOUT_EFFECT,
    AdapterFile,
    check_adapter,
    check_modules,
    read_adapter,
    write_adapter,
)
from megatron_lora.huggingface.export import EXPORT_DTYPES, export
from megatron_lora.huggingface.model_card import serve_command

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TARGETS = ("down_proj", "q_proj", "v_proj")
TOKENS = torch.arange(1, 13)[None]


def tiny_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    return transformers.LlamaForCausalLM(config).eval()


def peft_model(**options):
    """Make a peft model whose A and B are all non-zero."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(TARGETS), task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    """A directory that peft wrote, and the logits of the model it wrote it from."""
    model = peft_model()
    model.save_pretrained(tmp_path / "peft")
    return tmp_path / "peft", model(TOKENS).logits


def edit_config(directory, **changes):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(directory, edit):
    tensors = load_file(directory / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")


def test_what_peft_wrote_and_we_rewrote_computes_the_same(saved, tmp_path):
    directory, logits = saved
    adapter = read_adapter(directory)
    assert (adapter.r, adapter.lora_alpha, adapter.use_rslora, adapter.target_modules) == (4, 6, False, TARGETS)
    assert adapter.weights["model.layers.1.mlp.down_proj"][0].shape == (4, 24)
    write_adapter(tmp_path / "ours", adapter, "some/base")
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    assert torch.equal(again(TOKENS).logits, logits)
    assert not torch.allclose(tiny_llama()(TOKENS).logits, logits, atol=1e-3)


def test_rslora_survives(tmp_path):
    model = peft_model(use_rslora=True, lora_dropout=0.25)
    model.save_pretrained(tmp_path / "peft")
    adapter = read_adapter(tmp_path / "peft")
    assert adapter.use_rslora and adapter.lora_dropout == 0.25
    write_adapter(tmp_path / "ours", adapter, "some/base")
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert peft.LoraConfig.from_pretrained(tmp_path / "ours").lora_dropout == 0.25


def test_our_files_say_what_those_of_peft_do_in_fields_that_old_versions_know(saved, tmp_path):
    directory, _ = saved
    write_adapter(tmp_path / "ours", read_adapter(directory), "some/base")
    assert sorted(os.listdir(tmp_path / "ours")) == sorted(os.listdir(directory))
    theirs, ours = (peft.LoraConfig.from_pretrained(path).to_dict() for path in (directory, tmp_path / "ours"))
    assert ours == theirs | {"base_model_name_or_path": "some/base"}
    assert set(json.loads((tmp_path / "ours" / "adapter_config.json").read_text())) == FIELDS_WRITTEN
    assert load_file(tmp_path / "ours" / "adapter_model.safetensors").keys() == load_file(directory / "adapter_model.safetensors").keys()


def views_of_one_storage(r=2):
    """Make an adapter whose tensors are strided views of one storage, as an arena's are."""
    arena = torch.arange(200.0)
    b_RN = arena[50:].view(10, 15)
    weights = {"model.layers.0.self_attn.q_proj": (arena[: r * 5].view(r, 5), b_RN[3 : 3 + r].T)}
    return AdapterFile(r=r, lora_alpha=2.5, use_rslora=False, target_modules=("q_proj",), weights=weights)


def test_views_of_an_arena_are_written_as_they_are(tmp_path):
    adapter = views_of_one_storage()
    write_adapter(tmp_path, adapter, "b")
    again = read_adapter(tmp_path)
    assert again.lora_alpha == 2.5
    for ours, theirs in zip(
        adapter.weights["model.layers.0.self_attn.q_proj"], again.weights["model.layers.0.self_attn.q_proj"], strict=True
    ):
        assert torch.equal(ours, theirs)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 1000


def test_replacing_keeps_other_files_and_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    write_adapter(tmp_path, views_of_one_storage(2), "b")
    before = (tmp_path / "adapter_model.safetensors").read_bytes()

    def full_disk(*_args, **_options):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("megatron_lora.huggingface.adapter_files.save_file", full_disk)
        write_adapter(tmp_path, views_of_one_storage(3), "b")
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    write_adapter(tmp_path, views_of_one_storage(3), "b")
    assert read_adapter(tmp_path).r == 3
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "metrics.jsonl"]


def test_the_card_survives_a_hub_parser(tmp_path):
    write_adapter(tmp_path, views_of_one_storage(), "dir with spaces: 'quoted'/base")
    card = pytest.importorskip("huggingface_hub").ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "dir with spaces: 'quoted'/base"
    assert card.data.library_name == "peft"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "lora_magnitude_vector is missing, and use_dora is true"),
        ({"use_dora": 1}, "use_dora: 1 is not true or false"),
        ({"rank_pattern": {"q_proj": 3}}, r"q_proj.lora_A.weight has shape \[4, \d+\] where r = 3 needs \[3, in\]"),
        ({"exclude_modules": ["q_proj"]}, "q_proj has weights and is in exclude_modules"),
        ({"exclude_modules": "(q_proj"}, r"exclude_modules: \(q_proj is no regular expression"),
        ({"rank_pattern": {"(?i)q_proj": 4}}, "rank_pattern: .* is no regular expression"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"layers_to_transform": "0"}, "layers_to_transform"),
        ({"kasa_config": {}}, "kasa_config"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"bias": "all"}, 'bias: "all"'),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layers_to_transform": [0]}, r"down_proj has weights and is not in target_modules \(of model.layers.1"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"some_future_feature": {"on": 1}}, "some_future_feature"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"r": 0}, "r: 0"),
        ({"r": 8}, r"has shape \[4, 24\] where r = 8 needs \[8, in\]"),
        ({"lora_alpha": None}, "lora_alpha: null"),
        ({"lora_dropout": 1.5}, "lora_dropout: 1.5"),
        ({"target_modules": None}, "target_modules: null"),
        ({"target_modules": ["q_proj", "v_proj"]}, "down_proj has weights and is not in target_modules"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(saved, changes, named):
    directory, _ = saved
    edit_config(directory, **changes)
    with pytest.raises(UserError, match=named) as caught:
        read_adapter(directory)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"), "q_proj.lora_B.weight is missing"),
        (
            lambda t: [t.pop(f"base_model.model.model.layers.1.self_attn.q_proj.lora_{half}.weight") for half in "AB"],
            "q_proj has no weights in layer 1",
        ),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}), "lm_head.weight, which is no A or B"),
        (lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.zeros(4, 16)}), r"needs \[out, 4\]"),
        (
            lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.zeros(16, 4, dtype=torch.int8)}),
            "torch.int8",
        ),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_wrong_tensors_are_refused_by_name(saved, edit, named):
    directory, _ = saved
    edit_tensors(directory, edit)
    with pytest.raises(UserError, match=named):
        read_adapter(directory)


def test_damaged_and_missing_files_are_refused(saved, tmp_path):
    directory, _ = saved
    weights = directory / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for damage in (whole[:100], whole[:-10], b"", b"\xff" * 300):
        weights.write_bytes(damage)
        with pytest.raises(UserError, match=r"adapter_model.safetensors: is damaged"):
            read_adapter(directory)
    weights.rename(directory / "adapter_model.bin")
    with pytest.raises(UserError, match="is a pickle, which is never loaded"):
        read_adapter(directory)
    (directory / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_adapter(directory)
    with pytest.raises(UserError, match="has no adapter_config.json"):
        read_adapter(tmp_path / "nowhere")


def test_an_adapter_of_another_model_is_refused():
    adapter = views_of_one_storage()
    path = "model.layers.0.self_attn.q_proj"
    check_adapter("jobs.a.init_adapter", adapter, {path: (15, 5)})
    with pytest.raises(UserError, match="maps 5 to 15 features and the base model's maps 6 to 15"):
        check_adapter("jobs.a.init_adapter", adapter, {path: (15, 6)})
    with pytest.raises(UserError, match="no A and B for model.layers.1"):
        check_adapter("jobs.a.init_adapter", adapter, {path: (15, 5), "model.layers.1.self_attn.q_proj": (15, 5)})
    with pytest.raises(UserError, match="which this job does not train"):
        check_adapter("jobs.a.init_adapter", adapter, {})


LAYERS_OF_ALL = [0, 1]
SAYS_NOTHING_NEW = {  # fields that say what the weights say anyway
    "exclude_modules of other modules": {"exclude_modules": ["lm_head", "vision_tower", "k_proj"]},
    "exclude_modules of targets without weights": {"target_modules": [*TARGETS, "lm_head", "o_proj"],
                                                   "exclude_modules": ["lm_head", "o_proj"]},
    "exclude_modules as an expression": {"exclude_modules": r".*(embed_tokens|lm_head|visual).*"},
    "target_modules as an expression": {"target_modules": r"model\.layers\.\d+\.(mlp\.down|self_attn\.[qv])_proj"},
    "an expression and exclusions": {"target_modules": r".*_proj", "exclude_modules": r".*(k|o|gate|up)_proj"},
    "all-linear and exclusions": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "o_proj", "gate_proj", "up_proj"]},
    "complete paths": {"target_modules": [f"model.layers.{i}.{block}" for i in (0, 1)
                                          for block in ("mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj")]},
    "every layer": {"layers_to_transform": LAYERS_OF_ALL},
    "every layer, by name": {"layers_to_transform": LAYERS_OF_ALL, "layers_pattern": "layers"},
    "a rank pattern of the rank": {"rank_pattern": {"q_proj": 4, "no_such": 9}},
    "a rank pattern of every linear": {"r": 16, "rank_pattern": {"_proj": 4, ".*_proj": 4}},
    "an alpha pattern of the alpha": {"alpha_pattern": {"layers.1.self_attn.v_proj": 6}},
    "an alpha pattern of every linear": {"lora_alpha": 99, "alpha_pattern": {"[a-z]*_proj": 6}},
    "empty lists": {"modules_to_save": [], "target_parameters": [], "alora_invocation_tokens": [], "layers_to_transform": []},
    "eva": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99}},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "configs of other initialisations": {"loftq_config": {"loftq_bits": 4}, "corda_config": {"corda_method": "ipm"}},
    "weight tying without a tied target": {"ensure_weight_tying": True},
    "what describes it": {"revision": "main", "inference_mode": False, "peft_version": "0.11.0", "base_model_name_or_path": "x/y",
                          "auto_mapping": {"base_model_class": "LlamaForCausalLM"}, "qalora_group_size": 32, "megatron_core": "elsewhere"},
}  # fmt: skip
SHAPES = {"q_proj": (16, 16), "v_proj": (8, 16), "down_proj": (16, 24)}
OTHERS = ["model.embed_tokens", "lm_head", *(f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "ko"),
          *(f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up"))]  # fmt: skip


def check_against_the_base(adapter):
    """Check an adapter as a job's init_adapter is, against `tiny_llama`."""
    blocks = {"q_proj": "self_attn", "v_proj": "self_attn", "down_proj": "mlp"}
    shapes = {f"model.layers.{i}.{blocks[name]}.{name}": shape for i in (0, 1) for name, shape in SHAPES.items()}
    check_adapter("jobs.a.init_adapter", adapter, shapes, OTHERS)


@pytest.mark.parametrize("name", SAYS_NOTHING_NEW)
def test_fields_that_the_weights_answer_are_accepted(name, saved):
    directory, logits = saved
    edit_config(directory, **SAYS_NOTHING_NEW[name])
    adapter = read_adapter(directory)
    check_against_the_base(adapter)
    assert (adapter.r, adapter.lora_alpha, adapter.target_modules) == (4, 6, TARGETS)
    again = peft.PeftModel.from_pretrained(tiny_llama(), directory).eval()
    assert torch.equal(again(TOKENS).logits, logits)


@pytest.mark.parametrize("changes, missing", [
    ({"target_modules": [*TARGETS, "k_proj"]}, "model.layers.0.self_attn.k_proj"),
    ({"target_modules": [*TARGETS, "lm_head"]}, "lm_head"),
    ({"target_modules": r".*(q|k|v|down)_proj"}, "model.layers.0.self_attn.k_proj"),
    ({"target_modules": "all-linear"}, "model.layers.0.self_attn.k_proj"),
    ({"target_modules": "all-linear", "exclude_modules": ["k_proj", "o_proj", "gate_proj"]}, "model.layers.0.mlp.up_proj"),
])  # fmt: skip
def test_linears_that_would_start_anew_are_named(saved, changes, missing):
    """PEFT gives them fresh factors, with a warning."""
    directory, _ = saved
    edit_config(directory, **changes)
    with pytest.raises(UserError, match=f"its config adapts {missing}, and it holds no A and B for it"):
        check_against_the_base(read_adapter(directory))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key, dtype", [
    ("layers.0.self_attn.q_proj.lora_A", torch.float32),
    ("layers.1.mlp.down_proj.lora_B", torch.float32),
    ("layers.1.self_attn.v_proj.lora_A", torch.bfloat16),
])  # fmt: skip
def test_factors_that_are_not_finite_are_refused(saved, key, dtype, value):
    directory, _ = saved

    def poison(tensors):
        name = f"base_model.model.model.{key}.weight"
        tensors[name] = tensors[name].to(dtype)
        tensors[name][2, 3] = value

    edit_tensors(directory, poison)
    path, _, factor = f"model.{key}".rpartition(".lora_")
    with pytest.raises(UserError, match=f"{factor} of {path} holds NaN or infinite numbers"):
        check_against_the_base(read_adapter(directory))


@pytest.mark.parametrize("module, remedy", [
    ("qkv_proj", "adapts qkv_proj, which holds q_proj, k_proj and v_proj of this base model in one linear; split its B by rows"),
    ("gate_up_proj", "adapts gate_up_proj, which holds gate_proj and up_proj of this base model in one linear"),
    ("query_key_value", "which holds q_proj, k_proj and v_proj"),
    ("lm_head", "adapts lm_head, and an adapter here can have q_proj, v_proj, down_proj; use an adapter of these alone"),
    ("kv_a_proj", "adapts kv_a_proj, and an adapter here can have"),
])  # fmt: skip
def test_linears_of_other_models_are_explained(tmp_path, module, remedy):
    weights = {f"model.layers.{i}.self_attn.{module}": (torch.ones(2, 5), torch.ones(15, 2)) for i in (0, 1)}
    write_adapter(tmp_path, AdapterFile(r=2, lora_alpha=4, use_rslora=False, target_modules=(module,), weights=weights), "b")
    with pytest.raises(UserError) as caught:
        check_modules("jobs.a.init_adapter: 'dir'", read_adapter(tmp_path), SHAPES)
    assert remedy in str(caught.value) and str(caught.value).startswith("jobs.a.init_adapter: 'dir': ")


FIELDS_READ = {"peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"}
FIELDS_WRITTEN = FIELDS_READ | {"bias", "fan_in_fan_out", "inference_mode", "modules_to_save", "revision", "target_modules"}
ANOTHER_VALUE = {  # of each field of plain LoRA that is refused
    "alora_invocation_tokens": [1, 2], "arrow_config": {"top_k": 2}, "bias": "all", "fan_in_fan_out": True, "kasa_config": {"beta": 1e-4},
    "layer_replication": [[0, 1], [0, 2]], "lora_bias": True, "megatron_config": {"a": 1}, "modules_to_save": ["lm_head"],
    "monteclora_config": {"num_samples": 2}, "target_parameters": ["mlp.down_proj.weight"], "trainable_token_indices": [1],
    "use_bdlora": {"nblocks": 2}, "use_qalora": True, "velora_config": {"num_groups": 2},
}  # fmt: skip


def test_every_field_of_pefts_config_has_a_place(saved):
    directory, _ = saved
    original = (directory / "adapter_config.json").read_text()
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    accepted = FIELDS_READ | {"use_dora", *DESCRIPTIVE, *WITHOUT_EFFECT, *OF_TARGETS}
    assert fields - accepted == ANOTHER_VALUE.keys(), "what becomes of these fields of PEFT?"
    for key, value in ANOTHER_VALUE.items():
        edit_config(directory, **{key: value})
        with pytest.raises(UserError, match=f"{key}: .* is not supported; use a plain LoRA adapter, without {key}"):
            read_adapter(directory)
        (directory / "adapter_config.json").write_text(original)


def with_magnitudes(factor=1.0):
    adapter, path = views_of_one_storage(), "model.layers.0.self_attn.q_proj"
    return dataclasses.replace(adapter, magnitudes={path: torch.arange(15.0) * factor})


def test_magnitudes_are_read_as_they_were_written(tmp_path):
    write_adapter(tmp_path, with_magnitudes(), "b")
    again, tensors = read_adapter(tmp_path), load_file(tmp_path / "adapter_model.safetensors")
    assert [len(factors) for factors in again.factors.values()] == [3]
    assert torch.equal(again.factors["model.layers.0.self_attn.q_proj"][2], torch.arange(15.0))
    assert "merge" in (tmp_path / "README.md").read_text() and "vllm serve" not in (tmp_path / "README.md").read_text()
    with pytest.raises(UserError, match="magnitudes of model.layers.0.self_attn.q_proj holds NaN"):
        write_adapter(tmp_path, with_magnitudes(math.nan), "b")
        check_adapter("dir", read_adapter(tmp_path), {"model.layers.0.self_attn.q_proj": (15, 5)})
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    for changed, fault in (
        ({key: tensors[key][:-1].clone()}, r"is torch.float32 \[14\] where floats \[15\] belong"),
        ({key: tensors[key].to(torch.int32)}, "is torch.int32"),
        ({key.replace("q_proj", "k_proj"): tensors[key].clone()}, "k_proj.lora_magnitude_vector without A and B"),
    ):
        save_file(tensors | changed, tmp_path / "adapter_model.safetensors")
        with pytest.raises(UserError, match=fault):
            read_adapter(tmp_path)
    edit_config(tmp_path, use_dora=False)
    with pytest.raises(UserError, match="which is no A or B of a linear"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"lora_alpha": 12}, {"use_rslora": True}, {"rank_pattern": {".*_proj": 4}, "r": 2, "use_rslora": True}]
)
def test_the_scale_is_pefts(saved, tmp_path, changes):
    directory, logits = saved
    edit_config(directory, **changes)
    adapter = read_adapter(directory)
    write_adapter(tmp_path / "ours", adapter, "some/base")
    theirs, ours = (
        peft.PeftModel.from_pretrained(tiny_llama(), path).eval()(TOKENS).logits for path in (directory, directory.with_name("ours"))
    )
    assert torch.equal(ours, theirs) and not torch.allclose(theirs, logits, atol=1e-3)


def test_a_card_says_how_to_serve_the_adapter_and_of_which_base_it_is(tmp_path):
    write_adapter(tmp_path / "a", views_of_one_storage(), "b")
    write_adapter(tmp_path / "b", views_of_one_storage(), "b", "mine", ["Serve it cold.", "It is good."])
    plain, noted = ((tmp_path / name / "README.md").read_text() for name in "ab")
    assert noted == plain.replace("adapter=path", "mine=path") + "\nServe it cold.\n\nIt is good.\n"
    assert "vllm serve b --enable-lora --max-lora-rank 8 --lora-modules adapter=path/of/this/directory\n" in plain and "SHA" not in plain
    known = dataclasses.replace(views_of_one_storage(), revision="4e04e2", base_digest="0f" * 32)
    write_adapter(tmp_path / "c", known, "org/my base")
    card, again = (tmp_path / "c" / "README.md").read_text(), read_adapter(tmp_path / "c")
    assert "vllm serve 'org/my base' --revision 4e04e2 " in card and 'from_pretrained("org/my base", revision="4e04e2")' in card
    assert (again.revision, again.base_digest) == ("4e04e2", "0f" * 32) and read_adapter(tmp_path / "a").base_digest == ""
    assert peft.LoraConfig.from_pretrained(tmp_path / "c").revision == "4e04e2"


@pytest.mark.parametrize(("r", "bucket"), [(1, 1), (2, 8), (8, 8), (24, 32), (65, 128), (257, 320), (512, 512), (600, 512)])
def test_a_rank_is_served_in_the_bucket_that_holds_it(r, bucket):
    assert f" --max-lora-rank {bucket} " in serve_command("b", r, "a", "d")


def different_ranks(**options):
    model = peft_model(rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.down_proj": 9}, **options)
    return model, model(TOKENS).logits


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_portable_adapter_computes_the_same_by_its_tensors_alone(tmp_path, rslora, dtype):
    model, logits = different_ranks(use_rslora=rslora)
    model.save_pretrained(tmp_path / "peft")
    adapter = export(read_adapter(tmp_path / "peft"), "portable", dtype)
    write_adapter(tmp_path / "ours", adapter, "b")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {EXPORT_DTYPES[dtype]}
    assert {min(tensor.shape) for tensor in tensors.values()} == {4}
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    worst = {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.01}[dtype]
    assert (again(TOKENS).logits - logits).abs().max() < worst < (tiny_llama()(TOKENS).logits - logits).abs().max()


def test_what_fp16_cannot_hold_stays_as_it_is():
    adapter = views_of_one_storage()
    assert export(adapter, "peft", "bf16").weights["model.layers.0.self_attn.q_proj"][0].dtype == torch.bfloat16
    a_RK, b_NR = adapter.weights["model.layers.0.self_attn.q_proj"]
    large = dataclasses.replace(adapter, weights={"model.layers.0.self_attn.q_proj": (a_RK, b_NR * 1e5)})
    assert export(large, "peft", "fp16") is large and export(large, "peft", "bf16") is not large
