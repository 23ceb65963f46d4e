"""Shows what training changed: one question per job, answered by the base model and through the job's adapter.

The adapters are read with `peft` from the run's directories, as any user would read them. `transformers` generates the answers,
greedily. HELD_OUT.json maps a job's name to a row of its dataset's type; the question is the row up to its first
target token, tokenised as in training, and the reference is the rest of the row.

    python scripts/show_answers.py runs/quickstart-1 data/quickstart/held_out.json
"""

import json
import sys
import textwrap
import warnings
from pathlib import Path

import torch
from one_line import OneLineParser, ended
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from megatron_lora.config.schema import JobConfig, load_config
from megatron_lora.data.row_formats import RecordEncoder
from megatron_lora.errors import UserError

MAX_NEW_TOKENS = 24
MAX_LINES = 4
WIDTH = 110


def question_and_reference(encoder: RecordEncoder, job: JobConfig, row: dict) -> tuple[list[int], list[int]]:
    """Tokenise a row as in training and cut it before its first target."""
    encoded = encoder.encode(row, job.datasets[0].type, False, job.name)
    start, end = int(encoded.targets.argmax()), encoded.border or len(encoded.tokens)  # of a pair the chosen answer
    return encoded.tokens[:start].tolist(), encoded.tokens[start:end].tolist()


def answer(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, question: list[int]) -> str:
    """Continue the question greedily; returns the new text alone."""
    prompt = torch.tensor([question], device=model.device)
    with torch.inference_mode():
        ids = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(ids[0, len(question) :], skip_special_tokens=True)


def question_text(row: dict) -> str:
    """Return a row's question, without template and answer."""
    turns = row.get("messages") or row.get("prompt")
    if isinstance(turns, list):
        return next(turn["content"] for turn in turns if turn["role"] == "user")
    return "\n".join(text for key, text in row.items() if key not in ("completion", "output"))


def show(label: str, text: str) -> None:
    """Print a labelled text, cut after a few lines."""
    lines = [part for line in text.strip().splitlines() for part in textwrap.wrap(line, WIDTH, drop_whitespace=False)]
    if len(lines) > MAX_LINES:
        lines = [*lines[:MAX_LINES], "..."]
    for number, line in enumerate(lines or ["(nothing)"]):
        print(f"  {label if number == 0 else '':10}{line.rstrip()}")


def main() -> None:
    """Print question, reference and both answers for each job that has an adapter."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("held_out", type=Path)
    arguments = parser.parse_args()
    config = load_config(arguments.run / "config.yaml")
    try:
        held_out = json.loads(arguments.held_out.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{arguments.held_out} cannot be read ({error}); name the JSON file that make_tasks.py writes") from None
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft's calls of transformers
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(config.base_model, trust_remote_code=False)
    encoder = RecordEncoder(tokenizer)
    base = AutoModelForCausalLM.from_pretrained(config.base_model, trust_remote_code=False, dtype=torch.float32)
    jobs = [job for job in config.jobs if job.name in held_out and (arguments.run / "jobs" / job.name / "adapter_config.json").exists()]
    questions = [question_and_reference(encoder, job, held_out[job.name]) for job in jobs]
    before = [answer(base, tokenizer, question) for question, _ in questions]
    for job, (question, reference), answer_before in zip(jobs, questions, before, strict=True):
        adapted = PeftModel.from_pretrained(base, arguments.run / "jobs" / job.name)
        print(f"\n{job.name}")
        show("question", question_text(held_out[job.name]))
        show("reference", tokenizer.decode(reference, skip_special_tokens=True))
        show("before", answer_before)
        show("after", answer(adapted, tokenizer, question))
        base = adapted.unload()


if __name__ == "__main__":
    sys.exit(ended(main))
