"""What `megatron-lora preview` says: a few rows of a job as the trainer will see them, the targets of its loss set apart."""

import sys

from megatron_lora.config import load_config
from megatron_lora.config_rules import suggest
from megatron_lora.errors import UserError


def main(config_path: str, overrides: list[str], job_name: str, num_samples: int) -> int:
    """Print the first rows of a job, targets in green on a terminal and between « and » elsewhere; returns 0."""
    if num_samples < 1:
        raise UserError(f"--samples: {num_samples} is too few; use a whole number of at least 1")
    config = load_config(config_path, overrides)
    jobs = {job.name: job for job in config.jobs}
    if job_name not in jobs:
        raise UserError(f"--job: no job is called {job_name!r}{suggest(job_name, jobs)}; the jobs are {', '.join(jobs)}")
    from megatron_lora.checks import check_files
    from megatron_lora.data import load_tokenizer
    from megatron_lora.hub import resolve_base_model
    from megatron_lora.preview_rows import preview_rows, show_preview

    check_files(config)
    for row in preview_rows(jobs[job_name], load_tokenizer(resolve_base_model(config.base_model)), num_samples):
        print(show_preview(row, color=sys.stdout.isatty()))
    return 0
