"""Which tensors a model directory holds, and where, from the headers of its safetensors files; no tensor is read.

A safetensors file is 8 bytes (the header's length n, little-endian), n bytes of JSON (name ->
dtype, shape, data_offsets), data. This finds a file cut short by a broken download, a missing shard
and a tensor of another model, in milliseconds. Which file is taken, and which tensor it holds under
which name, follows transformers; where transformers would leave a tensor out or make one up, this
refuses.

    architecture = read_base_model(model_dir)       # config.json and the headers
    stored_tensors(model_dir, architecture)["lm_head.weight"].file
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_lora.errors import UserError, one_line
from megatron_lora.files import read_regular
from megatron_lora.huggingface.architecture import HEAD, Architecture, read_architecture
from megatron_lora.huggingface.quantisation import BESIDE, fault_of

DTYPES = {"F32": 4, "BF16": 2, "F16": 2}  # bytes per number
QUANTISED_DTYPES = ("F8_E4M3", "U8")  # of weights that have something beside them (quantisation.py)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_HEADER_BYTES = 100_000_000  # as the safetensors library has it
REFETCH = "fetch the model again"
ROTARY_TABLE = re.compile(r"rotary_emb\.inv_freq")  # older checkpoints hold it; it follows from config.json
QUANTISED = ("scale", "scales", "scale_inv", "zeros", "zero_point", "qweight", "absmax", "quant_map", "g_idx")  # ends of tensors' names


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor as a file holds it: the file, its name there, and its header entry."""

    file: Path
    name: str
    entry: Mapping
    beside: dict[str, "StoredTensor"] = dataclasses.field(default_factory=dict)  # what a quantised weight needs: _scale, .absmax, ...

    @property
    def is_nf4(self) -> bool:
        """Whether it is a quantised weight in 4 bits."""
        return bool(self.beside) and self.entry["dtype"] == "U8"


def read_base_model(model_dir: str | Path, load_weights: bool = True) -> Architecture:
    """Read config.json and, for `load_weights`, check the files; UserError for what is damaged, missing or not in the architecture.

    Where config.json ties the head to the embedding and the files hold both, the head is not tied:
    both are loaded, as transformers does where they differ.
    """
    architecture = read_architecture(model_dir)
    if not load_weights:
        return architecture
    stored = stored_tensors(model_dir, architecture)
    if architecture.tied_head and stored[HEAD] != stored[architecture.embedding]:
        architecture = dataclasses.replace(architecture, tied_head=False)
    model = f"base_model: {str(model_dir)!r}"
    for name, shape in architecture.tensor_shapes().items():
        _check_entry(f"{model}: {stored[name].name}", stored[name], shape)
    return architecture


def stored_tensors(model_dir: str | Path, architecture: Architecture) -> dict[str, StoredTensor]:
    """Return where each tensor of the architecture is stored, by its full name; both matrices of a tied pair are there.

    A backbone's names may lack the prefix `model.`; of a tied pair, either matrix may stand for both.
    Raises UserError where a tensor is missing, stored twice, or not in the architecture.
    """
    model = f"base_model: {str(model_dir)!r}"
    embedding = architecture.embedding
    names = {*architecture.tensor_shapes(), embedding, HEAD}
    stored: dict[str, StoredTensor] = {}
    unknown, beside = [], []
    for file in weight_files(Path(model_dir)):
        for name, entry in read_header(file).items():
            if (current := architecture.current_name(name)) is None:
                continue
            # transformers takes a missing or superfluous `model.` as none
            full = next((each for each in (current, current.removeprefix("model."), f"model.{current}") if each in names), name)
            if full in stored:
                first = stored[full]
                raise UserError(f"{model} holds {full} twice, as {first.name} in {first.file.name} and {name} in {file.name}; {REFETCH}")
            if full in names:
                stored[full] = StoredTensor(file=file, name=name, entry=entry)
            elif part := BESIDE.fullmatch(full):
                beside.append((part["weight"], part["what"], StoredTensor(file=file, name=name, entry=entry)))
            elif not ROTARY_TABLE.search(name):
                unknown.append(name)
    for weight, what, part in beside:
        main = next((each for each in (weight, weight.removeprefix("model."), f"model.{weight}") if each in names), None)
        if main in stored and stored[main].entry["dtype"] in QUANTISED_DTYPES:
            stored[main].beside[what] = part
        else:
            unknown.append(part.name)
    if architecture.tied_head:
        for name, other in ((HEAD, embedding), (embedding, HEAD)):
            if name not in stored and other in stored:
                stored[name] = stored[other]
    for name in architecture.tensor_shapes():
        if name not in stored:
            instead = f" (it holds {one_line(min(unknown), 100)} instead)" if unknown else ""
            raise UserError(f"{model} has no tensor {name}, which its config.json calls for; {REFETCH}{instead}")
    if unknown:
        raise UserError(f"{model} has a tensor {min(unknown)} that its config.json does not call for; {_remedy(min(unknown))}")
    return stored


