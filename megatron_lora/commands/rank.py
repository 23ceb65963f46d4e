"""One rank of a run: what `train` and `calibrate` do under torchrun.

Started by launch.py, everything has been checked and the output directory made; under a bare torchrun rank 0 does both before it
joins the others. A run's exit status goes into status.json and the rank ends 0, since torchrun passes no statuses on; under a bare
torchrun rank 0 also ends with it. An exception is recorded for torchrun, and the rank leaves at once, without waiting for peers.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_lora.commands.torchrun import die_with_parent, record_failure
from megatron_lora.config.schema import RunConfig, load_config
from megatron_lora.errors import UserError
from megatron_lora.output.run_directory import RunDirectory, job_states
from megatron_lora.training.stop_request import StopRequest

LAUNCHED = "MEGATRON_LORA_LAUNCHED"  # set by launch.py for the ranks that it starts


def under_torchrun() -> bool:
    """Whether torchrun started this process as a rank."""
    return "RANK" in os.environ and "LOCAL_RANK" in os.environ


def main(config_path: str, overrides: list[str]) -> int:
    """Train as one rank; returns the exit status, or leaves the process when it fails."""
    rank, launched, stop = int(os.environ["RANK"]), LAUNCHED in os.environ, StopRequest()
    if launched:
        stop.listen()

    def work() -> int:
        config = load_config(config_path, overrides)
        return _first_rank(config, launched, stop) if rank == 0 else _run(config, stop)

    status = _ended_in_words(work)
    return 0 if launched or rank > 0 else status


def calibrate(config_path: str, overrides: list[str], output: str | None) -> int:
    """Calibrate as one rank; returns 0, or leaves the process when it fails."""
    if LAUNCHED in os.environ:
        StopRequest().listen()  # there is nothing to save: whoever asks ends the rank

    def work() -> int:
        config = load_config(config_path, overrides)
        _check_world_size(config)
        import torch.distributed as dist

        from megatron_lora.training import calibrate

        calibrate.run(config, None if output is None else Path(output))
        dist.destroy_process_group()
        return 0

    return _ended_in_words(work)


def _ended_in_words(work: Callable[[], int]) -> int:
    """Return what a rank's work returns; a failure is recorded for torchrun, told where nobody else tells it, and ends the process."""
    if LAUNCHED in os.environ:
        die_with_parent()
    try:
        return work()
    except UserError as error:
        if os.environ["RANK"] == "0" and LAUNCHED not in os.environ:
            print(f"megatron-lora: {error}", file=sys.stderr)
        _leave(error, 2)
    except BaseException as error:
        _leave(error, 1)


def _first_rank(config: RunConfig, launched: bool, stop: StopRequest) -> int:
    """Train as rank 0, which holds the output directory and records how the run ended."""
    if launched:
        run_directory = RunDirectory.join(config)
    else:
        from megatron_lora.commands.checks import check_run
        from megatron_lora.environment import environment

        _check_world_size(config)
        check_run(config)
        run_directory = RunDirectory.create(config, environment())
    with run_directory:
        status = _run(config, stop)
        if status == 0 and "failed" in job_states(run_directory.path).values():
            status = 3  # in an earlier start of the run
        run_directory.finish(status)
    return status


def _run(config: RunConfig, stop: StopRequest) -> int:
    """Check the number of ranks and hand over to train.py."""
    _check_world_size(config)
    import torch.distributed as dist

    from megatron_lora.training import train

    status = train.run(config, stop)
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


def _check_world_size(config: RunConfig) -> None:
    """Refuse any number of ranks but the one that the config asks for."""
    needed, started = config.parallel.world_size, int(os.environ["WORLD_SIZE"])
    if started != needed:
        parallel = config.parallel
        raise UserError(
            f"parallel: pipeline {parallel.pipeline} x tensor {parallel.tensor} x data {parallel.data} needs {needed} ranks and "
            f"torchrun started {started}; start it with --nproc-per-node {needed}, or run megatron-lora train without torchrun"
        )


def _leave(error: BaseException, status: int) -> NoReturn:
    """Record the exception and end this process now: peers that wait for it would hang its clean-up."""
    record_failure(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
