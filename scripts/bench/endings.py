"""Ends real runs of `megatron-lora train` on all GPUs half-way, and checks that each says why in one line and leaves nothing behind.

    python scripts/bench/endings.py [--gpus 2] [--only 32b] [--ways killed,failing,still]

Every layout that several_runs.py measures with our policy, random weights of the same shape. A rank is killed once steps are taken, raises
in a backward, or is stopped: then another loses patience after PATIENCE_S, and torchrun gives the stopped one 30 s. A line each in
results/endings.jsonl, with all of the run's standard error; ends with 1 where a run ended otherwise than it should.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

import oracle  # noqa: E402
from living_run import FAILED, HUNG, KILLED, LivingRun  # noqa: E402
from model_shapes import write_config  # noqa: E402
from one_line import OneLineParser, numbers, output_file, whole  # noqa: E402
from several_runs import Run, chosen, machine  # noqa: E402
from stamp import RESULTS, append_line, stamp  # noqa: E402

PATIENCE_S = 60
LIMITS_S = {"killed": 60.0, "failing": 900.0, "still": PATIENCE_S + 60.0}  # a failing run's is from its start, the others' from the blow
VICTIM = 1
TOKENS_PER_WORD = 5  # at most: a space and "w119"
LINES = {"killed": KILLED.format(VICTIM), "failing": FAILED, "still": HUNG.format(VICTIM)}


def parser() -> OneLineParser:
    """Return the options."""
    found = OneLineParser(prog="endings.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    found.add_argument("--gpus", type=whole, help="end the runs of a machine of so many; default: the GPUs that are visible")
    found.add_argument("--only", type=chosen, default="", help="runs whose names begin so: 32b,8b-tp2")
    found.add_argument("--ways", type=numbers(str), default=tuple(LIMITS_S))
    found.add_argument("--longest", type=whole, default=500, help="words of a sample, at most")
    found.add_argument("--output", type=output_file, default=RESULTS / "endings.jsonl")
    found.add_argument("--hardware")
    found.add_argument("--commit")
    return found


def write_tokenizer(directory: Path) -> None:
    """Save a tokenizer of bytes, the one kind that a tokenizer class of any shape's architecture takes for its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(directory)


def config_of(run: Run, folder: Path, longest: int) -> dict:
    """Write a model without weights and its rows; return the config of two jobs that train it for a long time."""
    tokens = TOKENS_PER_WORD * longest
    write_tokenizer(folder / "model")
    write_config(run.shape, folder / "model")
    jobs = []
    for seed, name in enumerate(("a", "b")):
        rows = oracle.make_rows(folder / f"{name}.jsonl", num_rows=64, seed=seed, longest=longest)
        jobs.append({"name": name, "datasets": [{"path": str(rows), "type": "prompt_completion"}], "max_steps": 100000})
    return {
        "base_model": str(folder / "model"),
        "load_weights": False,
        "parallel": {"pipeline": run.pipeline, "tensor": run.tensor, "data": run.data, "sequence": run.tensor > 1},
        "defaults": {"sequence_len": tokens},
        "microbatch_tokens": max(64, tokens),
        "jobs": jobs,
    }


def ended(run: Run, way: str, longest: int) -> dict:
    """Start a run and end it in a way; return what it said, and whether that is what it should say."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        living = LivingRun(folder, config_of(run, folder, longest), {"MEGATRON_LORA_TIMEOUT_S": str(PATIENCE_S)}, failing=way == "failing")
        try:
            if way != "failing":
                living.train(seconds=900)
                os.kill(living.rank(VICTIM), signal.SIGKILL if way == "killed" else signal.SIGSTOP)
            start = time.monotonic()
            status, error = living.end(LIMITS_S[way])
            return {"seconds": time.monotonic() - start} | verdict(way, status, error)
        except (AssertionError, subprocess.TimeoutExpired) as failure:
            return {"seconds": None, "good": False, "status": None, "says": str(failure), "error": living.error()}
        finally:
            living.close()


def verdict(way: str, status: int, error: str) -> dict:
    """Return how a run ended, and whether its last line says what it should."""
    last = error.splitlines(keepends=True)[-1] if error else ""
    return {"good": status == 1 and last.startswith(LINES[way]), "status": status, "says": last.strip(), "error": error}


def main(arguments: list[str]) -> int:
    """End the chosen runs in the chosen ways."""
    options = parser().parse_args(arguments)
    if unknown := set(options.ways) - LIMITS_S.keys():
        parser().error(f"--ways: {unknown.pop()!r} is none of {', '.join(LIMITS_S)}")
    runs = [run for run in machine(options.only, options.gpus) if run.policy == "ours" and run.gpus > 1]
    if not runs:
        parser().error("--gpus: none of the runs that are asked for is of a machine of so many GPUs")
    layouts = {(run.shape, run.pipeline, run.tensor, run.data): run for run in runs}
    bad = 0
    for run in layouts.values():
        for way in options.ways:
            found = ended(run, way, options.longest)
            bad += not found["good"]
            took = "" if found["seconds"] is None else f" after {found['seconds']:.0f} s"
            print(f"{run.name}, {way}: {'as it should' if found['good'] else 'WRONG'}{took}: {found['says']}", flush=True)
            append_line(options.output, {"case": f"{run.name}, {way}"} | stamp(options.hardware, options.commit) | found)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
