"""The config: what is read, what is filled in, what overrides do, and that a dumped config is the same config."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lora.config.schema import JobConfig, ParallelConfig, RunConfig, dump_config, load_config
from megatron_lora.config.yaml_file import dump_yaml, parse_yaml
from megatron_lora.errors import UserError

MINIMAL = """
base_model: models/tiny
output_dir: runs/one
jobs:
  - {name: first, datasets: [{path: data/a.jsonl, type: text}]}
  - {name: second.v2, datasets: [{path: data/b.json, type: messages}], seed: 7, r: 8}
"""


@pytest.fixture
def load(tmp_path):
    """Return text, overrides -> config."""

    def from_text(text: str = MINIMAL, *overrides: str) -> RunConfig:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return from_text


def test_defaults_are_those_of_the_documented_schema(load):
    config = load(MINIMAL, "seed=3")
    assert config.precision == "auto" and config.microbatch_tokens == 4096 and config.load_weights is True
    assert config.recompute == "auto" and load(MINIMAL, "recompute=[full, cheap]").recompute == ("full", "cheap")
    assert config.parallel == ParallelConfig() and config.parallel.world_size == 1
    job = config.jobs[0]
    assert (job.r, job.lora_alpha, job.lora_dropout, job.use_rslora, job.scale) == (16, 32.0, 0.0, False, 2.0)
    assert job.target_modules is None and (job.experts, job.expert_r, job.expert_rank) == (False, None, 0)
    assert (job.learning_rate, job.lr_scheduler, job.warmup_ratio, job.weight_decay) == (2e-4, "cosine", 0.03, 0.0)
    assert (job.adam_beta1, job.adam_beta2, job.adam_epsilon, job.max_grad_norm) == (0.9, 0.999, 1e-8, 1.0)
    assert (job.global_batch_size, job.num_epochs, job.max_steps, job.sequence_len, job.shuffle) == (8, 1, None, 2048, True)
    assert [job.seed for job in config.jobs] == [3, 7]  # the run's seed, unless the job has its own


def test_a_job_key_beats_the_defaults_and_null_takes_a_default_back(load):
    text = MINIMAL + "defaults: {r: 4, max_grad_norm: 0.5, lora_alpha: 8, use_rslora: true}\n"
    first, second = load(text, "jobs.second.v2.max_grad_norm=null").jobs
    assert (first.r, first.max_grad_norm) == (4, 0.5)
    assert (second.r, second.max_grad_norm) == (8, None)
    assert first.scale == 8 / 2 and second.scale == pytest.approx(8 / math.sqrt(8))


def test_overrides_reach_keys_by_index_by_name_and_through_missing_sections(load):
    config = load(MINIMAL, "jobs.0.r=32", "jobs.second.v2.r=64", "defaults.learning_rate=1e-4", "parallel.pipeline=2")
    assert [job.r for job in config.jobs] == [32, 64]
    assert [job.learning_rate for job in config.jobs] == [1e-4, 1e-4]
    assert config.parallel.pipeline == 2
    config = load(MINIMAL, "jobs.0.datasets.0.path=data/c.jsonl", "jobs.first.target_modules=[v_proj, q_proj]", "output_dir=runs/x=y")
    assert config.jobs[0].datasets[0].path == "data/c.jsonl"
    assert config.jobs[0].target_modules == ("q_proj", "v_proj")  # in one order, whatever the config's
    assert config.output_dir == "runs/x=y"


def test_a_tilde_is_the_home_directory(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = load(MINIMAL, "output_dir=~/runs/one", "jobs.0.datasets.0.path=~/a.jsonl")
    assert (config.output_dir, config.jobs[0].datasets[0].path) == ("/home/someone/runs/one", "/home/someone/a.jsonl")


def test_an_alias_is_a_copy_that_an_override_changes_alone(load):
    text = """
base_model: m
output_dir: o
jobs:
  - {name: a, datasets: &d [{path: a.jsonl, type: text}]}
  - {name: b, datasets: *d}
