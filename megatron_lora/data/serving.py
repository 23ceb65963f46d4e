"""How an adapter has to be served where the base model's defaults are not what it was trained with: for its card and the end of a run."""

from pathlib import Path

from megatron_lora.config.schema import JobConfig
from megatron_lora.data.chat_template import chat_settings
from megatron_lora.data.left_out import NO_THOUGHT
from megatron_lora.data.samples import JobData
from megatron_lora.errors import UserError

SWITCH = "enable_thinking"  # what chat templates call it
MAY_HOLD_A_TEMPLATE = ("chat_template.jinja", "tokenizer_config.json")


def serving_advice(job: JobConfig, data: JobData, model_dir: Path) -> str:
    """Return sentences on how to serve a job's adapter; empty where the base model's defaults serve it."""
    advice = []
    if job.chat_template is not None:
        advice.append(f"It was trained with the chat template {job.chat_template}, so serve it with that one.")
    if job.chat_template_kwargs:
        given = ", ".join(f"{name}={value!r}" for name, value in job.chat_template_kwargs.items())
        advice.append(f"Its chat template was given {given}, so give it the same.")
    if data.notes.get(NO_THOUGHT) and SWITCH not in (job.chat_template_kwargs or {}):
        switch = f'{SWITCH}=False (of a request: `"chat_template_kwargs": {{"{SWITCH}": false}}`)'
        advice.append(
            f"The answers of {data.notes[NO_THOUGHT]:,} of its {data.num_records:,} records have no thought, so serve it with "
            f"{switch if _has_switch(job, model_dir) else 'whatever turns thoughts off in the chat template'}."
        )
    return " ".join(advice)


def _has_switch(job: JobConfig, model_dir: Path) -> bool:
    """Whether the chat template of a job, its own or the base model's, knows the variable that turns thoughts off."""
    files = [model_dir / name for name in MAY_HOLD_A_TEMPLATE]
    try:
        own = chat_settings(job).template
        return SWITCH in own if own else any(SWITCH.encode() in file.read_bytes() for file in files if file.is_file())
    except (UserError, OSError):  # a file that is gone since the data were read
        return False
