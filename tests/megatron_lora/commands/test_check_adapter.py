"""check-adapter: each fault of an adapter has a line of its own, from its files, from the run that wrote it, and from a server's answers.

The adapters have random B. The server is tests/stub_vllm.py with this model's own answers; scripts/serve_check.py asks a real vLLM.
"""

import json
import re
import shutil
import time

import oracle
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from stub_vllm import hostile, send, serving

from megatron_lora.__main__ import main
from megatron_lora.commands import check_adapter
from megatron_lora.config.rules import TARGET_MODULES
from megatron_lora.huggingface.adapter_effect import applied, load_base, log_probabilities
from megatron_lora.huggingface.adapter_files import AdapterFile, read_adapter, write_adapter
from megatron_lora.huggingface.base_files import WEIGHTS, digests_of_base
from megatron_lora.huggingface.model_card import model_card
from megatron_lora.huggingface.vllm_facts import readings
from megatron_lora.output import inference_server
from megatron_lora.output.inference_server import ask


def random_adapter(architecture_of, seed=0, **values):
    generator = torch.Generator().manual_seed(seed)
    weights = {
        path: (torch.randn(4, k, generator=generator) * 0.2, torch.randn(n, 4, generator=generator) * 0.02)
        for path, (k, n) in architecture_of.items()
    }
    return AdapterFile(**{"r": 4, "lora_alpha": 8, "use_rslora": False, "target_modules": TARGET_MODULES, "weights": weights, **values})


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A folder with two bases of the same shape, a deeper one of another width, and a good adapter of the first."""
    root = tmp_path_factory.mktemp("checked")
    for name, values in {"base": {}, "twin": {"seed": 1}, "narrow": {"kv_heads": 4}}.items():
        oracle.make_model(root / name, num_layers=2, **values)
    base = load_base(root / "base")
    linears = {p: (m.in_features, m.out_features) for p, m in base.named_modules() if p.endswith(TARGET_MODULES)}
    write_adapter(root / "good", random_adapter(linears), str(root / "base"))
    digest = digests_of_base(root / "base", True, root)[WEIGHTS]
    write_adapter(root / "rslora", random_adapter(linears, use_rslora=True, base_digest=digest), str(root / "base"))
    magnitudes = {path: linear.weight.norm(dim=1) * 1.1 for path, linear in base.named_modules() if path in linears}
    write_adapter(root / "dora", random_adapter(linears, magnitudes=magnitudes), str(root / "base"))
    oracle.make_rows(root / "rows.jsonl", num_rows=6, seed=0)
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()[:3]]
    (root / "samples.jsonl").write_text("".join(json.dumps({"text": row["prompt"] + row["completion"]}) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def answers(scene):
    """Return (model, tokens) -> log-probabilities, of names of the scene's adapters and of changed copies of one."""
    bases = {name: load_base(scene / name) for name in ("base", "twin")}
    good = read_adapter(scene / "good")
    changes = {"good": {}, "alpha": {"times": 3.0}, "lacks": {"without": ("v_proj",)}, "other": {"times": -1.0, "without": ("k_proj",)}}

    def answer(model, tokens):
        if model in bases:
            return log_probabilities(bases[model], [tokens]).tolist()
        if model == "nothing":
            return log_probabilities(bases["base"], [tokens]).tolist()
        with applied(bases["base"], good, **changes[model]):
            found = log_probabilities(bases["base"], [tokens])
        return found.tolist()

    return answer


def changed(scene, tmp_path, tensors=None, **values):
    """Copy the good adapter with other tensors, by a function of their dict, and other values in its config."""
    copy = tmp_path / "copy"
    shutil.copytree(scene / "good", copy)
    if tensors is not None:
        save_file(tensors(load_file(copy / "adapter_model.safetensors")), copy / "adapter_model.safetensors")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | values))
    return copy


