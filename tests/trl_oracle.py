"""TRL's own trainers as the oracle of preference jobs: one job alone, one device batch a step, in file order, in float32.

`train_trl` returns each step's log (loss, rewards/..., logps/...) and the adapter's tensors; gradients of steps can be compared as the
difference of adapters under plain steps. `VERSION` is the one whose formulas training/objectives.py states.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from oracle import WORDS

VERSION = "1.16.0"


def make_pairs(path: Path, num_rows: int, seed: int, longest: int = 14) -> Path:
    """Write preference rows of random words."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        count = int(torch.randint(low, high, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (count,), generator=generator).tolist())

    rows = [{"prompt": words(2, longest), "chosen": " " + words(2, longest), "rejected": " " + words(2, longest)} for _ in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_answers(path: Path, num_rows: int, seed: int) -> Path:
    """Write labelled rows of random words: in the first three the labels are both, the others' as they come."""
    pairs = [json.loads(line) for line in make_pairs(path, num_rows, seed).read_text().splitlines()]
    labels = [True, False, True, *(torch.rand(num_rows - 3, generator=torch.Generator().manual_seed(seed)) < 0.5).tolist()]
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"], "label": label} for pair, label in zip(pairs, labels, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_trl(model_dir: Path, adapter_dir: Path, rows_path: Path, job: dict, work_dir: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Train one job with TRL; returns the log of each step and the final adapter's tensors."""
    from datasets import Dataset
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind = job["objective"]["type"]
    config_of, trainer_of = _trainer(kind)

    class InOrder(trainer_of):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def base():
        return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)

    objective = {key: value for key, value in job["objective"].items() if key not in ("type", "reference")}
    config = config_of(
        output_dir=str(work_dir),
        per_device_train_batch_size=job["global_batch_size"],
        gradient_accumulation_steps=1,
        max_steps=job["max_steps"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=job.get("weight_decay", 0.0),
        max_grad_norm=job["max_grad_norm"],
        max_length=512,
        logging_steps=1,
        logging_nan_inf_filter=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **({"train_sampling_strategy": "sequential"} if kind == "kto" else {}),
        **objective,
    )
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.pad_token = tokenizer.eos_token
    if kind == "orpo":
        tokenizer.bos_token = None  # its trainer would put it in front of each text, where this tokenizer has none
    rows = [json.loads(line) for line in rows_path.read_text().splitlines()]
    policy = PeftModel.from_pretrained(base(), adapter_dir, is_trainable=True)
    reference = {} if kind == "orpo" else {"ref_model": base() if job["objective"].get("reference", "base") == "base" else None}
    trainer = InOrder(policy, **reference, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return logs, {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(policy).items()}


def _trainer(kind: str) -> tuple[type, type]:
    """Return TRL's config and trainer of an objective."""
    if kind == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOConfig, ORPOTrainer
    if kind == "kto":
        from trl import KTOConfig, KTOTrainer

        return KTOConfig, KTOTrainer
    from trl import DPOConfig, DPOTrainer

    return DPOConfig, DPOTrainer
