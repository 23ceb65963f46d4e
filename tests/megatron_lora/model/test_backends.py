"""The choice of backends and its one-line errors, and the modules of Transformer Engine over a stand-in for it, on CPU."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny import save_model, stage_input, train_step

from fused_ops.lora.refill import Refill
from megatron_lora.config.schema import ParallelConfig
from megatron_lora.data.microbatch import Packing
from megatron_lora.errors import UserError
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.huggingface.families import FAMILIES
from megatron_lora.model import backends, transformer_engine
from megatron_lora.model.attention import per_sample_attention
from megatron_lora.model.backends import Backends, Machine, backend_of, check_backends, choose, fall_back
from megatron_lora.model.norm import RMSNorm
from megatron_lora.model.stage import build_stage

CPU = Machine(capability=None)
HOPPER = Machine(capability=(9, 0))
WITH_ENGINE = Machine(capability=(9, 0), engine="2.17.1")
OLD_TORCH = Machine(capability=(9, 0), varlen=False)
OLD_TORCH_WITH_ENGINE = Machine(capability=(9, 0), varlen=False, engine="2.17.1")
WITH_CUDNN = Machine(capability=(9, 0), cudnn="1.32.0")
OLD_TORCH_WITH_CUDNN = Machine(capability=(9, 0), varlen=False, cudnn="1.32.0", engine="2.17.1")
OURS, ENGINE, CUDNN = Backends(), Backends(norms="te", attention="te"), Backends(attention="cudnn")


def test_a_deterministic_run_has_torchs_attention():
    config = SimpleNamespace(backend="auto", deterministic=True, base_weights="native")
    assert choose(backend_of(config), WITH_CUDNN) == OURS and choose(backend_of(config), CPU) == OURS
    with pytest.raises(UserError, match="install torch 2.11 or newer"):
        check_backends(config, OLD_TORCH_WITH_CUDNN)
    assert backend_of(SimpleNamespace(backend="te", deterministic=False)) == "te"


@pytest.mark.parametrize(
    ("backend", "machine", "expected"),
    [
        ("auto", CPU, OURS),
        ("torch", CPU, OURS),
        ("auto", HOPPER, OURS),
        ("auto", WITH_ENGINE, OURS),
        ("torch", WITH_ENGINE, OURS),
        ("te", WITH_ENGINE, ENGINE),
        ("auto", OLD_TORCH_WITH_ENGINE, Backends(attention="te")),
        ("te", OLD_TORCH_WITH_ENGINE, ENGINE),
        ("auto", WITH_CUDNN, CUDNN),
        ("torch", WITH_CUDNN, OURS),
        ("auto", Machine(capability=None, cudnn="1.32.0"), OURS),
        ("auto", OLD_TORCH_WITH_CUDNN, CUDNN),
    ],
)
def test_the_rules(backend, machine, expected):
    assert choose(backend, machine) == expected


@pytest.mark.parametrize(
    ("backend", "machine", "says"),
    [
        ("te", CPU, "needs a CUDA GPU, and none is visible; use auto"),
        ("te", HOPPER, r"is not installed; pip install --no-build-isolation -e '.\[te\]', or use auto"),
        ("auto", OLD_TORCH, "install torch 2.11 or newer"),
        ("torch", OLD_TORCH_WITH_ENGINE, "install torch 2.11 or newer"),
    ],
)
def test_what_is_not_there_is_one_line(backend, machine, says):
    with pytest.raises(UserError, match=says) as caught:
        choose(backend, machine)
    assert str(caught.value).startswith("backend: ") and "\n" not in str(caught.value)


def asked(backend="auto", base_weights="native"):
    return SimpleNamespace(backend=backend, base_weights=base_weights, deterministic=False)


def raiser(error):
    def fail(name):
        raise error

    return fail


def test_fp8_needs_a_gpu_that_multiplies_in_8_bits():
    with pytest.raises(UserError, match=r"base_weights: 'fp8' needs .* 8.9 or later, and this one has 8.0; use native"):
        check_backends(asked(base_weights="fp8"), Machine(capability=(8, 0)))
    for machine in (CPU, HOPPER, Machine(capability=(8, 9))):
        check_backends(asked(base_weights="fp8"), machine)


@pytest.mark.parametrize("error", [ImportError("no libcudart.so.12"), OSError("undefined symbol: _ZN3c10\nand more"), AssertionError()])
def test_an_engine_that_does_not_load_is_one_line(error, monkeypatch):
    monkeypatch.setattr(backends.importlib, "import_module", raiser(error))
    with pytest.raises(
        UserError, match="backend: 'te': Transformer Engine does not load .*; install a version built for this torch"
    ) as caught:
        check_backends(asked("te"), WITH_ENGINE)
    assert "\n" not in str(caught.value)


def test_one_that_would_break_megatron_core_is_named(monkeypatch):
    monkeypatch.setattr(backends.importlib, "import_module", raiser(OSError("libcuda.so.1: cannot open shared object file")))
    for machine in (WITH_ENGINE, Machine(capability=None, engine="2.17.1")):
        with pytest.raises(UserError, match="transformer-engine 2.17.1 does not load .libcuda.* or pip uninstall transformer-engine"):
            check_backends(asked(), machine)
    monkeypatch.setattr(backends.importlib, "import_module", raiser(ImportError("no module")))
    check_backends(asked(), WITH_ENGINE)


def test_what_fails_on_the_gpu_is_replaced_and_said():
    assert fall_back(ENGINE, WITH_ENGINE, "") == (ENGINE, "attention: Transformer Engine's, tried on this GPU")
    assert fall_back(CUDNN, WITH_CUDNN, "") == (CUDNN, "attention: cuDNN's, tried on this GPU")
    assert fall_back(CUDNN, WITH_CUDNN, "no plan") == (OURS, "attention: torch's, since cuDNN's fails on this GPU (no plan)")
    left, line = fall_back(ENGINE, WITH_ENGINE, "cuDNN: no plan")
    assert left == Backends(norms="te") and "torch's" in line and "cuDNN: no plan" in line
    with pytest.raises(UserError, match="fails on this GPU .cuDNN: no plan.; install torch 2.11"):
        fall_back(ENGINE, OLD_TORCH_WITH_ENGINE, "cuDNN: no plan")


class StandInNorm(torch.nn.Module):
    def __init__(self, hidden_size, eps, device, dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class StandInAttention(torch.nn.Module):
    """Transformer Engine's call, over one scaled-dot-product call per sample; `fault` breaks it."""

    fault = None

    def __init__(self, heads, head_dim, num_gqa_groups, qkv_format, attn_mask_type, softmax_scale):
        super().__init__()
        assert (qkv_format, attn_mask_type) == ("thd", "padding_causal")
        self.shape, self.scale = (heads, num_gqa_groups, head_dim), softmax_scale

    def forward(self, q, k, v, *, qkv_format, attn_mask_type, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, window_size, **_):
        assert (q.shape[1], k.shape[1], q.shape[2]) == self.shape and cu_seqlens_q is cu_seqlens_kv and window_size[1] == 0
        if self.fault == "raises":
            raise RuntimeError("cuDNN Error: no execution plans\nsupport the graph")
        lengths = tuple(cu_seqlens_q.diff().tolist())
        assert max(lengths) == max_seqlen_q == max_seqlen_kv
        packing = Packing(cu_seqlens=cu_seqlens_q, lengths=lengths, positions=None, max_length=max_seqlen_q)
        window = None if window_size[0] < 0 or self.fault == "no window" else window_size[0] + 1
        return per_sample_attention(q, k, v, packing, self.scale, window).flatten(1)


