"""What a config leaves open is resolved as the models say, the same for plan and training, and recorded; what it gives stays."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import oracle
import pytest
import runs

from megatron_lora.config.live import Live
from megatron_lora.config.objective_keys import DpoConfig
from megatron_lora.config.resolved import ResolvedConfig
from megatron_lora.config.schema import dump_config, load_config
from megatron_lora.data.tokenizer import load_tokenizer
from megatron_lora.errors import UserError
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.output.resume import as_begun, changed_key, with_precision_of
from megatron_lora.output.run_directory import RunDirectory
from megatron_lora.parallel.partition import recompute_of_layers
from megatron_lora.planning import devices
from megatron_lora.planning.predict import cost_of, memory_of, planner_cost, predicted_peaks, window_time
from megatron_lora.planning.resolve import choose_layers, describe, memory_line, resolve
from megatron_lora.planning.targets import targeted
from megatron_lora.training import train
from megatron_lora.training.stop_request import StopRequest
from megatron_lora.training.train import resolve_together
from scheduling.cost import DEVICES, stage_policies
from scheduling.memory import fitting_tokens, usable_bytes

H100, CPU = DEVICES["h100"], DEVICES["cpu"]
LENGTHS = [[[500, 300, 700, 650]] * 20] * 3
SMALL = {"hidden_size": 576, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "ffn_size": 1536, "vocab_size": 49152}
LARGE = {"hidden_size": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "ffn_size": 14336}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with a model and rows."""
    folder = tmp_path_factory.mktemp("resolve")
    oracle.make_model(folder / "model")
    oracle.make_rows(folder / "rows.jsonl", num_rows=12, seed=0)
    return folder


@pytest.fixture
def configure(root, tmp_path):
    """Return a function overrides -> config."""
    job = {"name": "one", "datasets": [{"path": str(root / "rows.jsonl"), "type": "prompt_completion"}]}
    path = runs.write_config(tmp_path / "config.yaml", root / "model", tmp_path / "run", [job], {}, 4096)
    return lambda *overrides: load_config(path, ["precision=auto", "recompute=none", "activation_offloading=false", *overrides])


def model(root, **facts):
    return dataclasses.replace(read_architecture(root / "model"), **facts, tied_head=False)


def check_split(config, split, architecture, device, share=1.0) -> None:
    """Check that a split takes all layers, and that no layer moved to another stage makes the slowest stage faster."""

    def slowest(layers) -> float:
        parallel = dataclasses.replace(config.parallel, layers_per_stage=tuple(layers))
        tried = dataclasses.replace(config, parallel=parallel, recompute="none")
        return max(stage.seconds(config.microbatch_tokens) for stage in cost_of(tried, architecture, device, share).stages)

    assert len(split) == config.parallel.pipeline and sum(split) == architecture.num_layers and min(split) >= 1
    for giving, taking in itertools.permutations(range(len(split)), 2):
        if split[giving] > 1:
            moved = [count + (stage == taking) - (stage == giving) for stage, count in enumerate(split)]
            assert slowest(moved) > slowest(split) * (1 - 1e-6), f"{moved} is faster than {split}"


def test_stages_take_equally_long_with_the_head(configure, root):
    small, large = model(root, **SMALL), model(root, **LARGE, vocab_size=128256)
    two, four = configure("parallel.pipeline=2", "microbatch_tokens=512"), configure("parallel.pipeline=4")
    splits = {name: choose_layers(two, small, DEVICES[name]) for name in ("cpu", "h100")}
    for name, split in splits.items():
        check_split(two, split, small, DEVICES[name])
    assert splits["cpu"][0] > splits["cpu"][1] and splits["h100"][0] == splits["h100"][1]  # on a GPU launches take the time, not work
    split = choose_layers(four, large, H100)
    check_split(four, split, large, H100)
    assert split[-1] < split[0] and choose_layers(four, large, DEVICES["a100"]) == split  # any GPU, one split
    given = configure("precision=bf16", "parallel.pipeline=4", "parallel.layers_per_stage=[8, 8, 8, 8]", "adapter_memory=1")
    assert resolve(given, large, LENGTHS, H100) == given
    resolved = resolve(configure("parallel.pipeline=4"), large, LENGTHS, H100)
    times = [stage.seconds(4096) for stage in cost_of(resolved, large, H100).stages]
    assert max(times) < 1.1 * sum(times) / 4
    assert describe(configure("parallel.pipeline=4"), resolved) == [f"parallel.layers_per_stage: null is {list(split)}"]


