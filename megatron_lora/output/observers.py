"""The observers of a run: files, TensorBoard, the display, and Weights & Biases when a project is set.

observers = make_observers(output_dir, jobs)    # on the rank that reports; call close() on each at the end, also after an error
for observer in observers: observer.on_step(report)
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_lora.errors import UserError
from megatron_lora.output.display import make_display
from megatron_lora.output.metrics import JobSummary, JsonlMetrics, Observer
from megatron_lora.output.trackers import TensorBoardMetrics, WandbMetrics

WANDB_PROJECT = "MEGATRON_LORA_WANDB"  # environment variable: the Weights & Biases project to report to


def make_observers(output_dir: str | Path, jobs: Sequence[JobSummary], environment: Mapping[str, str] = os.environ) -> tuple[Observer, ...]:
    """Start the observers of a run; Weights & Biases is one of them if the environment names a project.

    When one cannot start, those that have started are closed.
    """
    observers: list[Observer] = [JsonlMetrics(output_dir), TensorBoardMetrics(output_dir)]
    if environment.get(WANDB_PROJECT):
        observers.append(WandbMetrics(output_dir, environment[WANDB_PROJECT]))
    observers.append(make_display())
    started: list[Observer] = []
    try:
        for observer in observers:
            if jobs:
                observer.on_start(jobs)
            started.append(observer)
    except UserError:
        for observer in started:
            observer.close()
        raise
    return tuple(observers)
