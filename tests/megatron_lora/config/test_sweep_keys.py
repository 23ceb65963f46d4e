"""A sweep makes jobs of one: which points, with which values, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_lora.commands.plan import sweep_lines
from megatron_lora.config import sweep_keys
from megatron_lora.config.added_jobs import load_added_jobs
from megatron_lora.config.schema import config_of, dump_config, load_config
from megatron_lora.config.sweep_keys import SweepConfig
from megatron_lora.errors import UserError
from megatron_lora.output.changes import job_mapping
from megatron_lora.output.resume import changed_key

JOB = {"name": "tune", "datasets": [{"path": "a.jsonl", "type": "text"}], "val_set_size": 4, "lora_alpha": 8}
OVER = {"learning_rate": [1e-4, 1e-3], "r": [4, 8, 16]}
RANGES = {"learning_rate": {"min": 1e-5, "max": 1e-3, "log": True}, "r": {"min": 1, "max": 4}, "use_rslora": {"choices": [True, False]}}


def tree(over=OVER, jobs=(JOB,), **keys):
    return {"base_model": "m", "output_dir": "o", "jobs": [dict(job) for job in jobs], "sweep": {"job": "tune", "over": over, **keys}}


def points(over=OVER, **keys):
    return config_of(tree(over, **keys)).jobs


def test_a_grid_takes_the_place_of_its_job_and_differs_from_it_in_the_swept_keys_alone():
    other = JOB | {"name": "other"}
    jobs = config_of(tree(jobs=(other, JOB))).jobs
    assert [job.name for job in jobs] == ["other", *(f"tune-{k:03d}" for k in range(6))]
    assert jobs[0].point is None
    for job, (learning_rate, r) in zip(jobs[1:], itertools.product(*OVER.values()), strict=True):
        assert (job.learning_rate, job.r, job.lora_alpha) == (learning_rate, r, 8.0)
        assert job.point is not None and job.point.values == {"learning_rate": learning_rate, "r": r}


def test_random_points_depend_on_the_seed_alone_and_stay_in_their_ranges():
    drawn = points(RANGES, strategy="random", num=200)
    assert drawn == points(RANGES, strategy="random", num=200) != points(RANGES, strategy="random", num=200, seed=1)
    assert points(RANGES, strategy="random", num=5)[3].point.values == drawn[3].point.values
    rates = [job.learning_rate for job in drawn]
    assert min(rates) >= 1e-5 and max(rates) <= 1e-3
    assert 60 < sum(rate < 1e-4 for rate in rates) < 140  # half of a logarithmic range
    assert {job.r for job in drawn} == {1, 2, 3, 4} and {job.use_rslora for job in drawn} == {True, False}
    some = points(strategy="random", num=4)
    assert len({(job.learning_rate, job.r) for job in some}) == 4


def test_a_run_with_points_is_written_and_read_back(tmp_path):
    config = config_of(tree(RANGES, strategy="asha", num=3, metric="eval_accuracy"))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert {(job.metric, job.mode) for job in config.jobs} == {("eval_accuracy", "max")}


def test_a_sweep_is_added_like_jobs(tmp_path):
    config, file = config_of(tree()), tmp_path / "sweep.yaml"
    added = tree(strategy="asha") | {"defaults": {"r": 2}}
    file.write_text(json.dumps({key: added[key] for key in ("defaults", "jobs", "sweep")}))
    jobs = load_added_jobs(str(file), ["sweep.over.r=[1, 2]"], config)
    assert [job.point.values["r"] for job in jobs if job.point] == [1, 2, 1, 2]
    assert all(job.datasets[0].path.startswith("/") for job in jobs)


def test_rungs_are_fractions_of_a_points_own_steps():
    sweep = SweepConfig(job="a", over={}, strategy="asha")
    assert sweep.rung_steps(27) == (3, 9) and sweep.rung_steps(54) == (6, 18)
    assert len(sweep.rungs) == 2
    assert SweepConfig(job="a", over={}, strategy="asha", first_rung=0.1, reduction=2).rung_steps(100) == (10, 20, 40, 80)
    assert SweepConfig(job="a", over={}, strategy="random").rung_steps(27) == ()


@pytest.mark.parametrize(
    ("over", "keys", "words"),
    [
        ({"r": [4, 300]}, {}, r"jobs\.tune-001\.r: 300 is not a LoRA rank"),
        ({"rank": [4]}, {}, r"jobs\.tune-000\.rank: unknown key"),
        ({"name": ["a"]}, {}, r"sweep\.over\.name: all points of a sweep share it"),
        ({"r": []}, {}, r"sweep\.over\.r: .* names no values"),
        ({"r": {"min": 8, "max": 4}}, {"strategy": "random"}, r"sweep\.over\.r: 8 to 4 is no range"),
        ({"learning_rate": {"min": 0, "max": 1, "log": True}}, {"strategy": "random"}, r"min above 0, which is 0"),
        ({"r": {"min": 1, "max": 4}}, {}, r"sweep\.over\.r: a range has no grid"),
        (OVER, {"num": 5}, r"sweep\.num: 5 is not the grid's 6 points"),
        (OVER, {"num": 7, "strategy": "asha"}, r"sweep\.num: 7 is more than the 6 points"),
        (OVER, {"mode": "max"}, r"jobs\.tune-000\.mode: max contradicts"),
        (OVER, {"job": "tun"}, r"sweep\.job: 'tun' is no entry of jobs, which are tune"),
        (OVER, {"first_rung": 1.0}, r"sweep\.first_rung: 1\.0 is not a share"),
        (OVER, {"jobs": [JOB | {"val_set_size": 0}]}, r"compares its points by evaluations; set jobs\.tune\.val_datasets"),
        ({"val_set_size": [2, 4]}, {}, r"sweep\.over\.val_set_size: all points of a sweep share it"),
        (OVER, {"jobs": [JOB, JOB]}, r"jobs\.tune\.name: two jobs have this name"),
        ({"r": [4, 8, 4]}, {}, r"sweep\.over\.r: 4 is in the list twice"),
        ({"r\n": [4, 4]}, {}, r"sweep\.over\.'r\\n': 4 is in the list twice"),
        ({"seed": list(range(501))}, {}, r"sweep\.over: lists 501 values, and at most 500"),
        ({key: [*range(1, 101)] for key in ("r", "seed", "max_steps", "save_steps")}, {}, r"sweep\.over: has 100,000,000 combinations"),
        ({"r": {"min": 1, "max": 4}}, {"strategy": "random", "num": 5}, r"sweep\.num: 5 points were to differ, and 4 were found"),
        (OVER, {"first_rung": 0.95, "strategy": "asha"}, r"sweep\.first_rung: 0\.95 is not a share"),
        (OVER, {"first_rung": 0.3}, r"sweep\.first_rung: 0\.3 means nothing to strategy: grid"),
        (OVER, {"reduction": 2, "strategy": "random"}, r"sweep\.reduction: 2 means nothing to strategy: random"),
        (OVER, {"seed": 1}, r"sweep\.seed: 1 means nothing to strategy: grid"),
    ],
)
def test_points_that_cannot_exist_are_refused_in_one_line(over, keys, words):
    with pytest.raises(UserError, match=words) as refused:
        config_of(tree(over, **keys))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changed", [{"name": "other"}, {"r": 32}, {"point.number": 1}, {"point.values": {"r": 4}}, {"point.values": {"rank": 4, "r": 4}}]
)
def test_a_point_that_is_written_by_hand_is_refused(changed):
    config = tree(jobs=[job_mapping(points()[0])]) | {"sweep": None}
    assert config_of(dict(config)).jobs == points()[:1]
    for key, value in changed.items():
        *sections, last = key.split(".")
        (config["jobs"][0][sections[0]] if sections else config["jobs"][0])[last] = value
    with pytest.raises(UserError, match=r"point: is what a sweep wrote for tune-00. with {"):
        config_of(config)


def test_drawn_points_differ_whatever_they_go_over():
    assert sorted(job.r for job in points({"r": {"min": 1, "max": 4}}, strategy="random", num=4)) == [1, 2, 3, 4]
    many = {key: [*range(1, 101)] for key in ("r", "seed", "max_steps", "save_steps")}
    assert len({(job.r, job.seed, job.max_steps, job.save_steps) for job in points(many, strategy="random", num=20)}) == 20


def test_a_run_is_not_resumed_with_another_sweep():
    before = config_of(tree())
    assert changed_key(before, config_of(tree())) is None
    other = config_of(tree(OVER | {"r": [4, 8, 32]}))
    assert changed_key(before, other) == "sweep.over.r: {'choices': [4, 8, 32]} differs from {'choices': [4, 8, 16]}"
    drawn = [config_of(tree(RANGES, strategy="random", num=num)) for num in (3, 4)]
    assert changed_key(*drawn) == "sweep.num: 4 differs from 3"


def test_optuna_is_refused_with_how_to_install_it_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(sweep_keys.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install optuna"):
        points(RANGES, strategy="optuna")


def test_whole_numbers_of_a_range_are_equally_likely():
    assert [sweep_keys.value_at({"min": 1, "max": 4, "log": False}, share) for share in (0, 0.24, 0.26, 0.99)] == [1, 1, 2, 4]
    assert math.isclose(sweep_keys.value_at({"min": 1e-4, "max": 1e-2, "log": True}, 0.5), 1e-3)


def as_of_optuna(job):
    """Return a point as it is in a sweep of twice as many, of which Optuna is to name the others."""
    if job.point is None:
        return job
    sweep = dataclasses.replace(job.point.sweep, strategy="optuna", num=18)
    return dataclasses.replace(job, point=dataclasses.replace(job.point, sweep=sweep))


def test_plan_says_what_a_sweep_costs():
    config = config_of(tree({"r": list(range(1, 10))}, jobs=(JOB | {"name": "other"}, JOB), strategy="successive_halving"))
    together = SimpleNamespace(shares=lambda: [0.1] * 10, figures=SimpleNamespace(seconds=1000.0))
    optuna = dataclasses.replace(config, jobs=tuple(map(as_of_optuna, config.jobs)))
    assert sweep_lines(optuna, cast(Any, together)) == ["sweep tune: 18 points, 1,800 s if all train to their end"]
    share = (9 * 0.111 + 3 * 0.222 + 0.667) / 9
    said = f"sweep tune: 9 points, 900 s if all train to their end; {900 * share:.0f} s expected by successive_halving, {share:.0%} of it"
    assert sweep_lines(config, cast(Any, together)) == [said]
