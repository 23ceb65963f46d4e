"""Times candidates on a GPU: under CUDA graphs, each once per round, in an order drawn anew.

The chip's clock moves from one second to the next and what runs hot slows down what comes after it, so candidates are compared within
rounds and none always comes after the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import torch


def time_rounds(candidates: Mapping[str, Callable[[], object]], rounds: int, repeats: int = 4) -> dict[str, list[float]]:
    """Return {name: milliseconds in each round}; two rounds before are not counted."""
    graphs = {name: _captured(function) for name, function in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    order, generator = list(graphs.items()), random.Random(0)
    for i in range(rounds + 2):
        generator.shuffle(order)
        for name, graph in order:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(repeats):
                graph.replay()
            end.record()
            end.synchronize()
            if i >= 2:
                times[name].append(begin.elapsed_time(end) / repeats)
    return times


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return median, 10th and 90th percentile."""
    ordered = sorted(values)
    return tuple(ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.1, 0.9))  # type: ignore[return-value]


def measure(candidates: Mapping[str, Callable[[], object]], rounds: int, repeats: int = 4) -> dict[str, tuple[float, float, float]]:
    """Return {name: median, 10th and 90th percentile} in milliseconds."""
    return {name: spread(each) for name, each in time_rounds(candidates, rounds, repeats).items()}


def _captured(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph
