"""A stage computes what transformers computes, on one rank and on several, forward and backward; a rank reads only what it owns."""

from __future__ import annotations

import pytest
import torch
from full_logits import full_logits
from safetensors.torch import load_file, save_file
from tiny import KINDS, attach_adapters, save_model, stage_input, train_step

from megatron_lora.config.schema import ParallelConfig
from megatron_lora.errors import UserError
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.huggingface.weight_files import read_base_model
from megatron_lora.huggingface.weight_slices import Checkpoint, load
from megatron_lora.model.stage import build_stage

CPU = torch.device("cpu")
LENGTHS = (5, 22, 1, 16)
SEGMENTS = ((2, 9, 1), (9, 40, 0))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return kind -> (directory, transformers model), made when first asked for."""
    made = {}

    def get(kind):
        if kind not in made:
            directory = tmp_path_factory.mktemp(kind)
            made[kind] = (directory, save_model(directory, kind))
        return made[kind]

    return get


def build(directory, parallel=None, **options):
    return build_stage(read_architecture(directory), directory, parallel or ParallelConfig(), dtype=torch.float32, device=CPU, **options)


def step_of(directory, parallel, dropout=None):
    """Build a stage and train one microbatch; runs on any rank."""
    stage = build(directory, parallel)
    if dropout is not None:
        attach_adapters(stage.linears, parallel.tensor, dropout)
    microbatch = stage_input(LENGTHS, stage.architecture.vocab_size, SEGMENTS if dropout is not None else ())
    return train_step(stage, microbatch, parallel)


def assert_close(ours, reference, tolerance):
    assert ours.shape == reference.shape
    largest = reference.abs().max().item()
    difference = (ours - reference).abs().max().item()
    assert difference <= tolerance * largest, f"differs by {difference / largest:.2e} of the largest"


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_losses_equal_transformers(kind, models, one_process):
    directory, reference = models(kind)
    stage = build(directory)
    microbatch = stage_input(LENGTHS, stage.architecture.vocab_size)
    hidden = stage(microbatch)
    with torch.no_grad():
        expected = torch.cat([reference(tokens[None]).logits[0] for tokens in microbatch.tokens.split(LENGTHS)])
    assert_close(full_logits(hidden, stage.head), expected, 1e-5)
    losses = torch.nn.functional.cross_entropy(expected, microbatch.labels, reduction="none")
    assert_close(stage.losses(hidden, microbatch.labels), losses, 1e-5)


@pytest.mark.parametrize("kind, layout", [
    ("llama", {"tp": 2}),
    ("llama-tied", {"tp": 2, "sequence": True}),
    ("qwen2", {"tp": 2}),
    ("qwen2", {"pp": 2}),
    ("qwen3-biased", {"pp": 3}),
    ("mistral", {"pp": 2, "tp": 2}),
    ("llama-tied", {"pp": 2, "tp": 2, "sequence": True}),
    ("qwen3", {"pp": 2, "tp": 2, "sequence": True}),
    ("granite", {"pp": 2, "tp": 2}),
    ("qwen3_moe", {"pp": 2}),
    ("qwen3_moe", {"tp": 2}),
    ("mixtral", {"pp": 2, "tp": 2, "sequence": True}),
    ("qwen3_moe", {"tp": 2, "ep": 2, "sequence": True}),
    ("mixtral", {"pp": 2, "tp": 2, "ep": 2}),
    ("ministral", {"pp": 2, "tp": 2}),
    ("phi3", {"pp": 2, "tp": 2, "sequence": True}),
    ("gemma2", {"pp": 2, "tp": 2}),
    ("gemma3_text", {"pp": 2, "tp": 2, "sequence": True}),
    ("smollm3", {"pp": 2, "tp": 2, "sequence": True}),
])  # fmt: skip
def test_layouts_equal_one_rank(kind, layout, models, one_process, pool):
    directory, _ = models(kind)
    stages = layout.get("pp", 1)
    parallel = ParallelConfig(
        pipeline=stages,
        tensor=layout.get("tp", 1),
        expert=layout.get("ep", 1),
        sequence=layout.get("sequence", False),
        layers_per_stage=(1, 2) if stages == 2 else None,
    )
    expected = step_of(directory, ParallelConfig(), dropout=0.25)
    ranks = pool(**layout).run(step_of, directory, parallel, 0.25)
    for rank in ranks[-parallel.tensor :]:  # the last stage
        assert_close(rank["logits"], expected["logits"], 1e-5)
        assert_close(rank["losses"], expected["losses"], 1e-5)
    found = {}
    for rank in ranks[:: parallel.tensor]:
        found |= rank["gradients"]
    assert found.keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        assert gradient.abs().max() > 0, name
        assert_close(found[name], gradient, 2e-5)


def coverage(directory, parallel):
    """Load a stage anew; return (bytes read, bytes of its parameters without padding, bytes that were never filled)."""
    stage = build(directory, parallel, load_weights=False, seed=3)
    checkpoint = Checkpoint(directory, read_architecture(directory))
    for parameter in stage.parameters():
        parameter.fill_(float("nan"))
    load(stage.parts(), checkpoint)
    wanted = sum(part.target.nbytes for part in stage.parts())
    unfilled = sum(int(parameter.isnan().sum()) * parameter.element_size() for parameter in stage.parameters())
    return checkpoint.bytes_read, wanted, unfilled


def test_a_rank_reads_only_its_slices(models, pool):
    directory, reference = models("llama")
    whole = sum(parameter.nbytes for parameter in reference.parameters())
    ranks = pool(pp=2, tp=2).run(coverage, directory, ParallelConfig(pipeline=2, tensor=2, layers_per_stage=(1, 2)))
    hidden = 32 * 4  # bytes of one vocabulary row
    for rank, (read, wanted, unfilled) in enumerate(ranks):
        assert read == wanted < 0.4 * whole
        assert unfilled == (hidden if rank % 2 else 0)  # 61 tokens over 2 ranks: the second has one padding row
    replicated = 2 * (3 * 2 + 1) * hidden + 3 * 2 * hidden  # norms, and the biases of o_proj and down_proj, are read by both tensor ranks
    assert sum(read for read, _, _ in ranks) == whole + replicated - (3 * 2 + 1) * hidden


def test_nothing_of_the_base_model_is_trained(models, one_process):
    stage = build(models("llama")[0])
    assert [name for name, parameter in stage.named_parameters() if parameter.requires_grad] == []
    assert sum(1 for _ in stage.parameters()) > 20


def random_weights(directory, parallel, seed):
    stage = build(directory, parallel, load_weights=False, seed=seed)
    return train_step(stage, stage_input(LENGTHS, stage.architecture.vocab_size), parallel)


def test_evaluation_keeps_no_graph(models, one_process):
    stage = build(models("llama")[0])
    attach_adapters(stage.linears, 1)
    microbatch = stage_input(LENGTHS, 61, SEGMENTS)
    with torch.no_grad():
        hidden = stage(microbatch)
        losses = stage.losses(hidden, microbatch.labels)
    assert not hidden.requires_grad and not losses.requires_grad
    torch.testing.assert_close(hidden, stage(microbatch).detach())


def test_random_weights_depend_on_the_seed_alone(models, one_process, pool):
    directory, _ = models("llama-tied")
    expected = random_weights(directory, ParallelConfig(), 5)["logits"]
    ranks = pool(pp=2, tp=2).run(random_weights, directory, ParallelConfig(pipeline=2, tensor=2), 5)
    assert_close(ranks[-1]["logits"], expected, 1e-5)
    assert not torch.allclose(random_weights(directory, ParallelConfig(), 6)["logits"], expected, rtol=0.1)


def test_bf16_stays_near_float32(models, one_process):
    directory, _ = models("qwen3")
    architecture = read_architecture(directory)
    stage = build_stage(architecture, directory, ParallelConfig(), dtype=torch.bfloat16, device=CPU)
    microbatch = stage_input(LENGTHS, architecture.vocab_size)
    expected = build(directory)
    hidden = stage(microbatch)
    assert hidden.dtype == torch.bfloat16
    assert_close(full_logits(hidden, stage.head).float(), full_logits(expected(microbatch), expected.head), 0.05)


def test_sharded_checkpoint(tmp_path, models, one_process):
    save_model(tmp_path, "qwen3", max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists() and len(list(tmp_path.glob("*.safetensors"))) > 2
    microbatch = stage_input(LENGTHS, 61)
    single, sharded = build(models("qwen3")[0]), build(tmp_path)
    assert torch.equal(single(microbatch), sharded(microbatch))


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_a_tensor_without_a_place_in_the_model_is_refused(kind, tmp_path):
    save_model(tmp_path, kind)
    tensors = load_file(tmp_path / "model.safetensors")
    harmless = {"lm_head.weight": torch.zeros(61, 48), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(harmless | tensors, tmp_path / "model.safetensors")
    read_base_model(tmp_path)
    save_file(tensors | {"model.layers.0.mlp.gate_proj.scale": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="has a tensor model.layers.0.mlp.gate_proj.scale that its config.json does not call for"):
        read_base_model(tmp_path)


def test_samples_never_see_each_other(models, one_process):
    stage = build(models("mistral")[0])
    microbatch = stage_input(LENGTHS, 61)
    before = stage(microbatch)
    microbatch.tokens[5:27] = 60 - microbatch.tokens[5:27]
    after = stage(microbatch)
    assert not torch.equal(before[5:27], after[5:27])
    assert torch.equal(before[:5], after[:5]) and torch.equal(before[27:], after[27:])


def test_nan_in_one_jobs_adapter_stays_with_its_rows(models, one_process):
    directory, _ = models("qwen3")
    results = []
    for poison in (0.0, float("nan")):
        stage = build(directory)
        attach_adapters(stage.linears, 1, 0.25)
        for linear in stage.linears:
            linear.adapters.b_RN[-1][linear.adapters.b_rows[1][-1]] += poison
        microbatch = stage_input(LENGTHS, 61, ((0, 27, 0), (28, 44, 1)))  # jobs own whole samples; row 27 is base-only
        results.append(train_step(stage, microbatch, ParallelConfig()))
    clean, poisoned = results
    assert poisoned["losses"][29:].isnan().any()
    assert torch.equal(clean["losses"][:28], poisoned["losses"][:28])
    others = [name for name in clean["gradients"] if name.endswith(" 0")]
    assert len(others) == 2 * 3 * 6 and all(torch.equal(clean["gradients"][name], poisoned["gradients"][name]) for name in others)


def test_a_tied_matrix_is_held_once_where_the_stages_are_one(models, one_process, pool):
    directory, _ = models("llama-tied")
    stage = build(directory)
    assert stage.head.weight_VH.data_ptr() == stage.model.embedding.word_embeddings.weight.data_ptr()
    assert pool(pp=2).run(vocabulary_sizes, directory) == [(61 * 48, 0), (0, 61 * 48)]


def vocabulary_sizes(directory):
    """Return the numbers in this stage's embedding and head."""
    model = build(directory, ParallelConfig(pipeline=2)).model
    parts = [getattr(model, name, None) for name in ("embedding", "output_layer")]
    return tuple(sum(parameter.numel() for parameter in part.parameters()) if part is not None else 0 for part in parts)


def test_a_missing_tensor_is_named(models, one_process):
    directory, _ = models("llama")
    with pytest.raises(UserError, match="the tensor model.layers.3.no_such.weight is in none of the safetensors files"):
        Checkpoint(directory, read_architecture(directory)).read("model.layers.3.no_such.weight", (slice(None),))
