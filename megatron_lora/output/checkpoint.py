"""A job's checkpoint, `jobs/<name>/checkpoint-<step>/`: the job resumes from it as if it had never stopped, in any layout.

    adapter_config.json  adapter_model.safetensors  README.md     the PEFT directory as it was then, in fp32
    optimizer.safetensors    Adam's moments: the keys of the adapter's tensors plus .exp_avg or .exp_avg_sq, same shapes, fp32
    state.json               the fields of standing.CheckpointState

A checkpoint is made between two steps of its job and holds complete tensors, not those of one rank.
It is written under another name, synced and renamed, so a directory that has the name is complete.
It proves itself: state.json is sealed (files.py) and has the digests of the other files and of the lines
of metrics.jsonl by then, and the keys that decide the job's updates.
A step that had begun is taken again. Its samples and dropout masks are the same, because they
depend on the step alone.
"""

import dataclasses
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_lora.config.adapter_keys import chosen_modules, linears
from megatron_lora.config.consistent_job import same_targets
from megatron_lora.config.rules import show
from megatron_lora.config.schema import JobConfig
from megatron_lora.errors import UserError, one_line
from megatron_lora.files import digest_of_file, remove_leftovers, sealed, sync
from megatron_lora.huggingface.adapter_files import CARD_FILE, CONFIG_FILE, PREFIX, TENSORS, AdapterFile, read_adapter, write_adapter
from megatron_lora.output.best import check_best
from megatron_lora.output.resume import deciding_keys, logged_lines
from megatron_lora.output.standing import STATE_FILE, CheckpointState, Damaged, ResumePoint, checkpoint_name, resume_point_of

OPTIMIZER_FILE = "optimizer.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
TARGETS = {"target_modules": chosen_modules, "linears": linears}  # keys that planning completes
Pairs = Mapping[str, tuple[torch.Tensor, ...]]  # path -> one tensor for A [r, K], one for B [N, r], with DoRA one for m [N]


def write_checkpoint(job_dir: Path, adapter: AdapterFile, base_model: str, moments: Sequence[Pairs], state: CheckpointState) -> None:
    """Write a job's checkpoint, complete or not at all; one of the same step is replaced."""
    final = job_dir / checkpoint_name(state.step)
    remove_leftovers(job_dir, ".checkpoint-*")
    new, old = (job_dir / f".{final.name}.{kind}" for kind in ("new", "old"))
    new.mkdir(parents=True)
    write_adapter(new, adapter, base_model)
    tensors = {_key(path, kind, name): tensor for name, pairs in zip(MOMENTS, moments, strict=True) for path, kind, tensor in _walk(pairs)}
    save_file(tensors, new / OPTIMIZER_FILE, metadata={"format": "pt"})
    state = dataclasses.replace(state, files={path.name: digest_of_file(path) for path in sorted(new.iterdir())})
    os.chmod(new / OPTIMIZER_FILE, (new / CONFIG_FILE).stat().st_mode)  # that of the umask
    (new / STATE_FILE).write_text(sealed(json.dumps(dataclasses.asdict(state), indent=1)), encoding="utf-8")
    for name in (OPTIMIZER_FILE, STATE_FILE, "."):
        sync(new / name)
    if final.exists():
        final.rename(old)
    new.rename(final)
    sync(job_dir)
    shutil.rmtree(old, ignore_errors=True)


