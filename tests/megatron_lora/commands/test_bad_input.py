"""What a user can get wrong, end to end through the command line: one line that names key, value and remedy; status 2; no file touched.

Each case spoils one thing of a run that is right otherwise (`test_the_unspoilt_config_passes` starts it), so a case can only fail for
its own reason. The spoiler gets the scene's folder and config and returns overrides for the command line.
"""

import dataclasses
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import yaml

from megatron_lora.__main__ import main
from megatron_lora.commands import launch
from megatron_lora.commands.checks import check_files
from megatron_lora.config.on_save_keys import OnSaveConfig
from megatron_lora.config.schema import RunConfig
from megatron_lora.errors import UserError
from megatron_lora.output.run_directory import RunDirectory

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """A tiny model, an adapter for it and records; copied for each case."""
    root = tmp_path_factory.mktemp("materials")
    oracle.make_model(root / "model")
    oracle.make_adapter(root / "model", root / "adapter", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], seed=0)
    oracle.make_rows(root / "rows.jsonl", num_rows=5, seed=0, longest=20)
    return root


@pytest.fixture
def scene(materials, tmp_path, monkeypatch) -> dict:
    """A right config in the current directory, as data; a spoiler may change it and the files around it."""
    import shutil

    shutil.copytree(materials, tmp_path / "scene")
    monkeypatch.chdir(tmp_path / "scene")
    monkeypatch.setenv("MEGATRON_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return {
        "base_model": "model",
        "output_dir": "runs/out",
        "microbatch_tokens": 64,
        "jobs": [
            {"name": "one", "datasets": [{"path": "rows.jsonl", "type": "prompt_completion"}]},
            {"name": "two", "datasets": [{"path": "rows.jsonl", "type": "prompt_completion"}], "r": 4, "lora_alpha": 8,
             "target_modules": ["q_proj", "v_proj"], "init_adapter": "adapter"},
        ],
    }  # fmt: skip


def train(scene: dict, *overrides: str) -> int:
    """Write the config unless the spoiler did, and call `megatron-lora train` in this process."""
    if not Path("config.yaml").exists():
        Path("config.yaml").write_text(yaml.safe_dump(scene))
    return main(["train", "config.yaml", *overrides])


def snapshot() -> dict:
    """Every file and folder below the current directory."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*") if path.name != "config.yaml"}


def set_key(path: str, value: object):
    """A spoiler that sets a key of the config; `jobs.0.r` goes through lists."""

    def spoil(scene: dict) -> list[str]:
        *above, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in above:
            scene = scene.setdefault(part, {}) if isinstance(part, str) else scene[part]
        scene[last] = value
        return []

    return spoil


def write(path: str, text: str):
    """A spoiler that replaces a file."""

    def spoil(scene: dict) -> list[str]:
        Path(path).write_text(text)
        return []

    return spoil


def override(*overrides: str):
    """A spoiler that changes no file."""
    return lambda scene: list(overrides)


def model_config(**changes):
    """A spoiler that changes the model's config.json."""

    def spoil(scene: dict) -> list[str]:
        values = json.loads(Path("model/config.json").read_text())
        Path("model/config.json").write_text(json.dumps(values | changes))
        return []

    return spoil


def cut_weights(scene: dict) -> list[str]:
    os.truncate("model/model.safetensors", os.path.getsize("model/model.safetensors") - 100)
    return []


