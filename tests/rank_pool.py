"""A pool of ranks that tests share, so that a multi-rank test costs milliseconds and not a process start.

`RankPool.run(layout, fn, *args)` calls `fn(*args)` on every rank of the layout and returns the results in rank order. The worker
processes are started once, each forked from one server that has imported torch and megatron-core, and are kept over the session; a
change of layout only leaves the old process groups and joins new ones. `fn` is a module-level function of a test file (or of the
package); arguments and results are pickled. When a rank raises, its traceback is raised here and all workers are replaced. The backend is
gloo, or NCCL for a pool of `gpus`.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle
import sys
import threading
import time
import traceback
from multiprocessing.connection import wait
from unittest import mock

import torch

from megatron_lora.config.schema import ParallelConfig

PRELOAD = [
    "torch",
    "megatron.core.models.gpt",
    "megatron_lora.training.train",
    "transformers.models.llama.configuration_llama",
    "rank_pool",
]
CACHE = "MEGATRON_LORA_CACHE"
ENDED = "the process ended"


class RankError(AssertionError):
    """A function failed on a rank; the message holds that rank's traceback."""


class RankPool:
    """Worker processes and the layout that they are in now."""

    def __init__(self, *, gpus: bool = False):
        """Workers see the machine's GPUs only where asked: with them megatron-core's set-up for CPUs would not hold."""
        self.gpus = gpus
        # Importing megatron-core where there is a GPU begins CUDA, which a forked process cannot use.
        self.context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        self.workers = []
        self.layout = None
        self.store = None  # where ranks meet, for every process group that they make
        self.num_layouts = 0

    def _store_port(self) -> int:
        """Return the port of the store in this process, which outlives every layout."""
        import torch.distributed as dist

        if self.store is None:
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return self.store.port

    def run(self, layout: ParallelConfig, fn, *args, timeout_s: float = 400.0) -> list:
        """Call `fn(*args)` on each rank of `layout`; return the results in rank order. Raises RankError."""
        num_ranks = layout.world_size
        if layout != self.layout:
            if self.layout is not None:
                self._call(_leave, (), timeout_s)
            while len(self.workers) < num_ranks:
                self.workers.append(self._start())
            self.layout = layout
            self.num_layouts += 1
            self._call(_join, (layout, "nccl" if self.gpus else "gloo", self._store_port(), f"layout {self.num_layouts}"), timeout_s)
        return self._call(fn, args, timeout_s)

    def rest(self) -> None:
        """Leave the process groups: each of gloo's has a thread that looks for work a hundred times a second, a hundred in a worker."""
        if self.layout is not None:
            self._call(_leave, (), 400.0)
            self.layout = None

    def close(self) -> None:
        """End all workers."""
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
            process.join()
        self.workers, self.layout = [], None

    def _start(self):
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_work, args=(theirs,), daemon=True)
        with mock.patch.dict(os.environ, {} if self.gpus else {"CUDA_VISIBLE_DEVICES": ""}):
            process.start()
        theirs.close()
        return process, ours

    def _call(self, fn, args, timeout_s: float) -> list:
        layout = self.layout
        pipes = [pipe for _, pipe in self.workers[: layout.world_size]]
        module = sys.modules[fn.__module__]
        for rank, pipe in enumerate(pipes):
            pipe.send((rank, os.environ.get(CACHE), module.__name__, module.__file__, pickle.dumps((fn, args))))
        answers, deadline = {}, time.monotonic() + timeout_s
        while len(answers) < len(pipes):
            ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in answers], max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                answers[pipes.index(pipe)] = _receive(pipe)
            if errors := {error for _, error in answers.values() if error}:
                # The others may hang in a collective, or tell the same story.
                deadline = min(deadline, time.monotonic() + (0.1 if errors == {ENDED} else 2.0))
            if not ready:
                break
        errors = [f"rank {rank}:\n{error}" for rank, (_, error) in sorted(answers.items()) if error]
        if errors or len(answers) < len(pipes):
            self.close()
            missing = [rank for rank in range(len(pipes)) if rank not in answers]
            raise RankError("\n".join(errors) or f"ranks {missing} did not answer within {timeout_s:g} s")
        return [pickle.loads(answers[rank][0]) for rank in range(len(pipes))]


def _receive(pipe):
    try:
        return pipe.recv()
    except (EOFError, ConnectionError):
        return None, ENDED


def _join(layout, backend: str, port: int, name: str) -> None:
    import torch.distributed as dist

    from megatron_lora.parallel.process_groups import initialize_parallel

    rank = int(os.environ["RANK_POOL_RANK"])
    os.environ["LOCAL_RANK"] = str(rank)
    store = dist.PrefixStore(name, dist.TCPStore("127.0.0.1", port, is_master=False))
    dist.init_process_group(backend, store=store, rank=rank, world_size=layout.world_size)
    initialize_parallel(layout, backend)


def _leave() -> None:
    from megatron_lora.parallel.process_groups import destroy_parallel

    destroy_parallel()


def _work(pipe) -> None:
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    while True:
        try:
            rank, cache, module_name, path, payload = pipe.recv()
        except EOFError:
            return
        os.environ["RANK_POOL_RANK"] = str(rank)
        os.environ.pop(CACHE, None)
        os.environ |= {} if cache is None else {CACHE: cache}  # this process is older than the test
        try:
            _load(module_name, path)
            fn, args = pickle.loads(payload)
            answer = pickle.dumps(fn(*args)), None
        except BaseException:
            answer = None, traceback.format_exc()
        pipe.send(answer)


def _end_with_the_tests() -> None:
    """End this worker when the process that runs the tests is gone, even if a collective holds it."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _load(module_name: str, path: str) -> None:
    """Import a test file under the name that pytest gave it, so that what refers to it by name can be unpickled."""
    if module_name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(module_name, path)
    sys.modules[module_name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
