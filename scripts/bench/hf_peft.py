"""The baseline that most people run: transformers + peft + torch's AdamW, one job after another, on the same rows as the trainer.

Given the better of two ways to batch: samples of a global batch sorted by length and padded in batches of at most the token budget, or
one sample per forward without a mask. Adapters are kept in the compute dtype, which is faster than peft's default of float32. Only real
tokens count; the rate of all jobs is that of training each for the same number of steps.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_lora.config.schema import JobConfig, RunConfig
from megatron_lora.data.collate import NO_LABEL
from megatron_lora.data.sample_arrays import Sample
from megatron_lora.training.jobs import Job, read_jobs
from megatron_lora.training.schedules import num_warmup_steps
from scripts.bench.cases import Case
from scripts.bench.model_shapes import values_of

Batching = Callable[[Sequence[Sample], int], list[list[Sample]]]
LEAST_SECONDS = 20.0  # of all jobs together


def padded(samples: Sequence[Sample], budget: int) -> list[list[Sample]]:
    """Batch samples of like lengths: as many as fit the budget once padded to the longest."""
    batches: list[list[Sample]] = []
    for sample in sorted(samples, key=len, reverse=True):
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0]) <= budget:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches


BATCHINGS: dict[str, Batching] = {"padded": padded, "single": lambda samples, budget: [[sample] for sample in samples]}


def tensors(batch: Sequence[Sample], device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return tokens, labels and attention mask [samples, longest]; no mask where nothing is padded."""
    tokens = pad_sequence([torch.from_numpy(sample.tokens).long() for sample in batch], batch_first=True)
    targets = pad_sequence([torch.from_numpy(sample.targets) for sample in batch], batch_first=True)
    mask = pad_sequence([torch.ones(len(sample), dtype=torch.int64) for sample in batch], batch_first=True)
    return tokens.to(device), torch.where(targets, tokens, NO_LABEL).to(device), None if mask.all() else mask.to(device)


def fresh_adapter(base_model, job: JobConfig, checkpointing: bool):
    """Return the model with a new adapter of the job's settings on it, in the model's dtype; its `unload` takes it off."""
    from peft import LoraConfig, get_peft_model

    given = {name: getattr(job, name) for name in ("r", "lora_alpha", "lora_dropout", "use_rslora")}
    lora = LoraConfig(**given, target_modules=list(job.target_modules), task_type="CAUSAL_LM")
    model = get_peft_model(base_model, lora, autocast_adapter_dtype=False)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