def test_layers_move_to_the_last_stage_where_fewer_tokens_are_targets(configure, root):
    large, open_ = model(root, **LARGE, vocab_size=128256), configure("parallel.pipeline=4", "recompute=auto", "microbatch_tokens=8192")
    every, half, quarter, few = (resolve(open_, large, LENGTHS, H100, share) for share in (1.0, 0.5, 0.25, 0.1))
    splits = [config.parallel.layers_per_stage for config in (every, half, quarter, few)]
    for config, split, share in zip((every, half, quarter, few), splits, (1.0, 0.5, 0.25, 0.1), strict=True):
        check_split(config, split, large, H100, share)
    last = [split[-1] for split in splits]
    assert last == sorted(last) and last[0] < last[1] < last[2]
    slowest = [max(stage.seconds(4096) for stage in cost_of(config, large, H100, 0.25).stages) for config in (quarter, every)]
    assert slowest[0] < slowest[1]
    line = f"parallel.layers_per_stage: null is {list(splits[2])}, as 25% of the tokens are targets"
    assert describe(open_, quarter, 0.25)[0] == line
    assert planner_cost(quarter, large, H100, 0.25).fixed > planner_cost(quarter, large, H100).fixed  # a token costs less


def test_rows_that_fill_a_chunk_of_the_loss_cost_what_targets_do(configure, root):
    small = model(root, **SMALL)
    splits = {}
    for tokens in (128, 2048):  # one chunk on CPU, and 16
        config = configure("parallel.pipeline=2", f"microbatch_tokens={tokens}")
        splits[tokens] = [choose_layers(config, small, CPU, share) for share in (1.0, 0.05)]
        for split, share in zip(splits[tokens], (1.0, 0.05), strict=True):
            if tokens == 2048:  # in one chunk all rows count, whatever the share
                check_split(config, split, small, CPU, share)
    assert splits[128][0] == splits[128][1] and splits[2048][0][-1] < splits[2048][1][-1]


def test_an_automatic_budget_fits_and_is_no_larger_than_pays(configure, root):
    large, auto = model(root, **LARGE, vocab_size=128256), configure("parallel.pipeline=2", "microbatch_tokens=auto")
    plenty = resolve(auto, large, LENGTHS, H100)
    memory = fitting_tokens(memory_of(plenty, large, H100), H100)
    assert 700 <= plenty.microbatch_tokens <= memory and plenty.microbatch_tokens % 256 == 0
    assert load_config_text(dump_config(plenty)) == plenty
    tight = dataclasses.replace(H100, memory_bytes=14e9)
    scarce = resolve(auto, large, LENGTHS, tight)
    assert 700 <= scarce.microbatch_tokens <= fitting_tokens(memory_of(scarce, large, tight), tight) < memory
    assert scarce.microbatch_tokens < plenty.microbatch_tokens
    with pytest.raises(UserError, match="microbatch_tokens: auto: the longest sample has 700 tokens, memory allows") as refused:
        resolve(auto, large, LENGTHS, dataclasses.replace(H100, memory_bytes=9e9))
    assert "\n" not in str(refused.value) and "recompute: auto" in str(refused.value)


def load_config_text(text: str):
    path = Path("again.yaml").absolute()
    path.write_text(text)
    return load_config(path)


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGATRON_LORA_CACHE", str(tmp_path / "cache"))


