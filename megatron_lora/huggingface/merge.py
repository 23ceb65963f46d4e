"""Merges adapters into their base model: a model directory of the same files, in which each adapted W is another.

    W' = round(float32(W) + sum_i weight_i * scale_i * B_i A_i)        rounded once, to the type that W is stored in
    W' = round(m (W + scale B A) / ||W + scale B A||)                  of a DoRA adapter, which is merged alone; by rows

A file of weights is copied from its first byte to its last; where an adapted tensor lies, BLOCK_ROWS of its
rows at a time are read, added to and written. So names, order, header and index stay as they are, and the
memory needed is that of the adapters and of a block, however many files there are. All other files that a
server reads are copied. The directory is made under another name and renamed once it is complete.

    merge(model_dir, architecture, [(read_adapter("jobs/a"), 1.0)], Path("merged"))
"""

import math
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import torch

from megatron_lora.errors import UserError, one_line
from megatron_lora.files import open_new, sync
from megatron_lora.huggingface.adapter_files import AdapterFile
from megatron_lora.huggingface.architecture import HEAD, Architecture
from megatron_lora.huggingface.weight_files import INDEX, StoredTensor, stored_tensors, weight_files

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
COPIED = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*", "NOTICE*", "additional_chat_templates")
BLOCK_ROWS = 1024
COPY_BYTES = 1 << 24
Weighted = Sequence[tuple[AdapterFile, float]]


def merge(model_dir: Path, architecture: Architecture, adapters: Weighted, out: Path) -> None:
    """Write the merged model to `out`, which must not exist; UserError where adapters do not fit, or it cannot be written."""
    if any(adapter.magnitudes for adapter, _ in adapters) and [weight for _, weight in adapters] != [1.0]:
        raise UserError(
            "a DoRA adapter scales what it adds to, so it is merged alone and with weight 1; name it without others or a weight"
        )
    stored = stored_tensors(model_dir, architecture)
    adapted = _adapted(architecture, stored, adapters)
    files = weight_files(model_dir)
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists; name a directory that does not exist yet")
    new = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        needed = sum(file.stat().st_size for file in files)
        if (free := shutil.disk_usage(out.parent).free) < needed:
            raise UserError(f"{out}: needs {needed / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free there; choose another disk")
        new.mkdir()
        try:
            _copy_others(model_dir, new)
            for file in files:
                here = {path: where for path, where in adapted.items() if where.file == file}
                _merge_file(file, new / file.name, here, adapters)
            sync(new)
            new.rename(out)
            sync(out.parent)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except FileExistsError:
        raise UserError(f"{new}: is of another merge, that writes now or was killed; remove it if none does") from None
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); nothing is left of it") from None


def _adapted(architecture: Architecture, stored: dict[str, StoredTensor], adapters: Weighted) -> dict[str, StoredTensor]:
    """Return path -> where its weight is stored, of all linears that the adapters change; UserError where one does not fit."""
    found = {}
    for adapter, _ in adapters:
        for path, (a_RK, b_NR) in adapter.weights.items():
            name = f"{path}.weight"
            if name not in stored or len(stored[name].entry["shape"]) != 2:
                raise UserError(f"the adapter adapts {one_line(path, 160)}, which the base model does not have; name its own with --base")
            if name == HEAD and architecture.tied_head:
                raise UserError("the adapter adapts lm_head, which this base model shares with its embedding; it cannot be merged")
            shape, own = list(stored[name].entry["shape"]), [b_NR.shape[0], a_RK.shape[1]]
            if shape != own:
                raise UserError(f"the adapter's {path} is {own} and the base model's {shape}; name its own base model with --base")
            if not all(bool(torch.isfinite(factor).all()) for factor in adapter.factors[path]):
                raise UserError(f"the adapter's {path} holds NaN or infinite numbers; use an adapter of a run that did not diverge")
            if stored[name].entry["dtype"] not in TYPES:
                raise UserError(f"{name} is stored as {stored[name].entry['dtype']}; use a base model in bf16, fp16 or fp32")
            found[path] = stored[name]
    return found


def _copy_others(model_dir: Path, new: Path) -> None:
    """Copy what is not weights: config, generation config, tokenizer, chat templates, index, licence."""
    for source in {path for pattern in COPIED for path in model_dir.glob(pattern)}:
        if source.is_dir():
            shutil.copytree(source, new / source.name, copy_function=shutil.copyfile)
        elif not source.name.endswith(".index.json") or source.name == INDEX:
            shutil.copyfile(source, new / source.name)


def _merge_file(source: Path, target: Path, adapted: dict[str, StoredTensor], adapters: Weighted) -> None:
    """Copy a file of weights with the adapted tensors merged, and bring it to the disk."""
    with open(source, "rb") as reader, open_new(target) as writer:
        start = 8 + int.from_bytes(reader.read(8), "little")
        reader.seek(0)
        for path, where in sorted(adapted.items(), key=lambda item: item[1].entry["data_offsets"]):
            if (gap := start + where.entry["data_offsets"][0] - reader.tell()) < 0:
                raise UserError(f"{source}: its tensors overlap; fetch the file again")
            _copy(reader, writer, gap)
            terms = [(adapter, weight) for adapter, weight in adapters if path in adapter.weights]
            _merge_tensor(reader, writer, path, where, terms)
        _copy(reader, writer, os.fstat(reader.fileno()).st_size - reader.tell())
        writer.flush()
        os.fsync(writer.fileno())


def _copy(reader: IO[bytes], writer: IO[bytes], num_bytes: int) -> None:
    for first in range(0, num_bytes, COPY_BYTES):
        writer.write(reader.read(min(COPY_BYTES, num_bytes - first)))


def _merge_tensor(reader: IO[bytes], writer: IO[bytes], path: str, where: StoredTensor, terms: Iterable[tuple[AdapterFile, float]]) -> None:
    """Read a weight [N, K], add `weight * scale * B A` of each term in float32, write it in its type."""
    (rows, columns), kind = where.entry["shape"], TYPES[where.entry["dtype"]]
    terms = list(terms)
    factors = [(a.weights[path][0].float(), a.weights[path][1].float(), weight * a.scale(path)) for a, weight in terms]
    magnitudes = [adapter.magnitudes[path].float() for adapter, _ in terms if adapter.magnitudes]
    for first in range(0, rows, BLOCK_ROWS):
        count = min(BLOCK_ROWS, rows - first)
        buffer = bytearray(reader.read(count * columns * kind.itemsize))
        block = torch.frombuffer(buffer, dtype=kind).view(count, columns).float()
        for a_RK, b_NR, scale in factors:
            block.addmm_(b_NR[first : first + count], a_RK, alpha=scale)
        for m in magnitudes:
            block *= (m[first : first + count] / block.norm(dim=1))[:, None]
        merged = block.to(kind)
        if not math.isfinite(float(merged.abs().max())):
            raise UserError(f"{where.name} would hold numbers beyond {where.entry['dtype']} or NaN; use smaller weights, or a base in fp32")
        writer.write(merged.contiguous().view(torch.uint8).numpy().data)