@pytest.fixture
def stand_in(monkeypatch):
    module = ModuleType("transformer_engine.pytorch")
    module.RMSNorm, module.DotProductAttention = StandInNorm, StandInAttention
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)


@pytest.mark.parametrize(
    ("fault", "says"), [(None, ""), ("raises", "cuDNN Error: no execution plans"), ("no window", "its output is off by")]
)
def test_attention_is_tried_with_every_window(fault, says, stand_in, monkeypatch):
    monkeypatch.setattr(StandInAttention, "fault", fault)
    said = transformer_engine.attention_fault(4, 2, 16, (None, 7, None), torch.bfloat16, torch.device("cpu"))
    assert said.startswith(says) and (said == says or fault == "no window")


def test_float32_is_left_to_torch():
    assert transformer_engine.attention_fault(4, 2, 16, (None,), torch.float32, torch.device("cpu")) == "it takes 16 bits alone"


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_refill", [False, True])
def test_the_norm_is_ours_in_other_hands(with_residual, with_refill, stand_in):
    llama = SimpleNamespace(family=FAMILIES["llama"])
    config = SimpleNamespace(use_cpu_initialization=True, params_dtype=torch.float32, architecture=llama)
    answers = []
    for kind in (RMSNorm, transformer_engine.EngineNorm):
        generator = torch.Generator().manual_seed(0)
        norm = kind(config, 24, eps=1e-5)
        with torch.no_grad():
            norm.weight.copy_(torch.randn(24, generator=generator))
        assert not norm.weight.requires_grad
        x, residual = (torch.randn(6, 1, 24, generator=generator).requires_grad_() for _ in range(2))
        refill, again = Refill() if with_refill else None, []
        y, total = norm.add(x, residual if with_residual else None, refill)
        if refill is not None:
            refill.defer(again.append)
        (y * torch.randn(y.shape, generator=generator)).sum().backward(retain_graph=True)
        answers.append([y.detach(), total.detach(), x.grad, *again, *([residual.grad] if with_residual else [])])
    assert len(answers[0]) == 3 + with_residual + with_refill
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["mistral", "qwen3"])
@pytest.mark.parametrize("recompute", ["none", "cheap", "full"])
def test_a_stage_with_its_parts_computes_the_same(kind, recompute, stand_in, tmp_path, one_process):
    from tiny import attach_adapters

    save_model(tmp_path, kind)
    answers = []
    for chosen in (OURS, ENGINE):
        stage = build_stage(
            read_architecture(tmp_path), tmp_path, ParallelConfig(),
            dtype=torch.float32, device=torch.device("cpu"), recompute=recompute, backends=chosen,
        )  # fmt: skip
        attach_adapters(stage.linears, 1, dropout=0.25)
        answers.append(train_step(stage, stage_input((5, 22, 1, 16), 61, ((2, 9, 1), (9, 40, 0))), ParallelConfig()))
        used = {type(module).__name__ for module in stage.model.decoder.modules()}
        assert ({"StandInNorm", "StandInAttention"} <= used) == (chosen is ENGINE)
    torch.testing.assert_close(answers[1]["losses"], answers[0]["losses"], rtol=1e-5, atol=1e-5)
    for name, gradient in answers[0]["gradients"].items():
        assert gradient.any() and (answers[1]["gradients"][name] - gradient).norm() <= 1e-4 * gradient.norm(), name