def test_recomputation_is_no_more_than_the_memory_asks_for(configure, root):
    large, auto = model(root, **LARGE, vocab_size=128256), configure("recompute=auto", "microbatch_tokens=8192")
    sizes = (60, 52, 40, 25)
    resolved = [resolve(auto, large, LENGTHS, dataclasses.replace(H100, memory_bytes=size * 1e9)) for size in sizes]
    policies = [recompute_of_layers(config.recompute, 32) for config in resolved]
    counts = [(each.count("full"), each.count("cheap")) for each in policies]
    assert counts == sorted(counts) and counts[0] == (0, 0) and counts[1][1] > counts[1][0] == 0 and counts[3][0] > counts[2][0] > 0
    for size, config in zip(sizes, resolved, strict=True):
        device = dataclasses.replace(H100, memory_bytes=size * 1e9)
        assert predicted_peaks(config, large, device)[0] <= usable_bytes(device)
        assert describe(auto, config)[0].startswith("recompute: auto is ") and load_config_text(dump_config(config)) == config
        assert memory_line(auto, config, large, device)[1].endswith("to spare")
    assert "full" in describe(auto, resolved[3])[0] and describe(auto, resolved[0])[0] == "recompute: auto is none"
    tiny = dataclasses.replace(H100, memory_bytes=9e9)
    beyond = resolve(auto, large, LENGTHS, tiny)
    assert beyond.recompute == "full" and "TOO MUCH" in memory_line(auto, beyond, large, tiny)[1]


def test_inputs_wait_on_the_host_only_where_nothing_else_fits(configure, root):
    large = model(root, **LARGE, vocab_size=128256)
    auto = configure("recompute=auto", "microbatch_tokens=8192", "activation_offloading=auto")
    roomy, tight = (dataclasses.replace(H100, memory_bytes=size * 1e9) for size in (25, 20))
    assert resolve(auto, large, LENGTHS, roomy).activation_offloading is False
    resolved = resolve(auto, large, LENGTHS, tight)
    assert resolved.activation_offloading is True and recompute_of_layers(resolved.recompute, 32).count("full") > 20
    resolved = resolve(dataclasses.replace(auto, recompute="full"), large, LENGTHS, tight)
    assert resolved.activation_offloading is True
    (line,) = memory_line(resolved, resolved, large, tight)
    assert line.startswith("activation_offloading: true; layer inputs take 2.1 GB")
    _, peak, line = memory_line(auto, resolved, large, tight)
    assert predicted_peaks(resolved, large, tight)[0] <= usable_bytes(tight) and peak.endswith("to spare")
    assert line == "activation_offloading: auto is true; layer inputs take 2.1 GB of pinned host memory on each rank"
    without = dataclasses.replace(resolved, activation_offloading=False)
    assert predicted_peaks(without, large, tight)[0] - predicted_peaks(resolved, large, tight)[0] == 8192 * 30 * 8192  # of 32 two are there
    cheap = configure("recompute=cheap", "microbatch_tokens=8192", "activation_offloading=auto")
    assert resolve(cheap, large, LENGTHS, tight).activation_offloading is False  # no layer runs again
    assert resolve(auto, large, LENGTHS, dataclasses.replace(CPU, memory_bytes=1e9)).activation_offloading is False
    longest = resolve(configure("recompute=auto", "microbatch_tokens=auto", "activation_offloading=auto"), large, [[[8192]]], tight)
    assert longest.activation_offloading is True and longest.microbatch_tokens == 8192


def test_offloading_is_counted_on_every_stage_and_where_its_copies_are_slow(configure, root):
    two = configure("recompute=full", "parallel.pipeline=2", "activation_offloading=true", "microbatch_tokens=8192")
    for size, is_slow in ((SMALL, True), (LARGE | {"vocab_size": 128256}, False)):
        shape = model(root, **size)
        resolved = resolve(two, shape, LENGTHS, H100)
        kept = dataclasses.replace(resolved, activation_offloading=False)
        first, last = memory_of(resolved, shape, H100)
        counts = [count - one for count, one in zip(resolved.layers_per_stage, (1, 2), strict=True)]  # the uppermost, and the received
        assert [stage.on_host_per_token for stage in (first, last)] == [2 * shape.hidden_size * count for count in counts]
        seconds = [max(stage.seconds(4096) for stage in cost_of(config, shape, H100).stages) for config in (resolved, kept)]
        assert (seconds[0] > seconds[1]) == is_slow