def _remedy(name: str) -> str:
    """Return what to do about a tensor that the architecture does not have."""
    if ".lora_" in name or ".base_layer." in name:
        return "merge the adapter into the base model with peft, or use the base model"
    if name.endswith(QUANTISED) or ".quant_" in name:
        return "use a checkpoint in bf16, fp16 or fp32, not a quantised one"
    return "use the config.json of these weights"


def _check_entry(where: str, stored: StoredTensor, shape: tuple[int, ...]) -> None:
    """Raise UserError unless a header's entry has the shape, a type that is read, and its bytes."""
    entry, beside = stored.entry, stored.beside
    dtype, found = entry["dtype"], list(entry["shape"])
    if beside and len(shape) == 2:
        if (fault := fault_of(dtype, beside, found, shape)) is not None:
            raise UserError(f"{where} is {one_line(fault, 160)}, which is no quantised {list(shape)}; {REFETCH}")
    elif dtype not in DTYPES:
        raise UserError(f"{where} is {one_line(dtype, 40)}; use a checkpoint in bf16, fp16 or fp32, not a quantised one")
    elif found != list(shape):
        raise UserError(f"{where} has shape {one_line(found, 60)} and config.json calls for {list(shape)}; {REFETCH}")
    for what, each in {"": stored, **beside}.items():
        (first, end), dtype, found = each.entry["data_offsets"], each.entry["dtype"], each.entry["shape"]
        if end - first != math.prod(found) * DTYPES.get(dtype, 1):
            raise UserError(f"{where}{what} has {end - first} bytes, which are not {found} {dtype}; {REFETCH}")


def weight_files(model_dir: Path) -> list[Path]:
    """Return the safetensors files of a model directory: the single one, else those of the index, as transformers chooses."""
    if (model_dir / SINGLE).is_file():
        return [model_dir / SINGLE]
    index = model_dir / INDEX
    if index.is_file():
        return [model_dir / name for name in _shards(index)]
    others = sorted(path.name for path in model_dir.glob("*.safetensors"))
    hint = f" (its {others[0]} is read by no name that transformers gives)" if others else ""
    if not others and any(model_dir.glob("*.bin")):
        hint = " (its .bin files are pickles, which are not read)"
    raise UserError(f"base_model: {str(model_dir)!r} has no {SINGLE}{hint}; use a model saved as safetensors, or load_weights: false")


def _shards(index: Path) -> list[str]:
    """Return the file names that an index lists."""
    try:
        names = sorted(set(json.loads(read_regular(index))["weight_map"].values()))
        inside = all(name == os.path.basename(name) and name.endswith(".safetensors") for name in names)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError(f"base_model: {index} is damaged; {REFETCH}") from None
    except OSError as error:
        raise UserError(f"base_model: {index} cannot be read ({error.strerror}); check its permissions") from None
    if not names or not inside:
        raise UserError(f"base_model: {index} lists no safetensors files of its own directory; {REFETCH}")
    return names


def read_header(path: Path) -> Mapping[str, dict]:
    """Read name -> {dtype, shape, data_offsets} of one file; UserError when the file is missing, cut short or no safetensors file."""
    damaged = UserError(f"base_model: {path} is damaged or no safetensors file; {REFETCH}")
    try:
        size = os.path.getsize(path)
        if not path.is_file():
            raise damaged
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if 0 < length <= min(size - 8, MOST_HEADER_BYTES) else b""
        header = json.loads(text)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        if not all(map(_is_entry, tensors.values())):
            raise damaged
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except FileNotFoundError:
        raise UserError(f"base_model: {path} is missing; {REFETCH}") from None
    except OSError as error:
        raise UserError(f"base_model: {path} cannot be read ({error.strerror}); check its permissions") from None
    except (ValueError, AttributeError, RecursionError):
        raise damaged from None
    if size != 8 + length + end:
        raise UserError(f"base_model: {path} has {size} bytes where its header says {8 + length + end}; {REFETCH}")
    return tensors


def _is_entry(entry: object) -> bool:
    """Whether a header's entry has the form that the format prescribes."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return all(type(size) is int and size >= 0 for size in [*shape, *offsets])