def check(capsys, *arguments):
    """Return the exit status, the kinds of fault that were printed, and all that was printed."""
    status = main(["check-adapter", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, re.findall(r"^wrong    ([\w ]+): ", printed.out, re.MULTILINE), printed.out + printed.err


@pytest.mark.parametrize("name", ["good", "rslora", "dora"])
def test_a_right_adapter_is_peft_s_and_has_its_command(scene, capsys, name):
    status, faults, text = check(capsys, scene / name)
    assert (status, faults) == (0, []), text
    assert float(re.search(r"peft .* differs by (\S+)", text)[1]) < 1e-5
    assert float(re.search(r"effect   (\S+)", text)[1]) > 0.05
    assert f"vllm serve {scene / 'base'} --enable-lora --max-lora-rank 8 --lora-modules {name}={scene / name}" in text
    assert ("use_rslora" in text) == (name == "rslora") and ("refuses use_dora" in text) == (name == "dora")


TENSORS = {  # fault -> what becomes of the tensors
    "wrong prefix": lambda found: {key.replace("base_model.model.model.", "base_model.model."): t for key, t in found.items()},
    "no effect": lambda found: {key: t * ("lora_A" in key) for key, t in found.items()},
    "missing module": lambda found: {key: t for key, t in found.items() if "layers.1.self_attn.v_proj" not in key},
}


@pytest.mark.parametrize("fault", TENSORS)
def test_faults_of_files_have_their_own_lines(scene, tmp_path, capsys, fault):
    status, faults, text = check(capsys, changed(scene, tmp_path, TENSORS[fault]))
    assert (status, faults) == (1, [fault]), text
    assert fault != "no effect" or "every B is zero" in text


def test_another_base_shows_in_its_digest_in_shapes_and_in_names(scene, tmp_path, capsys):
    status, faults, text = check(capsys, scene / "rslora", "--base", scene / "twin")
    assert (status, faults) == (1, ["another base"]) and "base weights in" in text, text
    status, faults, text = check(capsys, scene / "good", "--base", scene / "narrow")
    assert (status, faults) == (1, ["another base"]) and "k_proj has 32 outputs in the adapter and 64" in text, text
    of_others = changed(scene, tmp_path, lambda found: {key.replace("self_attn", "attn"): t for key, t in found.items()})
    status, faults, text = check(capsys, of_others)
    assert status == 1 and "another base" in faults, text


def test_what_the_run_recorded_is_compared(scene, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(scene / "good", run / "jobs" / "a")
    job = {"name": "a", "datasets": [{"path": str(scene / "rows.jsonl"), "type": "prompt_completion"}], "r": 4, "lora_alpha": 8}
    config = {"base_model": str(scene / "base"), "output_dir": str(run), "microbatch_tokens": 64, "jobs": [job]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    rests_on = digests_of_base(scene / "base", True, tmp_path)
    (run / "status.json").write_text(json.dumps({"rests_on": rests_on, "jobs": {"a": {"state": "done", "reason": ""}}}))
    status, faults, text = check(capsys, run / "jobs" / "a")
    assert (status, faults) == (0, []) and "training data of a: 4" in text and "that of its training" in text, text
    status, faults, text = check(capsys, run / "jobs" / "a", "--base", scene / "twin")
    assert (status, faults) == (1, ["another base"]) and "base weights" in text, text
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"jobs": [job | {"lora_alpha": 16}]}))
    status, faults, text = check(capsys, run / "jobs" / "a")
    assert (status, faults) == (1, ["wrong alpha"]) and "lora_alpha is 8 in the adapter, and the run wrote 16" in text, text


def test_what_a_card_says_is_compared_outside_a_run(scene, tmp_path, capsys):
    shutil.copytree(scene / "good", tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "adapter_config.json").read_text()) | {"revision": None, "target_modules": ["q_proj"]}
    for alpha, expected in ((8, (0, [])), (16.5, (1, ["wrong alpha"]))):
        (tmp_path / "copy" / "README.md").write_text(model_card(config | {"lora_alpha": alpha}, 1024, "", "copy", ()))
        status, faults, text = check(capsys, tmp_path / "copy")
        assert (status, faults) == expected and (not faults or "is 8 in the adapter, and its card says 16.5" in text), text


SERVED = {
    "good": [],
    "nothing": ["no effect"],
    "alpha": ["wrong alpha"],
    "lacks": ["missing module"],
    "other": ["differs"],
}


@pytest.mark.parametrize("served", ["good", "nothing", "alpha", "lacks", "other"])
def test_faults_of_a_server_s_copy_have_their_own_lines(scene, answers, capsys, served):
    models = {"base": (str(scene / "base"), None), served: ("elsewhere", "base")}
    with serving(models, answers) as url:
        status, faults, text = check(capsys, scene / "good", "--server", url, "--name", served, "--samples", scene / "samples.jsonl")
    assert (status, faults) == (int(served != "good"), SERVED[served]), text
    assert "vLLM     0.32.0 honours r: 4, lora_alpha: 8" in text
    assert served != "alpha" or "as with lora_alpha 24, and the adapter has 8" in text
    assert served != "lacks" or "as if v_proj had no A and B" in text


def test_the_server_s_base_and_its_rounding_are_told_from_the_adapter(scene, answers, capsys):
    models = {"twin": ("elsewhere", None), "good": (str(scene / "good"), "twin")}
    with serving(models, answers, version="0.40.1") as url:
        status, faults, text = check(capsys, scene / "good", "--server", url)
        assert (status, faults) == (1, ["another base"]) and "0.40.1; the following are facts of 0.32" in text, text
    noisy = lambda model, tokens: [value + 0.05 * (-1) ** i for i, value in enumerate(answers(model, tokens))]  # noqa: E731
    with serving({"base": ("", None), "good": (str(scene / "good"), "base")}, noisy) as url:
        assert check(capsys, scene / "good", "--server", url)[:2] == (0, [])
    noisy = lambda model, tokens: [value + 0.28 * (-1) ** i for i, value in enumerate(answers(model, tokens))]  # noqa: E731
    with serving({"base": ("", None), "good": (str(scene / "good"), "base")}, noisy) as url:
        assert check(capsys, scene / "good", "--server", url)[:2] == (1, ["not visible"])


