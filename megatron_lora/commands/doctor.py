"""What `megatron-lora doctor` prints: versions, devices, the backends that a run will use here, what is missing and what that costs.

Packages are looked up and, except for torch, not imported, because a broken optional package must
not break the doctor. NVIDIA apex is recognised by what it contains, because PyPI's package of that
name is another project.
"""

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path

from fused_ops.launch.triton_version import FIRST, LAST, VERSION, compiles_gluon
from megatron_lora.environment import PACKAGES, commit, devices, num_cores, version
from megatron_lora.planning.devices import machine_bytes, size

RANGES = {"torch": "2.8 or newer", "megatron-core": "0.16.1 to 0.19"}
REQUIRED = {
    "torch": "nothing runs without it",
    "megatron-core": "nothing can be trained without it",
    "transformers": "no tokenizer can be loaded without it",
    "safetensors": "no weights can be read or written without it",
    "numpy": "nothing can be planned without it",
}
OPTIONAL = {
    "triton": "LoRA, norms, RoPE and SwiGLU run as plain torch, several times slower on a GPU",
    "tensorboard": "no event files are written; metrics.jsonl has the same numbers",
    "wandb": "runs cannot be sent to Weights & Biases",
    "peft": "nothing is lost in training; it is what loads the adapters afterwards, and the tests compare with it",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """A line of the report: a subject, what was found, and what is missing and what that costs (empty if nothing is)."""

    subject: str
    found: str
    missing: str = ""


def main() -> int:
    """Print the report; returns 0 when a run can start here, 2 when something required is missing."""
    findings = [*packages(), *machine(), *backends(), *apex()]
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        print(f"{finding.subject:<{width}}  {finding.found}" + (f"  -  {finding.missing}" if finding.missing else ""))
    absent = [name for name in REQUIRED if version(name) is None]
    if absent:
        print(f"megatron-lora: missing {', '.join(absent)}; pip install {' '.join(absent)}", file=sys.stderr)
    return 2 if absent else 0


def packages() -> list[Finding]:
    """Report the versions of installed packages, and what those that are missing cost."""
    findings = [Finding("python", sys.version.split()[0]), Finding("commit", commit() or "not a git checkout")]
    for name in PACKAGES:
        found, cost = version(name), REQUIRED.get(name) or OPTIONAL.get(name)
        if found is not None:
            findings.append(Finding(name, found, out_of_range(name, found)))
        elif cost:
            findings.append(Finding(name, "missing", cost))
    splits = Finding("Mistral's tokenizers", "as tokenizer.json splits words", "preview and train say where fix_mistral_regex is wanted")
    return [*findings, *([splits] if version("transformers") else [])]


def out_of_range(name: str, found: str) -> str:
    """Return a note for a version that is not supported, else an empty string."""
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:3] if part.isdigit())
    if name == "transformers" and numbers < (5, 16):
        return "reads byte-level Llama tokenizers without their spaces; a base model with one is refused"
    fits = {"torch": numbers >= (2, 8), "megatron-core": (0, 16, 1) <= numbers < (0, 20)}.get(name, True)
    return "" if fits else f"not a supported version; use {RANGES[name]}"


def machine() -> list[Finding]:
    """Report CPU cores and GPUs."""
    if version("torch") is None:
        return [Finding("devices", f"{num_cores()} CPU cores")]
    gpus = devices()
    threads = os.environ.get("OMP_NUM_THREADS", "the cores are divided among the ranks")
    no_gpu = Finding("GPU", "none visible", "runs on CPU over gloo, in fp32: good for trying things out, too slow for real models")
    return [
        Finding("CPU", f"{num_cores()} cores, OMP_NUM_THREADS {threads}"),
        Finding("host memory", size(machine_bytes()), "activation_offloading keeps layer inputs there; plan says how much" if gpus else ""),
        *([Finding(f"GPU {index}", name) for index, name in enumerate(gpus)] or [no_gpu]),
    ]


def backends() -> list[Finding]:
    """Report what a run will use on this machine."""
    if version("torch") is None:
        return []
    import torch

    from megatron_lora.errors import UserError
    from megatron_lora.model.backends import ATTENTION, FP8_CAPABILITY, choose, this_machine

    here = this_machine()
    cuda, triton = here.capability is not None, version("triton")
    try:
        chosen = choose("auto", here).attention
        found = f"{ATTENTION[chosen]}, of variable length" if cuda else "torch's, one call per sample"
        attention = Finding("attention", found, "tried on the GPU when a run starts" if cuda and chosen != "torch" else "")
    except UserError as error:
        attention = Finding("attention", "none", str(error))
    fp8 = Finding("base_weights fp8", "8-bit tensor cores" if cuda else "plain torch, for trying out")
    if here.capability is not None and here.capability < FP8_CAPABILITY:
        fp8 = Finding("base_weights fp8", "refused", "this GPU has no 8-bit tensor cores")
    order = Finding("deterministic true", "no cost, CPU sums have a fixed order")
    if cuda:
        slower = "11% less speed than cuDNN's at samples of 4,096 tokens (8B, H200)"
        order = Finding("deterministic true", "torch's attention, in a fixed order of sums", slower)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    idle = "no GPU is visible, so it runs as a CPU build would" if torch.version.cuda and not cuda else ""
    return [
        Finding("torch built for", build, idle),
        Finding("precision auto", "bf16" if cuda else "fp32"),
        Finding("transport", "NCCL" if cuda else "gloo"),
        attention,
        Finding("fused kernels", "Triton" if cuda and triton else "plain torch", hopper_kernels(here.capability) if triton else ""),
        fp8,
        order,
        *(_extras(here.cudnn, here.engine) if cuda else []),
    ]


def hopper_kernels(capability: tuple[int, int] | None, version: tuple[int, ...] = VERSION) -> str:
    """Say what this Triton costs on a Hopper GPU: the kernels made for it where they are not known to compile."""
    if capability is None or capability[0] != 9 or compiles_gluon(version):
        return ""
    first, last = (".".join(map(str, known)) for known in (FIRST, LAST))
    return (
        f"not those for Hopper, which are for Triton {first} to {last}: products with an adapter take 7% longer (H200), more with dropout"
    )


def _extras(cudnn: str | None, engine: str | None) -> list[Finding]:
    """Report what cuDNN's attention and Transformer Engine are used for on a GPU."""
    from megatron_lora.model.backends import INSTALL_CUDNN, INSTALL_ENGINE

    attention = ("missing", f"torch's attention takes its place, 3 to 8% less speed on an H200; {INSTALL_CUDNN}")
    if cudnn:
        attention = (f"nvidia-cudnn-frontend {cudnn}", "for backend: auto, where it works when a run starts")
    te = ("missing", f"nothing: our norms and torch's attention take its place; {INSTALL_ENGINE}")
    if engine:
        te = (engine, "for backend: te; its norms, and its attention where that works when a run starts")
    return [Finding("cuDNN's attention", *attention), Finding("backend te", *te)]


def apex() -> list[Finding]:
    """Report whether NVIDIA's apex is installed, and not the other project of that name; neither is imported."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return [Finding("NVIDIA apex", "missing", "nothing: it is used only through megatron-core. `pip install apex` is another project")]
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        return [Finding("NVIDIA apex", "present")]
    return [Finding("NVIDIA apex", "missing", "the installed package apex is another project and is not used; pip uninstall apex")]
