"""Damages the directories of runs at random, then resumes and reports them: damage is refused in one line, or makes no difference.

Three directories are made of one small run of three jobs: finished, stopped half-way, and killed. A case copies one, changes one to
three things there (a bit, a digit, a cut, zeros, a swap, a removal, lines of a text), and calls `megatron-lora train` or `report`, in
this process and without ranks. Its outcome is

    same      exit 0, or ranks would be started, with every number as it was, or from an older checkpoint that is whole
    refused   exit 2 with one line and nothing touched
    failed    anything else: another number, a traceback, a file that was changed although the run was refused

    python -m scripts.damage_runs --num 2000 --seed 0 [--first 137 --num 1: one case again]

Each failed case is printed as a JSON line, and a line of counts goes to results/damage.jsonl. Status 1 if any case failed.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from unittest import mock

from scripts.bench.stamp import ROOT, append_line, result_options, stamp
from scripts.one_line import OneLineParser, ended, whole

sys.path[:0] = [str(ROOT / "tests")]

import oracle  # noqa: E402
import runs  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from megatron_lora import __main__ as command_line  # noqa: E402
from megatron_lora.commands import launch  # noqa: E402
from megatron_lora.config import yaml_file  # noqa: E402
from megatron_lora.config.schema import ParallelConfig, load_config  # noqa: E402
from megatron_lora.data import tokenizer as tokenizers  # noqa: E402
from megatron_lora.files import sealed, unsealed  # noqa: E402
from megatron_lora.output.checkpoint import read_checkpoint  # noqa: E402
from megatron_lora.output.resume import logged_lines  # noqa: E402
from megatron_lora.output.run_directory import job_states  # noqa: E402
from megatron_lora.output.standing import Damaged, ResumePoint, best_name, resume_point_of, resume_points, steps_of  # noqa: E402
from megatron_lora.parallel.process_groups import initialize_parallel  # noqa: E402

KINDS = {"finished": ("report", "page"), "stopped": ("resume", "resume", "report", "page"), "killed": ("resume",)}
UNREAD = re.compile(r"README\.md|events\.out\..*|report\.html|env\.json|\.lock|start-\d+")


def make_runs(root: Path, pool) -> None:
    """Train a small run to its end and stop another half-way; make one that was killed of the first. `pool` is that of the tests."""
    model = oracle.make_model(root / "model", num_layers=1)
    rows = {"type": "prompt_completion", "path": str(oracle.make_rows(root / "rows.jsonl", 14, seed=3))}
    job = {"datasets": [rows], "r": 4, "target_modules": ["q_proj", "v_proj"], "global_batch_size": 3, "save_steps": 2, "max_steps": 9}
    jobs = [job | {"name": "plain"}, job | {"name": "judged", "r": 8, "val_set_size": 3, "eval_steps": 2}, job | {"name": "short"}]
    jobs[2]["max_steps"] = 2
    for kind, stop_after in (("finished", None), ("stopped", 2)):
        folder = root / kind
        folder.mkdir()
        config = runs.write_config(root / f"{kind}.yaml", model, folder / "run", jobs, {}, 48)
        assert runs.start(pool, config, {}, stop_after) == (75 if stop_after else 0)
    killed = root / "killed" / "run"
    shutil.copytree(root / "finished" / "run", killed)
    status = unsealed((killed / "status.json").read_text()) | {"exit_status": None}
    status["jobs"] |= {name: {"state": "running", "reason": ""} for name in ("plain", "judged")}
    (killed / "status.json").write_text(sealed(json.dumps(status)))
    (killed / "timeline.json").unlink()
    runs.write_config(root / "killed.yaml", model, killed, jobs, {}, 48)


class Scene:
    """The three runs, and what is read of each as long as it is whole."""

    def __init__(self, root: Path):
        """Read runs that `make_runs` has made."""
        self.root = root
        self.whole: dict[tuple[str, str], object] = {}
        for kind, readers in KINDS.items():
            for reader in set(readers):
                with self.copy(kind) as folder:
                    outcome, _, found = self.read(kind, reader, folder)
                    assert outcome == "same", f"{kind}, {reader}: {found}"
                    self.whole[kind, reader] = found
        self.points = {kind: dict(self._points(root / kind / "run")) for kind in KINDS}

    @contextlib.contextmanager
    def copy(self, kind: str) -> Iterator[Path]:
        """Give a run's directory again, of hard links; files that are damaged or written are new ones."""
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            shutil.copytree(self.root / kind / "run", Path(folder) / "run", copy_function=os.link, ignore=shutil.ignore_patterns(".lock"))
            yield Path(folder) / "run"

    def run_case(self, seed: int, case: int) -> dict:
        """Damage a run and read it; return a report."""
        random = Random(f"damage {seed} {case}")
        kind = random.choice(sorted(KINDS))
        reader = random.choice(KINDS[kind])
        with self.copy(kind) as folder:
            done = [damage(random, folder) for _ in range(random.choice([1, 1, 1, 2, 3]))]
            before = snapshot(folder)
            try:
                outcome, said, found = self.read(kind, reader, folder)
            except BaseException as error:  # any but one line is what this script looks for
                outcome, said, found = "failed", "".join(traceback.format_exception(error)), None
            if outcome == "refused" and snapshot(folder) != before:
                outcome, said = "failed", f"files were touched: {said}"
            if outcome == "same" and not self.is_same(kind, reader, found):
                outcome, said = "failed", f"differs: {found}"
        return {"kind": kind, "reader": reader, "seed": seed, "case": case, "damage": done, "outcome": outcome, "said": said[:3000]}

    def read(self, kind: str, reader: str, folder: Path) -> tuple[str, str, object]:
        """Return the outcome, what was said of it, and what was read."""
        config, found = str(self.root / f"{kind}.yaml"), []

        def would_start(*arguments, **options):
            found.append(self.resumed(config, folder))
            return launch._Ending(status=1)

        words = {
            "resume": ["train", config, f"output_dir={folder}"],
            "report": ["report", str(folder)],
            "page": ["report", str(folder), "--html", str(folder.parent / "page.html")],
        }[reader]
        out, err = io.StringIO(), io.StringIO()
        without_ranks = mock.patch.multiple(launch, start_ranks=would_start, environment=dict)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), without_ranks:
            status = command_line.main(words)
        said = err.getvalue()
        if status == 2:
            return ("refused" if len(said.splitlines()) == 1 and len(said) < 1200 else "failed"), said, None
        if reader == "resume":
            return ("same" if found else "failed"), said, found and found[0]
        text = out.getvalue().replace(str(folder), "RUN")
        if reader == "page":
            text = (folder.parent / "page.html").read_text().partition("<footer>")[0]
            text += "damaged" * ("Left out" in (folder.parent / "page.html").read_text())
        return "same", said, text

    def resumed(self, config: str, folder: Path) -> dict:
        """Return what ranks would read of a directory that was prepared for them."""
        states = job_states(folder)
        points = resume_points(load_config(config, [f"output_dir={folder}"]), states)
        return {"states": states} | {name: told(folder / "jobs" / name, point) for name, point in points.items()}

    def _points(self, run: Path) -> Iterator[tuple[tuple[str, int], str]]:
        for job_dir in (run / "jobs").iterdir():
            yield (job_dir.name, 0), told(job_dir, ResumePoint())
            for step in steps_of(job_dir, "checkpoint"):
                with contextlib.suppress(Damaged):  # its best weights went when the job was over
                    yield (job_dir.name, step), told(job_dir, resume_point_of(job_dir, step + 1))

    def is_same(self, kind: str, reader: str, found) -> bool:
        """Whether what was read is what the whole run has; a resume may begin at any of its checkpoints."""
        whole = self.whole[kind, reader]
        if reader != "resume" or found["states"] != whole["states"]:
            return found == whole or (reader == "page" and found.endswith("damaged"))
        return all(
            text in {known for (job, _), known in self.points[kind].items() if job == name}
            for name, text in found.items()
            if name != "states"
        )


