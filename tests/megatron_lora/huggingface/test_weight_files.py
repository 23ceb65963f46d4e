"""What a checkpoint's files hold is loaded as transformers loads it, or refused by name: logits agree, and each refusal has its line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hf_logits import difference, our_logits, their_logits
from safetensors.torch import load_file, save_file
from tiny import save_model

from megatron_lora.errors import UserError
from megatron_lora.huggingface.weight_files import read_base_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return kind -> a directory with a model of it, made when first asked for."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            save_model(made[kind], kind)
        return made[kind]

    return get


@pytest.fixture
def copy_of(saved, tmp_path):
    """Return kind -> a copy of its directory that a test may spoil."""
    return lambda kind: shutil.copytree(saved(kind), tmp_path / "model")


def edit(directory, change, file="model.safetensors"):
    """Rewrite a file with what `change` makes of its tensors."""
    tensors = change(load_file(directory / file))
    save_file(tensors, directory / file, metadata={"format": "pt"})


def scaled_head(tensors, scale):
    return tensors | {HEAD: (scale * tensors[EMBEDDING]).contiguous()}


def renamed(tensors, rename):
    return {rename(name): tensor for name, tensor in tensors.items()}


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


LOADED = {  # name: (kind, what is done to the tensors)
    "a tied pair, as saved": ("llama-tied", dict),
    "a head that differs from the tied embedding": ("llama-tied", lambda t: scaled_head(t, -0.5)),
    "a head that differs in one number": ("llama-tied", lambda t: t | {HEAD: t[EMBEDDING] + torch.eye(61, 48) * (torch.arange(48) == 7)}),
    "a head equal to the tied embedding": ("qwen2", lambda t: scaled_head(t, 1.0)),
    "the head of a tied pair alone": ("qwen2", lambda t: without(scaled_head(t, 1.0), EMBEDDING)),
    "a backbone without its prefix, tied": ("llama-tied", lambda t: renamed(t, lambda n: n.removeprefix("model."))),
    "a backbone without its prefix, with a head": ("llama", lambda t: renamed(t, lambda n: n.removeprefix("model."))),
    "a head with the backbone's prefix": ("mistral", lambda t: renamed(t, lambda n: n.replace("lm_head", "model.lm_head"))),
    "a prefix on some names": ("qwen3", lambda t: renamed(t, lambda n: n.removeprefix("model.") if "layers.1" in n else n)),
    "rotary tables of an older version": (
        "llama", lambda t: t | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.full((4,), 9.0) for i in range(3)}
    ),
    "weights in half precision": ("llama-tied", lambda t: {name: tensor.half() for name, tensor in t.items()}),
    "weights in two precisions": ("qwen3", lambda t: {n: x.bfloat16() if "mlp" in n else x for n, x in t.items()}),
}  # fmt: skip


@pytest.mark.parametrize("case", LOADED)
def test_what_is_stored_is_loaded_as_transformers_does(case, copy_of, one_process):
    kind, change = LOADED[case]
    directory = copy_of(kind)
    edit(directory, change)
    assert difference(our_logits(directory), their_logits(directory, 61)) < 1e-5


def test_a_head_beside_a_tied_embedding_matters(saved, copy_of, one_process):
    before = our_logits(saved("llama-tied"))
    directory = copy_of("llama-tied")
    edit(directory, lambda tensors: scaled_head(tensors, -0.5))
    assert not read_base_model(directory).tied_head and read_base_model(saved("llama-tied")).tied_head
    assert difference(our_logits(directory), before) > 1


def sharded(directory, kind):
    """Save the model in shards beside what `directory` holds; return the index."""
    parts = directory.with_name("parts")
    save_model(parts, kind, max_shard_size="20KB")
    for path in parts.glob("model*"):
        shutil.copy(path, directory / path.name)
    return json.loads((directory / "model.safetensors.index.json").read_text())


def negate(directory, file):
    edit(directory, lambda tensors: {name: -tensor for name, tensor in tensors.items()}, file)


def spoil_shards(directory):
    """Both forms are there; the shards hold another model."""
    for file in set(sharded(directory, "mistral")["weight_map"].values()):
        negate(directory, file)


def spoil_single(directory):
    sharded(directory, "mistral")
    negate(directory, "model.safetensors")


def stray_shard(directory):
    sharded(directory, "mistral")
    save_file({Q_PROJ: torch.full((96, 32), 7.0)}, directory / "model-00099-of-00099.safetensors")
    (directory / "model.safetensors").unlink()


def variant(directory):
    save_file({Q_PROJ: torch.full((96, 32), 7.0)}, directory / "model.fp16.safetensors")
    (directory / "pytorch_model.bin").write_bytes(b"no pickle is read")


def misnamed_in_the_index(directory):
    index = sharded(directory, "mistral")
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"] = {name: files[i % len(files)] for i, name in enumerate(sorted(index["weight_map"]))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()


@pytest.mark.parametrize("spoil", [spoil_shards, spoil_single, stray_shard, variant, misnamed_in_the_index])
def test_the_file_that_is_taken_is_the_one_that_transformers_takes(spoil, copy_of, one_process):
    directory = copy_of("mistral")
    spoil(directory)
    assert difference(our_logits(directory), their_logits(directory, 61)) < 1e-5


ZERO = torch.zeros(1)
REFUSED_TENSORS = {  # name: (kind, what is done to the tensors, what the line says)
    "no head": ("llama", lambda t: without(t, HEAD), "has no tensor lm_head.weight, which its config.json calls for"),
    "no embedding": ("llama", lambda t: without(t, EMBEDDING), "has no tensor model.embed_tokens.weight"),
    "neither of a tied pair": ("qwen2", lambda t: without(t, EMBEDDING), "has no tensor model.embed_tokens.weight"),
    "no norm": ("qwen3", lambda t: without(t, "model.norm.weight"), "has no tensor model.norm.weight"),
    "no bias": ("qwen2", lambda t: without(t, Q_PROJ.replace("weight", "bias")), "has no tensor model.layers.0.self_attn.q_proj.bias"),
    "another prefix": ("llama", lambda t: renamed(t, lambda n: f"language_{n}"), "it holds language_lm_head.weight instead"),
    "a fused linear": (
        "llama", lambda t: renamed(t, lambda n: n.replace("q_proj.weight", "qkv_proj.weight")), "self_attn.qkv_proj.weight instead"
    ),
    "a bias that config.json has off": (
        "mistral", lambda t: t | {"model.layers.0.self_attn.o_proj.bias": torch.zeros(32)}, "o_proj.bias that its config.json does not"
    ),
    "a layer too many": (
        "mistral", lambda t: t | {"model.layers.3.self_attn.q_proj.weight": t[Q_PROJ].clone()}, "model.layers.3.self_attn.q_proj.weight"
    ),
    "an adapter": (
        "mistral", lambda t: t | {Q_PROJ.replace("weight", "lora_A.weight"): ZERO}, "merge the adapter into the base model with peft"
    ),
    "an adapted base": ("mistral", lambda t: renamed(t, lambda n: n.replace("q_proj.", "q_proj.base_layer.")), "q_proj.base_layer.weight"),
    "a scale": ("mistral", lambda t: t | {Q_PROJ + "_scale_inv": ZERO}, "not a quantised one"),
    "a classifier": ("mistral", lambda t: t | {"score.weight": torch.zeros(2, 32)}, "score.weight that its config.json does not call for"),
    "fp8": ("mistral", lambda t: t | {Q_PROJ: t[Q_PROJ].to(torch.float8_e4m3fn)}, "q_proj.weight is F8_E4M3; use a checkpoint in bf16"),
    "int8": ("mistral", lambda t: t | {Q_PROJ: t[Q_PROJ].to(torch.int8)}, "q_proj.weight is I8; use a checkpoint in bf16"),
    "fp64": ("mistral", lambda t: t | {Q_PROJ: t[Q_PROJ].double()}, "q_proj.weight is F64"),
    "packed 4 bits": ("mistral", lambda t: t | {Q_PROJ: torch.zeros(96 * 16, 1, dtype=torch.uint8)}, "q_proj.weight is U8"),
    "another shape": ("mistral", lambda t: t | {Q_PROJ: t[Q_PROJ].T.contiguous()}, "has shape [32, 96] and config.json calls for [96, 32]"),
    "a head of another size": ("llama-tied", lambda t: t | {HEAD: torch.zeros(60, 48)}, "lm_head.weight has shape [60, 48]"),
    "a name with and without its prefix": (
        "llama", lambda t: t | {"norm.weight": t["model.norm.weight"].clone()}, "holds model.norm.weight twice, as model.norm.weight in"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_TENSORS)
def test_what_cannot_be_loaded_is_refused_by_name(case, copy_of):
    kind, change, message = REFUSED_TENSORS[case]
    directory = copy_of(kind)
    edit(directory, change)
    with pytest.raises(UserError) as caught:
        read_base_model(directory)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("base_model: ")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [EMBEDDING, Q_PROJ, "model.norm.weight", "model.layers.1.mlp.down_proj.bias"])
def test_weights_that_are_not_finite_are_refused(name, value, copy_of, one_process):
    directory = copy_of("llama")

    def poison(tensors):
        tensors[name].view(-1)[5] = value
        return tensors

    edit(directory, poison)
    with pytest.raises(UserError, match=f"the tensor {name} holds NaN or infinite numbers"):
        our_logits(directory)


def write_index(directory, weight_map):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("spoil, message", [
    (lambda d: write_index(d, {"a": "../elsewhere.safetensors"}), "lists no safetensors files of its own directory"),
    (lambda d: write_index(d, {"a": "/etc/passwd"}), "lists no safetensors files of its own directory"),
    (lambda d: write_index(d, {"a": "pytorch_model.bin"}), "lists no safetensors files of its own directory"),
    (lambda d: write_index(d, {}), "lists no safetensors files of its own directory"),
    (lambda d: write_index(d, {"a": 3}), "index.json is damaged"),
    (lambda d: write_index(d, ["a"]), "index.json is damaged"),
    (lambda d: write_index(d, {"a": "model-00001-of-00001.safetensors"}), "model-00001-of-00001.safetensors is missing"),
    (lambda d: (d / "model.safetensors").rename(d / "model.fp16.safetensors"), "its model.fp16.safetensors is read by no name"),
    (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "its .bin files are pickles, which are not read"),
    (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors; use a model saved as safetensors"),
])  # fmt: skip
def test_files_that_cannot_be_taken(spoil, message, copy_of):
    directory = copy_of("mistral")
    spoil(directory)
    with pytest.raises(UserError) as caught:
        read_base_model(directory)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_tensor_in_two_shards_is_refused(copy_of):
    directory = copy_of("mistral")
    files = sorted(set(sharded(directory, "mistral")["weight_map"].values()))
    (directory / "model.safetensors").unlink()
    first = next(iter(load_file(directory / files[0])))
    edit(directory, lambda tensors: tensors | {first: torch.zeros(1)}, files[-1])
    with pytest.raises(UserError, match=f"holds {first} twice, as {first} in {files[0]} and {first} in {files[-1]}"):
        read_base_model(directory)


def test_without_weights_no_file_is_asked_for(copy_of):
    directory = copy_of("qwen2")
    (directory / "model.safetensors").unlink()
    assert read_base_model(directory, load_weights=False).tied_head
