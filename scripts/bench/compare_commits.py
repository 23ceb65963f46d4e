"""Two checkouts of this repository on one machine, in alternating rounds: tokens per second of whole runs, ratios of kernels.

    python -m scripts.bench.compare_commits OLD NEW [--what runs] [--rounds 5] [--limit-s 500]

Each round runs both, now the one and now the other first, each in a process of its own: runs of the 8B shape on het-s4, with ranks
8/16/32/64, dropout on two, and with r = 16, over the same samples; and three shapes of linears over their frozen floor. A process's first
run also loads kernels, so one run goes ahead that is not counted. A difference is within bounds where the medians differ by no more than
1%, or than either's own spread (largest - smallest round) / median. No round begins that would end past --limit-s. Appends a line to
scripts/bench/results/commits.jsonl; ends with 1 where something is out of bounds.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_lora.errors import UserError
from scripts.bench.stamp import RESULTS, append_line, stamp
from scripts.one_line import OneLineParser, ended, json_lines, numbers, output_file, positive, whole

MIXED, EQUAL = "ranks=8,16,32,64 dropouts=0,0,0.05,0.05", "ranks=16"
CASES = (MIXED, MIXED, EQUAL)  # the first is not counted
SHAPES = ("4096->4096", "4096->28672", "8192->8192")
WITHIN = 0.01
WHAT = ("runs", "kernels")


def command(checkout: Path, what: str, steps: int, words: list[str], output: Path) -> list[str]:
    """Return the words that measure a checkout; before scripts/bench was a package its scripts were files."""
    script = {"runs": "end_to_end", "kernels": "kernels"}[what]
    package = (checkout / "scripts" / "bench" / "__init__.py").exists()
    start = [sys.executable, *(["-m", f"scripts.bench.{script}"] if package else [f"scripts/bench/{script}.py"])]
    if what == "kernels":
        return [*start, "--shapes", *SHAPES, "--rounds", "10", "--output", str(output), "--mixes"]
    return [*start, "--steps", str(steps), *words, "--output", str(output), *(word for case in CASES for word in ("--case", case))]


def measure(checkout: Path, what: str, steps: int, words: list[str]) -> dict[str, float]:
    """Return what one round of a checkout measures, {name: number}; UserError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "lines.jsonl"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))}
        asked = command(checkout, what, steps, words, output)
        done = subprocess.run(asked, cwd=checkout, env=environment, capture_output=True, text=True)
        lines = json_lines(output) if output.exists() else []
        if done.returncode or not lines:
            raise UserError(f"{checkout}: {what} ended with status {done.returncode}: {(done.stderr.strip().splitlines() or ['-'])[-1]}")
        if what == "kernels":
            return {f"kernel {line['case']}": line["ratio"] for line in lines}
        return {name: line["results"]["tokens_per_s"] for name, line in zip(("8B mixed", "8B r 16"), lines[1:], strict=True)}


def compared(rounds: list[tuple[dict, dict]]) -> dict[str, dict]:
    """Return, for everything measured, both medians and spreads, the difference, and whether it is within bounds."""
    found = {}
    for name in rounds[0][0]:
        values = [[each[side][name] for each in rounds] for side in (0, 1)]
        old, new = map(statistics.median, values)
        spreads = [(max(each) - min(each)) / statistics.median(each) for each in values]
        bound, difference = max(WITHIN, *spreads), new / old - 1
        found[name] = {"old": old, "new": new, "spreads": spreads, "difference": difference, "within": abs(difference) <= bound}
        found[name]["rounds"] = values
    return found


def main() -> int:
    """Alternate rounds, and say what differs."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs=2, type=Path, metavar="CHECKOUT", help="the old one, the new one")
    parser.add_argument("--what", type=numbers(str), default=WHAT, help="of runs,kernels")
    parser.add_argument("--rounds", type=whole, default=5)
    parser.add_argument("--steps", type=whole, default=2, help="of each job of a run; two are about 8 s on an H200")
    parser.add_argument("--limit-s", type=positive, default=500.0)
    parser.add_argument("--words", default="", help="further options of both checkouts' end_to_end.py, as one word")
    parser.add_argument("--output", type=output_file, default=RESULTS / "commits.jsonl")
    options = parser.parse_args()
    checkouts = [each.resolve() for each in options.checkouts]
    if missing := [each for each in checkouts if not (each / "scripts" / "bench" / "end_to_end.py").exists()]:
        parser.error(f"{missing[0]} is no checkout of this repository")
    if unknown := set(options.what) - set(WHAT):
        parser.error(f"--what: {unknown.pop()!r} is none of {', '.join(WHAT)}")
    start, rounds, longest = time.monotonic(), [], 0.0
    while len(rounds) < options.rounds and time.monotonic() - start + longest < options.limit_s:
        begun, sides = time.monotonic(), ({}, {})
        for side in (0, 1) if len(rounds) % 2 == 0 else (1, 0):
            for what in options.what:
                sides[side].update(measure(checkouts[side], what, options.steps, options.words.split()))
        rounds.append(sides)
        longest = time.monotonic() - begun if len(rounds) != 1 else 0.7 * (time.monotonic() - begun)  # the first compiles
        told = "; ".join(f"{name} {sides[0][name]:,.4g} | {sides[1][name]:,.4g}" for name in sides[0])
        print(f"round {len(rounds)}, {time.monotonic() - begun:.0f} s: {told}", flush=True)
    found = compared(rounds)
    for name, each in found.items():
        spreads, verdict = ", ".join(f"{spread:.2%}" for spread in each["spreads"]), "within" if each["within"] else "OUT OF BOUNDS"
        print(f"{name}: {each['old']:,.5g} -> {each['new']:,.5g}, {each['difference']:+.2%}, spreads {spreads}: {verdict}")
    mark = stamp() | {"case": ", ".join(options.what), "checkouts": list(map(str, checkouts))}
    append_line(options.output, mark | {"rounds": len(rounds), "steps": options.steps, "compared": found})
    return 0 if all(each["within"] for each in found.values()) else 1


if __name__ == "__main__":
    sys.exit(ended(main))