def told(job_dir: Path, point: ResumePoint) -> str:
    """Return a digest of all that a job resumes with: step, state, weights, moments, best weights, lines of its metrics."""
    digest = hashlib.sha256(logged_lines(job_dir, point))
    if point.checkpoint is not None and point.state is not None:
        digest.update(json.dumps(dataclasses.asdict(point.state)).encode())
        weights, moments = read_checkpoint(point.checkpoint)
        tensors = [tensor for pairs in (weights, *moments) for path in sorted(pairs) for tensor in pairs[path]]
        if point.best is not None:
            best = load_file(job_dir / best_name(point.best.step) / "adapter_model.safetensors")
            tensors += [best[name] for name in sorted(best)]
        for tensor in tensors:
            digest.update(tensor.numpy().tobytes())
    return f"step {point.step}: {digest.hexdigest()}"


def snapshot(folder: Path) -> dict[str, tuple]:
    """Return what shows whether anything in a folder was touched."""
    found = [(path, path.lstat()) for path in folder.rglob("*")]
    return {str(path): (status.st_ino, status.st_size, status.st_mtime_ns) for path, status in found if path.name != ".lock"}


def damage(random: Random, run: Path) -> str:
    """Change one thing in a run's directory; return what."""
    files = sorted(path for path in run.rglob("*") if path.is_file())
    unread = [path for path in files if any(map(UNREAD.fullmatch, path.relative_to(run).parts))]
    file = random.choice(unread if unread and random.random() < 0.05 else [path for path in files if path not in unread])
    content, name = file.read_bytes(), str(file.relative_to(run))
    numbers, lines = [match.start() for match in re.finditer(rb"[0-9]", content)], content.splitlines(keepends=True)
    what = random.choice(("bit", "bit", "digit", "digit", "cut", "zeros", "removed", "swapped", "folder", "line", "longer"))
    if what == "removed":
        file.unlink()
        return f"{name}: removed"
    if what in ("swapped", "folder"):
        return _swap_or_remove(random, run, file, what)
    place = random.randrange(len(content) + 1) if content else 0
    if what == "bit" and content:
        place = min(place, len(content) - 1)
        content = content[:place] + bytes([content[place] ^ (1 << random.randrange(8))]) + content[place + 1 :]
    elif what == "digit" and numbers and not name.endswith(".safetensors"):
        place = random.choice(numbers)
        content = content[:place] + bytes([random.choice([d for d in b"0123456789" if d != content[place]])]) + content[place + 1 :]
    elif what == "line" and len(lines) > 1 and not name.endswith(".safetensors"):
        place = random.randrange(len(lines) - 1)
        joined = [lines[place].rstrip(b"\n") + random.choice([b"\f", b"\x85", b"\r", b" "]) + lines[place + 1]]
        changed = random.choice([[], lines[place : place + 1] * 2, lines[place : place + 2][::-1], joined])
        content = b"".join(lines[:place] + changed + lines[place + max(1, min(2, len(changed))) :])
    elif what == "longer":
        content += random.choice([b"\x00", b"\n", b"{}\n", content[:50], b"x"])
    elif what == "zeros":
        content = content[:place] + bytes(len(content[place : place + 64])) + content[place + 64 :]
    else:
        content = content[:place]
    file.unlink()
    file.write_bytes(content)
    return f"{name}: {what} at {place}"


