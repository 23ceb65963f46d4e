"""The factors that adapters of `pissa` and `olora` start from: cut out of the complete base weights once, and kept with the job.

    pissa     W = U S V^T      A = sqrt(S_r / c) V_r^T      B = U_r sqrt(S_r / c)         (Meng et al. 2024; c the scale)
    pissa_niter_N              the same of the r-dimensional range that N subspace iterations find (Halko et al. 2011)
    olora     W = Q R          A = R_r                      B = Q_r                       (Buyukakyuz 2024)

PEFT takes c B A off the base weight. Here that stays as it is, and the adapter has rank 2 r: [A; A] and [B, -B], of which the
second half is never trained. In float32, of each component the sign such that A's largest number is positive. Machines decompose
differently, so the first rank does it, or its reader of queued jobs, into jobs/<name>/start, a PEFT directory with a sealed list of
its files' digests, before the others learn of the job; all ranks read that, as does a run that resumes from before the job's first
checkpoint.

    FirstFactors(output_dir, base_model, architecture, model_dir).write(job)         # the first rank; nothing where they are there
    FirstFactors(output_dir, base_model, architecture, model_dir).read(job.name)     # path -> (A [2r, K], B [N, 2r])
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from megatron_lora.config.schema import JobConfig
from megatron_lora.errors import UserError, one_line
from megatron_lora.files import digest_of_file, remove_leftovers, sealed, sync, unsealed
from megatron_lora.huggingface.adapter_files import layer_of, read_adapter, write_adapter
from megatron_lora.huggingface.architecture import Architecture
from megatron_lora.huggingface.weight_slices import Checkpoint, finite
from megatron_lora.model.adapter_arena import generator_of
from megatron_lora.output.standing import STATE_FILE
from megatron_lora.training.adapter_forms import Weights, adapter_of

START = "start"
COMPLETE = (slice(None), slice(None))


class FirstFactors:
    """The first factors of a run's jobs, in its directory."""

    def __init__(self, output_dir: str, base_model: str, architecture: Architecture, model_dir: Path):
        """Read base weights in `model_dir`."""
        self.jobs_dir, self.base_model = Path(output_dir) / "jobs", base_model
        self.architecture, self.model_dir = architecture, model_dir

    def write(self, job: JobConfig) -> None:
        """Cut a job's first factors out of the base weights, unless that has been done; complete or not at all."""
        directory = self.jobs_dir / job.name / START
        if directory.exists():
            return
        remove_leftovers(directory.parent, f".{START}*")
        new = directory.with_name(f".{START}.new")
        new.mkdir(parents=True)
        write_adapter(new, adapter_of(job, self._cut(job), {}), self.base_model)
        files = {path.name: digest_of_file(path) for path in sorted(new.iterdir())}
        (new / STATE_FILE).write_text(sealed(json.dumps({"files": files})), encoding="utf-8")
        for name in (STATE_FILE, "."):
            sync(new / name)
        new.rename(directory)
        sync(directory.parent)

    def read(self, name: str) -> Weights:
        """Read a job's first factors; UserError where they are not what was written."""
        check_first_factors(self.jobs_dir / name)
        return dict(read_adapter(self.jobs_dir / name / START).weights)

    def _cut(self, job: JobConfig) -> Weights:
        source, weights = Checkpoint(self.model_dir, self.architecture), {}
        for path in self.architecture.linear_sizes():
            module, layer = path.rpartition(".")[2], layer_of(path)
            if module not in job.target_modules or not (r := job.rank_at(module, layer)):
                continue
            weight = finite(source.read(f"{path}.weight", COMPLETE).float(), path)
            scale = job.scale_of(r, job.alpha_at(module, layer))
            a_RK, b_NR = cut(weight, r, str(job.init_lora_weights), scale, generator_of(job.seed, path))
            b_NR *= scale / job.scale  # the arena has one scale
            weights[path] = torch.cat([a_RK, a_RK]), torch.cat([b_NR, -b_NR], 1)
        return weights


def check_first_factors(job_dir: Path) -> None:
    """Check the first factors of a job, if it has some; UserError where they are not what was written."""
    directory = job_dir / START
    if not directory.exists():
        return
    remedy = "restore it, or remove the directory, which is then made anew"
    try:
        files = unsealed((directory / STATE_FILE).read_text(encoding="utf-8"))["files"]
        damaged = [file for file, digest in files.items() if digest_of_file(directory / file) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{directory}: cannot be read ({one_line(error, 120)}); {remedy}") from None
    if damaged:
        raise UserError(f"{directory / damaged[0]}: is damaged (its SHA-256 differs from that in {STATE_FILE}); {remedy}")


def remove_first_factors(job_dir: Path) -> None:
    """Remove the first factors of a job that is over."""
    shutil.rmtree(job_dir / START, ignore_errors=True)


def cut(weight_NK: Tensor, r: int, how: str, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return A [r, K] and B [N, r] that `how`, a word of init_lora_weights, makes of a weight in float32."""
    if how == "olora":
        q, upper = torch.linalg.qr(weight_NK)
        a_RK, b_NR = upper[:r], q[:, :r]
    else:
        u, s, vh = torch.linalg.svd(weight_NK, full_matrices=False) if how == "pissa" else _low_rank(weight_NK, r, how, generator)
        root = (s[:r] / scale).sqrt()
        a_RK, b_NR = root[:, None] * vh[:r], u[:, :r] * root
    sign = a_RK.gather(1, a_RK.abs().argmax(1, keepdim=True)).sign()
    sign[sign == 0] = 1.0
    return a_RK * sign, b_NR * sign.T


def _low_rank(weight_NK: Tensor, r: int, how: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.linalg.qr(weight_NK @ torch.randn(weight_NK.shape[1], r, generator=generator)).Q
    for _ in range(int(how.rpartition("_")[2])):
        q = torch.linalg.qr(weight_NK.T @ q).Q
        q = torch.linalg.qr(weight_NK @ q).Q
    u, s, vh = torch.linalg.svd(q.T @ weight_NK, full_matrices=False)
    return q @ u, s, vh
