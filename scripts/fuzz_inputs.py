"""Spoils small valid inputs at random and reads them as a run does: each is read, or refused in one line.

A case makes an input of its kind, changes one to three things, and reads it. Its outcome is "read",
"refused" (a UserError of one line), or "failed": any other exception, a line that is too long, or
more than `TIMEOUT_S`. One JSON line tells each case: kind, seed, case, mutations, outcome, message.
The same kind, seed and case give the same input again. Status 1 if any case failed. The kinds are
modules of fuzz_kinds/.

    python scripts/fuzz_inputs.py --kind base_model adapter --num 1000 --seed 0 --output fuzz.jsonl
    python scripts/fuzz_inputs.py --kind base_model --num 1 --first 137 --keep spoilt        # one case again, its input kept
    python scripts/fuzz_inputs.py --kind base_model --num 300 --agree      # what was read is what transformers makes of it
"""

import contextlib
import importlib
import json
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

from one_line import OneLineParser, ended, whole  # noqa: E402

from megatron_lora.errors import UserError  # noqa: E402

KINDS = ("base_model", "adapter", "hostile")
TIMEOUT_S = 30
LONGEST_LINE = 1000  # characters


def run_case(kind: str, seed: int, case: int, directory: Path, agree: bool = False) -> dict:
    """Make, spoil and read one input in an empty directory; return its report."""
    module = importlib.import_module(f"fuzz_kinds.{kind}")
    random = Random(f"{kind} {seed} {case}")
    module.make(directory, random)
    mutations = [random.choice(module.MUTATIONS)(random, directory) for _ in range(random.choice([1, 1, 1, 2, 3]))]
    outcome, message = "read", ""
    try:
        with _limited():
            module.read(directory)
            if agree and hasattr(module, "agree"):
                message = module.agree(directory)
    except UserError as error:
        line = str(error)
        outcome, message = "refused", line
        if len(line) > LONGEST_LINE or len(line.splitlines()) != 1:
            outcome = "failed"
    except Exception as error:  # any but a UserError is what this script looks for
        outcome, message = "failed", "".join(traceback.format_exception(error))
    return {"kind": kind, "seed": seed, "case": case, "mutations": mutations, "outcome": outcome, "message": message}


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Raise TimeoutError in what runs longer than the limit."""

    def stop(signum, frame):
        raise TimeoutError(f"not read in {TIMEOUT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(TIMEOUT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> int:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--num", type=whole, default=100, help="cases of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file for the JSON lines; default: those of failed cases, printed")
    parser.add_argument("--keep", type=Path, help="directory for the spoilt inputs")
    parser.add_argument("--agree", action="store_true", help="compare what was read with transformers")
    options = parser.parse_args()
    if options.agree:
        from megatron_lora.config.schema import ParallelConfig
        from megatron_lora.parallel.process_groups import initialize_parallel

        initialize_parallel(ParallelConfig(), "gloo")
    outcomes: Counter = Counter()
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(options.output.open("w", encoding="utf-8")) if options.output else None
        for kind in options.kind:
            for case in range(options.first, options.first + options.num):
                directory = Path(tempfile.mkdtemp(prefix="fuzz-"))
                report = run_case(kind, options.seed, case, directory, options.agree)
                outcomes[kind, report["outcome"]] += 1
                if out:
                    print(json.dumps(report), file=out)
                elif report["outcome"] == "failed":
                    print(json.dumps(report), flush=True)
                if options.keep:
                    shutil.copytree(directory, options.keep / f"{kind}-{case}", symlinks=True)
                shutil.rmtree(directory)
    print(", ".join(f"{kind} {outcome}: {number}" for (kind, outcome), number in sorted(outcomes.items())))
    return int(any(outcome == "failed" for _, outcome in outcomes))


if __name__ == "__main__":
    sys.exit(ended(main))
