"""Plays random scripts of add, pause, resume, cancel and set on live runs of a tiny model, and compares each job with its solo run.

    python scripts/play_live_runs.py --num 50 --layout pp2 [--stop | --kill] [--seed 100] [--output live_runs.jsonl]

Six jobs, of which two to four are resident at a time, and up to two that are added (tests/live_scripts.py). Losses must agree within
1e-5 and adapters within 1e-4 of the solo run's; without --stop and --kill, a run that ended in one start is repeated from its
events.jsonl and must give the same bits. With --stop it is stopped twice at random slots, with --kill its processes are killed twice.
Appends a JSON line with what was played; ends with 1 at the first difference, which it prints.
"""

from __future__ import annotations

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
    parser.add_argument("--layout", choices=LAYOUTS, default="pp2")
    parser.add_argument("--stop", action="store_true", help="stop each run twice")
    parser.add_argument("--kill", action="store_true", help="kill each run's processes twice")
    parser.add_argument("--output", type=output_file, default=RESULTS / "live_runs.jsonl")
    options = parser.parse_args()
    ranks, begun, counts = rank_pool.RankPool(), time.monotonic(), Counter()

    def pool(pp: int = 1, tp: int = 1, dp: int = 1):
        layout = ParallelConfig(pipeline=pp, tensor=tp, data=dp)
        return SimpleNamespace(run=lambda function, *words: ranks.run(layout, function, *words))

    with tempfile.TemporaryDirectory() as root:
        scene = live_scripts.make_scene(Path(root))
        for seed in range(options.seed, options.seed + options.num):
            folder = Path(root) / f"script-{seed}"
            folder.mkdir()
            parallel = LAYOUTS[options.layout]
            if options.kill:
                outcome = live_scripts.play_and_kill(scene, seed, parallel, folder)
            else:
                outcome = live_scripts.play(pool, scene, seed, parallel, folder, stop=options.stop)
            counts += live_scripts.check(pool, scene, outcome)
            counts["starts"] += outcome.num_starts
            counts["requests"] += sum(map(len, outcome.script.values()))
            if outcome.num_starts == 1 and not options.kill:
                live_scripts.repeat(pool, scene, outcome, folder)
                counts["repeated"] += 1
            print(f"script {seed}: {dict(counts)}, {time.monotonic() - begun:.0f} s", flush=True)
    ranks.close()
    how = "kill" if options.kill else "stop" if options.stop else "requests"
    line = {"case": f"{options.num} scripts, {options.layout}, {how}", "seed": options.seed, "num": options.num, "results": dict(counts)}
    append_line(options.output, stamp() | line)
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