@pytest.mark.parametrize("tensor", [1, 2])
def test_stages_that_hold_more_microbatches_recompute_more_and_get_fewer_layers(tensor, configure, root):
    large, device = model(root, **LARGE, vocab_size=128256), dataclasses.replace(H100, memory_bytes=28e9 / tensor)
    shape = ("recompute=auto", "parallel.pipeline=4", f"parallel.tensor={tensor}", "microbatch_tokens=8192")
    given = resolve(configure(*shape, "parallel.layers_per_stage=[8, 8, 8, 8]"), large, LENGTHS, device)
    stages = stage_policies((8,) * 4, given.recompute)
    work = [2 * policies.count("full") + policies.count("cheap") for policies in stages]
    assert given.parallel.layers_per_stage == (8, 8, 8, 8) and work == sorted(work, reverse=True) and work[0] > work[3]
    free = resolve(configure(*shape), large, LENGTHS, device)
    plain = choose_layers(configure("parallel.pipeline=4", f"parallel.tensor={tensor}", "microbatch_tokens=8192"), large, device)
    kept = resolve(configure(*shape, f"parallel.layers_per_stage={list(plain)}"), large, LENGTHS, device)

    def slowest(config):
        return max(stage.seconds(4096) for stage in cost_of(config, large, H100).stages)

    assert free.parallel.layers_per_stage[0] < plain[0] and sum(free.parallel.layers_per_stage) == 32
    assert slowest(free) < slowest(kept) and max(predicted_peaks(free, large, device)) <= usable_bytes(device)
    assert free == resolve(configure(*shape), large, LENGTHS, device)
    assert describe(configure(*shape), free)[-1].count(" | ") == 3


def test_an_automatic_budget_counts_what_recomputing_for_it_costs(configure, root):
    large = model(root, **LARGE, vocab_size=128256)
    auto = configure("recompute=auto", "microbatch_tokens=auto", "parallel.pipeline=4", "parallel.layers_per_stage=[9, 9, 8, 6]")
    roomy, tight = (resolve(auto, large, LENGTHS, dataclasses.replace(H100, memory_bytes=size)) for size in (80e9, 13e9))
    assert roomy.recompute == "none"
    assert tight.microbatch_tokens <= roomy.microbatch_tokens and tight.recompute != "none"
    assert max(predicted_peaks(tight, large, H100)) <= 13e9


def test_the_planner_weighs_slots_by_the_model_and_not_by_the_gpu(configure, root):
    small, large = model(root, **SMALL), model(root, **LARGE, vocab_size=128256)
    config = configure("parallel.layers_per_stage=[32]")
    assert planner_cost(config, large, H100) == planner_cost(config, large, DEVICES["a100"])
    assert planner_cost(config, small, H100).fixed > 10 * planner_cost(config, large, H100).fixed > 0
    wider = configure("parallel.layers_per_stage=[32]", "jobs.0.r=256")
    assert planner_cost(wider, large, H100).per_square < planner_cost(config, large, H100).per_square  # a token costs more


def test_a_window_of_so_much_planned_time_takes_so_many_predicted_seconds(configure, root):
    """Slots that take window_time by the planner's costs take window_s by the cost model, of the reference device."""
    large = model(root, **LARGE, vocab_size=128256)
    config = configure("parallel.pipeline=2", "parallel.layers_per_stage=[18,14]")
    rank = config.jobs[0].r
    for device in (H100, CPU):
        time = window_time(config, large, device, 0.5, 5.0)
        slots = time / (2 * dataclasses.replace(planner_cost(config, large, device, 0.5), tiles=()).slot([1024] * 4))
        stages = cost_of(config, large, device, 0.5).stages
        assert slots * max(stage.seconds(4096, 4 * 1024**2, 4096 * rank) for stage in stages) == pytest.approx(5.0, rel=1e-3)
    assert window_time(config, large, H100, 0.5, 5.0) == window_time(config, large, DEVICES["a100"], 0.5, 5.0)
    assert window_time(config, large, H100, 0.5, 10.0) == 2 * window_time(config, large, H100, 0.5, 5.0)


