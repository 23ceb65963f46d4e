"""The observers of a run: files, TensorBoard, the display, and Weights & Biases when a project is set.

observers = make_observers(output_dir)    # on the rank that reports; call close() on each at the end, also after an error
for observer in observers: observer.on_step(report)
"""

import os
from collections.abc import Mapping
from pathlib import Path

from megatron_lora.output.display import make_display
from megatron_lora.output.metrics import JsonlMetrics, Observer
from megatron_lora.output.trackers import TensorBoardMetrics, WandbMetrics

WANDB_PROJECT = "MEGATRON_LORA_WANDB"  # environment variable: the Weights & Biases project to report to


def make_observers(output_dir: str | Path, environment: Mapping[str, str] = os.environ) -> tuple[Observer, ...]:
    """Make the observers of a run; Weights & Biases is one of them if the environment names a project."""
    observers: list[Observer] = [JsonlMetrics(output_dir), TensorBoardMetrics(output_dir)]
    if environment.get(WANDB_PROJECT):
        observers.append(WandbMetrics(output_dir, environment[WANDB_PROJECT]))
    return (*observers, make_display())