"""
    a, b = load(text, "jobs.a.datasets.0.path=c.jsonl").jobs
    assert (a.datasets[0].path, b.datasets[0].path) == ("c.jsonl", "a.jsonl")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("2.", 2.0), ("-1.5e+3", -1500.0), ("+7", 7), ("010", 10), ("0o10", 8), ("0x1f", 31),
        ("no", "no"), ("on", "on"), ("1:30", "1:30"), ("2_000", "2_000"), ("2026-11-22", "2026-11-22"), ("true", True), ("FALSE", False),
        ("~", None), ("", None), ("null", None), ("'1e-4'", "1e-4"), ("e5", "e5"), ("<<", "<<"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value):
    assert parse_yaml(f"key: {text}", "test") == {"key": value}
    assert type(parse_yaml(f"key: {text}", "test")["key"]) is type(value)


def test_infinities_are_floats_that_no_key_accepts(load):
    assert parse_yaml("-.INF", "test") == -math.inf and math.isnan(parse_yaml(".nan", "test"))
    with pytest.raises(UserError, match="inf is not a learning rate"):
        load(MINIMAL, "defaults.learning_rate=.inf")


text = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=8)  # PyYAML folds the line breaks of Unicode
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
words = st.sampled_from(
    ["1e-4", "010", "0o7", "no", "on", "~", "", "1:30", ".5", "null", "True", "x: y", "- a", "# c", "=", "<<", "1_0", "é"]
)


@settings(deadline=None)
@given(st.recursive(scalars | words, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3)))
def test_what_is_dumped_reads_back_as_the_same_data_of_the_same_types(tree):
    again = parse_yaml(dump_yaml(tree), "test")
    assert again == tree and repr(again) == repr(tree)


def test_a_dumped_config_is_complete_and_loads_as_the_same_config(load):
    config = load(MINIMAL, "jobs.0.name='1e-4'", "parallel={pipeline: 2, layers_per_stage: [3, 1]}", "defaults.adam_epsilon=1e-7")
    text = dump_config(config)
    assert load(text) == config
    for field in [*dataclasses.fields(JobConfig), *dataclasses.fields(RunConfig), *dataclasses.fields(ParallelConfig)]:
        assert f"{field.name}:" in text


def test_what_an_evaluation_decides_is_chosen_where_the_config_leaves_it_open(load):
    text = MINIMAL + "defaults: {metric: eval_accuracy}\n"
    first, second = load(text, "jobs.first.val_set_size=0.1", "jobs.second.v2.val_set_size=12", "jobs.second.v2.keep=last").jobs
    assert (first.val_set_size, first.keep, first.mode) == (0.1, "best", "max") and first.is_evaluated
    assert (second.val_set_size, second.keep) == (12, "last") and isinstance(second.val_set_size, int)
    config = load(MINIMAL, "jobs.first.val_datasets=[{path: v.jsonl, type: text}]", "jobs.first.early_stopping_patience=2")
    first, second = config.jobs
    assert (first.val_datasets[0].path, first.mode, second.keep, second.val_datasets) == ("v.jsonl", "min", "last", ())
    assert not second.is_evaluated and load(dump_config(config)) == config
    assert load(MINIMAL, "defaults.val_datasets=null").jobs[0].val_datasets == ()  # as older runs' config.yaml have it


VALIDATION = "jobs.first.val_datasets=[{path: v.jsonl, type: text, sampling_weight: %s}]"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["defaults.eval_steps=10"], "jobs.first.eval_steps: 10 needs validation data; set jobs.first.val_datasets or val_set_size"),
        (["jobs.first.eval_on_start=true"], "jobs.first.eval_on_start: true needs validation data"),
        (["jobs.first.early_stopping_patience=3"], "jobs.first.early_stopping_patience: 3 needs validation data"),
        (["jobs.first.early_stopping_patience=0"], "early_stopping_patience: 0 is not a number of evaluations; .*at least 1"),
        (["defaults.keep=best"], "jobs.first.keep: 'best' needs validation data"),
        (["jobs.first.val_set_size=0.1", VALIDATION % 1], "jobs.first.val_set_size: 0.1 takes records of .*keep one of the two keys"),
        ([VALIDATION % 2], "jobs.first.val_datasets.0.sampling_weight: 2 is for training; .*remove it"),
        (["jobs.first.val_set_size=1.5"], r"jobs.first.val_set_size: 1.5 is no part .*a share below 1 \(0.02\), a whole number"),
        (["jobs.first.val_set_size=1.0"], "jobs.first.val_set_size: 1.0 is no part"),
        (["jobs.first.val_set_size=-0.5"], "jobs.first.val_set_size: -0.5 is no part"),
        (["jobs.first.val_set_size=true"], "jobs.first.val_set_size: true is no part"),
        (["defaults.metric=rouge"], "defaults.metric: 'rouge' is unknown; use eval_loss or eval_perplexity or eval_accuracy or eval_re"),
        (["defaults.mode=max"], "jobs.first.mode: max contradicts jobs.first.metric: eval_loss, of which min is the best; remove it"),
        (["jobs.first.early_stopping_threshold=0.1"], "early_stopping_threshold: 0.1 needs jobs.first.early_stopping_patience"),
        (["defaults.save_total_limit=0"], "defaults.save_total_limit: 0 is not a number of checkpoints; .*at least 1"),
        (["defaults.priority=0"], "defaults.priority: 0 is not a priority; use a number above 0"),
        (["adapter_memory=0"], "adapter_memory: 0 is not an amount of memory; use a number above 0, or auto"),
        (["window_s=0"], "window_s: 0 is not a time in seconds; use a number above 0"),
        (["max_wait_s=0"], "max_wait_s: 0 is not a time in seconds; use a number above 0"),
        (["defaults.load_best_model_at_end=true"], r"load_best_model_at_end: unknown key \(did you mean keep\?\)"),
    ],
)  # fmt: skip
def test_keys_of_evaluation_and_of_the_queue_that_cannot_be_right_are_refused(load, overrides, words):
    with pytest.raises(UserError, match=words):
        load(MINIMAL, *overrides)


def test_the_queues_keys(load):
    config = load(MINIMAL, "adapter_memory=2.5", "max_wait_s=600", "window_s=1", "jobs.0.priority=2")
    assert (config.adapter_memory, config.max_wait_s, config.window_s) == (2.5, 600.0, 1.0)
    assert [job.priority for job in config.jobs] == [2.0, 1.0]
    assert (load().adapter_memory, load().max_wait_s, load().window_s) == ("auto", None, 5.0)


def test_configs_are_frozen(load):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().jobs[0].r = 3


def test_targets_of_adapters_are_those_again_that_were_dumped(load):
    config = load(MINIMAL, "on_save=[{url: 'http://host:8000/'}, {command: [echo, done], timeout_s: 5}]", "defaults.export_dtype=bf16")
    assert [entry.name for entry in config.on_save] == ["http://host:8000", "echo done"] and config.jobs[0].export_dtype == "bf16"
    assert load(dump_config(config)) == config and load(dump_config(load())) == load()
    assert load(MINIMAL, "on_save.url=http://host").on_save[0].attempts == 3
    with pytest.raises(UserError, match=r"on_save.timeout: unknown key \(did you mean timeout_s\?\)"):
        load(MINIMAL, "on_save={url: 'http://host', timeout: 3}")
