"""PEFT directories, with peft itself as the oracle on both sides, and every way in which one can be unusable."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lora.errors import UserError
from megatron_lora.huggingface.adapter_files import AdapterFile, check_adapter, read_adapter, write_adapter

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


def test_our_files_are_the_files_peft_writes(saved, tmp_path):
    directory, _ = saved
    write_adapter(tmp_path / "ours", read_adapter(directory), "some/base")
    assert sorted(os.listdir(tmp_path / "ours")) == sorted(os.listdir(directory))
    theirs, ours = (json.loads((path / "adapter_config.json").read_text()) for path in (directory, tmp_path / "ours"))
    for volatile in ("peft_version", "base_model_name_or_path"):
        theirs.pop(volatile), ours.pop(volatile)
    theirs["target_modules"].sort()  # peft keeps a set
    assert ours == theirs
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
        ({"use_dora": True}, "use_dora: true"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
        ({"bias": "all"}, 'bias: "all"'),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
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
        ({"target_modules": [*TARGETS, "k_proj"]}, "k_proj has no weights"),
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


def test_advice_on_serving_stands_in_the_card(tmp_path):
    write_adapter(tmp_path / "a", views_of_one_storage(), "b")
    write_adapter(tmp_path / "b", views_of_one_storage(), "b", "Serve it cold.")
    plain, advised = ((tmp_path / name / "README.md").read_text() for name in "ab")
    assert advised == plain + "\nServe it cold.\n"
