"""The reference of a preference job: log-probabilities of its pairs under the base model, or under the adapter that it began from.

They are computed once per sample, in reference slots (scheduling/references.py), and kept on the last stage as fp32 [pairs, 2] or
[answers, 1], those of the validation set behind those of training, nan while unknown. A replica computes those of the samples that it
trains; where a step or an evaluation ends, the replicas exchange them, so that each knows all before the next step. When a job leaves or
is over, what is known is kept beside the tokens, under a key of all that decides it:

    base digest, precision, storage      or, of random weights, the model's config and the seed
    adapter digest and scale             "base" without an adapter
    the tokens and targets of all pairs  which tokenizer, chat template and cuts have made

Another job, or a later start, with the same key needs no reference slots. The first rank looks for it and tells the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from fused_ops.lora.route import upload
from megatron_lora.config.schema import JobConfig, RunConfig
from megatron_lora.data.microbatch import Pairs
from megatron_lora.data.sample_arrays import digest_of
from megatron_lora.data.samples import JobData
from megatron_lora.data.steps import Steps
from megatron_lora.files import digest_of_file, write_atomically
from megatron_lora.huggingface.adapter_files import WEIGHTS_FILE
from megatron_lora.huggingface.base_files import WEIGHTS, digests_of_base
from megatron_lora.training.objectives import log_probabilities
from scheduling.data_parallel import DealtJob
from scheduling.references import Wanted
from scheduling.types import VALIDATION


class Known(NamedTuple):
    """What the first rank knows of a job's references when it joins: their key, those kept under it, and the adapter's digest."""

    key: str
    values: np.ndarray | None
    adapter: str = ""


def shape_of(data: JobData) -> tuple[int, int]:
    """Return the shape of a job's references: its samples, those of validation behind them, by the sequences of each."""
    return len(data.samples) + len(data.validation_samples), 1 + bool(data.samples.borders.any())


def digest_of_reference(job: JobConfig) -> str:
    """Return the SHA-256 of the weights of the adapter that a job is held to; nothing where that is the base model, or it has none."""
    if job.reference != "init_adapter":
        return ""
    assert job.init_adapter is not None
    return digest_of_file(Path(job.init_adapter) / WEIGHTS_FILE)


class References:
    """A job's references on one rank; the values are on the last stage alone."""

    def __init__(self, known: Known, data: JobData, steps: Steps, first_step: int, is_evaluated: bool):
        """Begin with what is known; steps from `first_step` on are to be taken."""
        num_samples = len(data.samples)
        self.key, self.adapter = known.key, known.adapter
        unknown = np.full(shape_of(data), np.nan, np.float32)
        self._known = unknown if known.values is None else known.values
        self._device_values: Tensor | None = None
        self._has_changed = False
        waiting = np.isnan(self._known[:, 0])
        # Step, or VALIDATION -> the places in its batch of samples that no earlier step has had, and these samples' places in the values.
        self.unknown: dict[int, dict[int, int]] = {}
        if is_evaluated and (held := np.flatnonzero(waiting[num_samples:])).size:
            self.unknown[VALIDATION] = {k: num_samples + k for k in held.tolist()}
        waiting, step = waiting[:num_samples].copy(), first_step
        while step < len(steps) and waiting.any():
            batch = steps.batch(step)
            if (held := np.flatnonzero(waiting[batch])).size:
                self.unknown[step] = {k: int(batch[k]) for k in held.tolist()}
                waiting[batch] = False
            step += 1

    def wanted(self, dealt: DealtJob) -> Wanted:
        """Return the rounds whose reference has to be computed, by step."""
        found: Wanted = {}
        for step, places in self.unknown.items():
            held, at = (dealt.validation, 0) if step == VALIDATION else (dealt, step)
            assert held is not None
            rounds = np.isin(held.samples[:, held.rounds.span(at)], list(places)).any(axis=0)
            found[step] = set(np.flatnonzero(rounds).tolist())
        return found

    def of(self, pairs: Pairs) -> Tensor:
        """Return the references of pairs, fp32 [n, 2], or of labelled answers, [n, 1]."""
        return self._values(pairs.places.device)[pairs.places]

    def keep(self, rows: Tensor, pairs: Pairs) -> None:
        """Keep the references of pairs, of which `rows` are the cross-entropies."""
        self._values(rows.device)[pairs.places] = log_probabilities(rows, pairs)
        self._has_changed = True

    def share(self, step: int, group: dist.ProcessGroup | None, device: torch.device) -> None:
        """Exchange what was computed for a step, or for VALIDATION, with the other replicas, which all do so in the same order."""
        places = self.unknown.pop(step, None)
        if group is None or places is None:
            return
        at = upload(torch.tensor(sorted(set(places.values()))), device)
        values = self._values(device)
        own = values[at]
        is_known = ~own.isnan().any(dim=1, keepdim=True)
        total = torch.cat([own.masked_fill(~is_known, 0.0), is_known.float()], dim=1)
        dist.all_reduce(total, group=group)
        values[at] = total[:, :-1] / total[:, -1:]
        self._has_changed = True

    def changed(self) -> np.ndarray | None:
        """Return the values if there are new ones since they were asked for; waits for the device."""
        if not self._has_changed or self._device_values is None:
            return None
        self._has_changed = False
        return self._device_values.cpu().numpy()

    def _values(self, device: torch.device) -> Tensor:
        if self._device_values is None:
            self._device_values = upload(torch.from_numpy(self._known.copy()), device)
        return self._device_values


REFERENCE_FILES = "reference-*.safetensors"


class ReferenceCache:
    """Where references are kept between runs: a file for each key, beside the tokens."""

    def __init__(self, config: RunConfig, model_dir: Path, directory: Path):
        self._config = config
        self._model_dir = model_dir
        self._directory = directory

    def known(self, job: JobConfig, data: JobData) -> Known:
        """Return a job's key, and what is kept under it."""
        adapter = digest_of_reference(job)
        key = self._key(job, data, adapter)
        return Known(key, self._kept(key, shape_of(data)), adapter)

    def _kept(self, key: str, shape: tuple[int, int]) -> np.ndarray | None:
        with suppress(OSError, SafetensorError, KeyError, TypeError), safe_open(self._file(key), framework="numpy") as file:
            values = file.get_tensor("values")
            if file.metadata()["sha256"] == _digest(values) and values.shape == shape and values.dtype == np.float32:
                return values
        return None

    def store(self, references: References) -> None:
        """Keep a job's references if there are new ones, with what others of its key have kept.

        A disk that is full costs a later run their computation, no more.
        """
        values = references.changed()
        if values is None:
            return
        if (kept := self._kept(references.key, values.shape)) is not None:
            values = np.where(np.isnan(values), kept, values)
        with suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file(references.key), save({"values": values}, {"sha256": _digest(values)}))

    @cached_property
    def _base(self) -> Sequence[object]:
        config, found = self._config, digests_of_base(self._model_dir, self._config.load_weights, self._directory)
        weights = found.get(WEIGHTS) or ["random", config.seed]
        return [weights, found.get("config.json"), config.precision, config.base_weights]

    def _key(self, job: JobConfig, data: JobData, adapter: str) -> str:
        reference: object = "base"
        if adapter:
            reference = [adapter, job.scale, *([dataclasses.asdict(job.linears)] if job.linears else [])]
        parts = [*self._base, reference, digest_of(data.samples), digest_of(data.validation_samples)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _file(self, key: str) -> Path:
        return self._directory / f"reference-{key[:40]}.safetensors"


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()
