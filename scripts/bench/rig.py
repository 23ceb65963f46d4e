"""What the benchmarks of kernels share: options, a line per case, and a check against the reference before anything is timed."""

import argparse

import torch
from torch import Tensor

from scripts.bench.stamp import append_line, result_options, stamp
from scripts.one_line import OneLineParser, need_gpus, whole


def parser(doc: str, output: str, rounds: int) -> OneLineParser:
    """Return a parser with the options of all of them."""
    found = OneLineParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--rounds", type=whole, default=rounds)
    result_options(found, output)
    return found


def options(parser: OneLineParser) -> argparse.Namespace:
    """Read the command line; ends with one line where no GPU is visible."""
    found = parser.parse_args()
    need_gpus(parser)
    return found


def pieces(row: dict) -> str:
    """Say the medians of a line in microseconds."""
    return " ".join(f"{name.removeprefix('piece ')} {ms * 1000:.1f}" for name, (ms, *_) in row["times_ms"].items())


def keep(options: argparse.Namespace, line: dict, told: str) -> None:
    """Append one case's line, say it, and make room for the next."""
    append_line(options.output, stamp(options.hardware, options.commit) | line)
    print(told, flush=True)
    torch.cuda.empty_cache()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the distance of two tensors, relative to the second."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def rounded(times_ms: dict) -> dict:
    """Return {name: (median, low, high)} as a line has it."""
    return {name: [round(ms, 5) for ms in values] for name, values in times_ms.items()}
