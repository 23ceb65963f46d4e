"""Recomputation and offloading change memory and nothing else: same bits on every layout, own microbatch for each layer, fewer bytes."""

from __future__ import annotations

import pytest
import torch
from tiny import attach_adapters, joined_gradients, save_model, stage_input, train_step

from megatron_lora.config.schema import ParallelConfig
from megatron_lora.errors import UserError
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.model.offloading import HostPool, LayerInputs
from megatron_lora.model.stage import build_stage

LENGTHS = (5, 22, 1, 16)
SEGMENTS = ((2, 9, 1), (9, 40, 0))
ROWS, HIDDEN, FFN, LAYERS = sum(LENGTHS), 32, 48, 3
MIXED = ("full", "none", "cheap")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3")
    save_model(path, "qwen3")
    return path


def build(directory, recompute, parallel=None, offload=False):
    parallel = parallel or ParallelConfig()
    kind = {"dtype": torch.float32, "device": torch.device("cpu")}
    stage = build_stage(read_architecture(directory), directory, parallel, **kind, recompute=recompute, activation_offloading=offload)
    attach_adapters(stage.linears, parallel.tensor, dropout=0.25)
    return stage


def step_of(directory, recompute, parallel, offload=False):
    """Train one microbatch; runs on any rank."""
    stage = build(directory, recompute, parallel, offload)
    return train_step(stage, stage_input(LENGTHS, stage.architecture.vocab_size, SEGMENTS), parallel)


def assert_same(ours, expected):
    assert torch.equal(ours["losses"], expected["losses"]) if "losses" in expected else "losses" not in ours
    assert ours["gradients"].keys() == expected["gradients"].keys() != set()
    for name, gradient in expected["gradients"].items():
        assert gradient.any() and torch.equal(ours["gradients"][name], gradient), name


@pytest.mark.parametrize("recompute", ["cheap", "full", MIXED])
def test_bits_on_one_rank(recompute, directory, one_process):
    assert_same(step_of(directory, recompute, ParallelConfig()), step_of(directory, "none", ParallelConfig()))


@pytest.mark.parametrize("recompute", ["cheap", "full"])
@pytest.mark.parametrize("layout", [{"pp": 2}, {"tp": 2}, {"tp": 2, "sequence": True}])
def test_bits_on_every_layout(layout, recompute, directory, pool):
    parallel = ParallelConfig(pipeline=layout.get("pp", 1), tensor=layout.get("tp", 1), sequence=layout.get("sequence", False))
    ours, expected = (pool(**layout).run(step_of, directory, policy, parallel) for policy in (recompute, "none"))
    for mine, theirs in zip(ours, expected, strict=True):
        assert_same(mine, theirs)


@pytest.mark.parametrize("recompute", ["full", ("full", "full", "cheap")])
@pytest.mark.parametrize("layout", [{}, {"pp": 2}, {"tp": 2, "sequence": True}])
def test_bits_with_inputs_on_the_host(layout, recompute, directory, pool):
    parallel = ParallelConfig(pipeline=layout.get("pp", 1), tensor=layout.get("tp", 1), sequence=layout.get("sequence", False))
    ours, expected = (pool(**layout).run(step_of, directory, recompute, parallel, offload) for offload in (True, False))
    for mine, theirs in zip(ours, expected, strict=True):
        assert_same(mine, theirs)


def test_buffers_serve_one_microbatch_after_another(directory, one_process):
    """Three microbatches of other sizes in flight at most, first in, first out: each meets its own inputs, and no buffer is added."""
    sizes = [(9, 4), (30,), (5, 22), (11, 11, 1), (40,), (3,), (17, 20), (8, 8)]
    answers = []
    for offload in (False, True):
        stage = build(directory, "full", offload=offload)
        assert [block.offloads for block in stage.blocks] == [offload, offload, False]  # the backward of the uppermost comes first
        in_flight, losses = [], []
        for number, lengths in enumerate(sizes):
            microbatch = stage_input(lengths, 61, ((0, lengths[0], number % 2),), seed=number)
            losses.append((stage.losses(stage(microbatch), microbatch.labels) * microbatch.weights).sum())
            in_flight.append(losses[-1])
            if len(in_flight) == 3:
                in_flight.pop(0).backward()
        for loss in in_flight:
            loss.backward()
        answers.append({"losses": torch.stack(losses).detach(), "gradients": joined_gradients(stage.linears)})
    assert_same(answers[1], answers[0])
    pool = stage.host_pool
    assert pool is not None and pool.num_buffers == len(pool.free) == 3 * 2
    assert len({buffer.data_ptr() for buffer in pool.free}) == 3 * 2


