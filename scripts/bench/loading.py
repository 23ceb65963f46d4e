"""Seconds and host memory of loading a 70B-shaped base model, from checkpoints in 16, 8 and 4 bits into each storage.

    python -m scripts.bench.loading [--layers 1 3] [--only nf4]

A checkpoint is written on demand, a shard a layer, as a model hub has it; the large tensors are holes in their files, which are read as
zeros and take no disk, so that the seconds are those of a checkpoint in the page cache: a disk adds `read_gb` by its rate. Each load is a
process of its own. `host_gb` is its largest anonymous memory beyond what it held before; on a CPU without the weights that stay. It has
to be the same for any number of layers: then a model never exists in 16 bits as a whole. `mapped_gb` is the most of the files that was
mapped at once; the system takes such pages back when it needs memory. Appends a line for each case, with the seconds that all 80 layers
would take by the difference of the two.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import torch

from fused_ops.lora.nf4 import CODES, dynamic_codes
from megatron_lora.config.rules import BASE_WEIGHTS
from megatron_lora.config.schema import ParallelConfig
from megatron_lora.huggingface.architecture import read_architecture
from megatron_lora.huggingface.weight_files import INDEX, read_base_model
from megatron_lora.model.stage import build_stage
from megatron_lora.parallel.process_groups import initialize_parallel
from scripts.bench.model_shapes import SHAPES, values_of
from scripts.bench.stamp import append_line, result_options, stamp
from scripts.one_line import OneLineParser, ended, whole

GB = 1e9
CASES = (("bf16", "native"), ("bf16", "fp8/bf16"), ("bf16", "nf4/bf16"), ("fp8", "fp8/bf16"), ("nf4", "nf4/bf16"))
BY_ROWS = {"num_bits": 8, "type": "float", "strategy": "channel"}
QUANTISATION = {
    "fp8": {"quant_method": "compressed-tensors", "config_groups": {"linears": {"weights": BY_ROWS}}},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}  # fmt: skip
NAMES = {torch.float32: "F32", torch.uint8: "U8"}


def tensors_of(name: str, shape: tuple[int, ...], kind: str) -> dict[str, tuple[str, list[int], int, bytes | None]]:
    """Return what a checkpoint has of one tensor: name -> (type, shape, bytes, contents unless these are zeros)."""

    def small(values: torch.Tensor) -> tuple[str, list[int], int, bytes]:
        return NAMES[values.dtype], list(values.shape), values.nbytes, values.numpy().tobytes()

    if kind == "bf16" or not name.endswith("_proj.weight"):
        return {name: ("BF16", list(shape), 2 * torch.Size(shape).numel(), None)}
    rows, cols = shape
    if kind == "fp8":
        return {name: ("F8_E4M3", [rows, cols], rows * cols, None), f"{name}_scale": small(torch.ones(rows, 1))}
    blocks = rows * cols // 64
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, cols], "nested_blocksize": 256,
             "nested_dtype": "float32", "nested_offset": 0.02}  # fmt: skip
    return {
        name: ("U8", [rows * cols // 2, 1], rows * cols // 2, None),
        f"{name}.absmax": ("U8", [blocks], blocks, None),
        f"{name}.quant_map": small(torch.tensor(CODES)),
        f"{name}.nested_absmax": small(torch.ones(-(-blocks // 256))),
        f"{name}.nested_quant_map": small(dynamic_codes(torch.device("cpu"))),
        f"{name}.quant_state.bitsandbytes__nf4": small(torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)),
    }


def write_checkpoint(path: Path, shape: str, num_layers: int, kind: str, vocab: int | None = None) -> None:
    """Write a checkpoint, a shard for each layer and one for what is in none; `vocab` in place of the shape's."""
    config = values_of(shape, num_layers) | ({"vocab_size": vocab} if vocab else {})
    config |= {"quantization_config": QUANTISATION[kind]} if kind in QUANTISATION else {}
    (path / "config.json").write_text(json.dumps(config))
    shards: dict[str, dict] = defaultdict(dict)
    for name, size in read_architecture(path).tensor_shapes().items():
        layer = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "rest"
        shards[f"model-{layer}.safetensors"] |= tensors_of(name, size, kind)
    for file, tensors in shards.items():
        header, end = {}, 0
        for name, (dtype, size, num_bytes, _) in tensors.items():
            header[name] = {"dtype": dtype, "shape": size, "data_offsets": [end, end + num_bytes]}
            end += num_bytes
        written = json.dumps(header).encode()
        with open(path / file, "wb") as out:
            out.write(len(written).to_bytes(8, "little") + written)
            for _, _, num_bytes, contents in tensors.values():
                out.write(contents) if contents else out.seek(num_bytes, 1)
            out.truncate(8 + len(written) + end)
    (path / INDEX).write_text(json.dumps({"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}))


def resident(*fields: str) -> list[int]:
    """Return figures of /proc/self/status in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[field].split()[0]) * 1024 for field in fields]


def load(path: Path, base_weights: str) -> dict:
    """Load a checkpoint as one rank; return what it took. Runs in a process of its own."""
    device = initialize_parallel(ParallelConfig(), seed=0)
    torch.zeros(1, device=device)
    most, over = [0, 0], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            most[:] = map(max, most, resident("RssAnon", "RssFile"))

    (held, mapped), watcher = resident("RssAnon", "RssFile"), threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    stage = build_stage(read_base_model(path), path, ParallelConfig(), dtype=torch.bfloat16, device=device, base_weights=base_weights)
    seconds = time.perf_counter() - begin
    over.set()
    watcher.join()
    weights = sum(parameter.nbytes for parameter in stage.parameters())
    weights += sum(linear.frozen.num_bytes for linear in stage.linears if linear.frozen is not None)
    staying = weights if device.type == "cpu" else 0
    host, files = most[0] - held - staying, most[1] - mapped
    return {
        "load_s": seconds,
        "weights_gb": weights / GB,
        "host_gb": host / GB,
        "mapped_gb": files / GB,
        "hwm_gb": resident("VmHWM")[0] / GB,
    }


def measure(options: argparse.Namespace, kind: str, base_weights: str) -> dict:
    """Return the figures of a case: of each number of layers, and what all of the layers would take."""
    found: dict[str, list] = defaultdict(list)
    for num_layers in options.layers:
        with tempfile.TemporaryDirectory() as name:
            write_checkpoint(Path(name), options.shape, num_layers, kind, options.vocab)
            found["read_gb"].append(sum(file.stat().st_size for file in Path(name).glob("*.safetensors")) / GB)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                for key, value in pool.apply(load, (Path(name), base_weights)).items():
                    found[key].append(value)
    (few, many), total = options.layers, SHAPES[options.shape]["num_hidden_layers"]
    a_layer = {key: (values[1] - values[0]) / (many - few) for key, values in found.items()}
    scaled = {key: found[key][1] + (total - many) * a_layer[key] for key in ("load_s", "weights_gb", "read_gb")}
    return {"layers": options.layers, "vocab": options.vocab, **found, "all_layers": total, "scaled": scaled}


def parser() -> OneLineParser:
    """Return the options."""
    found = OneLineParser(prog="loading.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    found.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-70b")
    found.add_argument("--layers", type=whole, nargs=2, default=[1, 3], help="that are loaded; default: %(default)s")
    found.add_argument("--vocab", type=whole, help="tokens, in place of the shape's; head and embedding are in 16 bits in any storage")
    found.add_argument("--only", choices=list(BASE_WEIGHTS.values()), help="of the storages")
    result_options(found, "loading.jsonl")
    return found


def run(options: argparse.Namespace) -> None:
    """Measure all cases."""
    for kind, base_weights in CASES:
        if options.only in (None, base_weights):
            line = {"case": f"{options.shape} in {kind}, base_weights {base_weights}", **stamp(options.hardware, options.commit)}
            append_line(options.output, line | measure(options, kind, base_weights))
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(ended(lambda: run(parser().parse_args())))