class PeftTrainer:
    """One job's adapter on a transformers model, trained a global batch at a time."""

    def __init__(self, model, job: JobConfig, device: torch.device, num_steps: int | None = None, autocast: bool = False):
        """Train `model`, which has the adapter; by the job's schedule where `num_steps` are known, in bf16 autocast where asked."""
        self.model, self.device, self.job, self.autocast = model.train(), device, job, autocast
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        betas, fused = (job.adam_beta1, job.adam_beta2), device.type == "cuda"
        adam = {"lr": job.learning_rate, "betas": betas, "eps": job.adam_epsilon, "weight_decay": job.weight_decay}
        self.optimizer = torch.optim.AdamW(self.parameters, **adam, fused=fused)
        self.scheduler = None
        if num_steps is not None:
            from transformers import get_scheduler

            assert job.loraplus_lr_ratio is None, "one learning rate for A and B here"
            kind = {"constant": "constant_with_warmup"}.get(job.lr_scheduler, job.lr_scheduler)
            warmup = num_warmup_steps(job.warmup_ratio, job.warmup_steps, num_steps)
            known = {"num_warmup_steps": warmup, "num_training_steps": num_steps, "scheduler_specific_kwargs": job.lr_scheduler_kwargs}
            self.scheduler = get_scheduler(kind, self.optimizer, **known)

    def step(self, batches: Sequence[Sequence[Sample]]) -> Tensor:
        """Take one optimizer step over a global batch, [] its loss on the device."""
        num_targets = sum(int(sample.targets.sum()) for batch in batches for sample in batch)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            tokens, labels, mask = tensors(batch, self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                out = self.model(input_ids=tokens, attention_mask=mask, labels=labels, num_items_in_batch=num_targets, use_cache=False)
            out.loss.backward()
            total += out.loss.detach()
        if self.job.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.job.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        return total


def build(shape: str, num_layers: int | None, device: torch.device, dtype: torch.dtype):
    """Return a transformers model of random weights, made on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.backends.cuda.enable_cudnn_sdp(False)  # torch's first choice on Hopper; it plans anew, for seconds a step, at every new shape
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            config = AutoConfig.for_model(**values_of(shape, num_layers))
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)


def global_batches(job: Job, batching: Batching, budget: int) -> Iterator[list[list[Sample]]]:
    """Give out the job's global batches, in microbatches, around and around."""
    while True:
        for step in job.step_samples.steps:
            yield batching([job.step_samples.samples[index] for _, index in step], budget)


def timed_steps(trainer: PeftTrainer, batches: Iterator, seconds: float, steps: int | None) -> dict:
    """Train for `seconds` (or `steps`); return real and padded tokens, steps and seconds."""
    tokens = rows = taken = 0
    _synchronise(trainer.device)
    start = time.perf_counter()
    while taken < (steps or 1) or (steps is None and time.perf_counter() - start < seconds):
        batch = next(batches)
        loss = trainer.step(batch)
        tokens += sum(len(sample) for part in batch for sample in part)
        rows += sum(len(part) * max(map(len, part)) for part in batch)
        taken += 1
        _synchronise(trainer.device)
    spent = time.perf_counter() - start
    return {"tokens": tokens, "rows": rows, "steps": taken, "seconds": spent, "last_loss": float(loss)}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(options: argparse.Namespace, case: Case, config: RunConfig) -> dict:
    """Train the case's jobs one after another; return the figures of an end_to_end line."""
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    model = build(options.shape, options.num_layers, device, dtype)
    jobs = list(read_jobs(config.jobs, None, None, model.config.vocab_size).values())
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    batching, found, budget = None, [], int(case.budget)
    for job in jobs:
        trainer = PeftTrainer(fresh_adapter(model, job.config, case.recompute == "full"), job.config, device)
        batching = batching or _faster(trainer, job, budget)
        batches = global_batches(job, BATCHINGS[batching], budget)
        timed_steps(trainer, batches, 0.0, 1)
        found.append(timed_steps(trainer, batches, max(case.seconds, LEAST_SECONDS) / len(jobs), case.steps))
        print(f"  {job.config.name}: {found[-1]['tokens'] / found[-1]['seconds']:,.0f} tokens/s", flush=True)
        model = trainer.model.unload()
    per_job = [int(job.data.samples.lengths.sum()) for job in jobs]
    seconds = sum(tokens * each["seconds"] / each["tokens"] for tokens, each in zip(per_job, found, strict=True))
    return {
        "tokens": sum(each["tokens"] for each in found),
        "seconds": sum(each["seconds"] for each in found),
        "tokens_per_s": sum(per_job) / seconds,
        "batching": batching,
        "padding": 1 - sum(each["tokens"] for each in found) / sum(each["rows"] for each in found),
        "memory": {"peak_bytes": [torch.cuda.max_memory_allocated() if cuda else 0]},
        "jobs": found,
    }


def _faster(trainer: PeftTrainer, job: Job, budget: int) -> str:
    """Return the way to batch in which the job's first step is faster, each tried twice."""
    rates = {}
    for name, batching in BATCHINGS.items():
        batches = global_batches(job, batching, budget)
        timed_steps(trainer, batches, 0.0, 1)
        tried = timed_steps(trainer, batches, 0.0, 1)
        rates[name] = tried["tokens"] / tried["seconds"]
    print("  batching: " + ", ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in rates.items()), flush=True)
    return max(rates, key=lambda name: rates[name])
