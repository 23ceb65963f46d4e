"""Merged models: transformers' logits of them beside peft's of base and adapters, in every family; and what is never merged."""

import json
import os
import shutil
import subprocess
import sys

import peft
import pytest
import tiny
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_lora.__main__ import main
from megatron_lora.commands import merge as command
from megatron_lora.commands.merge import split_weight
from megatron_lora.config.rules import TARGET_MODULES
from megatron_lora.errors import UserError
from megatron_lora.huggingface import merge as merging
from megatron_lora.huggingface.adapter_files import AdapterFile, read_adapter, write_adapter
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.huggingface.base_files import WEIGHTS, digests_of_base

TOKENS = torch.arange(1, 25)[None]
ADAPTERS = {  # what peft is given: ranks and alphas of their own, rslora, other modules
    "one": {"r": 4, "lora_alpha": 6, "target_modules": [*TARGET_MODULES, "qkv_proj", "gate_up_proj"]},
    "two": {
        "r": 8,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.1.mlp.down_proj": 9},
        "use_rslora": True,
    },
}
WEIGHTS_OF = {"one": 0.75, "two": -1.5}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    os.environ["MEGATRON_LORA_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["MEGATRON_LORA_CACHE"]


def randomise(model) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def load(directory, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")


def make_base(directory, kind, shard="20KB"):
    tiny.save_model(directory, kind, shard)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE", "notes.bin"):
        (directory / name).write_text(f"{name} of the base")
    return directory


@pytest.fixture(scope="module", params=tiny.KINDS)
def family(request, tmp_path_factory):
    """A base model of many files, two adapters of it, and peft's logits of each and of both with weights."""
    folder = tmp_path_factory.mktemp(request.param)
    base = make_base(folder / "base", request.param)
    model = load(base)
    linears = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}  # no experts
    one, two = (
        peft.LoraConfig(task_type="CAUSAL_LM", **values | {"target_modules": linears.intersection(values["target_modules"])})
        for values in ADAPTERS.values()
    )
    model = peft.get_peft_model(model, one, adapter_name="one")
    model.add_adapter("two", two)
    randomise(model)
    model.save_pretrained(folder)
    found = {}
    for name in ADAPTERS:
        model.set_adapter(name)
        found[name] = logits(model)
    model.add_weighted_adapter(list(WEIGHTS_OF), list(WEIGHTS_OF.values()), "both", combination_type="cat")
    model.set_adapter("both")
    return folder, found | {"both": logits(model)}


def test_a_merged_model_computes_what_base_and_adapters_do(family):
    folder, wanted = family
    words = {name: [str(folder / name)] for name in ADAPTERS} | {"both": [f"{folder / n}={w:g}" for n, w in WEIGHTS_OF.items()]}
    for name, adapters in words.items():
        out = folder / "out" / name
        assert main(["merge", *adapters, str(out), "--base", str(folder / "base")]) == 0
        assert (logits(load(out)) - wanted[name]).abs().max() <= 1e-5 * wanted[name].abs().max().clamp_min(1)
        assert (logits(load(folder / "base")) - wanted[name]).abs().max() > 0.01
        names = {path.name for path in (folder / "base").iterdir()}
        assert {path.name for path in out.iterdir()} == names - {"notes.bin"} and len(names) > 12
        for other in names - {"notes.bin"}:
            if not other.endswith(".safetensors"):
                assert (out / other).read_bytes() == (folder / "base" / other).read_bytes()


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A tied llama in one file, and an adapter whose card knows its weights."""
    folder = tmp_path_factory.mktemp("scene")
    base = make_base(folder / "base", "llama-tied", "5GB")
    model = peft.get_peft_model(load(base), peft.LoraConfig(task_type="CAUSAL_LM", **ADAPTERS["one"]))
    randomise(model)
    model.save_pretrained(folder / "peft")
    digest = digests_of_base(base, load_weights=True, cache=folder)[WEIGHTS]
    adapter = read_adapter(folder / "peft")
    object.__setattr__(adapter, "base_digest", digest)
    write_adapter(folder / "adapter", adapter, str(base))
    return folder


def test_a_dora_adapter_is_merged_alone(scene, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(merging, "BLOCK_ROWS", 5)
    model = peft.get_peft_model(load(scene / "base"), peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, **ADAPTERS["two"]))
    randomise(model)
    model.save_pretrained(tmp_path / "dora")
    words = ["--base", str(scene / "base")]
    assert main(["merge", str(tmp_path / "dora"), str(tmp_path / "out"), *words]) == 0
    assert (logits(load(tmp_path / "out")) - (wanted := logits(model))).abs().max() <= 1e-5 * wanted.abs().max().clamp_min(1)
    for others in ([str(scene / "peft")], []):
        name = str(tmp_path / "dora") + ("" if others else "=0.5")
        assert main(["merge", name, *others, str(tmp_path / "two"), *words]) == 2
        assert "a DoRA adapter scales what it adds to" in capsys.readouterr().err and not (tmp_path / "two").exists()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_sum_is_rounded_once_to_the_stored_type(scene, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(merging, "BLOCK_ROWS", 5)
    monkeypatch.setattr(merging, "COPY_BYTES", 999)
    shutil.copytree(scene / "base", tmp_path / "base")
    tensors = {name: tensor.to(kind) for name, tensor in load_file(scene / "base" / "model.safetensors").items()}
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    adapter = read_adapter(scene / "peft")
    shutil.copytree(scene / "peft", tmp_path / "again")
    words = [f"{scene / 'peft'}=3", f"{tmp_path / 'again'}=-2"]  # rounded twice, it would be another sum
    assert main(["merge", *words, str(tmp_path / "out"), "--base", str(tmp_path / "base")]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == tensors.keys() and "lm_head.weight" not in merged
    num_rounded, num_other_way = 0, 0
    for name, tensor in tensors.items():
        assert merged[name].dtype == kind
        pair = adapter.weights.get(name.removesuffix(".weight"))
        if pair is None:
            assert torch.equal(merged[name], tensor), name
            continue
        exact = (tensor.double() + 1.5 * pair[1].double() @ pair[0].double()).to(kind)
        num_rounded, num_other_way = num_rounded + exact.numel(), num_other_way + int((merged[name] != exact).sum())
    assert num_rounded > 20_000 and num_other_way < 1e-3 * num_rounded, "float32's own sum may round a few the other way"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def refused(capsys, *words) -> str:
    assert main(["merge", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_another_base_is_refused(scene, tmp_path, capsys):
    assert main(["merge", str(scene / "adapter"), str(tmp_path / "out")]) == 0, "the base that the adapter names"
    tiny.save_model(tmp_path / "qwen", "qwen3")
    assert "and the base model's" in refused(capsys, scene / "peft", tmp_path / "no", "--base", tmp_path / "qwen")
    shutil.copytree(scene / "base", tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    said = refused(capsys, scene / "adapter", tmp_path / "no", "--base", tmp_path / "other")
    assert "adapter: was trained on base weights of SHA-256" in said and "--base" in said
    assert not (tmp_path / "no").exists()


def test_a_base_in_8_bits_is_refused(scene, tmp_path, capsys):
    shutil.copytree(scene / "base", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    assert "F8_E4M3; use a checkpoint in bf16" in refused(capsys, scene / "peft", tmp_path / "out", "--base", tmp_path / "base")


def test_a_head_that_is_the_embedding_is_not_merged_into(scene, tmp_path, capsys):
    model = peft.get_peft_model(load(scene / "base"), peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "head", save_embedding_layers=False)
    assert "lm_head, which this base model shares" in refused(capsys, tmp_path / "head", tmp_path / "out", "--base", scene / "base")
    tiny.save_model(tmp_path / "untied", "qwen3")
    model = peft.get_peft_model(load(tmp_path / "untied"), peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    randomise(model)
    model.save_pretrained(tmp_path / "own", save_embedding_layers=False)
    assert main(["merge", str(tmp_path / "own"), str(tmp_path / "out"), "--base", str(tmp_path / "untied")]) == 0
    assert (logits(load(tmp_path / "out")) - logits(model)).abs().max() <= 1e-5


def test_nothing_is_half_written(scene, tmp_path, capsys, monkeypatch):
    (tmp_path / "there").mkdir()
    assert "exists; name a directory that does not" in refused(capsys, scene / "adapter", tmp_path / "there")
    full = OSError(28, "No space left on device")

    def fails(*words):
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(merging, "_merge_tensor", fails)
        assert "cannot be written (No space left on device)" in refused(capsys, scene / "adapter", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(merging.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
        assert "0.0 GB are free there" in refused(capsys, scene / "adapter", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    (tmp_path / ".out.partial").mkdir()
    assert "is of another merge" in refused(capsys, scene / "adapter", tmp_path / "out")
    assert (tmp_path / ".out.partial").is_dir()


def test_numbers_beyond_the_stored_type_are_refused(scene, tmp_path, capsys):
    shutil.copytree(scene / "base", tmp_path / "base")
    tensors = {name: tensor.half() for name, tensor in load_file(scene / "base" / "model.safetensors").items()}
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    said = refused(capsys, f"{scene / 'peft'}=1e6", tmp_path / "out", "--base", tmp_path / "base")
    assert "numbers beyond F16" in said and not (tmp_path / "out").exists()


def test_weights_stand_behind_the_directory(tmp_path):
    assert split_weight("a/b=0.5") == ("a/b", 0.5) and split_weight("a") == ("a", 1.0) and split_weight("a=b=-2") == ("a=b", -2.0)
    (tmp_path / "r=8").mkdir()
    assert split_weight(str(tmp_path / "r=8")) == (str(tmp_path / "r=8"), 1.0)
    for word in ("a=much", "a=nan", "a="):
        with pytest.raises(UserError, match="is no weight; write ADAPTER=WEIGHT"):
            split_weight(word)
    with pytest.raises(UserError, match="stands there twice"):
        command.main(["a=1", "a=2"], "out", None)


MEASURE = """
import re, sys
from pathlib import Path
from megatron_lora.huggingface.adapter_files import read_adapter
from megatron_lora.huggingface.merge import merge
from megatron_lora.huggingface.weight_files import read_base_model
def kilobytes(name): return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
for folder in map(Path, sys.argv[1:]):
    base = folder / "base"
    architecture, adapter = read_base_model(base), read_adapter(folder / "adapter")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = kilobytes("VmRSS")
    merge(base, architecture, [(adapter, 1.0)], folder / "out")
    print(kilobytes("VmHWM") - before)
"""


def many_files(folder, num_layers: int):
    """A model of a file a layer, of 9 MB each, and an adapter of rank 2 of all linears."""
    sizes = {"hidden_size": 512, "intermediate_size": 832, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 8}
    config = {"model_type": "llama", "num_hidden_layers": num_layers, "max_position_embeddings": 64, "tie_word_embeddings": True, **sizes}
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "config.json").write_text(json.dumps(config))
    architecture, files = read_architecture(folder / "base"), {}
    for name, shape in architecture.tensor_shapes().items():
        layer = name.split(".")[2] if ".layers." in name else "x"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = torch.zeros(shape)
    for name, tensors in files.items():
        save_file(tensors, folder / "base" / name)
    where = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    paths = [name for name in where if name.endswith("proj.weight")]
    pairs = {name.removesuffix(".weight"): [torch.ones(2, where_k) for where_k in architecture.tensor_shapes()[name]] for name in paths}
    weights = {path: (a_RK, b_RN.T) for path, (b_RN, a_RK) in pairs.items()}
    modules = tuple(architecture.module_sizes)
    adapter = AdapterFile(r=2, lora_alpha=4, use_rslora=False, target_modules=modules, weights=weights)
    write_adapter(folder / "adapter", adapter, str(folder / "base"))
    return folder


def test_memory_does_not_grow_with_the_number_of_files(tmp_path):
    folders = [many_files(tmp_path / str(num_layers), num_layers) for num_layers in (2, 14)]
    found = subprocess.run([sys.executable, "-c", MEASURE, *map(str, folders)], capture_output=True, text=True, check=True)
    few, many = (int(line) / 1024 for line in found.stdout.split())  # MB, beyond what is resident before
    size = sum(file.stat().st_size for file in (folders[1] / "out").iterdir()) / 1e6
    assert few < 60 and many < 20 and size > 120, (few, many, size)
    merged = load_file(folders[1] / "out" / "model-13.safetensors")
    assert merged["model.layers.13.mlp.up_proj.weight"].unique().tolist() == [4.0], "scale 2, of rank 2"
