"""Compares the losses of several runs of end_to_end.py (--losses FILE), over the steps that all of them took, with those of the first.

python scripts/bench/compare_losses.py losses.jsonl [more.jsonl ...]
"""

import statistics
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from one_line import OneLineParser, ended, json_lines  # noqa: E402

from megatron_lora.errors import UserError  # noqa: E402


def read(files: list[Path]) -> list[tuple[str, dict[tuple[int, int], float]]]:
    """Return (name, {(job, step): loss}) of every run."""
    lines = [line for file in files for line in json_lines(file)]
    if len(lines) < 2 or any({"case", "losses"} - line.keys() for line in lines):
        raise UserError(f"{', '.join(map(str, files))}: hold no losses of two runs; write them with end_to_end.py --losses")
    return [(line["case"], {(job, step): loss for job, step, loss in line["losses"]}) for line in lines]


def differences(ours: dict[tuple[int, int], float], theirs: dict[tuple[int, int], float]) -> list[float]:
    """Return the absolute differences over the common steps."""
    return [abs(ours[key] - theirs[key]) for key in sorted(ours.keys() & theirs.keys())]


def main() -> None:
    """Print a line per run."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    (name, first), *others = read(parser.parse_args().files)
    print(f"beside {name}:")
    for other, losses in others:
        found = differences(first, losses)
        print(f"  {other}: {len(found)} steps, largest difference {max(found):.2e}, mean {statistics.fmean(found):.2e}")


if __name__ == "__main__":
    sys.exit(ended(main))