def test_samples_are_those_of_a_file(scene, tmp_path, capsys):
    lines = [{"text": "w1 w2 w3"}, {"text": "w4 w5"}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, _, text = check(capsys, scene / "good", "--samples", tmp_path / "samples.jsonl")
    assert status == 0 and "samples.jsonl: 2, 5 log-probabilities" in text, text
    (tmp_path / "samples.jsonl").write_text('{"txet": "w1"}\n')
    status, _, text = check(capsys, scene / "good", "--samples", tmp_path / "samples.jsonl")
    assert status == 2 and text.splitlines()[-1].startswith("megatron-lora: ") and "has no 'text'" in text
    (tmp_path / "samples.jsonl").write_text("")
    status, _, text = check(capsys, scene / "good", "--samples", tmp_path / "samples.jsonl")
    assert status == 2 and "holds no record" in text


HOSTILE = {
    "garbage": (lambda handler: handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n<html>"), "something else"),
    "no HTTP": (lambda handler: handler.wfile.write(b"\0\xff\r\n\r\n"), "cannot be asked"),
    "another JSON": (lambda handler: send(handler, {"data": [1]}), "something else"),
    "an error": (lambda handler: send(handler, {"error": "out of\nmemory"}, 500), "HTTP status 500"),
    "a redirect": (lambda handler: send(handler, {}, 302), "HTTP status 302"),
    "slow": (lambda handler: time.sleep(8), "did not answer within 0.3 s"),
    "a byte now and then": (
        lambda handler: [(handler.wfile.write(b"HTTP"), time.sleep(0.1)) for _ in range(80)],
        "did not answer within 0.3 s",
    ),
    "endless": (
        lambda handler: [handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n"), *map(handler.wfile.write, [b" " * 4096] * 64)],
        "more than",
    ),
    "SGLang": (lambda handler: send(handler, {"data": [{"id": "a", "owned_by": "sglang"}]}), "is SGLang"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_server_that_is_none_is_one_line(scene, capsys, monkeypatch, kind):
    monkeypatch.setattr(inference_server, "ANSWER_S", 0.3)
    monkeypatch.setattr(ask, "__defaults__", (None, 0.3))
    monkeypatch.setattr(inference_server, "MOST_BYTES", 1 << 16)
    write, said = HOSTILE[kind]
    start = time.monotonic()
    with hostile(write) as url:
        status, _, text = check(capsys, scene / "good", "--server", url)
    assert status == 2 and said in text and text.count("\n") == 1, text
    assert time.monotonic() - start < 6


def test_addresses_and_names_are_checked(scene, answers, capsys):
    for url in (
        "ftp://localhost",
        "localhost:8000",
        "http://",
        "http://a:b@c",
        "http://localhost:99999",
        "http://x/?q",
        "http://127.0.0.1:9",
    ):
        status, _, text = check(capsys, scene / "good", "--server", url)
        assert status == 2 and text.count("\n") == 1 and "--server" in text, text
    with serving({"base": ("", None)}, answers) as url:
        status, _, text = check(capsys, scene / "good", "--server", url)
        assert status == 2 and "does not serve 'good'" in text
    without = lambda model, tokens: [float("nan")] * (len(tokens) - 1)  # noqa: E731
    with serving({"base": ("", None), "good": ("", "base")}, without) as url:
        status, _, text = check(capsys, scene / "good", "--server", url)
        assert status == 2 and "not finite" in text


def test_a_package_that_is_missing_is_one_line(scene, capsys, monkeypatch):
    monkeypatch.setattr(check_adapter, "version", lambda package: None)
    status, _, text = check(capsys, scene / "good")
    assert status == 2 and "pip install peft" in text and text.count("\n") == 1


def test_vllm_refuses_what_changes_the_meaning_of_an_adapter():
    config = {"r": 600, "lora_alpha": 8, "use_dora": True, "init_lora_weights": "pissa", "modules_to_save": ["lm_head"], "bias": "all"}
    found = readings(config | {"lora_dropout": 0.1, "rank_pattern": {"q_proj": 700}, "use_rslora": False, "peft_version": "0.21"})
    assert found["honours"] == ["r: 600", "lora_alpha: 8", "rank_pattern: {'q_proj': 700}"]
    assert found["ignores"] == ["lora_dropout"]
    assert [text.split(":")[0] for text in found["refuses"]] == [
        *("use_dora", "init_lora_weights", "modules_to_save", "bias", "rank 700, of which 512 is the largest")
    ]
    assert readings({"init_lora_weights": "eva", "modules_to_save": ["score"], "bias": "none"})["refuses"] == []
