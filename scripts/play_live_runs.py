"""Plays random scripts of add, pause, resume, cancel and set on live runs of a tiny model, and compares each job with its solo run.

    python scripts/play_live_runs.py --num 50 --layouts pp2 --ends none stop kill [--seed 100] [--output live_runs.jsonl]

Six jobs, of which two to four are resident at a time, and up to two that are added (tests/live_scripts.py). Losses must agree within
1e-5 and adapters within 1e-4 of the solo run's, and the first start, repeated from its events alone, must give the same bits. The first
two starts end as --ends says: by themselves, or stopped, or one of their ranks is killed: at random slots, or in front of random changes
of files. Appends a JSON line with what was played for each layout and end; ends with 1 at the first difference, which it prints.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "tests")]

import live_scripts  # noqa: E402
import rank_pool  # noqa: E402

from megatron_lora.config.schema import ParallelConfig  # noqa: E402
from scripts.bench.stamp import RESULTS, append_line, stamp  # noqa: E402
from scripts.one_line import OneLineParser, ended, output_file, whole  # noqa: E402

LAYOUTS = {"pp2": {"pp": 2}, "tp2": {"tp": 2}, "dp2": {"dp": 2}, "one": {}}


def main() -> int:
    """Play scripts one after another."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=whole, default=10)
    parser.add_argument("--seed", type=whole, default=100, help="of the first script; the others follow")
    parser.add_argument("--layouts", choices=LAYOUTS, nargs="+", default=["pp2"])
    parser.add_argument("--ends", choices=live_scripts.ENDS, nargs="+", default=["none"], help="how the first two starts of each run end")
    parser.add_argument("--output", type=output_file, default=RESULTS / "live_runs.jsonl")
    options = parser.parse_args()
    ranks = rank_pool.RankPool()

    def pool(pp: int = 1, tp: int = 1, dp: int = 1):
        layout = ParallelConfig(pipeline=pp, tensor=tp, data=dp)
        return SimpleNamespace(run=lambda function, *words: ranks.run(layout, function, *words))

    with contextlib.closing(ranks), tempfile.TemporaryDirectory() as root:
        scene = live_scripts.make_scene(Path(root))
        for end, layout in itertools.product(options.ends, options.layouts):
            begun, counts = time.monotonic(), Counter()
            for seed in range(options.seed, options.seed + options.num):
                folder = Path(root) / f"script-{layout}-{end}-{seed}"
                folder.mkdir()
                outcome = live_scripts.play(pool, scene, seed, LAYOUTS[layout], folder, end)
                counts += outcome.counts + live_scripts.check(pool, scene, outcome)
                live_scripts.repeat(pool, outcome, folder)
                shutil.rmtree(folder)
                print(f"script {seed}, {layout}, {end}: {dict(counts)}, {time.monotonic() - begun:.0f} s", flush=True)
            line = {"case": f"{layout}, {end}", "seed": options.seed, "num": options.num, "results": dict(counts)}
            append_line(options.output, stamp() | line)
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
