"""Adapters reach a server one by one while the run trains; servers that fail change no bit of it; a resumed run delivers the rest."""

from __future__ import annotations

import http.server
import json
import threading
import time
from pathlib import Path

import oracle
import pytest
import runs

from megatron_lora.huggingface.adapter_files import read_adapter
from megatron_lora.output.on_save import DELIVERED

STEPS = {"quick": 2, "middle": 6, "long": 60}


class Handler(http.server.BaseHTTPRequestHandler):
    """Loads what it is asked for; below /slow it never answers, below /bad it says 500 for ever."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.startswith("/slow"):
            time.sleep(20)
            return
        if self.path.startswith("/bad"):
            self.send_response(500)
            self.end_headers()
            self.wfile.write(b"\x1b[2Jno" * 100_000)
            return
        adapter = Path(body["lora_path"])
        read_adapter(adapter)
        steps = {name: len(runs.lines_of(adapter.parents[1], name)) for name in STEPS if (adapter.parent / name / "metrics.jsonl").exists()}
        self.server.loaded.append((body["lora_name"], steps))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *words):
        pass


@pytest.fixture
def server():
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.daemon_threads, found.block_on_close, found.loaded = True, False, []
    found.url = f"http://127.0.0.1:{found.server_address[1]}"
    threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("on_save")
    oracle.make_model(folder / "model", num_layers=1)
    jobs = []
    for number, (name, steps) in enumerate(STEPS.items()):
        rows = oracle.make_rows(folder / f"{name}.jsonl", num_rows=6, seed=number)
        job = {"name": name, "datasets": [{"path": str(rows), "type": "prompt_completion"}], "r": 4, "max_steps": steps}
        job["priority"] = 60 / steps
        jobs.append(job | {"global_batch_size": 2, "warmup_ratio": 0.0, "learning_rate": 1e-3})

    def write(name: str, *targets: dict) -> Path:
        path = runs.write_config(folder / f"{name}.yaml", folder / "model", folder / name, jobs, {}, 64)
        config = json.loads(path.read_text()) | {"on_save": list(targets), "window_s": 0.01}
        path.write_text(json.dumps(config))
        return path

    return folder, write


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MEGATRON_LORA_CACHE", str(tmp_path / "cache"))


def said_of(run: Path) -> dict:
    return {name: job.get("on_save", {}) for name, job in json.loads((run / "status.json").read_text())["jobs"].items()}


def test_adapters_appear_while_the_run_trains_and_bad_servers_change_nothing(scene, server, pool):
    folder, write = scene
    assert runs.start(pool, write("alone"), {}) == 0
    targets = [{"url": server.url}, {"url": server.url + "/slow", "timeout_s": 0.2, "attempts": 1}]
    targets += [{"url": url, "attempts": 1} for url in (server.url + "/bad", "http://127.0.0.1:1")]
    assert runs.start(pool, write("served", *targets), {}) == 0
    names, steps = zip(*server.loaded, strict=True)
    assert names == tuple(STEPS)
    assert steps[0]["long"] < steps[1]["long"] < STEPS["long"] == steps[2]["long"], "each is there before those after it are trained"
    for name in STEPS:
        files = [folder / run / "jobs" / name / "adapter_model.safetensors" for run in ("alone", "served")]
        assert files[0].read_bytes() == files[1].read_bytes()
        said = said_of(folder / "served")[name]
        assert said[server.url] == DELIVERED and said[server.url + "/slow"] == "no answer within 0.2 s"
        assert said[server.url + "/bad"].startswith("it answers 500 \\x1b[2Jno") and "refused" in said["http://127.0.0.1:1"]
        assert said_of(folder / "alone")[name] == {}


def test_a_resumed_run_delivers_what_an_earlier_start_could_not(scene, server, pool):
    folder, write = scene
    first = {"url": server.url}
    down = {"url": "http://127.0.0.1:1", "attempts": 1}
    assert runs.start(pool, write("stopped", first, down), {}, stop_after=8) == 75
    before = [name for name, _ in server.loaded]
    assert before and "long" not in before
    write("stopped", first, {"url": server.url + "/second"})
    assert runs.start(pool, folder / "stopped.yaml", {}) == 0
    paths = [name for name, _ in server.loaded]
    assert sorted(paths) == sorted([*STEPS, *STEPS]), "each once for each target, none twice"
    assert all(said_of(folder / "stopped")[name][server.url] == DELIVERED for name in STEPS)