def test_the_planner_knows_the_stairs_of_a_gpu_and_what_a_further_job_costs(configure, root):
    """About 80 tokens at 32B on two stages; no more than was measured for a model whose layers are quicker; nothing of both on a CPU."""
    facts = {"hidden_size": 5120, "num_layers": 64, "num_heads": 40, "num_kv_heads": 8, "head_dim": 128, "ffn_size": 27648}
    middle, config = model(root, **facts, vocab_size=152064), configure("parallel.pipeline=2", "parallel.layers_per_stage=[32,32]")
    found = planner_cost(config, middle, H100)
    assert 75 < found.per_segment <= 0.02 * 4096 and found.tiles[32] == pytest.approx(1.026 * 4096, rel=1e-3)
    small = planner_cost(configure("parallel.layers_per_stage=[30]"), model(root, **SMALL), H100)
    assert small.per_segment == pytest.approx(0.02 * 4096) and small.tiles[1] > 1.5 * small.tiles[33] / 33
    on_cpu = planner_cost(config, middle, CPU)
    assert on_cpu.per_segment == 0 and on_cpu.tiles == ()


def test_weights_are_counted_in_their_precision_and_a_tied_matrix_once(configure, root):
    large = model(root, **LARGE, vocab_size=128256)
    config = configure("parallel.layers_per_stage=[32]")
    weights = [memory_of(config, large, device)[0].weights for device in (H100, CPU)]
    assert weights[0] == pytest.approx(2 * 8.03e9, rel=1e-3) and weights[1] == 2 * weights[0]
    tied = memory_of(config, dataclasses.replace(large, tied_head=True), H100)[0].weights
    assert weights[0] - tied == 2 * 4096 * 128256


def test_an_adapter_that_a_job_is_held_to_is_counted_beside_the_one_that_it_trains(configure, root):
    large = model(root, **LARGE, vocab_size=128256)
    config = configure("parallel.layers_per_stage=[32]")

    def of_adapters(**keys) -> float:
        job = dataclasses.replace(config.jobs[0], init_adapter="somewhere", **keys)
        return memory_of(dataclasses.replace(config, jobs=(job,)), large, H100)[0].adapters

    held = of_adapters(objective=DpoConfig(type="dpo", reference="init_adapter")) - of_adapters(objective=DpoConfig(type="dpo"))
    assert held == pytest.approx(2 * 41_943_040)  # r = 16 on all linears of an 8B, in 16 bits


def test_this_machine_is_shared_by_its_ranks(monkeypatch):
    monkeypatch.setattr(devices, "this_gpu", lambda: None)
    monkeypatch.setattr(devices, "machine_bytes", lambda: 9e9)
    assert devices.this_device(2).memory_bytes == 3.5e9 and devices.this_device(100).memory_bytes == 0
    assert devices.this_device(2).name == "cpu" and devices.reference_of(devices.this_device(2)) is CPU
    with pytest.raises(UserError, match="--device: 'h10'"):
        devices.named_device("--device", "h10")


def test_the_first_rank_tells_and_records_what_it_settled(one_process, configure, root, capsys):
    import torch.distributed as dist

    open_ = ("microbatch_tokens=auto", "parallel.pipeline=2", "recompute=auto")
    config, given = configure(*open_), configure("precision=fp32", "parallel.layers_per_stage=[4]", "adapter_memory=0.1")
    with RunDirectory.create(config):
        resolved, cost, _ = resolve_together(config, read_architecture(root / "model"), [[[20, 30]]], 0.25, dist.group.WORLD)
        split = f"parallel.layers_per_stage: null is {list(resolved.parallel.layers_per_stage)}, as 25% of the tokens are targets"
        lines = ["microbatch_tokens: auto is 256", split]
        *printed, adapters, memory = capsys.readouterr().out.splitlines()
        assert (
            printed == [*lines, "recompute: auto is none"]
            and adapters.endswith(", room for all jobs at once")
            and memory.startswith("predicted peak memory: ")
            and " MB | " in memory
        )
        every, some = (planner_cost(resolved, read_architecture(root / "model"), CPU, share) for share in (1.0, 0.25))
        assert load_config("run/config.yaml") == resolved and cost == some != every
        assert resolve_together(given, read_architecture(root / "model"), [[[20, 30]]], 0.25, dist.group.WORLD)[0] == given
        assert capsys.readouterr().out == ""
        architecture, device = read_architecture(root / "model"), devices.this_device(config.parallel.world_size)
        least = max(predicted_peaks(dataclasses.replace(resolved, recompute="full"), architecture, device))
        live = Live(memory_share=1.001 * least / usable_bytes(device))
        less = resolve_together(config, architecture, [[[20, 30]]], 0.25, dist.group.WORLD, live)
        assert "full" in less[0].recompute


