"""A function over many items by several processes, results in the order of the items, few of them in memory.

    for item, result in map_in_order(function, items, num_workers=2): ...

Workers are started anew (spawn), so that threads and CUDA of this process do not matter; the function is pickled to each once. A worker
ends when this process does, however that ends: its only connection is then closed.
"""

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, cast

AHEAD = 4  # items per worker that may be finished before an earlier one is


def map_in_order(function: Callable[[Any], Any], items: Iterable[Any], num_workers: int) -> Iterator[tuple[Any, Any]]:
    """Yield (item, function(item)); what the function raises is a RuntimeError with its traceback."""
    context = multiprocessing.get_context("spawn")
    idle: list[Connection] = []
    processes = []
    for _ in range(num_workers):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(theirs,), daemon=True))
        processes[-1].start()
        theirs.close()
        ours.send(function)
        idle.append(cast(Connection, ours))
    connections = list(idle)
    try:
        yield from _deal(iter(items), idle, AHEAD * num_workers)
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join()


def _deal(items: Iterator[Any], idle: list[Connection], most: int) -> Iterator[tuple[Any, Any]]:
    """Give each idle worker the next item, and yield what comes back in order."""
    busy: dict[Connection, int] = {}
    open_items: dict[int, Any] = {}
    results: dict[int, Any] = {}
    given = taken = 0
    ended = False
    while True:
        while idle and not ended and given - taken < most:
            item = next(items, _END)
            ended = item is _END
            if not ended:
                worker = idle.pop()
                worker.send(item)
                busy[worker], open_items[given] = given, item
                given += 1
        while taken in results:
            yield open_items.pop(taken), results.pop(taken)
            taken += 1
        if not busy:
            if ended:
                return
            continue
        for worker in wait(list(busy)):
            assert isinstance(worker, Connection)
            try:
                result, failure = worker.recv()
            except EOFError:
                raise RuntimeError("a process that tokenises has ended early, mostly because memory ran out") from None
            if failure:
                raise RuntimeError(f"a process that tokenises has failed:\n{failure}")
            results[busy.pop(worker)] = result
            idle.append(worker)


_END = object()


def _serve(connection: Connection) -> None:
    """Receive a function, then items; answer each with (result, traceback)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, whose end closes the connection
    try:
        function = connection.recv()
        while True:
            item = connection.recv()
            try:
                answer = (function(item), "")
            except Exception:  # whatever it is, it is the parent's to raise, with this traceback
                answer = (None, traceback.format_exc())
            connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
