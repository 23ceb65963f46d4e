"""Quantised checkpoints stand for the numbers that they hold, are kept as they are by base_weights of the same storage, or are refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_model, stage_input

from fused_ops.lora.fp8 import quantise_rows
from fused_ops.lora.nf4 import CODES, dynamic_codes
from megatron_lora.config.schema import ParallelConfig
from megatron_lora.errors import UserError
from megatron_lora.huggingface.weight_files import read_base_model
from megatron_lora.huggingface.weight_slices import Checkpoint
from megatron_lora.model.stage import build_stage

CPU = torch.device("cpu")
COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float",
              "strategy": "channel"}}}, "ignore": ["lm_head"]}  # fmt: skip
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def compressed(name, w):
    matrix = quantise_rows(w)
    scales = matrix.scales * torch.linspace(0.6, 1.9, len(w))
    return {name: matrix.values, f"{name}_scale": scales[:, None]}, matrix.values.float() * scales[:, None]


def of_one_scale(name, w):
    values = (w / 0.003).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {name: values, f"{name}_scale": torch.tensor([0.003])}, values.float() * 0.003


def in_blocks(name, w):
    scales = torch.rand(-(-len(w) // 128), -(-w.shape[1] // 128), generator=torch.Generator().manual_seed(3)) / 100 + 0.001
    wide = scales.repeat_interleave(128, 0)[: len(w)].repeat_interleave(128, 1)[:, : w.shape[1]]
    values = (w / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {name: values, f"{name}_scale_inv": scales}, values.float() * wide


def nf4(name, w):
    generator = torch.Generator().manual_seed(len(w))
    number = w.numel() // 64
    codes = torch.randint(256, (w.numel() // 2, 1), generator=generator, dtype=torch.uint8)
    absmax, largest = torch.randint(256, (number,), generator=generator, dtype=torch.uint8), torch.rand(-(-number // 256)) / 50
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(w.shape), "nested_blocksize": 256,
             "nested_dtype": "float32", "nested_offset": 0.25}  # fmt: skip
    tensors = {
        name: codes, f"{name}.absmax": absmax, f"{name}.quant_map": torch.tensor(CODES), f"{name}.nested_absmax": largest,
        f"{name}.nested_quant_map": dynamic_codes(CPU).clone(),
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }  # fmt: skip
    pairs = torch.cat((codes >> 4, codes & 15), 1).flatten()
    scales = dynamic_codes(CPU)[absmax.int()] * largest[torch.arange(number) // 256] + 0.25
    return tensors, (torch.tensor(CODES)[pairs.int()].reshape(-1, 64) * scales[:, None]).reshape(w.shape)


FORMS = {
    "compressed": (compressed, COMPRESSED, "fp8/bf16"), "one scale": (of_one_scale, COMPRESSED, "fp8/bf16"),
    "blocks": (in_blocks, BLOCKS, None), "nf4": (nf4, NF4, "nf4/bf16"),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    save_model(path, "llama", more={"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1}.items())
    return path


def written(path, plain, tensors, quantisation=None):
    """Write a model of other tensors."""
    path.mkdir()
    config = json.loads((plain / "config.json").read_text()) | ({"quantization_config": quantisation} if quantisation else {})
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"})
    return path


def quantised(path, plain, form):
    """Write a checkpoint in a form, and the same numbers in float32."""
    ours, numbers = {}, {}
    for name, w in load_file(plain / "model.safetensors").items():
        ours[name], numbers[name] = w, w
        if "_proj.weight" in name:
            tensors, numbers[name] = FORMS[form][0](name, w)
            ours |= tensors
    return written(path / "ours", plain, ours, FORMS[form][1]), written(path / "numbers", plain, numbers)


def hidden_of(directory, base_weights="native"):
    """Return a stage and its hidden states of a microbatch."""
    stage = build_stage(
        read_base_model(directory), directory, ParallelConfig(), dtype=torch.float32, device=CPU, base_weights=base_weights
    )  # fmt: skip
    with torch.no_grad():
        return stage, stage(stage_input((5, 9), stage.architecture.vocab_size))


@pytest.mark.parametrize("form", FORMS)
def test_numbers_are_those_that_are_stored(form, plain, tmp_path, one_process):
    ours, numbers = quantised(tmp_path, plain, form)
    expected = hidden_of(numbers)[1]
    torch.testing.assert_close(hidden_of(ours)[1], expected, rtol=1e-5, atol=1e-5)
    if FORMS[form][2]:
        torch.testing.assert_close(hidden_of(ours, FORMS[form][2])[1], expected, rtol=1e-5, atol=1e-5)


def test_codes_and_values_are_kept(plain, tmp_path, one_process):
    for form, kept in (("nf4", "codes"), ("compressed", "values")):
        ours, _ = quantised(tmp_path / form if (tmp_path / form).mkdir() is None else tmp_path, plain, form)
        stage, _ = hidden_of(ours, FORMS[form][2])
        mine = getattr(stage.linears[1].frozen.matrix, kept)
        stored = load_file(ours / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"]
        assert torch.equal(mine.view(torch.uint8).flatten(), stored.view(torch.uint8).flatten())


@pytest.mark.parametrize("form", FORMS)
def test_a_rank_reads_its_slice(form, plain, tmp_path):
    """Of NF4 its rows: columns lie in all of the file."""
    ours, numbers = quantised(tmp_path, plain, form)
    name = "model.layers.0.mlp.down_proj.weight"
    whole, (rows, cols) = load_file(numbers / "model.safetensors")[name], (128, 192)
    for index in ((slice(40, 100), slice(None)), (slice(None), slice(64, 128)), (slice(3, 5), slice(128, 192))):
        source = Checkpoint(ours, read_base_model(ours))
        torch.testing.assert_close(source.read(name, index), whole[index])
        largest = whole[index].numel() if form != "nf4" else len(whole[index]) * cols // 2
        assert largest <= source.bytes_read < largest + 0.1 * rows * cols
        if FORMS[form][2]:
            torch.testing.assert_close(source.packed(name, index).float(), whole[index])
        else:
            assert source.packed(name, index) is None


REFUSED = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "quantization_config is 'gptq'"),
    **{f"groups {groups}": ({"quant_method": "compressed-tensors", "config_groups": groups}, f"compressed-tensors {said}")
       for groups, said in (([], "without config_groups"), ({"a": None}, "None"), ({"a": {"weights": [8]}}, "[8]"),
                            ({"a": {"weights": {"num_bits": [8]}}}, "([8], None, None)"))},
    "fp8 in other blocks": (BLOCKS | {"weight_block_size": [64, 128]}, "'fp8 with weight_block_size [64, 128]'"),
    "fp8 of one scale": ({"quant_method": "fp8"}, "quantization_config is 'fp8 without weight_block_size'"),
    "fp4": (NF4 | {"bnb_4bit_quant_type": "fp4"}, "quantization_config is 'bitsandbytes fp4'"),
    "8 bits of bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "'bitsandbytes 8 bits'"),
    "int8": (
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}}},
        "compressed-tensors (8, 'int', 'channel')",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_quantisations_are_refused_by_name(case, plain, tmp_path):
    quantisation, words = REFUSED[case]
    directory = written(tmp_path / "model", plain, load_file(plain / "model.safetensors"), quantisation)
    with pytest.raises(UserError) as caught:
        read_base_model(directory)
    assert words in str(caught.value) and "bitsandbytes NF4 are read" in str(caught.value)


SEVEN = torch.zeros(7)
SPOILT = [
    ("compressed", "_scale", SEVEN, "F8_E4M3 [128, 128] beside _scale F32 [7]"),
    ("compressed", "_scale", torch.ones(128, dtype=torch.int32), "beside _scale I32 [128]"),
    ("compressed", ".absmax", SEVEN, "beside .absmax, _scale"),
    ("blocks", "_scale_inv", SEVEN, "beside _scale_inv F32 [7]"),
    ("nf4", ".absmax", SEVEN.to(torch.uint8), "beside .absmax U8 [7]"),
    ("nf4", ".absmax", torch.ones(256), "beside .absmax F32 [256]"),
    ("nf4", ".quant_map", SEVEN, "beside .quant_map F32 [7]"),
    ("nf4", "", torch.zeros(128, 64, dtype=torch.uint8), "U8 [128, 64] beside"),
    ("nf4", ".nested_absmax", None, "beside .absmax, .nested_quant_map"),
    ("nf4", ".nested_quant_map", SEVEN, "beside .nested_quant_map F32 [7]"),
]


def spoilt(path, plain, form, beside, value):
    """Return a checkpoint in a form, in which something else, or nothing, lies beside a weight."""
    ours, _ = quantised(path, plain, form)
    tensors = load_file(ours / "model.safetensors")
    name = f"model.layers.0.self_attn.q_proj.weight{beside}"
    rest = {other: tensor for other, tensor in tensors.items() if other != name}
    save_file(rest | ({} if value is None else {name: value}), ours / "model.safetensors", metadata={"format": "pt"})
    return ours


@pytest.mark.parametrize(("form", "beside", "value", "words"), SPOILT, ids=[f"{form}{beside}-{words}" for form, beside, _, words in SPOILT])
def test_scales_have_to_fit(form, beside, value, words, plain, tmp_path):
    with pytest.raises(UserError) as caught:
        read_base_model(spoilt(tmp_path, plain, form, beside, value))
    assert words in str(caught.value)


WITHOUT_OFFSET = b'{"quant_type": "nf4", "blocksize": 64, "shape": [128, 128], "nested_blocksize": 256}'


@pytest.mark.parametrize("state", [b"{", b"[1]", b'{"blocksize": 128}', b"\xff", WITHOUT_OFFSET])
def test_a_state_of_bitsandbytes_that_cannot_be_read_is_named(state, plain, tmp_path, one_process):
    ours = spoilt(tmp_path, plain, "nf4", ".quant_state.bitsandbytes__nf4", torch.tensor(list(state), dtype=torch.uint8))
    for base_weights in ("native", "nf4/bf16"):
        with pytest.raises(UserError, match="a tensor of bitsandbytes has the state .* is read; fetch the model again"):
            hidden_of(ours, base_weights)


def test_other_codes_than_those_of_nf4_are_refused(plain, tmp_path, one_process):
    ours = spoilt(tmp_path, plain, "nf4", ".quant_map", torch.tensor(CODES).bfloat16())
    for base_weights in ("native", "nf4/bf16"):
        with pytest.raises(UserError, match="a quant_map that is not NF4's; fetch the model again"):
            hidden_of(ours, base_weights)
