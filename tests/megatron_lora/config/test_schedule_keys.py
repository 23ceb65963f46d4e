"""A schedule's arguments: those that it takes are kept, others are refused by name."""

import pytest

from megatron_lora.config.schema import dump_config, load_config
from megatron_lora.errors import UserError

CONFIG = "base_model: m\noutput_dir: out\njobs: [{name: one, datasets: [{path: a.jsonl, type: text}]}]\n"


def loaded(tmp_path, *overrides: str):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return load_config(path, overrides)


def test_a_resolved_config_loads_again(tmp_path):
    chosen = "defaults={lr_scheduler: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr_rate: 0.1}, warmup_steps: 3, loraplus_lr_ratio: 16}"
    config = loaded(tmp_path, chosen)
    job = config.jobs[0]
    assert (job.lr_scheduler_kwargs, job.warmup_steps, job.loraplus_lr_ratio) == ({"min_lr_rate": 0.1}, 3, 16)
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    "given, words",
    [
        ("lr_scheduler_kwargs: {min_lr: 1e-5}", "lr_scheduler_kwargs.min_lr: lr_scheduler cosine takes num_cycles"),
        ("lr_scheduler: linear, lr_scheduler_kwargs: {power: 2}", "lr_scheduler_kwargs.power: lr_scheduler linear takes none"),
        ("lr_scheduler: polynomial, lr_scheduler_kwargs: {powr: 2}", "did you mean power?"),
        ("lr_scheduler: warmup_stable_decay", "needs num_decay_steps"),
        ("lr_scheduler: warmup_stable_decay, lr_scheduler_kwargs: {num_decay_steps: 0}", "lr_scheduler_kwargs.num_decay_steps: 0"),
        ("lr_scheduler: cosine_with_min_lr", "takes min_lr or min_lr_rate; give one of them"),
        ("lr_scheduler: polynomial, lr_scheduler_kwargs: {lr_end: 0.5}", "learning_rate: 0.0002 is not above the 0.5"),
        ("lr_scheduler_kwargs: 3", "is no mapping of a schedule's arguments"),
        ("warmup_steps: 3, warmup_ratio: 0.1", "warmup_steps: 3 is in place of jobs.one.warmup_ratio"),
    ],
)
def test_what_a_schedule_does_not_take_is_refused(tmp_path, given, words):
    with pytest.raises(UserError) as refused:
        loaded(tmp_path, f"defaults={{{given}}}")
    assert words in str(refused.value) and str(refused.value).startswith(("jobs.one.", "defaults."))