def _swap_or_remove(random: Random, run: Path, file: Path, what: str) -> str:
    """Exchange a file, or the folder that holds it, with another of its kind; or remove the folder."""
    path = file.parent if what == "folder" and file.parent != run else file
    kind = re.sub(r"\d+", "*", path.name)
    others = sorted(other for other in run.rglob(kind) if other != path and other.is_dir() == path.is_dir() and path not in other.parents)
    others = [other for other in others if other not in path.parents]
    if path.is_dir() and (not others or random.random() < 0.5):
        shutil.rmtree(path)
        return f"{path.relative_to(run)}: folder removed"
    if not others:
        path.unlink()
        return f"{path.relative_to(run)}: removed"
    other, aside = random.choice(others), run.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)
    return f"{path.relative_to(run)}: exchanged with {other.relative_to(run)}"


@contextlib.contextmanager
def quick(root: Path) -> Iterator[None]:
    """Have this process load the tokenizer and parse a text once, keep the cache below `root`, and not wait for the disk."""
    parse, parsed = yaml_file.parse_yaml, {}

    def parse_once(text: str, source: str) -> object:
        if text not in parsed:
            parsed[text] = parse(text, source)
        return copy.deepcopy(parsed[text])

    with (
        mock.patch.object(tokenizers, "load_tokenizer", functools.cache(tokenizers.load_tokenizer)),
        mock.patch.object(yaml_file, "parse_yaml", parse_once),
        mock.patch.object(os, "fsync"),
        mock.patch.dict(os.environ, {"MEGATRON_LORA_CACHE": str(root / "cache")}),
    ):
        yield


def main() -> int:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num", type=whole, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, help="folder to keep the runs in, or that has them")
    result_options(parser, "damage.jsonl")
    options = parser.parse_args()
    initialize_parallel(ParallelConfig(), "gloo")  # this process is the one rank
    outcomes: Counter[str] = Counter()
    with (
        contextlib.nullcontext(options.runs.resolve()) if options.runs else tempfile.TemporaryDirectory() as name,
        quick(Path(name)),
    ):
        if not (Path(name) / "killed.yaml").exists():
            Path(name).mkdir(exist_ok=True)
            make_runs(Path(name), lambda: SimpleNamespace(run=lambda function, *words: function(*words)))
        scene, start = Scene(Path(name)), time.monotonic()
        for case in range(options.first, options.first + options.num):
            report = scene.run_case(options.seed, case)
            outcomes[f"{report['reader']} {report['outcome']}"] += 1
            if report["outcome"] == "failed" or options.num == 1:
                print(json.dumps(report), flush=True)
    found = {
        "seed": options.seed,
        "first": options.first,
        "num": options.num,
        "outcomes": dict(sorted(outcomes.items())),
        "seconds": round(time.monotonic() - start, 1),
    }
    print(json.dumps(found))
    if options.num > 1:
        append_line(options.output, stamp(options.hardware, options.commit) | {"case": f"damaged runs from {options.first}"} | found)
    return int(any(name.endswith("failed") for name in outcomes))


if __name__ == "__main__":
    sys.exit(ended(main))
