"""Loads adapters that are written here with any version of peft, and compares logits with those of weights summed by hand.

    python scripts/load_with_peft.py                          # with the peft that is installed
    python scripts/load_with_peft.py 0.11.1 0.14.0            # with each of these, in an environment that is made for it

Per adapter a line, with the largest difference of the logits over the largest logit. It ends with 1 if one lies beyond BOUND.

An old peft needs a transformers of its time: OLD says which. The environment has these packages alone; torch is that of this Python.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLD = {  # peft -> the packages beside it
    "0.11.1": ("transformers==4.44.2", "tokenizers==0.19.1", "huggingface_hub==0.25.2", "accelerate==0.33.0"),
    "0.14.0": ("transformers==4.48.3", "tokenizers==0.21.0", "huggingface_hub==0.27.1", "accelerate==1.2.1"),
}
OF_ALL = ("requests", "urllib3", "charset_normalizer", "idna", "certifi")
BOUND = 1e-5
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
MODEL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 61, "max_position_embeddings": 64, **SIZES}
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write(folder: Path) -> None:
    """Write a base model's config.json, and adapters of each form and type."""
    import torch

    from megatron_lora.huggingface.adapter_files import AdapterFile, write_adapter
    from megatron_lora.huggingface.architecture import read_architecture
    from megatron_lora.huggingface.export import EXPORT_DTYPES, export

    (folder / "config.json").write_text(json.dumps(MODEL))
    architecture, generator = read_architecture(folder), torch.Generator().manual_seed(0)
    for rslora in (False, True):
        weights = {
            architecture.module_path(layer, module): (
                torch.randn(4, num_in, generator=generator) * 0.1,
                torch.randn(num_out, 4, generator=generator) * 0.1,
            )
            for layer in range(architecture.num_layers)
            for module, (num_in, num_out) in architecture.module_sizes.items()
        }
        adapter = AdapterFile(
            r=4,
            lora_alpha=6,
            use_rslora=rslora,
            lora_dropout=0.1,
            target_modules=MODULES,
            weights=weights,
            revision="abc",
            base_digest="0f" * 32,
        )
        for form in ("peft", "portable"):
            for dtype in EXPORT_DTYPES:
                write_adapter(folder / f"{'rslora' if rslora else 'lora'}-{form}-{dtype}", export(adapter, form, dtype), str(folder))


def check(folder: Path) -> int:
    """Load every adapter with the peft that is imported; return 1 if one computes something else."""
    import peft
    import torch
    import transformers
    from safetensors.torch import load_file

    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(folder)).eval()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens, worst = torch.arange(1, 41)[None], 0
    with torch.no_grad():
        base = model(tokens).logits
        for directory in sorted(path for path in folder.iterdir() if path.is_dir()):
            config = json.loads((directory / "adapter_config.json").read_text())
            scale = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1)
            tensors = load_file(directory / "adapter_model.safetensors")
            factors = {name.removeprefix("base_model.model."): tensor.float() for name, tensor in tensors.items()}
            sums = {
                name.replace("lora_A.", ""): scale * factors[name.replace("lora_A", "lora_B")] @ a_RK
                for name, a_RK in factors.items()
                if ".lora_A." in name
            }
            assert sums.keys() <= start.keys() and 2 * len(sums) == len(factors)
            model.load_state_dict({name: tensor + sums.get(name, 0.0) for name, tensor in start.items()})
            expected = model(tokens).logits
            model.load_state_dict(start)
            adapted = peft.PeftModel.from_pretrained(model, str(directory)).eval()
            found = adapted(tokens).logits
            model = adapted.unload()
            apart, effect = (float((logits - expected).abs().max() / expected.abs().max()) for logits in (found, base))
            good = apart <= BOUND < 0.1 < effect
            worst |= not good
            said = f"differs by {apart:.1e}, has an effect of {effect:.2f}"
            print(f"peft {peft.__version__}: {directory.name}: {said}{'' if good else ': WRONG'}")
    return int(worst)


def with_version(version: str, folder: Path) -> int:
    """Check with another version of peft, in a process and an environment of its own."""
    if version not in OLD:
        sys.exit(f"{version}: which transformers it needs is not known; OLD of this script has {', '.join(OLD)}")
    with tempfile.TemporaryDirectory() as environment:
        packages = (f"peft=={version}", *OLD[version], *OF_ALL)
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", environment, *packages], check=True)
        paths = os.pathsep.join((environment, str(ROOT)))
        command = [sys.executable, "-W", "ignore", __file__, "--check", str(folder)]
        return subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}).returncode


def main() -> int:
    """Write the adapters and check them with each version; return 1 if one is loaded as another adapter."""
    parser = argparse.ArgumentParser(description="Load adapters as they are written here with versions of peft.")
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="versions of peft to install (default: the one that is there)")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="check what lies in a folder, with the peft that is imported")
    arguments = parser.parse_args()
    if arguments.check is not None:
        return check(arguments.check)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        found = [with_version(version, Path(folder)) for version in arguments.versions] or [check(Path(folder))]
    return max(found)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    sys.exit(main())
