"""A run writes its adapters as they are to be served, and says in their cards and at its end how that has to be done."""

import dataclasses
import json
import queue
from types import SimpleNamespace
from typing import cast

import oracle
import pytest
import runs
import torch

from megatron_lora.config.schema import JobConfig
from megatron_lora.data.left_out import NO_THOUGHT
from megatron_lora.data.sample_arrays import Samples
from megatron_lora.data.samples import JobData
from megatron_lora.data.serving import serving_advice
from megatron_lora.huggingface.adapter_files import read_adapter
from megatron_lora.huggingface.base_files import WEIGHTS, digests_of_base
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
    jobs[0] |= {"chat_template": str(tmp_path / "own.jinja"), "r": 4, "use_rslora": True, "export": "portable", "export_dtype": "bf16"}
    jobs[1] |= {"r": 20, "val_datasets": jobs[1]["datasets"], "max_steps": 2, "eval_steps": 1, "learning_rate": 0.0, "save_steps": 1}
    config = runs.write_config(tmp_path / "config.yaml", tmp_path / "model", tmp_path / "out", jobs, {}, 64)
    assert runs.start(pool, config, {}) == 0
    advice = f"It was trained with the chat template {tmp_path / 'own.jinja'}, so serve it with that one. The answers of 1 of its 1 records"
    cards = {name: (tmp_path / "out" / "jobs" / name / "README.md").read_text() for name in ("chats", "pairs")}
    assert advice in cards["chats"] and "so serve" not in cards["pairs"] and "eval_loss" not in cards["chats"]
    evaluations = [line["eval_loss"] for line in runs.lines_of(tmp_path / "out", "pairs") if "eval_loss" in line]
    assert f"\nThe eval_loss was {evaluations[1]:.4f} in the last evaluation, after 2 steps, and {evaluations[0]:.4f} in" in cards["pairs"]
    assert f"vllm serve {tmp_path / 'model'} --enable-lora --max-lora-rank 32 --lora-modules pairs=path" in cards["pairs"]
    digest = digests_of_base(tmp_path / "model", load_weights=True, cache=tmp_path / "cache")[WEIGHTS]
    portable, plain = (read_adapter(tmp_path / "out" / "jobs" / name) for name in ("chats", "pairs"))
    assert portable.base_digest == plain.base_digest == digest == read_adapter(tmp_path / "out" / "jobs" / "pairs" / "best-1").base_digest
    assert (portable.r, portable.lora_alpha, portable.use_rslora, plain.lora_alpha) == (4, 4, False, 32)
    assert [next(iter(adapter.weights.values()))[0].dtype for adapter in (portable, plain)] == [torch.bfloat16, torch.float32]


def test_the_advice_of_jobs_that_are_done_ends_a_run(capsys):
    written: queue.SimpleQueue = queue.SimpleQueue()
    for name, state, advice in (
        ("a", "done", "Serve it cold."),
        ("b", "stopped", "Serve it cold."),
        ("c", "done", ""),
        ("d", "queued", ""),
    ):
        written.put((SimpleNamespace(name=name, state="running", advice=advice, files={}), state))
    ended = SimpleNamespace(
        observers=[], directory=SimpleNamespace(close=lambda: None), reasons={}, alarms={}, advice={}, over={"d"}, files_of_left={}
    )
    ended.board, ended._set_job = SimpleNamespace(close=lambda failed: None), lambda job, state, reason: None
    sweeps = SimpleNamespace(is_stopped=lambda name: False)
    ended.control, announced = SimpleNamespace(tell=lambda *news: None, sweeps=sweeps), []
    ended.on_save = SimpleNamespace(put=announced.append, results=lambda: [("a", "server", "down")], close=lambda: None)
    ended.directory.set_on_save = lambda *words: announced.append(words)
    RunReporter._update_states(cast(RunReporter, ended), written)
    RunReporter.__exit__(cast(RunReporter, ended), None, None, None)
    assert capsys.readouterr().out == "a: Serve it cold.\n"
    assert announced == ["a", "b", "c", ("a", "server", "down")]


@pytest.mark.parametrize(("name", "text", "said"), [
    ("chat_template.jinja", "{{ enable_thinking }}", 'enable_thinking=False (of a request: `"chat_template_kwargs": {"enable_thinking": f'),
    ("tokenizer_config.json", '{"chat_template": "{{ enable_thinking }}"}', "serve it with enable_thinking=False ("),
    ("chat_template.jinja", "{{ think }}", "serve it with whatever turns thoughts off in the chat template."),
])  # fmt: skip
def test_the_switch_of_thoughts_is_named_where_the_template_has_it(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    job, data = JobConfig(name="a", datasets=()), dataclasses.replace(JobData.of(Samples.of([])), num_records=2, notes={NO_THOUGHT: 1})
    assert said in serving_advice(job, data, tmp_path)
    own = dataclasses.replace(job, chat_template=str(tmp_path / "gone.jinja"))
    assert "whatever turns thoughts off" in serving_advice(own, data, tmp_path), "a file that is gone ends nothing"
    given = dataclasses.replace(job, chat_template_kwargs={"enable_thinking": False})
    assert serving_advice(given, data, tmp_path) == "Its chat template was given enable_thinking=False, so give it the same."
