"""Reads the data of queued jobs in a process of its own, one job after another, so that neither the start nor a step waits for them.

Tokens go into the cache, from which the ranks map them when the job joins. A job whose data, adapter or
checkpoint cannot be used fails alone, with the line that says why.

    reader = JobReader(partial(read_and_check, config=config, ...))
    reader.ask(job)
    for name, fault in reader.answers(): ...      # None: it can train
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import megatron_lora
from megatron_lora.config.schema import JobConfig
from megatron_lora.data.samples import load_jobs_data
from megatron_lora.data.tokenizer import tokenizer_for
from megatron_lora.errors import UserError, one_line
from megatron_lora.huggingface.architecture import Architecture
from megatron_lora.output.standing import resume_point_of
from megatron_lora.training.first_factors import FirstFactors
from megatron_lora.training.job_checks import check_checkpoint, check_data, check_init_adapter

Check = Callable[[JobConfig], "str | None"]


def read_and_check(
    job: JobConfig, *, output_dir: str, base_model: str, model_dir: Path, architecture: Architecture, budget: int, cache_dir: Path | None
) -> str | None:
    """Read a job's data into the cache, cut its first factors, check what can be wrong with it; return in one line what is, or None.

    `budget`: tokens of a microbatch. `output_dir` may hold a checkpoint of the job.
    """
    try:
        check_init_adapter(job, architecture, base_model)
        data = load_jobs_data([job], tokenizer_for([job], model_dir), cache_dir, architecture.vocab_size)[0]
        check_data(job, data, budget, architecture)
        point = resume_point_of(Path(output_dir) / "jobs" / job.name)
        check_checkpoint(job, data, point)
        if job.has_frozen_half and point.checkpoint is None:  # minutes, which no window should wait for
            FirstFactors(output_dir, base_model, architecture, model_dir).write(job)
    except UserError as error:
        return str(error)
    return None


class JobReader:
    """The reading process. It is started with the first job, and ends when this process does."""

    def __init__(self, check: Check):
        """`check` is pickled to the process."""
        self._check = check
        self._ours: Connection | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.asked: set[str] = set()  # names of jobs that are being read, or wait for it

    def start(self) -> None:
        """Start the process, which imports for some seconds before it reads; the first job that is asked for does it otherwise."""
        if self._ours is None:
            ours, theirs = socket.socketpair()
            root = str(Path(megatron_lora.__file__).parent.parent)
            path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
            # Not one of multiprocessing's, since it has processes that tokenise. It ends with the other end of its connection.
            command = [sys.executable, "-m", "megatron_lora.training.job_reader", str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=os.environ | {"PYTHONPATH": path})
            theirs.close()
            self._ours = Connection(ours.detach())
            self._ours.send(self._check)

    def ask(self, job: JobConfig) -> None:
        """Have a job read."""
        self.start()
        assert self._ours is not None
        self.asked.add(job.name)
        self._ours.send(job)

    def answers(self) -> dict[str, str | None]:
        """Return, for each job that has been read since the last call, what is wrong with it. RuntimeError if the process has ended."""
        found = {}
        while self._ours is not None and self._ours.poll():
            try:
                name, fault = self._ours.recv()
            except (EOFError, ConnectionResetError):
                raise RuntimeError(
                    "the process that reads the data of queued jobs has ended early, mostly because memory ran out"
                ) from None
            self.asked.discard(name)
            found[name] = fault
        return found

    def close(self) -> None:
        """End the process."""
        if self._ours is not None and self._process is not None:
            self._ours.close()
            self._process.terminate()
            self._process.wait()
            self._ours = None


def main() -> None:
    """Answer each job that comes through the connection with its name and what is wrong with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # the rank that started this process has blocked it
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        connection = Connection(int(sys.argv[1]))
        check: Check = connection.recv()
        while True:
            job = connection.recv()
            try:
                fault = check(job)
            except Exception as error:  # whatever it is, it is this job's: the others are read
                fault = f"its data could not be read: {type(error).__name__}: {one_line(str(error), 200)}"
            connection.send((job.name, fault))


if __name__ == "__main__":
    main()
