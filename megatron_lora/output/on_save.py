"""Announces finished adapters to servers and commands (`on_save` of the config) while the run trains.

Each target has a thread and a queue of its own, on the first rank. Nothing that a target does reaches
the run: an attempt ends after `timeout_s`, whatever the server sends; redirects and proxies are not
followed; at the end of a run what is left is awaited END_WAIT_S seconds and given up. What became of
an adapter stands in status.json, so a run that is resumed announces those that were not delivered.

    on_save = OnSave(config.on_save, run);  on_save.put_undelivered(status["jobs"])      # of earlier starts
    on_save.put("summaries");  for job, target, said in on_save.results(): ...
    on_save.wait(stopped=False);  on_save.close()
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path

from megatron_lora.config.on_save_keys import OnSaveConfig
from megatron_lora.errors import one_line
from megatron_lora.output.inference_server import request

DELIVERED = "delivered"
HAS_ADAPTER = ("done", "stopped")  # states of jobs whose PEFT directory is final
END_WAIT_S, END_WAIT_STOPPED_S = 60.0, 5.0  # a run that was stopped announces the rest when it is resumed
CLOSE_S = 1.0  # for what is under way
PAUSE_S = 1.0  # before the second attempt; then twice as long each time
MOST_READ = 2000  # bytes of an answer
NOT_ALLOWED = "; start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"


class OnSave:
    """The targets of a run. Only the training thread calls the methods, none of which waits but `wait`."""

    def __init__(self, targets: Sequence[OnSaveConfig], run: Path):
        """Start a thread for each target; `run` is the output directory."""
        self._jobs_dir = run.absolute() / "jobs"
        self._targets = targets
        self._queues: list[queue.SimpleQueue[str | None]] = [queue.SimpleQueue() for _ in targets]
        self._results: queue.SimpleQueue[tuple[str, str, str]] = queue.SimpleQueue()
        self._open: set[tuple[str, str]] = set()  # (job, target) whose result was not taken yet
        self._closing = threading.Event()
        pairs = zip(targets, self._queues, strict=True)
        self._threads = [threading.Thread(target=self._work, args=pair, name="on-save", daemon=True) for pair in pairs]
        for thread in self._threads:
            thread.start()

    def put(self, job: str, delivered: Mapping[str, str] | None = None) -> None:
        """Announce a job's adapter to every target that has not got it; `delivered`: what status.json says of that."""
        for target, jobs in zip(self._targets, self._queues, strict=True):
            if (delivered or {}).get(target.name) != DELIVERED:
                self._open.add((job, target.name))
                jobs.put(job)

    def put_undelivered(self, jobs: Mapping[str, Mapping]) -> None:
        """Announce what earlier starts of the run have finished and not delivered; `jobs` as in status.json."""
        for name, job in jobs.items():
            if job["state"] in HAS_ADAPTER:
                self.put(name, job.get("on_save"))

    def results(self) -> Iterator[tuple[str, str, str]]:
        """Yield (job, target, what became of it) of what has ended since, and print a line for each."""
        for _ in range(self._results.qsize()):
            job, target, fault = self._results.get()
            self._open.discard((job, target))
            said = f"warning: {job}: on_save did not reach {target}: {fault}" if fault else f"{job}: on_save has reached {target}"
            print(f"megatron-lora: {said}", file=sys.stderr, flush=True)
            yield job, target, fault or DELIVERED

    def wait(self, *, stopped: bool) -> None:
        """Wait for what is left, for a bounded time; the rest then has a result that says so."""
        end = time.monotonic() + (END_WAIT_STOPPED_S if stopped else END_WAIT_S)
        while self._results.qsize() < len(self._open) and time.monotonic() < end:
            time.sleep(0.02)
        self.close()
        ended = [self._results.get() for _ in range(self._results.qsize())]
        left = self._open - {(job, target) for job, target, _ in ended}
        for result in [*ended, *((job, target, "the run ended first") for job, target in sorted(left))]:
            self._results.put(result)

    def close(self) -> None:
        """End what is under way; nothing is announced any more. A command is killed, a request is not awaited."""
        self._closing.set()
        end = time.monotonic() + CLOSE_S
        for thread, jobs in zip(self._threads, self._queues, strict=True):
            jobs.put(None)
            thread.join(max(0.0, end - time.monotonic()))

    def _work(self, target: OnSaveConfig, jobs: queue.SimpleQueue[str | None]) -> None:
        while (job := jobs.get()) is not None and not self._closing.is_set():
            fault = self._deliver(target, job)
            if not self._closing.is_set():
                self._results.put((job, target.name, fault))

    def _deliver(self, target: OnSaveConfig, job: str) -> str:
        """Announce an adapter, in several attempts; return why it failed, or nothing."""
        fault = ""
        for attempt in range(target.attempts):
            if attempt and self._closing.wait(PAUSE_S * 2 ** (attempt - 1)):
                return "the run ended first"
            if target.url is None:
                again, fault = run_command(target, self._jobs_dir / job, self._closing)
            else:
                again, fault = post(target, job, self._jobs_dir / job)
            if not (fault and again):
                break
        return fault


def post(target: OnSaveConfig, job: str, directory: Path) -> tuple[bool, str]:
    """Ask a server to load an adapter; return whether another attempt may help, and why this one failed, or nothing."""
    body = {"lora_name": job, "lora_path": str(directory)} | ({"load_inplace": True} if target.load_inplace else {})
    try:
        with request(target.url or "", "/v1/load_lora_adapter", body, target.timeout_s) as answer:
            if 200 <= answer.status < 300:
                return False, ""
            said = ascii(answer.read1(MOST_READ).decode("utf-8", "replace"))[1:-1]
    except TimeoutError:
        return True, f"no answer within {target.timeout_s:g} s"
    except (OSError, ValueError, HTTPException) as error:  # ValueError: no name of a host
        return True, one_line(ascii(f"{type(error).__name__}: {error}")[1:-1], 300)
    hint = NOT_ALLOWED if answer.status == 404 else ""
    return answer.status >= 500, one_line(f"it answers {answer.status} {said}", 300) + hint


def run_command(target: OnSaveConfig, directory: Path, closing: threading.Event) -> tuple[bool, str]:
    """Run a command with an adapter's directory as its last argument; it is killed after `timeout_s`, with what it has started."""
    try:
        process = subprocess.Popen(
            [*(target.command or ()), str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        return True, f"it cannot be run ({error.strerror})"
    end = time.monotonic() + target.timeout_s
    while (status := process.poll()) is None and time.monotonic() < end and not closing.wait(0.02):
        pass
    if status is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True, f"it had not ended after {target.timeout_s:g} s"
    return True, f"it ended with status {status}" if status else ""
