"""What `megatron-lora doctor` says: versions, devices, the backends that a run will use here, what is missing and what that costs.

A finding is (subject, what there is, what is missing and its cost). Packages are looked up, not imported, except torch: a broken
optional package must not break the doctor. NVIDIA apex is known by what it contains, since PyPI's package of that name is another project.
"""

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path

from fused_ops.triton_version import FIRST, LAST, VERSION, compiles_gluon
from megatron_lora.environment import PACKAGES, commit, devices, num_cores, version

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
    """One line of the report; `missing` is empty where all is well."""

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
    """Versions of what is installed and the cost of what is not."""
    findings = [Finding("python", sys.version.split()[0]), Finding("commit", commit() or "not a git checkout")]
    for name in PACKAGES:
        found, cost = version(name), REQUIRED.get(name) or OPTIONAL.get(name)
        if found is not None:
            findings.append(Finding(name, found, out_of_range(name, found)))
        elif cost:
            findings.append(Finding(name, "missing", cost))
    return findings


def out_of_range(name: str, found: str) -> str:
    """Say so when a version is one that this project is not made for."""
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:3] if part.isdigit())
    fits = {"torch": numbers >= (2, 8), "megatron-core": (0, 16, 1) <= numbers < (0, 20)}.get(name, True)
    return "" if fits else f"not a supported version; use {RANGES[name]}"


def machine() -> list[Finding]:
    """CPU cores and GPUs."""
    if version("torch") is None:
        return [Finding("devices", f"{num_cores()} CPU cores")]
    gpus = devices()
    threads = os.environ.get("OMP_NUM_THREADS", "shared out over the ranks")
    return [
        Finding("CPU", f"{num_cores()} cores, OMP_NUM_THREADS {threads}"),
        *(Finding(f"GPU {index}", name) for index, name in enumerate(gpus)),
        *(
            []
            if gpus
            else [Finding("GPU", "none visible", "runs on CPU over gloo, in fp32: right for trying out, too slow for real models")]
        ),
    ]


def backends() -> list[Finding]:
    """What a run will use on this machine."""
    if version("torch") is None:
        return []
    import torch

    from megatron_lora.errors import UserError
    from megatron_lora.model.backends import FP8_CAPABILITY, INSTALL_ENGINE, choose, this_machine

    here = this_machine()
    cuda, triton = here.capability is not None, version("triton")
    try:
        chosen = choose("auto", here).attention
        found = (
            "Transformer Engine" if chosen == "te" else "torch.nn.attention.varlen" if cuda else "scaled_dot_product_attention per sample"
        )
        attention = Finding("attention", found, "tried on the GPU when a run starts" if chosen == "te" else "")
    except UserError as error:
        attention = Finding("attention", "none", str(error))
    narrow = cuda and here.capability < FP8_CAPABILITY
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    idle = "no GPU is visible, so it runs as a CPU build would" if torch.version.cuda and not cuda else ""
    return [
        Finding("torch built for", build, idle),
        Finding("precision auto", "bf16" if cuda else "fp32"),
        Finding("transport", "NCCL" if cuda else "gloo"),
        attention,
        Finding("fused kernels", "Triton" if cuda and triton else "plain torch", hopper_kernels(here.capability) if triton else ""),
        Finding(
            "base_weights fp8",
            "refused" if narrow else "8-bit tensor cores" if cuda else "plain torch, for trying out",
            "this GPU has no 8-bit tensor cores" if narrow else "",
        ),
        *_engine(here.engine, cuda, INSTALL_ENGINE),
    ]


def hopper_kernels(capability: tuple[int, int] | None, version: tuple[int, ...] = VERSION) -> str:
    """Say what this Triton costs on a Hopper GPU: the kernels made for it where they are not known to compile."""
    if capability is None or capability[0] != 9 or compiles_gluon(version):
        return ""
    first, last = (".".join(map(str, known)) for known in (FIRST, LAST))
    return (
        f"not those for Hopper, which are for Triton {first} to {last}: products with an adapter take 7% longer (H200), more with dropout"
    )


def _engine(found: str | None, cuda: bool, install: str) -> list[Finding]:
    """Say what Transformer Engine is good for here."""
    if not cuda:
        return []
    if found is None:
        return [Finding("backend te", "missing", f"nothing: our norms and torch's attention take its place; {install}")]
    return [Finding("backend te", found, "for backend: te; its norms, and its attention where that works when a run starts")]


def apex() -> list[Finding]:
    """Tell NVIDIA's apex from the other project of that name, without importing either."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return [Finding("NVIDIA apex", "missing", "nothing: it is used only through megatron-core. `pip install apex` is another project")]
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if any((folder / "multi_tensor_apply").is_dir() for folder in folders):
        return [Finding("NVIDIA apex", "present")]
    return [Finding("NVIDIA apex", "missing", "the installed package apex is another project and is not used; pip uninstall apex")]