class LateCopies(HostPool):
    """Copies as a slow stream makes them: in their order, none before it is waited for. What comes back is NaN until then."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.waiting, self.num_done = [], 0

    def copy(self, target, source):
        if target._base is None:  # on the device; a part of a buffer may be read by a copy before this one
            target.fill_(torch.nan)
        self.waiting.append((target, source))
        return self.num_done + len(self.waiting)

    def wait(self, copied):
        while self.num_done < copied:
            target, source = self.waiting.pop(0)
            target.copy_(source)
            self.num_done += 1


def test_nothing_is_read_before_its_copy_is_waited_for(directory, one_process):
    answers = []
    for late in (False, True):
        stage = build(directory, "full", offload=True)
        stage.host_pool = LateCopies() if late else stage.host_pool
        losses = []
        for seed in range(4):
            microbatch = stage_input((20, 3 + seed), 61, ((0, 20, seed % 2),), seed=seed)
            losses.append((stage.losses(stage(microbatch), microbatch.labels) * microbatch.weights).sum())
            if seed % 2:
                losses[seed - 1].backward()
                losses[seed].backward()
        answers.append({"losses": torch.stack(losses).detach(), "gradients": joined_gradients(stage.linears)})
    assert_same(answers[1], answers[0])
    assert not stage.host_pool.waiting and stage.host_pool.num_buffers == 2 * 2


def test_an_input_is_taken_once(directory, one_process):
    inputs = LayerInputs(HostPool(torch.device("cpu")))
    first, last = torch.arange(6.0).view(2, 3), torch.ones(2, 3)
    places = [inputs.put(first), inputs.put(last, stays=True)]
    assert inputs.take(places[1]) is last
    first.zero_()  # what came back is a copy
    assert torch.equal(inputs.take(places[0]), torch.arange(6.0).view(2, 3))
    with pytest.raises(AssertionError, match="the input at place 0 was taken before"):
        inputs.take(places[0])


def test_each_layer_is_run_again_with_its_own_microbatch(directory, one_process):
    """Two microbatches are in flight, as in a pipeline; each backward must meet its own rows, route and dropout keys."""
    answers = []
    for recompute in ("none", MIXED, "full"):
        stage = build(directory, recompute)
        microbatches = [stage_input(LENGTHS, 61, SEGMENTS, seed=1), stage_input((9, 4), 61, ((0, 9, 0), (9, 13, 1)), seed=2)]
        losses = [(stage.losses(stage(m), m.labels) * m.weights).sum() for m in microbatches]
        for loss in losses:
            loss.backward()
        answers.append({"losses": torch.stack(losses).detach(), "gradients": joined_gradients(stage.linears)})
    assert_same(answers[1], answers[0])
    assert_same(answers[2], answers[0])


def kept_bytes(directory, recompute):
    """Return the bytes that one microbatch's forward keeps for backward, each storage once, parameters apart."""
    stage = build(directory, recompute)
    parameters = {p.untyped_storage().data_ptr() for p in stage.parameters()}
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor lives on, or its address would be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = stage(stage_input(LENGTHS, 61, SEGMENTS))
    del hidden
    return sum(size for size, _ in storages.values())


def test_memory(directory, one_process):
    none, cheap, full, mixed = (kept_bytes(directory, recompute) for recompute in ("none", "cheap", "full", MIXED))
    layer_none, layer_cheap, layer_full = ((total - ROWS * HIDDEN * 4) // LAYERS for total in (none, cheap, full))  # final norm's input
    assert layer_none - layer_cheap == ROWS * (2 * HIDDEN + FFN) * 4
    assert layer_full == ROWS * HIDDEN * 4
    assert mixed - ROWS * HIDDEN * 4 == layer_none + layer_cheap + layer_full
    # Both sums; qkv before and after its head norms; attention's outputs per sample (CPU), together, and its scores; gate | up.
    assert layer_cheap == ROWS * (2 * HIDDEN + 2 * (4 + 2 * 2) * 16 + 2 * 4 * 16 + 4 + 2 * FFN) * 4


def test_evaluation_keeps_nothing(directory, one_process):
    stage, plain = build(directory, MIXED), build(directory, "none")
    microbatch = stage_input(LENGTHS, 61, SEGMENTS)
    with torch.no_grad():
        hidden = stage(microbatch)
        assert not hidden.requires_grad and torch.equal(hidden, plain(microbatch))


def test_a_list_must_be_as_long_as_the_model_is_deep(directory, one_process):
    with pytest.raises(UserError, match="recompute: 2 policies do not fit the model's 3 layers; give 3, or one word for all layers"):
        build(directory, ("none", "full"))
