"""What `megatron-lora calibrate` does: check the config and start its ranks on this machine, to time themselves (training/calibrate.py)."""

import dataclasses
from pathlib import Path

from megatron_lora.commands import launch
from megatron_lora.commands.checks import check_devices, read_inputs
from megatron_lora.commands.stop_signals import StopSignals
from megatron_lora.config.schema import load_config
from megatron_lora.errors import UserError
from megatron_lora.model.backends import check_backends


def main(config_path: str, overrides: list[str], output: str | None, signals: StopSignals) -> int:
    """Measure the cost table of a config's ranks on this machine; returns 0, or 1 where a rank crashed."""
    config = load_config(config_path, overrides)
    if output is not None and (Path(output).is_dir() or not Path(output).absolute().parent.is_dir()):
        raise UserError(f"--output: {output!r} is no file in a folder that is there; name one")
    check_backends(config)
    check_devices(config.parallel.world_size)
    read_inputs(dataclasses.replace(config, load_weights=False))
    ranks = config.parallel.world_size
    flags = [] if output is None else ["--output", output]
    command = [*launch.torchrun_arguments(ranks, launch.Nodes()), "-m", "megatron_lora", "calibrate", config_path, *overrides, *flags]
    return launch.report_ending(launch.start_ranks(command, ranks, None, signals, undone="its table was written")).status
