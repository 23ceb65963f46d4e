"""A real `megatron-lora train` of thousands of steps, to be ended half-way: a rank is killed, stopped, or made to fail.

run = LivingRun(folder, config, environment)        # started, in a process group of its own
run.train()                                         # returns when it has taken some steps
os.kill(run.rank(0), signal.SIGKILL)
status, error = run.end(20)                         # returns when none of its processes runs
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAIL_IN_BACKWARD = """
import os
if os.environ.get("RANK") == os.environ.get("FAIL_RANK", "1"):
    from megatron_lora.training import executor

    def fails(self, slot, before=executor.Executor._backward):
        once = os.environ.get("FAIL_ONCE")
        if slot == 7 and once is None:
            raise RuntimeError("matrix is torn")
        if slot == 7 and not os.path.exists(once):
            import torch

            open(once, "w").close()
            if self.device.type == "cuda":
                torch.empty(1 << 48, dtype=torch.uint8, device=self.device)
            raise torch.OutOfMemoryError("CUDA out of memory")
        before(self, slot)

    executor.Executor._backward = fails
"""
KILLED = "megatron-lora: rank {} was ended by SIGKILL, which mostly means that the machine ran out of memory\n"
FAILED = "megatron-lora: rank 1: RuntimeError: matrix is torn\n"
HUNG = "megatron-lora: rank {} hung: rank "


class LivingRun:
    """A run in `folder`, which holds its config, output directory and standard error."""

    def __init__(self, folder: Path, config: dict, environment: dict[str, str], *words: str, failing: bool = False, terminal: bool = False):
        """Start it, with more words of its command line; with `failing` rank FAIL_RANK, or 1, raises in the backward of slot 7.

        With FAIL_ONCE in the environment it runs out of memory there, really so on a GPU, unless that file exists.
        With `terminal` it writes to one, until `close_terminal`.
        """
        self.folder = folder
        self.output = folder / "run"
        self.first_job = config["jobs"][0]["name"]
        (folder / "config.yaml").write_text(json.dumps(config | {"output_dir": str(self.output)}))
        if failing:
            (folder / "sitecustomize.py").write_text(FAIL_IN_BACKWARD)
        self.mark = f"MARK={folder}"
        paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        here = {"PYTHONPATH": os.pathsep.join(paths), "MEGATRON_LORA_CACHE": str(folder / "cache"), "MARK": str(folder)}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        command = [sys.executable, "-m", "megatron_lora", "train", str(folder / "config.yaml"), *words]
        self.errors = open(folder / "err", "w")  # noqa: SIM115
        self.terminal, output = os.openpty() if terminal else (None, None)
        self.process = subprocess.Popen(
            command,
            env=inherited | environment | here,
            stdout=subprocess.DEVNULL if output is None else output,
            stderr=self.errors,
            start_new_session=True,
        )
        self.closing = threading.Event()
        self.reader = threading.Thread(target=self._read_terminal, daemon=True)
        if output is not None:
            os.close(output)
            self.reader.start()

    def _read_terminal(self) -> None:
        """Read what is written to the terminal, which would block its writers otherwise."""
        while not self.closing.is_set():
            if select.select([self.terminal], [], [], 0.1)[0]:
                os.read(self.terminal, 65536)

    def close_terminal(self) -> None:
        """Close the terminal that it writes to; who writes there from then on gets EIO."""
        assert self.terminal is not None
        self.closing.set()
        self.reader.join()
        os.close(self.terminal)

    def processes(self) -> dict[int, dict[str, str]]:
        """Return the processes of this run that are alive: process id -> environment, and under "" the command line."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "environ").read_text().split("\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if self.mark in words and state != "Z":
                found[int(entry.name)] = dict(word.partition("=")[::2] for word in words) | {"": (entry / "cmdline").read_text()}
        return found

    def rank(self, number: int) -> int:
        """Return a rank's process id."""
        processes = self.processes().items()
        found = next((pid for pid, env in processes if env.get("RANK") == str(number) and "serve" not in env[""]), None)
        assert found is not None, f"rank {number} has ended already"
        return found

    def train(self, seconds: float = 300, num_steps: int = 3) -> None:
        """Wait until its first job has logged `num_steps` steps."""
        metrics = self.output / "jobs" / self.first_job / "metrics.jsonl"
        end = time.monotonic() + seconds
        while not metrics.exists() or metrics.read_text().count("\n") < num_steps:
            assert self.process.poll() is None and time.monotonic() < end, self.error()
            time.sleep(0.05)

    def end(self, seconds: float) -> tuple[int, str]:
        """Wait for all of its processes to end; return exit status and standard error."""
        status = self.process.wait(timeout=seconds)
        end = time.monotonic() + 5
        while self.processes():
            assert time.monotonic() < end, self.processes()
            time.sleep(0.05)
        return status, self.error()

    def error(self) -> str:
        """Return its standard error so far."""
        return (self.folder / "err").read_text()

    def close(self) -> None:
        """Kill the processes that are still alive."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):  # it may have ended since
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.errors.close()
