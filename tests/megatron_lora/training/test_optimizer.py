"""A job's optimizer against torch.optim.AdamW and transformers' schedules; skipped steps; what the arena's rows hold."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_lora.config.rules import TARGET_MODULES
from megatron_lora.config.schema import DatasetConfig, JobConfig
from megatron_lora.data.sample_arrays import JobSamples, Samples
from megatron_lora.data.samples import JobData
from megatron_lora.data.steps import job_steps
from megatron_lora.huggingface.adapter_files import AdapterFile
from megatron_lora.model.adapter_arena import Arena
from megatron_lora.model.arena_region import AdapterSpec
from megatron_lora.model.linears import LinearGeometry
from megatron_lora.output.checkpoint import write_checkpoint
from megatron_lora.output.standing import CheckpointState, resume_point_of
from megatron_lora.parallel.messages import NUM_SUMS
from megatron_lora.parallel.process_groups import StageGroups
from megatron_lora.training.jobs import Job
from megatron_lora.training.optimizer import MAX_SKIPPED_IN_A_ROW, JobOptimizer, OptimizerSettings
from megatron_lora.training.saving import read_start, start_job
from megatron_lora.training.snapshots import SnapshotCollector, join_shards

BASE = {
    "learning_rate": 3e-3,
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.2,
    "num_steps": 10,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.7,
}


class Linear:
    """What the arena needs of a patched linear."""

    def __init__(self, modules=("q_proj", "k_proj", "v_proj"), out_features=(24, 8, 8), parallel="column", in_features=32, **shared):
        paths = tuple(f"model.layers.0.self_attn.{name}" for name in modules)
        self.geometry = LinearGeometry(
            modules=modules,
            paths=paths,
            in_features=in_features,
            out_features=out_features,
            parallel=parallel,
            **{"first_feature": 0, **shared},
        )
        self.adapters = None


def make_arena(adapters, linears=None, dtype=torch.float32, tensor_rank=0, tensor_ranks=1) -> Arena:
    """Build an arena over the given linears on the CPU."""
    ranks = {"tensor_rank": tensor_rank, "tensor_ranks": tensor_ranks}
    return Arena(linears or [Linear()], adapters, **ranks, dtype=dtype, device=torch.device("cpu"))


def spec(r: int, *targets: str) -> AdapterSpec:
    """Return an adapter over some modules."""
    return AdapterSpec(r=r, scale=2.0, dropout=0.0, target_modules=frozenset(targets or ("q_proj", "k_proj", "v_proj")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_equal_torch_adamw_with_clipping_and_schedule(dtype):
    arena = make_arena([spec(5), spec(16, "v_proj")], dtype=dtype)
    arena.put(0, arena.draw(arena.specs[0], 3), arena.master)
    arena.put(1, arena.draw(arena.specs[1], 3), arena.master)
    before = arena.master.clone()
    settings = OptimizerSettings(**BASE)
    ours = JobOptimizer(arena, 0, settings)
    theirs = [torch.nn.Parameter(arena.view(f, arena.master).clone()) for f in ours.factors]
    oracle = torch.optim.AdamW(theirs, lr=1.0, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    rate = settings.learning_rate_at
    torch.manual_seed(0)
    for step in range(10):
        for factor, parameter in zip(ours.factors, theirs, strict=True):
            parameter.grad = torch.randn_like(parameter) * (0.01 if step % 2 else 1.0)
            arena.view(factor, arena.grad).copy_(parameter.grad)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.7)
        oracle.param_groups[0]["lr"] = rate(step)
        oracle.step()
        ours.start_reduction(torch.full((NUM_SUMS,), 2.5))
        square_norm, sums = ours.finish_reduction()
        assert sums.tolist() == [2.5] * NUM_SUMS
        assert float(square_norm) == pytest.approx(float(norm) ** 2, rel=1e-5)
        ours.step(step, square_norm)
        assert not arena.grad.any()
    for factor, parameter in zip(ours.factors, theirs, strict=True):
        torch.testing.assert_close(arena.view(factor, arena.master), parameter.data, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(arena.view(factor, arena.compute), arena.view(factor, arena.master).to(dtype), rtol=0, atol=0)
    for factor in arena.factors[1]:
        assert torch.equal(arena.view(factor, arena.master), arena.view(factor, before)), "another job's weights changed"


@pytest.mark.parametrize(
    "kind, arguments",
    [
        ("constant", {}),
        ("linear", {}),
        ("cosine", {}),
        ("cosine", {"num_cycles": 1.5}),
        ("cosine_with_min_lr", {"min_lr": 3e-4}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1.0}),
        ("polynomial", {}),
        ("polynomial", {"lr_end": 1e-4, "power": 2.0}),
        ("warmup_stable_decay", {"num_decay_steps": 9}),
        ("warmup_stable_decay", {"num_decay_steps": 30, "warmup_type": "cosine", "decay_type": "linear", "min_lr_ratio": 0.2}),
        ("warmup_stable_decay", {"num_decay_steps": 5, "warmup_type": "1-sqrt", "decay_type": "1-sqrt", "num_cycles": 0.25}),
    ],
)
@pytest.mark.parametrize("warmup", [{"warmup_ratio": 0.0}, {"warmup_ratio": 0.03}, {"warmup_ratio": 1.0}, {"warmup_steps": 7}])
def test_schedule_is_that_of_transformers(kind, arguments, warmup):
    from transformers import get_scheduler

    num_steps = 37
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    name = {"constant": "constant_with_warmup"}.get(kind, kind)
    known = {"num_warmup_steps": warmup.get("warmup_steps") or math.ceil(warmup["warmup_ratio"] * num_steps)}
    known |= {"num_training_steps": num_steps, "scheduler_specific_kwargs": arguments}
    scheduler = get_scheduler(name, optimizer, **known)
    settings = BASE | {"lr_scheduler": kind, "num_steps": num_steps, "learning_rate": 2e-3, "lr_scheduler_kwargs": arguments} | warmup
    ours = OptimizerSettings(**settings).learning_rate_at
    for step in range(num_steps):
        assert ours(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        if step + 1 < num_steps:  # behind the last one transformers' polynomial divides by 0 where all steps warm up
            scheduler.step()


def test_a_step_that_is_not_finite_changes_nothing_and_three_in_a_row_end_the_job():
    arena = make_arena([spec(4)])
    arena.put(0, arena.draw(arena.specs[0], 0), arena.master)
    optimizer = JobOptimizer(arena, 0, OptimizerSettings(**BASE))
    start = arena.master.clone()

    def step(i: int, square_norm: float) -> bool:
        arena.grad.fill_(1.0 if math.isfinite(square_norm) else math.nan)
        before = arena.master.clone()
        optimizer.step(i, torch.tensor(square_norm))
        assert not any(arena.view(f, arena.grad).any() for f in optimizer.factors)
        return not torch.equal(before, arena.master)

    for i in range(2):
        assert not step(i, math.nan)
    assert torch.equal(arena.master, start) and int(optimizer.num_updates) == 0
    assert step(4, 1.0) and int(optimizer.num_updates) == 1 and not optimizer.has_failed()
    for i in range(MAX_SKIPPED_IN_A_ROW):
        assert not step(5 + i, math.inf)
    assert optimizer.has_failed() and not step(9, 1.0), "a job that failed continues"


def job_of(num_steps: int, r: int, **settings_of_job) -> Job:
    """Return a job of that many steps with the settings of BASE."""
    settings = {name: value for name, value in BASE.items() if name != "num_steps"}
    datasets = (DatasetConfig(path="a.jsonl", type="text"),)
    config = JobConfig(name="a", seed=3, datasets=datasets, r=r, max_steps=num_steps, target_modules=TARGET_MODULES, **settings)
    step_samples = JobSamples(seed=3, samples=Samples.of([]), steps=job_steps(1, 1, 1, num_steps, False, 0))
    return Job(number=0, config=config, data=JobData.of(Samples.of([])), step_samples=step_samples, **settings_of_job)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_job_comes_back_from_its_checkpoint_to_the_bit(dtype, one_process, tmp_path):
    """Masters, moments and counts, which differ where a step was skipped; its neighbour stays as it is."""
    import torch.distributed as dist

    jobs = [spec(5), spec(16, "v_proj")]
    arena, written = make_arena(jobs, dtype=dtype), []
    first = job_of(num_steps=9, r=5)
    start_job(first, arena, 0, StageGroups(), read_start(first, arena))
    torch.manual_seed(0)
    for step, square_norm in enumerate((1.0, math.nan, 4.0, math.inf)):
        arena.grad.copy_(torch.randn_like(arena.grad))
        first.optimizer.step(step, torch.tensor(square_norm))
    first.steps_taken = 4
    collector = SnapshotCollector(arena, written.append, dist.group.WORLD)
    collector.submit(first, moments=True)
    kept = arena.master.clone()
    arena.master.fill_(7.0)  # what comes later is not in it
    collector.finish()
    (snapshot,) = written
    assert snapshot.job is first
    adapter = AdapterFile(r=5, lora_alpha=10, use_rslora=False, target_modules=("q_proj", "k_proj", "v_proj"), weights=snapshot.weights)
    counts = {"num_updates": snapshot.num_updates, "skipped_in_a_row": snapshot.skipped_in_a_row}
    write_checkpoint(tmp_path, adapter, "base", snapshot.moments, CheckpointState(step=4, num_steps=9, samples="", **counts))

    again, second = make_arena(jobs, dtype=dtype), job_of(num_steps=9, r=5, resume_point=resume_point_of(tmp_path))
    start_job(second, again, 0, StageGroups(), read_start(second, again))
    other = second.optimizer
    assert (int(other.num_updates), int(other.skipped_in_a_row)) == (2, 1) == (snapshot.num_updates, snapshot.skipped_in_a_row)
    for factor in arena.factors[0]:
        assert torch.equal(again.view(factor, again.compute), again.view(factor, again.master).to(dtype))
        for buffer in ("exp_avg", "exp_avg_sq"):
            value = again.view(factor, getattr(again, buffer))
            assert value.any() and torch.equal(value, arena.view(factor, getattr(arena, buffer)))
        half = snapshot.weights[factor.path][factor.kind == "B"]
        assert torch.equal(again.view(factor, again.master), half if factor.kind == "A" else half.t()) and not (half == 7.0).any()
    assert not any(again.view(factor, buffer).any() for factor in again.factors[1] for buffer in (again.master, again.exp_avg))
    arena.master.copy_(kept)
    for optimizer, buffers in ((first.optimizer, arena), (other, again)):  # the next step is the same from either
        buffers.grad.fill_(0.25)
        optimizer.step(4, torch.tensor(2.0))
    for factor in arena.factors[0]:
        value = again.view(factor, again.master)
        assert torch.equal(value, arena.view(factor, arena.master)) and not torch.equal(value, arena.view(factor, kept))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_job_that_moves_takes_the_same_steps(dtype):
    """Beside a neighbour whose rows it takes over, and with a snapshot that is taken where it then lies."""
    specs, finals = [spec(16), spec(5)], []
    for moves in (False, True):
        arena = make_arena(specs, dtype=dtype)
        arena.put(0, arena.draw(arena.specs[0], 1), arena.master)
        arena.put(1, arena.draw(arena.specs[1], 3), arena.master)
        optimizer, gen = JobOptimizer(arena, 1, OptimizerSettings(**BASE)), torch.Generator().manual_seed(0)
        for step in range(5):
            for factor in optimizer.factors:
                arena.view(factor, arena.grad).copy_(torch.randn(factor.r, factor.width, generator=gen))
            optimizer.start_reduction(torch.zeros(NUM_SUMS))
            optimizer.step(step, optimizer.finish_reduction()[0])
            if moves and step == 1:
                arena.remove(0)
                arena.move(1, {module: (a - 48, 0) for module, (a, _) in arena.places[1].items()})
                optimizer.locate()
        assert not arena.grad.any()
        finals.append([arena.view(f, b) for b in (arena.master, arena.exp_avg, arena.exp_avg_sq, arena.compute) for f in optimizer.factors])
        assert optimizer.factors[0].start == (0 if moves else 48 * 32)
    assert all(map(torch.equal, *finals)) and all(each.any() for each in finals[0])


def test_initial_values_depend_on_seed_and_path_alone():
    alone, among = make_arena([spec(4, "v_proj")]), make_arena([spec(16), spec(4, "v_proj")])
    alone.put(0, alone.draw(alone.specs[0], 7), alone.master)
    among.put(0, among.draw(among.specs[0], 1), among.master)
    among.put(1, among.draw(among.specs[1], 7), among.master)
    a, b = (arena.view(arena.factors[row][0], arena.master) for arena, row in ((alone, 0), (among, 1)))
    assert torch.equal(a, b) and a.abs().max() <= 1 / math.sqrt(32) and float(a.std()) == pytest.approx(1 / math.sqrt(96), rel=0.15)
    alone.put(0, alone.draw(alone.specs[0], 8), alone.master)
    assert not torch.equal(alone.view(alone.factors[0][0], alone.master), b)


@pytest.mark.parametrize("parallel", ["column", "row"])
def test_shards_of_tensor_ranks_join_to_the_whole(parallel):
    modules, size = (("q_proj",), 8)
    full = make_arena([spec(3, "q_proj")], [Linear(modules, (2 * size,), parallel, 2 * size)])
    path = "model.layers.0.self_attn.q_proj"
    weights = {path: (torch.randn(3, 2 * size), torch.randn(2 * size, 3))}
    full.load(0, weights)
    factors, flats = [], []
    reference = {f.kind: full.view(f, full.master) for f in full.factors[0]}
    for rank in range(2):
        shape = (
            {"in_features": 2 * size, "out_features": (size,)}
            if parallel == "column"
            else {"in_features": size, "out_features": (2 * size,)}
        )
        linear = Linear(modules, parallel=parallel, first_feature=0 if parallel == "column" else rank * size, tensor_ranks=2, **shape)
        arena = make_arena([spec(3, "q_proj")], [linear], tensor_rank=rank, tensor_ranks=2)
        arena.load(0, weights)
        factors.append(arena.factors[0])
        flats.append(torch.cat([arena.view(f, arena.master).flatten() for f in arena.factors[0]]))
    ((a_rk, b_nr),) = join_shards(factors, flats).values()
    assert torch.equal(a_rk, reference["A"]) and torch.equal(b_nr.t(), reference["B"])
    assert torch.equal(a_rk, weights[path][0]) and torch.equal(b_nr, weights[path][1])


def test_unmoved_names_the_modules_without_gradient():
    arena = make_arena([spec(4)])
    arena.put(0, arena.draw(arena.specs[0], 0), arena.master)
    optimizer = JobOptimizer(arena, 0, OptimizerSettings(**BASE | {"max_grad_norm": None}))
    for factor in optimizer.factors:
        if "k_proj" not in factor.path:
            arena.view(factor, arena.grad).fill_(0.5)
    optimizer.step(3, torch.tensor(1.0))
    paths, moved = optimizer.moved()
    assert [path for path, has in zip(paths, moved.tolist(), strict=True) if not has] == ["model.layers.0.self_attn.k_proj"]