def check_resume_point(job: JobConfig, point: ResumePoint) -> None:
    """Raise Damaged unless a resume point's files are those that were written, for this job; prints a line where that is not known."""
    checkpoint, state = point.checkpoint, point.state
    if checkpoint is None or state is None:
        return
    check_files(checkpoint, state.files)
    logged_lines(checkpoint.parent, point)
    try:
        read_checkpoint(checkpoint)
        if state.best is not None:
            check_best(checkpoint.parent, state.best, job.name)
    except Damaged:
        raise
    except UserError as error:
        raise Damaged(checkpoint, _without_remedy(error)) from None
    if not state.files:
        unknown = f"{checkpoint}: was written by an earlier version, without digests: whether it is whole cannot be checked"
        print(f"megatron-lora: warning: {unknown}", file=sys.stderr)
        return
    now, written = deciding_keys(job), {name: state.job.get(name) for name in TARGETS}
    for key, value in state.job.items():
        if key in TARGETS and same_targets(job, dataclasses.replace(job, **{name: TARGETS[name](name, written[name]) for name in written})):
            continue  # of a job whose base model is not known yet
        if now.get(key, value) != value:
            raise Damaged(checkpoint, f"{checkpoint}: was written for {key} {show(value)}, and {key} of this job is {show(now[key])}")


def check_files(directory: Path, digests: Mapping[str, str]) -> None:
    """Raise Damaged unless the files of a checkpoint have these digests; the model card, which is not read back, does not count."""
    for name, digest in digests.items():
        try:
            found = digest if name == CARD_FILE else digest_of_file(directory / name)
        except OSError as error:
            raise Damaged(directory, f"{directory / name}: cannot be read ({error.strerror})") from None
        if found != digest:
            raise Damaged(directory, f"{directory / name}: is damaged (its SHA-256 differs from that in {STATE_FILE})")


def newest_whole(job_dir: Path, job: JobConfig, before: float = math.inf) -> ResumePoint:
    """Return a job's newest checkpoint `before` a step that is whole, or its start."""
    while True:
        try:
            point = resume_point_of(job_dir, before)
            check_resume_point(job, point)
            return point
        except Damaged as damaged:
            before = step_of(damaged.checkpoint)


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint's name says."""
    return int(checkpoint.name.rpartition("-")[2])


def with_remedy(error: Damaged, job: JobConfig) -> UserError:
    """Return the error for a damaged checkpoint with the name of the whole one before it."""
    older = newest_whole(error.checkpoint.parent, job, step_of(error.checkpoint)).checkpoint
    if older is None:
        return UserError(f"{error.what}; no checkpoint before it is whole: train --from-older begins the job from its start")
    return UserError(f"{error.what}; the newest whole checkpoint before it is {older.name}: train --from-older resumes from that")


def read_checkpoint(checkpoint: Path) -> tuple[Pairs, list[Pairs]]:
    """Read a job's weights and Adam's two moments; UserError if files are missing, damaged, or do not match."""
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: is not there on this machine; choose an output_dir that all machines of the run share")
    file = checkpoint / OPTIMIZER_FILE
    try:
        weights, tensors = read_adapter(checkpoint).factors, load_file(file)
    except (SafetensorError, OSError) as error:
        raise Damaged(checkpoint, f"{file}: is damaged ({one_line(error, 160)})") from None
    except UserError as error:
        raise Damaged(checkpoint, _without_remedy(error)) from None
    for name in MOMENTS:
        for path, kind, tensor in _walk(weights):
            key = _key(path, kind, name)
            if key not in tensors or tensors[key].shape != tensor.shape:
                raise Damaged(checkpoint, f"{file}: has no {key} of shape {list(tensor.shape)}")
    moments: list[dict[str, tuple[torch.Tensor, ...]]] = [{} for _ in MOMENTS]
    for name, moment in zip(MOMENTS, moments, strict=True):
        for path, kind, _ in _walk(weights):
            moment[path] = (*moment.get(path, ()), tensors[_key(path, kind, name)])
    return weights, list(moments)


def _without_remedy(error: UserError) -> str:
    return str(error).rpartition(";")[0] or str(error)


def _walk(pairs: Pairs) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield (path, name of the tensor in PEFT's files, tensor)."""
    for path, tensors in pairs.items():
        for name, tensor in zip(TENSORS, tensors, strict=False):
            yield path, name, tensor


def _key(path: str, kind: str, moment: str) -> str:
    return f"{PREFIX}{path}.{kind}.{moment}"
