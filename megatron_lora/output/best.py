"""A job's best weights, `jobs/<name>/best-<step>/`, and which of these directories and of its checkpoints are kept.

    adapter_config.json  adapter_model.safetensors  README.md     the PEFT directory as it was after `step` steps, in fp32
    state.json                {"step": 8, "metric": "eval_loss", "value": 1.25, "job": name, "files": {name: SHA-256}}, sealed

Invariant: whatever a job resumes from, the best weights by then are there. So new ones are complete before others go, and best weights
that a kept checkpoint names as its best stay as long as it does.

    write_best(job_dir, adapter, base_model, Best(8, 1.25), "eval_loss")
    check_best(job_dir, Best(8, 1.25), "summarise")                            # where a checkpoint that names them is resumed
    remove_outdated(job_dir, Best(8, 1.25), save_total_limit=2)                # after each of these and after each checkpoint
"""

import json
import shutil
from pathlib import Path

from megatron_lora.errors import UserError, one_line
from megatron_lora.files import digest_of_file, remove_leftovers, sealed, sync, unsealed
from megatron_lora.huggingface.adapter_files import CARD_FILE, AdapterFile, read_adapter, write_adapter
from megatron_lora.output.standing import STATE_FILE, Best, best_name, read_state, steps_of


def write_best(job_dir: Path, adapter: AdapterFile, base_model: str, best: Best, metric: str) -> None:
    """Write a job's best weights, complete or not at all; those of the same step are replaced."""
    final = job_dir / best_name(best.step)
    remove_leftovers(job_dir, ".best-*")
    new = job_dir / f".{final.name}.new"
    new.mkdir(parents=True)
    write_adapter(new, adapter, base_model)
    files = {path.name: digest_of_file(path) for path in sorted(new.iterdir())}
    state = {"step": best.step, "metric": metric, "value": best.value, "job": job_dir.name, "files": files}
    (new / STATE_FILE).write_text(sealed(json.dumps(state)), encoding="utf-8")
    for name in (STATE_FILE, "."):
        sync(new / name)
    _remove(final)
    new.rename(final)
    sync(job_dir)


def check_best(job_dir: Path, best: Best, job: str) -> None:
    """Raise UserError unless a job's best weights are those that were written for it; of an earlier version they are only read."""
    directory = job_dir / best_name(best.step)
    try:
        state = unsealed((directory / STATE_FILE).read_text(encoding="utf-8"))
        written = (state["step"], state["value"], state.get("job", job))
        files = {name: digest for name, digest in state.get("files", {}).items() if name != CARD_FILE}
        damaged = [name for name, digest in files.items() if digest_of_file(directory / name) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{directory}: cannot be read ({one_line(error, 120)}); restore it") from None
    if damaged:
        raise UserError(f"{directory / damaged[0]}: is damaged (its SHA-256 differs from that in {STATE_FILE}); restore it")
    if written != (best.step, best.value, job):
        raise UserError(f"{directory}: is not of {job} after {best.step} steps, with {best.value:g}; restore it")
    read_adapter(directory)


def remove_outdated(job_dir: Path, best: Best | None, save_total_limit: int | None, *, is_over: bool = False) -> None:
    """Remove the checkpoints beyond `save_total_limit`, and best weights that are neither `best` nor named by a checkpoint that is kept.

    The newest checkpoint and that of the best step do not count. Of a job that `is_over` the newest checkpoint alone needs its best
    weights: until the job's state says that it is over, a run that is killed resumes it there.
    """
    checkpoints = steps_of(job_dir, "checkpoint")
    best_step = best.step if best else None
    counted = [step for step in list(checkpoints)[:-1] if step != best_step]
    for step in counted[:-save_total_limit] if save_total_limit else []:
        _remove(checkpoints.pop(step))
    needed = list(checkpoints.values())[-1:] if is_over else checkpoints.values()
    named = {best_step, *map(_best_step_of, needed)}
    for step, directory in steps_of(job_dir, "best").items():
        if step not in named:
            _remove(directory)


def remove_checkpoints(job_dir: Path) -> None:
    """Remove all checkpoints of a job that is over; best weights that they alone named stay."""
    for checkpoint in steps_of(job_dir, "checkpoint").values():
        _remove(checkpoint)


def _best_step_of(checkpoint: Path) -> int | None:
    """Return the step that a checkpoint names as its job's best; None also for a checkpoint that is damaged."""
    try:
        best = read_state(checkpoint).best
    except UserError:
        return None
    return best.step if best else None


def _remove(directory: Path) -> None:
    """Remove a directory, if it is there; one that has its name is complete."""
    if directory.exists():
        removed = directory.with_name(f".{directory.name}.old")
        directory.rename(removed)
        shutil.rmtree(removed)
