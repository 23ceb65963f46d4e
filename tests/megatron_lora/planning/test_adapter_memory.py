"""An arena of adapter_memory: what it holds, what `auto` takes beside activations, which jobs can never fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import oracle
import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lora.config.rules import TARGET_MODULES
from megatron_lora.config.schema import load_config
from megatron_lora.errors import UserError
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.planning.adapter_memory import adapters_of, bytes_of, check_fits, in_gb, most, rooms, rows_of
from megatron_lora.planning.adapter_rows import Book
from megatron_lora.planning.predict import memory_of, predicted_peaks, rank_row_bytes_of, room_of
from megatron_lora.planning.resolve import adapter_memory_line, resolve
from scheduling.cost import DEVICES
from scheduling.layer_memory import MAGNITUDES, MODULES, Adapter
from scheduling.memory import usable_bytes

H100 = DEVICES["h100"]
LENGTHS = [[[500, 300, 700, 650]] * 20] * 3
LARGE = {
    "hidden_size": 4096,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "ffn_size": 14336,
}
ROW_BYTES = dict.fromkeys(MODULES, 1000.0) | {"down_proj": 5000.0}

adapters = st.builds(Adapter, st.integers(1, 100), st.sets(st.sampled_from(MODULES), min_size=1).map(lambda each: tuple(sorted(each))))


@settings(max_examples=100, deadline=None)
@given(st.lists(adapters, min_size=1, max_size=8), st.floats(0, 3e6))
def test_room_is_as_large_as_bytes_allow_and_holds_the_largest_at_once(kinds, num_bytes):
    kinds = sorted(kinds, key=lambda each: -each.rank)
    room, num = rooms(kinds, ROW_BYTES, num_bytes), most(kinds, ROW_BYTES, num_bytes)
    over = sum(ROW_BYTES[module] for module in (MODULES if num == len(kinds) else {m for each in kinds for m in each.modules}))
    assert num_bytes - 16 * over < bytes_of(room, ROW_BYTES) <= num_bytes, "rows that fit are missing, or too many"
    assert all(rows % 16 == 0 and rows >= rows_of(kinds, num).get(module, 0) for module, rows in room.items())
    book = Book(room)
    assert all(book.take(str(i), Job(each.rank, each.modules)) is not None for i, each in enumerate(kinds[:num]))
    needed = bytes_of(rows_of(kinds), ROW_BYTES)
    assert rooms(kinds, ROW_BYTES, in_gb(needed) * 1e9) == rows_of(kinds), "exactly as many bytes as all need"


def test_a_row_of_magnitudes_for_each_dora():
    kinds, row_bytes = [Adapter(16, (*MODULES, MAGNITUDES)), Adapter(16)], ROW_BYTES | {MAGNITUDES: 300.0}
    needed, another = bytes_of(rows_of(kinds), row_bytes), 16 * sum(ROW_BYTES.values()) + 300
    assert rooms(kinds, row_bytes, needed + another - 1) == rows_of(kinds) == dict.fromkeys(MODULES, 32) | {MAGNITUDES: 1}
    assert rooms(kinds, row_bytes, needed + another) == dict.fromkeys(MODULES, 48) | {MAGNITUDES: 2}
    assert adapters_of([Job(16, MODULES, adapter="dora")]) == (kinds[0],)
    with pytest.raises(UserError, match="0 rank rows for magnitudes, and adapter: dora takes 1; .* a run that has the job from the beg"):
        check_fits("a", Job(16, MODULES, adapter="dora"), dict.fromkeys(MODULES, 32), ROW_BYTES, 1.0)


@dataclasses.dataclass(frozen=True)
class Job:
    """A job, as the book sees it."""

    lora_rank: int
    target_modules: tuple[str, ...]
    expert_rank: int = 0
    adapter: str = "lora"


TARGETS = f"defaults.target_modules=[{', '.join(TARGET_MODULES)}]"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("arena")
    oracle.make_model(folder / "model")
    oracle.make_rows(folder / "rows.jsonl", num_rows=12, seed=0)
    return folder


@pytest.fixture
def configure(root, tmp_path):
    """Return a function (number of jobs, overrides) -> config."""

    def configured(num_jobs: int, *overrides: str, r=(16,)):
        data = [{"path": str(root / "rows.jsonl"), "type": "prompt_completion"}]
        jobs = [{"name": f"job-{i}", "datasets": data, "r": r[i % len(r)]} for i in range(num_jobs)]
        path = runs.write_config(tmp_path / "config.yaml", root / "model", tmp_path / "run", jobs, {}, 4096)
        return load_config(path, ["precision=bf16", "activation_offloading=false", TARGETS, *overrides])

    return configured


def large(root):
    return dataclasses.replace(read_architecture(root / "model"), **LARGE, vocab_size=128256, tied_head=False)


@pytest.mark.parametrize("pipeline", [1, 4])
def test_few_jobs_are_all_there_and_many_leave_activations_theirs(configure, root, pipeline):
    """8 jobs take 6 GB of 80; 300 would take 226: of them as many as fit, beside the activations of a run of 8."""
    open_, shape, device = (f"parallel.pipeline={pipeline}", "microbatch_tokens=auto", "recompute=auto"), large(root), H100
    if pipeline == 4:
        device = dataclasses.replace(H100, memory_bytes=20e9)
    few, many = (resolve(configure(num, *open_), shape, LENGTHS, device) for num in (8, 300))
    row_bytes = rank_row_bytes_of(few, shape, 2)
    assert few.adapter_memory == in_gb(bytes_of(rows_of(adapters_of(few.jobs)), row_bytes))
    assert room_of(few, shape, 2) == dict.fromkeys(MODULES, 8 * 16)
    num = room_of(many, shape, 2)["q_proj"] // 16
    assert 20 < num < 300 and many.microbatch_tokens >= 0.5 * few.microbatch_tokens
    assert max(predicted_peaks(many, shape, device)) <= usable_bytes(device)
    more = dataclasses.replace(many, adapter_memory=many.adapter_memory * (num + 1) / num)
    assert max(predicted_peaks(more, shape, device)) > usable_bytes(device), "another job would have fitted"
    (line,) = adapter_memory_line(configure(300, *open_), many, shape, device)
    assert line.startswith(f"adapter_memory: auto is {many.adapter_memory:.6g}, room for {num} of the 300 jobs at once")
    assert adapter_memory_line(few, few, shape, device) == []


def test_a_budget_that_is_given_leaves_what_it_leaves(configure, root):
    """And where not even a few fit, they are made room for all the same, and the warning says so."""
    shape, sizes = large(root), []
    for tokens in (2048, 8192, 200_000):
        config = resolve(configure(300, "recompute=none", f"microbatch_tokens={tokens}"), shape, LENGTHS, H100)
        sizes.append(room_of(config, shape, 2)["q_proj"] // 16)
    assert sizes[0] > sizes[1] > sizes[2] > 20 and max(predicted_peaks(config, shape, H100)) > usable_bytes(H100)


def test_a_given_size_is_what_the_memory_model_counts(configure, root):
    shape, gb = large(root), 10.0
    config = resolve(configure(300, f"adapter_memory={gb}", "recompute=none", r=(8, 32)), shape, LENGTHS, H100)
    (memory,) = memory_of(config, shape, H100)
    assert config.adapter_memory == gb and memory.adapters == pytest.approx(gb * 1e9, rel=0.06) and memory.adapters <= gb * 1e9
    assert memory.layer.num_jobs < 30 and adapter_memory_line(config, config, shape, H100)[0].startswith(
        "adapter_memory: 10 has room for 6 of"
    )


def test_a_run_that_is_kept_alive_has_room_for_more(configure, root):
    shape = large(root)
    config = configure(2, "recompute=auto", "microbatch_tokens=auto", "defaults.target_modules=[q_proj]", r=(8, 32))
    plain, alive = (resolve(config, shape, LENGTHS, H100, keep_alive=keep) for keep in (False, True))
    assert room_of(plain, shape, 2) == {"q_proj": 48} and alive.jobs == plain.jobs == config.jobs
    room = room_of(alive, shape, 2)
    assert set(room) == set(MODULES) and min(room.values()) >= 3 * 32
    assert max(predicted_peaks(alive, shape, H100)) <= usable_bytes(H100)


def test_a_job_that_can_never_fit_is_one_line(configure, root):
    shape = large(root)
    config = resolve(configure(2, "adapter_memory=1", "recompute=none", r=(16, 64)), shape, LENGTHS, H100)
    row_bytes, room = rank_row_bytes_of(config, shape, 2), room_of(config, shape, 2)
    check_fits("small", config.jobs[0], room, row_bytes, config.adapter_memory)
    assert Book(room).take("small", config.jobs[0]) and not Book(room).take("large", config.jobs[1])
    with pytest.raises(UserError, match=r"^job large: adapter_memory: 1 GB have 16 rank rows for q_proj, and r: 64 takes 64; ") as refused:
        check_fits("large", config.jobs[1], room, row_bytes, config.adapter_memory)
    assert "at least 3.02" in str(refused.value) and "\n" not in str(refused.value)
    other = dataclasses.replace(config.jobs[0], target_modules=("q_proj",))
    with pytest.raises(UserError, match="job late: adapter_memory: 1 GB have 0 rank rows for k_proj.* use more, or start a run"):
        check_fits("late", config.jobs[0], {"q_proj": 160}, row_bytes, config.adapter_memory)
    check_fits("query", other, {"q_proj": 160}, row_bytes, config.adapter_memory)