def rename_tensor(scene: dict) -> list[str]:
    data = Path("model/model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].replace(b"model.norm.weight", b"model.harm.weight")
    Path("model/model.safetensors").write_bytes(data[:8] + header + data[8 + length :])
    return []


def remove(path: str):
    def spoil(scene: dict) -> list[str]:
        Path(path).unlink()
        return []

    return spoil


def trained(scene: dict) -> list[str]:
    Path("runs/out/jobs/one").mkdir(parents=True)
    Path("runs/out/jobs/one/metrics.jsonl").write_text('{"step": 1}\n')
    jobs = {name: {"state": "done", "reason": ""} for name in ("one", "two")}
    Path("runs/out/status.json").write_text(json.dumps({"exit_status": 0, "reason": "", "jobs": jobs}))
    return []


def without_config(scene: dict) -> list[str]:
    trained(scene)
    Path("runs/out/status.json").write_text('{"jobs": {"one": {"state": "paused", "reason": ""}}}')
    return []


def without_status(scene: dict) -> list[str]:
    trained(scene)
    Path("runs/out/status.json").write_text('{"jobs": []}')
    return []


def foreign(scene: dict) -> list[str]:
    Path("runs/out").mkdir(parents=True)
    Path("runs/out/results.csv").write_text("1,2\n")
    return []


def weights_entry(change):
    """Change the header's entry of one tensor."""

    def spoil(scene: dict) -> list[str]:
        data = Path("model/model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header["model.norm.weight"])
        text = json.dumps(header).encode()
        Path("model/model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
        return []

    return spoil


def dangling(*overrides: str):
    def spoil(scene: dict) -> list[str]:
        Path("gone").symlink_to("nowhere")
        return list(overrides)

    return spoil


def chat_template(text: str):
    def spoil(scene: dict) -> list[str]:
        Path("model/chat_template.jinja").write_text(text)
        turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
        Path("rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
        return ["jobs.one.datasets.0.type=messages"]

    return spoil


def adapter_tensors(change) -> None:
    from safetensors.torch import load_file, save_file

    file = Path("adapter/adapter_model.safetensors")
    save_file(change(load_file(file)), file)


def poisoned_adapter(scene: dict) -> list[str]:
    adapter_tensors(lambda tensors: {name: tensor * float("nan") for name, tensor in tensors.items()})
    return []


def fused_adapter(scene: dict) -> list[str]:
    adapter_tensors(lambda tensors: {name.replace(".q_proj", ".qkv_proj"): tensor for name, tensor in tensors.items()})
    return adapter_config(target_modules=["qkv_proj", "v_proj"])(scene)


def adapter_config(**changes):
    def spoil(scene: dict) -> list[str]:
        values = json.loads(Path("adapter/adapter_config.json").read_text())
        Path("adapter/adapter_config.json").write_text(json.dumps(values | changes))
        return []

    return spoil


RECORD = '{"prompt": "a", "completion": "b"}\n'
CASES = {
    # the file and the overrides
    "broken yaml": (write("config.yaml", "jobs: [\n"), ["config.yaml:2: not valid YAML"]),
    "tabs": (write("config.yaml", "jobs:\n\t- a\n"), ["config.yaml:2: not valid YAML", "'\\t'"]),
    "two documents": (write("config.yaml", "a: 1\n---\nb: 1\n"), ["config.yaml:2: not valid YAML", "document"]),
    "not a mapping": (write("config.yaml", "- a\n"), ["config.yaml", "a config is a mapping"]),
    "empty": (write("config.yaml", ""), ["config.yaml", "null", "a config is a mapping"]),
    "key twice": (write("config.yaml", "seed: 1\nseed: 2\n"), ["config.yaml:2: the key 'seed' is given twice", "remove one"]),
    "python tag": (write("config.yaml", "seed: !!python/object/apply:os.getcwd []\n"), ["config.yaml:1", "tag", "without tags"]),
    "aliases that multiply": (
        write("config.yaml", "a: &a [1]\n" + "".join(f"{y}: &{y} [{', '.join(['*' + x] * 100)}]\n" for x, y in ("ab", "bc", "cd", "de"))),
        ["config.yaml:", "aliases", "more than 1,000,000 values"],
    ),
    "nested without end": (write("config.yaml", "seed: " + "[" * 3000), ["config.yaml", "nests too deeply"]),
    "nested override": (override("seed=" + "[" * 2000), ["nests too deeply"]),
    "half a character": (write("config.yaml", 'base_model: "\\ud800"\noutput_dir: x\njobs: []\n'), ["base_model", "half of a character"]),
    "a digit of another kind": (override("jobs.².r=1"), ["no entry '²'", "one, two"]),
    "override without =": (override("defaults.r"), ["'defaults.r'", "write key.path=value"]),
    "override without value": (override("defaults.r="), ["'defaults.r='", "defaults.r=null"]),
    "override of no job": (override("jobs.thre.r=1"), ["'jobs.thre.r=1'", "no entry 'thre'", "one, two"]),
    "override beyond the list": (override("jobs.2.r=1"), ["'jobs.2.r=1'", "jobs has 2 entries"]),
    "override through a number": (override("seed.x.y=1"), ["seed", "{'x': {'y': 1}}", "whole number"]),
    # keys
    "unknown key": (override("output_dri=runs/x"), ["output_dri: unknown key", "did you mean output_dir?"]),
    "unknown key of a job": (set_key("jobs.0.learning_rat", 1), ["jobs.one.learning_rat: unknown key", "did you mean learning_rate?"]),
    "another trainer's word": (override("defaults.lora_r=8"), ["defaults.lora_r: unknown key", "did you mean r?"]),
    "job key at the top": (override("r=8"), ["r: unknown key here", "a key of defaults or a job"]),
    "another trainer's word at the top": (override("batch_size=8"), ["batch_size: unknown key here", "global_batch_size is a key of"]),
    "experts over replicas": (
        override("parallel={data: 2, expert: 2}"),
        ["parallel.expert: 2 is neither 1 nor parallel.tensor, which is 1", "never among replicas", "set both to the same number"],
    ),
    "unknown key of parallel": (override("parallel.pipelines=2"), ["parallel.pipelines: unknown key", "did you mean pipeline?"]),
    "missing base_model": (override("base_model=null"), ["base_model: null", "write one as text"]),
    "no jobs": (override("jobs=[]"), ["jobs: []", "at least one"]),
    "job without name": (set_key("jobs.1", {"datasets": []}), ["jobs.1.name: is missing"]),
    "job without data": (set_key("jobs.1", {"name": "two"}), ["jobs.two.datasets: is missing"]),
    "same name in capitals": (set_key("jobs.1.name", "ONE"), ["jobs.ONE.name: two jobs have this name", "rename one"]),
    "name that climbs": (set_key("jobs.0.name", "../one"), ["jobs.0.name: '../one' cannot name a job", "letters"]),
    "name in defaults": (override("defaults.name=x"), ["defaults.name: 'x'", "its own name"]),
    # values
    "r is 0": (override("jobs.one.r=0"), ["jobs.one.r: 0 is not a LoRA rank", "from 1 to 256"]),
    "r is half": (override("defaults.r=1.5"), ["defaults.r: 1.5", "whole number"]),
    "seed is true": (override("seed=true"), ["seed: true", "whole number"]),
    "rate in quotes": (override("defaults.learning_rate='1e-4'"), ["defaults.learning_rate: '1e-4'", "in quotes"]),
    "rate below 0": (override("defaults.learning_rate=-1e-4"), ["defaults.learning_rate: -0.0001", "from 0 to 1"]),
    "dropout 1": (override("defaults.lora_dropout=1"), ["defaults.lora_dropout: 1 ", "below 1"]),
    "boolean as word": (override("defaults.shuffle=no"), ["defaults.shuffle: 'no'", "true nor false"]),
    "unknown module": (override("jobs.one.target_modules=[q_pro]"), ["jobs.one.target_modules.0: 'q_pro'", "did you mean q_proj?"]),
    "module twice": (override("jobs.one.target_modules=[q_proj, q_proj]"), ["jobs.one.target_modules: 'q_proj'", "remove one"]),
    "modules of other models": (override("jobs.one.target_modules=[qkv_proj]"), ["qkv_proj is no linear of a llama; set", "[q_proj,"]),
    "modules as one word": (override("jobs.one.target_modules=q_proj"), ["jobs.one.target_modules: 'q_proj' is no linear of a llama"]),
    "unknown scheduler": (override("defaults.lr_scheduler=cosin"), ["defaults.lr_scheduler: 'cosin'", "did you mean cosine?"]),
    "fp16": (override("precision=fp16"), ["precision: 'fp16'", "auto or bf16 or fp32"]),
    "unknown policy": (override("recompute=chaep"), ["recompute: 'chaep'", "did you mean cheap?", "none or cheap or full"]),
    "nothing to offload": (
        override("recompute=cheap", "activation_offloading=true"),
        ["activation_offloading: true moves inputs of `full` layers", "use recompute: full, or auto"],
    ),
    "offloading in words": (override("activation_offloading=host"), ["activation_offloading: 'host' is neither true nor false", "or auto"]),
    "an engine without a fixed order": (override("deterministic=true", "backend=te"), ["deterministic: true", "'te'", "auto or torch"]),
    "policies of no layers": (override("recompute=[]"), ["recompute: [] is not a list of policies, one per layer"]),
    "policies of too few layers": (override("recompute=[full, none]"), ["recompute: 2 policies", "4 layers", "or one word"]),
    "unknown format": (override("jobs.one.datasets.0.type=chat"), ["jobs.one.datasets.0.type: 'chat'", "messages or sharegpt"]),
    "an unknown ending": (override("jobs.one.datasets.0.path=rows.txt"), ["jobs.one.datasets.0.path: 'rows.txt'", ".jsonl"]),
    "a pattern of no file": (override("jobs.one.datasets.0.path=data/*.csv"), ["path: 'data/*.csv'", "matches no file"]),
    "split of a file": (override("jobs.one.datasets.0.split=train"), ["jobs.one.datasets.0.split: 'train' is for a hub id", "remove it"]),
    "weight 0": (override("jobs.one.datasets.0.sampling_weight=0"), ["jobs.one.datasets.0.sampling_weight: 0", "above 0"]),
    "bad_rows in other words": (override("jobs.one.bad_rows=skip"), ["jobs.one.bad_rows: 'skip'", "refuse or drop"]),
    "two ways to train": (
        override("defaults.train_on_inputs=true", "jobs.one.train_on=last"),
        ["jobs.one.train_on: last contradicts jobs.one.train_on_inputs: true"],
    ),
    "turns of another kind": (override("defaults.train_on=first"), ["defaults.train_on: 'first'", "use all or last"]),
    "kwargs in a list": (override("defaults.chat_template_kwargs=[a]"), ["defaults.chat_template_kwargs: ['a']", "write {name: value}"]),
    # later features
    "replicas": (override("parallel.data=0"), ["parallel.data: 0"]),
    "eval": (override("defaults.eval_steps=10"), ["jobs.one.eval_steps: 10 needs validation data", "val_set_size, or remove it"]),
    "a job without end": (override("jobs.one.num_epochs=1000000000000"), ["num_epochs: 1000000000000 takes", "a job may take 400000000"]),
    # files
    "a path too long": (override("jobs.one.datasets.0.path=" + "x" * 300 + ".jsonl"), ["jobs.one.datasets.0.path:", "too long a name"]),
    "missing data": (override("jobs.one.datasets.0.path=row.jsonl"), ["jobs.one.datasets.0.path: 'row.jsonl'", "no such file"]),
    "data is a folder": (
        lambda scene: Path("d.jsonl").mkdir() or ["jobs.one.datasets.0.path=d.jsonl"],
        ["jobs.one.datasets.0.path: 'd.jsonl'", "is a directory"],
    ),
    "broken line": (write("rows.jsonl", RECORD + "{oops\n"), ["rows.jsonl:2", "not valid JSON"]),
    "nested line": (write("rows.jsonl", RECORD + "[" * 100_000 + "\n"), ["rows.jsonl:2", "nests too deeply"]),
    "nested list": (
        lambda scene: Path("rows.json").write_text("[" * 100_000)
        and [f"jobs.{job}.datasets.0.path=rows.json" for job in ("one", "two")],
        ["rows.json:1", "nests too deeply"],
    ),
    "empty data": (write("rows.jsonl", ""), ["rows.jsonl", "no records"]),
    "field missing": (write("rows.jsonl", RECORD + '{"prompt": "a"}\n'), ["rows.jsonl:2", "'completion'", "add it"]),
    "empty completion": (write("rows.jsonl", RECORD + '{"prompt": "a", "completion": ""}\n'), ["rows.jsonl:2"]),
    "wrong format": (
        override("jobs.one.datasets.0.type=messages", "jobs.two.datasets.0.type=messages"),
        ["chat template", "prompt_completion"],
    ),
    "cut to nothing": (override("defaults.sequence_len=2"), ["jobs.one.sequence_len: 2", "raise it"]),
    "budget in words": (override("microbatch_tokens=all"), ["microbatch_tokens: 'all'", "or auto"]),
    "sample over the budget": (override("microbatch_tokens=8"), ["microbatch_tokens: 8", "of jobs.one", "jobs.one.sequence_len: 8"]),
    # the model
    "no model": (override("base_model=./modle"), ["base_model: './modle'", "no such directory", "correct the path"]),
    "hub without network": (override("base_model=some-org/some-model"), ["base_model: 'some-org/some-model'", "the hub", "network"]),
    "model is a file": (override("base_model=rows.jsonl"), ["base_model: 'rows.jsonl' is a file", "directory"]),
    "no config.json": (remove("model/config.json"), ["base_model: ", "config.json", "cannot be read"]),
    "architecture": (model_config(model_type="gpt2"), ["base_model: ", "model_type is 'gpt2'", "llama, mistral, qwen2, qwen3"]),
    "rope of another kind": (
        model_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4}, rope_scaling=None),
        ["base_model: ", "rope_type is 'dynamic'", "supported are"],
    ),
    "another model's config": (model_config(intermediate_size=77), ["base_model: ", "gate_proj", "has shape", "77"]),
    "cut weights": (cut_weights, ["base_model: ", "model.safetensors has", "fetch the model again"]),
    "garbled weights": (write("model/model.safetensors", "x" * 500), ["base_model: ", "damaged", "fetch the model again"]),
    "lost tensor": (rename_tensor, ["base_model: ", "no tensor model.norm.weight", "fetch the model again"]),
    "no weights": (remove("model/model.safetensors"), ["base_model: ", "no model.safetensors", "load_weights: false"]),
    "damaged tokenizer": (write("model/tokenizer.json", "{"), ["base_model: ", "tokenizer.json is damaged"]),
    "odd tokenizer config": (write("model/tokenizer_config.json", "[]"), ["base_model: ", "tokenizer", "cannot be loaded"]),
    "odd rope parameters": (model_config(rope_parameters=[]), ["base_model: ", "rope_parameters", "[]"]),
    "a list of model types": (model_config(model_type=["llama"]), ["base_model: ", "model_type is ['llama']"]),
    "layers without end": (model_config(num_hidden_layers=10**9), ["base_model: ", "num_hidden_layers is 1000000000", "10,000"]),
    "nested config.json": (write("model/config.json", "[" * 100_000), ["base_model: ", "config.json is not valid JSON"]),
    "tensor without shape": (weights_entry(lambda entry: entry.pop("shape")), ["base_model: ", "damaged", "fetch the model again"]),
    "tensor without dtype": (weights_entry(lambda entry: entry.pop("dtype")), ["base_model: ", "damaged", "fetch the model again"]),
    "tensor of another size": (weights_entry(lambda entry: entry.update(dtype="F16")), ["model.norm.weight has 256 bytes", "[64] F16"]),
    "index of numbers": (
        lambda scene: remove("model/model.safetensors")(scene) + write(f"model/{INDEX}", '{"weight_map": {"a": 1}}')(scene),
        ["index.json is damaged"],
    ),
    "template that divides by zero": (chat_template("{{ 1 / 0 }}"), ["rows.jsonl:1", "chat template refuses", "division by zero"]),
    "template that is missing": (
        override("jobs.one.datasets.0.type=messages", "jobs.one.chat_template=no.jinja"),
        ["jobs.one.chat_template: 'no.jinja' cannot be read", "No such file", "chatml"],
    ),
    "kwargs that the template does not use": (
        lambda scene: [*chat_template("{{ messages }}")(scene), "jobs.one.chat_template_kwargs={think: no}"],
        ["jobs.one.chat_template_kwargs: the chat template does not use 'think'"],
    ),
    # the layout
    "more stages than layers": (override("parallel.pipeline=5"), ["parallel.pipeline: 5 stages", "4 layers", "fewer"]),
    "layers do not add up": (
        override("parallel.pipeline=2", "parallel.layers_per_stage=[2, 3]"),
        ["parallel.layers_per_stage: [2, 3]", "4 layers", "sum to 4"],
    ),
    "layers of too few stages": (override("parallel.pipeline=2", "parallel.layers_per_stage=[4]"), ["parallel.layers_per_stage: [4]", "2"]),
    "heads do not divide": (override("parallel.tensor=3"), ["parallel.tensor: 3 does not divide", "heads"]),
    "sequence without tensor": (override("parallel.sequence=true"), ["parallel.sequence: true", "parallel.tensor above 1"]),
    "too many ranks": (override("parallel.tensor=4096"), ["parallel: needs 4096 ranks", "CPU cores", "lower parallel."]),
    # the adapter to continue from
    "no adapter": (override("jobs.two.init_adapter=adaptor"), ["jobs.two.init_adapter: 'adaptor'", "no such directory"]),
    "adapter of another rank": (override("jobs.two.r=8"), ["jobs.two.r: 8 differs from 4", "'adapter'", "set r: 4"]),
    "adapter of another scale": (override("jobs.two.lora_alpha=16"), ["jobs.two.lora_alpha: 16.0 differs from 8", "set lora_alpha: 8"]),
    "adapter of other modules": (override("jobs.two.target_modules=[q_proj]"), ["jobs.two.target_modules", "set [q_proj, v_proj]"]),
    "adapter that is DoRA": (adapter_config(use_dora=True), ["jobs.two.init_adapter: ", "magnitude_vector is missing"]),
    "DoRA and dropout": (override("jobs.two.adapter=dora", "jobs.two.lora_dropout=0.1"), ["jobs.two.lora_dropout: ", "dora", "set", "0"]),
    "adapter that diverged": (poisoned_adapter, ["jobs.two.init_adapter: 'adapter': A of model.layers.0.self_attn.q_proj holds NaN"]),
    "adapter of a fused linear": (fused_adapter, ["jobs.two.init_adapter: 'adapter': adapts qkv_proj, which holds q_proj, k_proj and"]),
    "damaged adapter": (write("adapter/adapter_model.safetensors", "no tensors"), ["jobs.two.init_adapter: ", "is damaged", "again"]),
    "nested adapter config": (write("adapter/adapter_config.json", "[" * 100_000), ["jobs.two.init_adapter: ", "is not valid JSON"]),
    # the output directory
    "output with a long name": (override("output_dir=" + "a" * 300), ["output_dir: 'aaa", "File name too long", "choose"]),
    "output is a dangling link": (dangling("output_dir=gone"), ["output_dir: 'gone'", "leads nowhere"]),
    "output below a dangling link": (dangling("output_dir=gone/x"), ["output_dir: 'gone/x' cannot be used"]),
    "output where nothing can be made": (override("output_dir=/proc/x"), ["output_dir: '/proc/x' cannot be used", "choose"]),
    "lock is a folder": (lambda scene: Path("runs/out/.lock").mkdir(parents=True) or [], ["output_dir: 'runs/out' cannot be used"]),
    "no config": (without_config, ["output_dir: 'runs/out' holds a run whose config.yaml", "no such file", "choose another directory"]),
    "no status": (without_status, ["output_dir: 'runs/out' holds", "status.json cannot be read", "choose another directory"]),
    "finished": (trained, ["output_dir: 'runs/out' holds a finished run", "choose another"]),
    "other files": (foreign, ["output_dir: 'runs/out' holds 'results.csv'", "empty or new directory"]),
    "output is a file": (override("output_dir=rows.jsonl"), ["output_dir: 'rows.jsonl' is a file", "choose"]),
    "output below a file": (override("output_dir=rows.jsonl/x"), ["output_dir: 'rows.jsonl/x' cannot be created", "choose"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_line_names_key_value_and_remedy_and_nothing_is_written(name, scene, monkeypatch, capfd):
    spoil, words = CASES[name]
    overrides = spoil(scene)
    monkeypatch.setattr(launch, "start_ranks", lambda *arguments: pytest.fail("torchrun was started"))
    before = snapshot()
    status = train(scene, *overrides)
    out, err = capfd.readouterr()
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and err.endswith("\n"), err
    assert err.startswith("megatron-lora: ") and "Traceback" not in err and len(err) < 600, err
    for word in words:
        assert word in err, err
    assert snapshot() == before


def test_the_unspoilt_config_passes(scene, monkeypatch, capfd):
    started = []
    monkeypatch.setattr(launch, "start_ranks", lambda command, *rest: started.append(command) or launch._Ending(status=0))
    train(scene, "parallel.pipeline=2")
    assert started == [["--standalone", "--nproc-per-node", "2", "-m", "megatron_lora", "train", "config.yaml", "parallel.pipeline=2"]]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("made_for", "named"), [("owner/other-model", True), ("elsewhere/model", False), (None, False)])
def test_an_adapter_of_another_base_model_of_the_same_shapes_is_named(made_for, named, scene, capfd):
    file = Path("adapter/adapter_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": made_for}))
    Path("config.yaml").write_text(yaml.safe_dump(scene))
    assert main(["plan", "config.yaml"]) == 0
    line = "jobs.two.init_adapter: 'adapter' was made for the base model 'owner/other-model', and this run has 'model', of the same shapes"
    assert (line in capfd.readouterr().err) is named


def test_a_directory_in_use_is_refused_and_not_touched(scene, monkeypatch, capfd):
    from megatron_lora.config.schema import load_config

    Path("config.yaml").write_text(yaml.safe_dump(scene))
    with RunDirectory.create(load_config("config.yaml")):
        before = snapshot()
        assert train(scene) == 2
        assert snapshot() == before
    assert f"output_dir: 'runs/out' is in use by process {os.getpid()}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nope.yaml"], ["nope.yaml: no such file"]),
        (["train", "."], [".: is a directory"]),
        (["train"], ["required: CONFIG", "megatron-lora train --help"]),
        (["trian"], ["'trian'", "'train'", "--help"]),
        ([], ["COMMAND", "--help"]),
        (["train", "config.yaml", "--fast"], ["'--fast'", "--help"]),
        (["doctor", "config.yaml"], ["'config.yaml'", "--help"]),
        (["preview", "config.yaml"], ["--job", "--help"]),
        (["preview", "config.yaml", "--job", "on"], ["--job: no job is called 'on'", "did you mean one?", "one, two"]),
        (["preview", "config.yaml", "--job", "one", "--samples", "0"], ["--samples: 0", "at least 1"]),
        (["plan", "config.yaml", "microbatch_tokens=8"], ["microbatch_tokens: 8"]),
        (["plan", "config.yaml", "--policy", "robin"], ["--policy: 'robin'", "did you mean round-robin?", "or ours"]),
        (["plan", "config.yaml", "--device", "h1000"], ["--device: 'h1000'", "h200 or h100 or a100 or cpu"]),
        (["plan", "config.yaml", "--cost", "cost.json"], ["--cost: 'cost.json' cannot be read"]),
        (["plan", "config.yaml", "--cost", "rows.jsonl"], ["--cost: 'rows.jsonl' holds no cost table"]),
        (["plan", "config.yaml", "--cost", "empty.json"], ["--cost: 'empty.json' holds no cost table", "megatron-lora calibrate"]),
        (["calibrate", "config.yaml", "--output", "."], ["--output: '.' is no file"]),
        (["report"], ["required: RUN", "megatron-lora report --help"]),
        (["report", "nowhere"], ["nowhere: is not the directory of a run that has ended"]),
        (["report", ".", "--plot", "run.txt"], ["--plot: 'run.txt'", ".png"]),
    ],
)
def test_a_wrong_command_line_is_one_line_too(arguments, words, scene, capfd):
    Path("config.yaml").write_text(yaml.safe_dump(scene))
    Path("empty.json").write_text("[]")
    before = snapshot()
    try:
        status = main(arguments)
    except SystemExit as ending:
        status = ending.code
    out, err = capfd.readouterr()
    assert status == 2 and out == "" and err.count("\n") == 1 and err.startswith("megatron-lora: "), err
    for word in words:
        assert word in err, err
    assert snapshot() == before


def test_the_process_itself_ends_with_2_and_without_a_traceback_and_without_loading_torch(scene):
    Path("config.yaml").write_text(yaml.safe_dump(scene))
    code = "import sys, megatron_lora.__main__ as m; s = m.main(); print('torch' in sys.modules); sys.exit(s)"
    root = Path(__file__).resolve().parents[3]
    ran = subprocess.run(
        [sys.executable, "-c", code, "train", "config.yaml", "defaults.r=0"],
        env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (2, "False\n")
    assert ran.stderr == "megatron-lora: defaults.r: 0 is not a LoRA rank; use a whole number from 1 to 256\n"


def test_a_command_for_adapters_that_is_no_program_is_refused():
    config = RunConfig(base_model="m", output_dir="o", jobs=(), on_save=(OnSaveConfig(command=("no-such-program", "x")),))
    with pytest.raises(UserError, match="on_save.command: 'no-such-program': no such program can be run here"):
        check_files(config)
    check_files(dataclasses.replace(config, on_save=(OnSaveConfig(command=("sh",)),)))
