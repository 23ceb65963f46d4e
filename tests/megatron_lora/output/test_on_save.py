"""Finished adapters at servers and commands: delivered once, and servers that are down, slow or hostile cost a bounded time and a line."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from pathlib import Path

import pytest
from waiting import wait_for

from megatron_lora.config.keys import build
from megatron_lora.config.on_save_keys import OnSaveConfig, on_save
from megatron_lora.errors import UserError
from megatron_lora.output import on_save as module
from megatron_lora.output.on_save import DELIVERED, OnSave


class Server:
    """An HTTP server whose answers a test gives: `answer(handler, body)`; it records what it was asked."""

    def __init__(self, answer):
        self.asked, self.keys = [], []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                outer.keys.append(self.headers.get("Authorization"))
                outer.asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
                answer(self, len(outer.asked))

            do_GET = do_POST

            def log_message(self, *words):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()


def says(status: int, text: str = "ok", **headers: str):
    def answer(handler, number):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(text.encode())

    return answer


def never(handler, number):
    time.sleep(3)


def drips(handler, number):
    """Send a byte of the headers now and then, so that no single wait is long."""
    for _ in range(200):
        handler.wfile.write(b"H")
        time.sleep(0.02)


def endless(handler, number):
    says(500)(handler, number)
    for _ in range(10_000):
        handler.wfile.write(b"\x1b[31mred\n" * 1000)


def target(**keys) -> OnSaveConfig:
    return build(OnSaveConfig, "on_save", {"timeout_s": 10.0, "attempts": 2, **keys})


def announced(run: Path, targets, jobs=("a",), wait: float = 30.0) -> tuple[list, float]:
    """Announce jobs to targets; return the results, and how long the calls in front of `wait` took."""
    announcer, begin = OnSave(targets, run), time.monotonic()
    for job in jobs:
        announcer.put(job)
    took = time.monotonic() - begin
    module_wait, module.END_WAIT_S = module.END_WAIT_S, wait
    try:
        announcer.wait(stopped=False)
    finally:
        module.END_WAIT_S = module_wait
    return list(announcer.results()), took


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(module, "PAUSE_S", 0.01)


def test_a_server_is_asked_for_each_adapter_by_its_jobs_name(tmp_path, capsys):
    with Server(says(200)) as server, Server(says(200)) as second:
        targets = [target(url=server.url + "/"), target(url=second.url + "/proxied", load_inplace=True)]
        results, _ = announced(tmp_path, targets, ("a", "b"))
        expected = [{"lora_name": name, "lora_path": str(tmp_path / "jobs" / name)} for name in "ab"]
        assert server.asked == [("/v1/load_lora_adapter", body) for body in expected]
        assert second.asked == [("/proxied/v1/load_lora_adapter", body | {"load_inplace": True}) for body in expected]
    assert sorted(results) == sorted((name, each.name, DELIVERED) for name in "ab" for each in targets)
    assert f"megatron-lora: a: on_save has reached {server.url}\n" in capsys.readouterr().err


def test_a_key_is_sent_where_the_environment_has_one_and_shown_nowhere(tmp_path, monkeypatch, capsys):
    with Server(says(401)) as server:
        for api_key in ("", "secret", "sec\nret"):
            monkeypatch.setenv("VLLM_API_KEY", api_key)
            ((_, _, found),), _ = announced(tmp_path, [target(url=server.url)])
            assert "ret" not in found + capsys.readouterr().err
        assert server.keys == [None, "Bearer secret"]


def no_server() -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_a_server_that_is_down_is_tried_again_and_named(tmp_path, capsys):
    url = no_server()
    results, took = announced(tmp_path, [target(url=url)])
    assert results == [("a", url, "ConnectionRefusedError: [Errno 111] Connection refused")] and took < 2
    assert f"megatron-lora: warning: a: on_save did not reach {url}: ConnectionRefusedError" in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "said", "asked"), [
    (never, "no answer within 0.3 s", 2),
    (drips, "no answer within 0.3 s", 2),
    (endless, "it answers 500 ok", 2),
    (says(500, "\x1b[31mred\n"), r"it answers 500 \x1b[31mred\n", 2),
    (says(302, Location="http://127.0.0.1:1/elsewhere"), "it answers 302 ok", 1),
    (says(400, "The lora adapter 'a' has already been loaded"), "it answers 400 The lora adapter", 1),
    (says(404, '{"detail":"Not Found"}'), "start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", 1),
    (says(200, "x" * 10_000_000), DELIVERED, 1),
    (lambda handler, number: says(503 if number == 1 else 200)(handler, number), DELIVERED, 2),
    (lambda handler, number: handler.wfile.write(b"\0\xff garbage\n"), "BadStatusLine", 2),
])  # fmt: skip
def test_whatever_a_server_does_costs_a_bounded_time_and_one_line(answer, said, asked, tmp_path):
    with Server(answer) as server:
        begin = time.monotonic()
        timeout_s = 0.3 if answer in (never, drips) else 10.0
        ((_, _, found),), took = announced(tmp_path, [target(url=server.url, timeout_s=timeout_s)])
        assert said in found and (found == DELIVERED) == (said == DELIVERED), found
        assert len(found) < 450 and found.isprintable() and len(server.asked) == asked
        assert took < 2 and time.monotonic() - begin < 10


def test_a_redirect_is_not_followed(tmp_path):
    with Server(says(200)) as other, Server(says(307, Location=other.url)) as server:
        ((_, _, found),), _ = announced(tmp_path, [target(url=server.url)])
        assert found.startswith("it answers 307") and not other.asked


def test_a_proxy_of_the_environment_is_not_asked(tmp_path, monkeypatch):
    with Server(says(200)) as proxy, Server(says(200)) as server:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        announced(tmp_path, [target(url=server.url)])
        assert server.asked and not proxy.asked


def test_the_end_of_a_run_waits_no_longer_than_it_says(tmp_path):
    with Server(never) as server, Server(says(200)) as quick:
        begin = time.monotonic()
        results, _ = announced(tmp_path, [target(url=server.url, timeout_s=2.0), target(url=quick.url)], ("a", "b"), wait=1.5)
        assert time.monotonic() - begin < 1.5 + module.CLOSE_S + 2
    assert sorted(results) == sorted(
        [(name, server.url, "the run ended first") for name in "ab"] + [(name, quick.url, DELIVERED) for name in "ab"]
    )


def test_a_command_gets_the_directory_without_a_shell(tmp_path):
    out = tmp_path / "said"
    script = f'printf "%s|" "$@" >> {out}; exit 0'
    results, _ = announced(tmp_path, [target(command=["/bin/sh", "-c", script, "sh", "$HOME; exit 1"])], ("a", "b"))
    assert out.read_text() == "".join(f"$HOME; exit 1|{tmp_path / 'jobs' / name}|" for name in "ab")
    assert [said for *_, said in results] == [DELIVERED] * 2


def test_a_command_that_fails_or_does_not_end_is_named(tmp_path):
    left = tmp_path / "child"
    fails = target(command=["/bin/sh", "-c", "exit 3"])
    hangs = target(command=["/bin/sh", "-c", f"sleep 60 & echo $! > {left}; wait"], attempts=1, timeout_s=0.3)
    gone = target(command=[str(tmp_path / "no-such-program")])
    results, took = announced(tmp_path, [fails, hangs, gone])
    assert {name: said for _, name, said in results} == {
        fails.name: "it ended with status 3",
        hangs.name: "it had not ended after 0.3 s",
        gone.name: "it cannot be run (No such file or directory)",
    }
    assert took < 2

    def ended() -> bool:
        try:
            return Path(f"/proc/{int(left.read_text())}/stat").read_text().split()[2] == "Z"
        except FileNotFoundError:
            return True

    wait_for(ended, 5.0)


def test_a_resumed_run_announces_what_was_not_delivered(tmp_path):
    with Server(says(200)) as server:
        announcer = OnSave([target(url=server.url)], tmp_path)
        jobs = {
            "delivered": {"state": "done", "on_save": {server.url: DELIVERED}},
            "elsewhere": {"state": "done", "on_save": {"http://other": DELIVERED}},
            "failed before": {"state": "stopped", "on_save": {server.url: "it answers 500"}},
            "not posted": {"state": "done"},
            "without": {"state": "failed"},
            "cancelled": {"state": "cancelled"},
            "trains": {"state": "queued"},
        }
        announcer.put_undelivered(jobs)
        announcer.wait(stopped=True)
        assert [body["lora_name"] for _, body in server.asked] == ["elsewhere", "failed before", "not posted"]
        assert all(said == DELIVERED for *_, said in announcer.results())


@pytest.mark.parametrize(("value", "said"), [
    ({"url": "127.0.0.1:8000"}, "on_save.url: '127.0.0.1:8000' is no address of a server; use http://host:port"),
    ({"url": "http://me:secret@host"}, "without a name, password or query"),
    ({"url": "http://host:99999"}, "no address"),
    ({"url": "http://host/?key=1"}, "no address"),
    ({"url": "file:///etc"}, "no address"),
    ({"url": "http://host", "command": ["a"]}, "names both url and command; set one of the two"),
    ({}, "names neither url and command"),
    ([{"url": "http://host"}, {"timeout_s": 3}], "on_save.1: .* names neither"),
    ({"command": "rm -rf"}, "is not a list of words"),
    ({"command": ["a"], "load_inplace": True}, "on_save.load_inplace: true is for a url"),
    ("http://host", "is not a mapping"),
])  # fmt: skip
def test_what_is_no_target_is_refused(value, said):
    with pytest.raises(UserError, match=said):
        on_save("on_save", value)


def test_several_targets_are_a_list():
    found = on_save("on_save", [{"url": "https://host/"}, {"command": ["a", "b"]}])
    assert [each.name for each in found] == ["https://host", "a b"] and on_save("on_save", None) == on_save("on_save", []) == ()
