"""An OpenAI-compatible server, asked over HTTP: what it serves, and the log-probabilities that it gives tokens.

A request has a connection of its own, through no proxy and after no redirect. Its time and the size of its answer are
bounded as a whole: a server that is down, slow or not one of these is a UserError of one line. VLLM_API_KEY is
sent as its key where it is set. Log-probabilities of a prompt are read as vLLM gives them (`prompt_logprobs`).

    server = find_server("http://localhost:8000")
    server.models["summaries"].directory                 # what it loaded, as it says itself
    log_probabilities(server, "summaries", [1, 517, 28]) # of 517 and 28
"""

import json
import math
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from megatron_lora.config.on_save_keys import server_url
from megatron_lora.errors import UserError, one_line

ANSWER_S, COMPLETION_S = 10.0, 300.0  # the first request of a server may compile kernels
MOST_BYTES = 1 << 26


class Refused(UserError):
    """The server's own answer that is no success."""


@dataclass(frozen=True, slots=True)
class Model:
    """What a server serves under a name: the directory or id that it loaded, and the base model's name if it is an adapter."""

    directory: str
    base: str | None


@dataclass(frozen=True, slots=True)
class Server:
    """A server that has answered. `version`: of vLLM, None where it does not say."""

    url: str
    version: str | None
    models: Mapping[str, Model]


@contextmanager
def request(url: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Iterator[HTTPResponse]:
    """GET `path`, or POST `body` to it as JSON, and yield the answer, to be read before `timeout_s` is over.

    TimeoutError once it is over, whatever was sent until then; OSError, HTTPException or ValueError where there is no answer.
    """
    parts, headers = urlsplit(url), {"Content-Type": "application/json", "Connection": "close"}
    if key := os.environ.get("VLLM_API_KEY"):
        if not (key.isascii() and key.isprintable()):
            raise ValueError("VLLM_API_KEY holds characters that cannot be sent")  # whose own error would show it
        headers["Authorization"] = f"Bearer {key}"
    connect = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection, is_late = connect(parts.hostname or "", parts.port, timeout=timeout_s), threading.Event()

    def give_up() -> None:  # a server that sends a byte now and then never runs into the timeout of its socket
        is_late.set()
        with suppress(OSError, ValueError, AttributeError):
            connection.sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        method, text = ("GET", None) if body is None else ("POST", json.dumps(body))
        connection.request(method, f"{parts.path.rstrip('/')}{path}", text, headers)
        yield connection.getresponse()
    except (OSError, HTTPException, ValueError) as error:
        if is_late.is_set():
            raise TimeoutError from error
        raise
    finally:
        timer.cancel()
        connection.close()
    if is_late.is_set():
        raise TimeoutError


def ask(url: str, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = ANSWER_S) -> Any:
    """Return the JSON of an answer; UserError in one line, Refused for any status but 200."""
    url = server_url("--server", url)
    try:
        with request(url, path, body, timeout_s) as answer:
            status, text = answer.status, answer.read(MOST_BYTES + 1)
    except (OSError, HTTPException, ValueError) as error:
        late = isinstance(error, TimeoutError)
        why = f"did not answer within {timeout_s:g} s" if late else f"cannot be asked ({one_line(error or type(error).__name__, 160)})"
        raise UserError(f"--server: {url}{path} {why}; start it, or correct the address") from None
    if len(text) > MOST_BYTES:
        raise UserError(
            f"--server: {url}{path} answered with more than {MOST_BYTES:,} bytes; give the address of an OpenAI-compatible server"
        )
    if status != 200:
        said = one_line(ascii(text.decode(errors="replace"))[1:-1] or "nothing", 300)
        raise Refused(f"--server: {url}{path} answered with HTTP status {status}: {said}; see the server's log")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _not_one(url, path) from None


def find_server(url: str) -> Server:
    """Ask a server what it serves and which version of vLLM it is; UserError where it is none that can be asked for log-probabilities."""
    listed = ask(url, "/v1/models")
    try:
        models = {str(entry["id"]): Model(str(entry.get("root") or ""), entry.get("parent")) for entry in listed["data"]}
        owners = {str(entry.get("owned_by")) for entry in listed["data"]}
    except (KeyError, TypeError, AttributeError):
        raise _not_one(url, "/v1/models") from None
    if "sglang" in owners:
        raise UserError(f"--server: {url} is SGLang, which gives a prompt's log-probabilities in a form that is not read here; use vLLM")
    try:
        version = ask(url, "/version")
    except Refused:
        version = None
    return Server(url, str(version["version"]) if isinstance(version, dict) and "version" in version else None, models)


def log_probabilities(server: Server, model: str, tokens: Sequence[int]) -> list[float]:
    """Return the log-probability of every token but the first, each after those in front of it."""
    path = "/v1/completions"
    body = {"model": model, "prompt": list(tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    answer = ask(server.url, path, body, COMPLETION_S)
    try:
        rows = answer["choices"][0]["prompt_logprobs"]
        found = [float(row[str(token)]["logprob"]) for token, row in zip(tokens[1:], rows[1:], strict=True)]
    except (KeyError, IndexError, TypeError, ValueError):
        raise UserError(
            f"--server: {server.url}{path} answered without prompt_logprobs of the tokens that it was given; use vLLM"
        ) from None
    if not all(map(math.isfinite, found)):
        raise UserError(f"--server: {model!r} gives log-probabilities that are not finite; check the adapter and the server's dtype")
    return found


def _not_one(url: str, path: str) -> UserError:
    return UserError(f"--server: {url}{path} answered with something else than an OpenAI-compatible server does; correct the address")
