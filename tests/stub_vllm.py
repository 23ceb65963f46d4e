"""A server on this machine that answers as vLLM does, with the log-probabilities that a function gives.

with serving(models, answer) as url: ...       # models: name -> (directory, base or None); answer(name, tokens) -> log-probabilities
with hostile(write) as url: ...                # write(handler) answers every request as it likes
"""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def hostile(write):
    """Serve what `write`, given the handler of a request, writes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(OSError):  # the other side may have left
                write(self)

        do_POST = do_GET

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def serving(models, answer, version="0.32.0", owner="vllm"):
    """Serve models, log-probabilities by `answer`."""

    def write(handler):
        if handler.path == "/v1/models":
            entries = [{"id": name, "owned_by": owner, "root": root, "parent": base} for name, (root, base) in models.items()]
            return send(handler, {"object": "list", "data": entries})
        if handler.path == "/version" and version is not None:
            return send(handler, {"version": version})
        if handler.path != "/v1/completions":
            return send(handler, {"detail": "Not Found"}, 404)
        asked = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        tokens = asked["prompt"]
        rows = [{str(token): {"logprob": value}} for token, value in zip(tokens[1:], answer(asked["model"], tokens), strict=True)]
        return send(handler, {"choices": [{"text": "", "prompt_logprobs": [None, *rows] if asked["prompt_logprobs"] == 0 else None}]})

    with hostile(write) as url:
        yield url


def send(handler, value, status=200):
    """Answer with JSON."""
    handler.send_response(status)
    handler.end_headers()
    handler.wfile.write(json.dumps(value).encode())
