"""The oracle: transformers + peft + torch.optim.AdamW training one job alone, one sample at a time; and the small files that runs read.

Everything the trainer does differently (packing, merged linears, pipelines, neighbours) is absent here on purpose.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

WORDS = [f"w{i}" for i in range(120)]


def make_tokenizer(directory: Path) -> int:
    """Save a word-level tokenizer; return the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    return len(vocabulary)


def make_model(directory: Path, *, num_layers: int = 4, kv_heads: int = 2, seed: int = 0) -> Path:
    """Save a tiny random Llama with a word-level tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=make_tokenizer(directory),
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.08,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def make_moe(directory: Path) -> Path:
    """Save a tiny random Qwen3-MoE with a word-level tokenizer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    attention = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    config = Qwen3MoeConfig(vocab_size=make_tokenizer(directory), num_hidden_layers=3, initializer_range=0.08, **attention, **experts)
    Qwen3MoeForCausalLM(config).save_pretrained(directory)
    return directory


def make_rows(path: Path, num_rows: int, seed: int, longest: int = 30) -> Path:
    """Write prompt_completion rows of random words."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        count = int(torch.randint(low, high, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (count,), generator=generator).tolist())

    rows = [{"prompt": words(2, longest // 2), "completion": " " + words(2, longest // 2)} for _ in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def swap_words(source: Path, target: Path) -> Path:
    """Copy rows with every word replaced by another: other tokens, the same lengths."""
    other = {word: WORDS[(7 * i + 3) % len(WORDS)] for i, word in enumerate(WORDS)}
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    swapped = [{key: " ".join(other.get(word, word) for word in text.split(" ")) for key, text in row.items()} for row in rows]
    target.write_text("".join(json.dumps(row) + "\n" for row in swapped))
    return target


def make_adapter(model_dir: Path, directory: Path, *, seed: int, **keys) -> Path:
    """Save a fresh adapter as peft initialises it; `keys` are its LoraConfig's."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    lora = LoraConfig(**keys, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), lora).save_pretrained(directory)
    return directory


def encode(tokenizer, row: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens [L] and labels [L] (-100 on the prompt) of a prompt_completion row."""
    prompt = tokenizer(row["prompt"]).input_ids
    completion = tokenizer(row["completion"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    return torch.tensor(prompt + completion), torch.tensor([-100] * len(prompt) + completion)


def train_alone(model_dir: Path, adapter_dir: Path, rows_path: Path, job: dict) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train one job; returns the loss of each step and the final adapter's tensors."""
    found = [(loss, adapter) for _, _, loss, adapter in train_stepwise(model_dir, adapter_dir, rows_path, job)]
    return [loss for loss, _ in found[1:]], found[-1][1]


def train_stepwise(model_dir: Path, adapter_dir: Path, rows_path: Path, job: dict, model=None):
    """Train one job; yields, before the first step and after each, the steps taken, the model, the loss and the adapter's tensors.

    `model`: peft's, in place of that of the adapter's directory.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

    def adapter() -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    if model is None:
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, adapter_dir, is_trainable=True)
    records = [json.loads(line) for line in rows_path.read_text().splitlines()]
    rows = [(*encode(tokenizer, record), record.get("weight", 1.0)) for record in records]
    batch, num_steps = job["global_batch_size"], job["max_steps"]
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = {"lr": job["learning_rate"], "weight_decay": job.get("weight_decay", 0.0), "eps": job.get("adam_epsilon", 1e-8)}
    if ratio := job.get("loraplus_lr_ratio"):
        from peft.optimizers import create_loraplus_optimizer

        decay = {"loraplus_weight_decay": adam.pop("weight_decay")}
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, loraplus_lr_ratio=ratio, **adam, **decay)
    else:
        optimizer = torch.optim.AdamW(parameters, **adam)
    kind = {"constant": "constant_with_warmup"}.get(job["lr_scheduler"], job["lr_scheduler"])
    warmup = job.get("warmup_steps") or math.ceil(job["warmup_ratio"] * num_steps)
    known = {"num_warmup_steps": warmup, "num_training_steps": num_steps}
    scheduler = get_scheduler(kind, optimizer, scheduler_specific_kwargs=job.get("lr_scheduler_kwargs"), **known)
    batches = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    yield 0, model, math.nan, adapter()
    for step in range(num_steps):
        global_batch = batches[step % len(batches)]
        num_targets = sum(int((labels[1:] != -100).sum()) for _, labels, _ in global_batch)
        total = 0.0
        for tokens, labels, weight in global_batch:
            logits = model(input_ids=tokens[None]).logits[0]
            loss = F.cross_entropy(logits[:-1].float(), labels[1:], ignore_index=-100, reduction="sum") * weight / num_targets
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(parameters, job["max_grad_norm"])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        yield step + 1, model, total, adapter()


@torch.no_grad()
def evaluate(model, model_dir: Path, rows_path: Path) -> tuple[float, float]:
    """Return a model's mean cross-entropy over the targets of rows, and the share of the targets that it predicts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    total, right, num_targets = 0.0, 0, 0
    for line in rows_path.read_text().splitlines():
        tokens, labels = encode(tokenizer, json.loads(line))
        logits = model(input_ids=tokens[None]).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum"))
        right += int((logits.argmax(dim=1) == labels[1:]).sum())
        num_targets += int((labels[1:] != -100).sum())
    return total / num_targets, right / num_targets


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], kind: str) -> float:
    """Return the relative Frobenius distance of all A ("lora_A"), B ("lora_B") or magnitudes ("magnitude"), concatenated."""
    keys = sorted(key for key in theirs if kind in key)
    assert keys and keys == sorted(key for key in ours if kind in key)
    mine, other = (torch.cat([tensors[key].double().flatten() for key in keys]) for tensors in (ours, theirs))
    return float((mine - other).norm() / other.norm())
