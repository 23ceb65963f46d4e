"""Plays random scripts of add, pause, resume, cancel and set on live runs of a tiny model, and compares each job with its solo run.

    python scripts/play_live_runs.py --num 50 --layouts pp2 --ends none stop kill [--seed 100] [--output live_runs.jsonl]
    python scripts/play_live_runs.py --num 40 --layouts pp2 tp2 dp2 --ends mixed --num-ends 12          # about a thousand kills and stops

Six jobs, of which two to four are resident at a time, and up to two that are added (tests/live_scripts.py). Losses must agree within
1e-5 and adapters within 1e-4 of the solo run's, and the first start, repeated from its events alone, must give the same bits. The first
--num-ends starts end as --ends says: by themselves, or stopped, or one of their ranks is killed: at random slots or times, or in front of
random changes of files. After each, nothing may be left that no document names: files, locks, processes (tests/leftovers.py). Appends a
JSON line with what was played for each layout and end, when it is stopped (SIGTERM) too; ends with 1 at the first difference, which it
prints.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import signal
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
    parser.add_argument("--ends", choices=live_scripts.ENDS, nargs="+", default=["none"], help="how the first starts of each run end")
    parser.add_argument("--num-ends", type=whole, default=live_scripts.NUM_ENDS, help="starts of each run that end so")
    parser.add_argument("--output", type=output_file, default=RESULTS / "live_runs.jsonl")
    options = parser.parse_args()
    ranks, seeds = rank_pool.RankPool(), range(options.seed, options.seed + options.num)

    def pool(pp: int = 1, tp: int = 1, dp: int = 1):
        layout = ParallelConfig(pipeline=pp, tensor=tp, data=dp)
        return SimpleNamespace(run=lambda function, *words: ranks.run(layout, function, *words))

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begun, results = time.monotonic(), {}
    with contextlib.closing(ranks), tempfile.TemporaryDirectory() as root:
        scene = live_scripts.make_scene(Path(root))
        try:
            for seed, end, layout in itertools.product(seeds, options.ends, options.layouts):
                folder = Path(root) / f"script-{layout}-{end}-{seed}"
                folder.mkdir()
                outcome = live_scripts.play(pool, scene, seed, LAYOUTS[layout], folder, end, options.num_ends)
                ended_as = live_scripts.check(pool, scene, outcome)
                live_scripts.repeat(pool, outcome, folder)
                shutil.rmtree(folder)
                counts = results.setdefault(f"{layout}, {end}", Counter())
                counts += outcome.counts + ended_as + Counter(scripts=1)
                print(f"script {seed}, {layout}, {end}: {dict(counts)}, {time.monotonic() - begun:.0f} s", flush=True)
        finally:
            for case, counts in results.items():
                append_line(options.output, stamp() | {"case": case, "seed": options.seed, "results": dict(counts)})
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