def test_a_run_is_settled_by_its_samples_share_of_targets(one_process, configure, root, monkeypatch):
    def stop(config, architecture, lengths, target_share, host, keep_alive):
        raise InterruptedError(target_share)

    monkeypatch.setattr(train, "resolve_together", stop)
    tokenizer = load_tokenizer(root / "model")
    rows = [oracle.encode(tokenizer, json.loads(line)) for line in (root / "rows.jsonl").read_text().splitlines()]
    shares = []
    for inputs in ("false", "true"):
        config = configure(f"jobs.0.train_on_inputs={inputs}")
        with RunDirectory.create(config), pytest.raises(InterruptedError) as stopped:
            train.run(config, StopRequest())
        shares.append(stopped.value.args[0])
    num_tokens = sum(len(tokens) for tokens, _ in rows)
    assert shares == [sum(int((labels != -100).sum()) for _, labels in rows) / num_tokens, (num_tokens - len(rows)) / num_tokens]


@pytest.mark.parametrize("parallel", [{"pp": 2}, {"dp": 2}])
def test_a_run_records_what_it_settled(parallel, root, pool, tmp_path):
    rows = {"datasets": [{"path": str(root / "rows.jsonl"), "type": "prompt_completion"}], "global_batch_size": 3, "max_steps": 2}
    jobs = [{"name": name, **rows} for name in ("one", "two")]
    path = runs.write_config(tmp_path / "config.yaml", root / "model", tmp_path / "run", jobs, parallel, "auto")
    assert runs.start(pool, path, parallel) == 0
    written = load_config(tmp_path / "run" / "config.yaml")
    assert isinstance(written.microbatch_tokens, int) and len(written.parallel.layers_per_stage) == parallel.get("pp", 1)
    assert written.recompute == "none"
    left_open = {"microbatch_tokens": "auto", "recompute": "auto", "activation_offloading": "auto", "adapter_memory": "auto"}
    opened = dataclasses.replace(written, **left_open, parallel=load_config(path).parallel)
    assert opened == targeted(load_config(path), read_architecture(root / "model"))
    window = json.loads((tmp_path / "run" / "plan" / "window-0000.json").read_text())
    assert max(sum(entry[3] for entry in slot) for slot in window["microbatches"]) <= written.microbatch_tokens


def test_a_resolved_config_leaves_nothing_open_and_equals_what_it_is_written_as(configure, root):
    large = model(root, **LARGE, vocab_size=128256)
    resolved = resolve(configure("microbatch_tokens=auto", "recompute=auto"), large, LENGTHS, H100)
    assert isinstance(resolved, ResolvedConfig) and resolved.precision == "bf16" and resolved.layers_per_stage == (32,)
    written = load_config_text(dump_config(resolved))
    assert written == resolved and resolved == written and type(written) is not ResolvedConfig
    assert resolved != dataclasses.replace(written, seed=1)
    for key in ("precision", "microbatch_tokens", "recompute", "activation_offloading", "adapter_memory"):
        with pytest.raises(AssertionError, match=key):
            ResolvedConfig.of(dataclasses.replace(written, **{key: "auto"}))


def test_a_deterministic_run_resumes_with_what_decided_its_plan(configure):
    open_ = ("microbatch_tokens=auto", "deterministic=true", "parallel.pipeline=2")
    begun = configure("microbatch_tokens=1024", "deterministic=true", "parallel.pipeline=2", "parallel.layers_per_stage=[3, 1]")
    assert as_begun(begun, configure(*open_)) == dataclasses.replace(begun, precision="auto")
    assert as_begun(begun, configure(*open_, "deterministic=false")).microbatch_tokens == "auto"
    given = as_begun(begun, configure("microbatch_tokens=512", "deterministic=true"))  # another layout, another budget: another plan
    assert given.microbatch_tokens == 512 and given.parallel.layers_per_stage is None


def test_auto_resumes_in_the_precision_that_the_run_began_with(configure):
    begun, again = configure("precision=bf16"), configure()
    assert changed_key(begun, again) is None and with_precision_of(begun, again).precision == "bf16"
    assert changed_key(begun, configure("precision=fp32")) == "precision: 'fp32' differs from 'bf16'"
