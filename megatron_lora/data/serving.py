"""How an adapter has to be served where the base model's defaults are not what it was trained with: for its card and the end of a run."""

from megatron_lora.config.schema import JobConfig
from megatron_lora.data.left_out import NO_THOUGHT
from megatron_lora.data.samples import JobData


def serving_advice(job: JobConfig, data: JobData) -> str:
    """Return sentences on how to serve a job's adapter; empty where the base model's defaults serve it."""
    advice = []
    if job.chat_template is not None:
        advice.append(f"It was trained with the chat template {job.chat_template}, so serve it with that one.")
    if job.chat_template_kwargs:
        given = ", ".join(f"{name}={value!r}" for name, value in job.chat_template_kwargs.items())
        advice.append(f"Its chat template was given {given}, so give it the same.")
    if data.notes.get(NO_THOUGHT) and "enable_thinking" not in (job.chat_template_kwargs or {}):
        advice.append(
            f"The answers of {data.notes[NO_THOUGHT]:,} of its {data.num_records:,} records have no thought, so serve it with "
            "enable_thinking=False, or whatever turns thoughts off in the chat template."
        )
    return " ".join(advice)
