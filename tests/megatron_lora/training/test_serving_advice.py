"""A run of conversations says in the adapter's card and at its end how the adapter has to be served."""

import json
import queue
from types import SimpleNamespace
from typing import cast

import oracle
import runs

from megatron_lora.config.schema import JobConfig
from megatron_lora.data.sample_arrays import Samples
from megatron_lora.data.samples import JobData
from megatron_lora.training.run_reporter import RunReporter

TEMPLATE = "{% for m in messages %}{{ '<think> </think> ' if loop.last }}{{ m.content + ' </s> ' }}{% endfor %}"


def test_what_the_data_say_about_serving_stands_in_the_card(pool, tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRON_LORA_CACHE", str(tmp_path / "cache"))
    oracle.make_model(tmp_path / "model", num_layers=1)
    oracle.make_rows(tmp_path / "pairs.jsonl", num_rows=2, seed=0)
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    types = {"chats": "messages", "pairs": "prompt_completion"}
    jobs = [{"name": name, "datasets": [{"path": str(tmp_path / f"{name}.jsonl"), "type": kind}]} for name, kind in types.items()]
    jobs[0]["chat_template"] = str(tmp_path / "own.jinja")
    config = runs.write_config(tmp_path / "config.yaml", tmp_path / "model", tmp_path / "out", jobs, {}, 64)
    assert runs.start(pool, config, {}) == 0
    advice = f"It was trained with the chat template {tmp_path / 'own.jinja'}, so serve it with that one. The answers of 1 of its 1 records"
    cards = {name: (tmp_path / "out" / "jobs" / name / "README.md").read_text() for name in ("chats", "pairs")}
    assert advice in cards["chats"] and "serve" not in cards["pairs"]


def test_the_advice_of_jobs_that_are_done_ends_a_run(capsys):
    template = {"datasets": (), "chat_template": "chatml"}
    written: queue.SimpleQueue = queue.SimpleQueue()
    for name, state, keys in (("a", "done", template), ("b", "stopped", template), ("c", "done", {"datasets": ()})):
        job = SimpleNamespace(name=name, state="running", config=JobConfig(name=name, **keys), data=JobData.of(Samples.of([])))
        written.put((job, state))
    ended = SimpleNamespace(observers=[], directory=SimpleNamespace(close=lambda: None), reasons={}, alarms={}, advice={})
    ended.board, ended._set_job = SimpleNamespace(close=lambda failed: None), lambda job, state, reason: None
    ended.control = SimpleNamespace(tell=lambda *news: None)
    RunReporter._update_states(cast(RunReporter, ended), written)
    RunReporter.__exit__(cast(RunReporter, ended), None, None, None)
    assert capsys.readouterr().out == "a: It was trained with the chat template chatml, so serve it with that one.\n"
