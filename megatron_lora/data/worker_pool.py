"""A function over many items by several processes, results in the order of the items, few of them in memory.

    for item, result in map_in_order(function, items, num_workers=2): ...

Workers are started anew (spawn), so that threads and CUDA of this process do not matter; the function is pickled to each once. A worker
ends when this process does, however that ends.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

AHEAD = 4  # items per worker that may be finished before an earlier one is
_function: Callable[[Any], Any]  # of a worker


def map_in_order(function: Callable[[Any], Any], items: Iterable[Any], num_workers: int) -> Iterator[tuple[Any, Any]]:
    """Yield (item, function(item)); what the function raises is a RuntimeError with its traceback."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_begin, initargs=(function,))
    waiting: deque[tuple[Any, Future]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(_answer, item)))
            if len(waiting) == AHEAD * num_workers:
                yield _first_of(waiting)
        while waiting:
            yield _first_of(waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def _first_of(waiting: deque[tuple[Any, Future]]) -> tuple[Any, Any]:
    item, future = waiting.popleft()
    try:
        result, failure = future.result()
    except BrokenProcessPool:
        raise RuntimeError("a process that tokenises has ended early, mostly because memory ran out") from None
    if failure:
        raise RuntimeError(f"a process that tokenises has failed:\n{failure}")
    return item, result


def _begin(function: Callable[[Any], Any]) -> None:
    """Let a worker keep the function, leave Ctrl-C to its parent, and end with it."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)


def _answer(item: Any) -> tuple[Any, str]:
    """Return (result, traceback) of an item: whatever the function raises is the parent's to raise."""
    try:
        return _function(item), ""
    except Exception:  # carried as its traceback to the parent, which raises it
        return None, traceback.format_exc()
