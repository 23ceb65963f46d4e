"""One rank of a run: what `train` and `calibrate` do under torchrun.

launch.py has checked everything and made the output directory before it starts a rank. Under a bare
torchrun, rank 0 does both before it joins the others. The run's exit status is written to
status.json, and a rank exits with 0, because torchrun does not pass on other statuses; only rank 0
under a bare torchrun exits with the run's status. A rank that raises records the exception for
torchrun and exits at once, without waiting for the other ranks.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_lora.commands.output_streams import keep_running_unread
from megatron_lora.commands.torchrun import die_with_parent, record_failure
from megatron_lora.config.live import Live
from megatron_lora.config.schema import RunConfig, load_config
from megatron_lora.errors import UserError
from megatron_lora.output.report_page import write_report_page
from megatron_lora.output.run_directory import RunDirectory
from megatron_lora.output.whereabouts import Whereabouts
from megatron_lora.training.stop_request import StopRequest

LAUNCHED = "MEGATRON_LORA_LAUNCHED"  # set by launch.py for the ranks that it starts: a folder of its own


def main(config_path: str, overrides: list[str], live: Live) -> int:
    """Train as one rank; returns the exit status, or ends the process on an exception."""
    stop = StopRequest()
    status = _as_rank(lambda: _train(_load(config_path, overrides), stop, live), stop)
    return 0 if LAUNCHED in os.environ else status


def calibrate(config_path: str, overrides: list[str], output: str | None) -> int:
    """Calibrate as one rank; returns 0, or ends the process on an exception."""

    def work() -> int:
        config = _load(config_path, overrides)
        import torch.distributed as dist

        from megatron_lora.training import calibrate

        calibrate.run(config, None if output is None else Path(output))
        dist.destroy_process_group()
        return 0

    return _as_rank(work, StopRequest())  # there is nothing to save: a request ends the rank


def _as_rank(work: Callable[[], int], stop: StopRequest) -> int:
    """Return what a rank's work returns; an exception is recorded for torchrun, printed if no other process does, and ends the process."""
    launched = LAUNCHED in os.environ
    keep_running_unread()
    if launched:
        stop.listen()
        die_with_parent()
    try:
        return work()
    except UserError as error:
        stop.fails = True
        if os.environ["RANK"] == "0" and not launched:
            print(f"megatron-lora: {error}", file=sys.stderr)
        _exit_now(error, 2)
    except BaseException as error:
        stop.fails = True
        _exit_now(error, 1)


def _load(config_path: str, overrides: list[str]) -> RunConfig:
    """Load the config; UserError unless torchrun started as many ranks as it needs."""
    config = load_config(config_path, overrides)
    parallel, needed, started = config.parallel, config.parallel.world_size, int(os.environ["WORLD_SIZE"])
    if started != needed:
        raise UserError(
            f"parallel: pipeline {parallel.pipeline} x tensor {parallel.tensor} x data {parallel.data} needs {needed} ranks and "
            f"torchrun started {started}; start it with --nproc-per-node {needed}, or run megatron-lora train without torchrun"
        )
    return config


def _train(config: RunConfig, stop: StopRequest, live: Live) -> int:
    """Train, and return the run's status as rank 0, which locks the output directory and records how the run ended; others return 0."""
    if os.environ["RANK"] != "0":
        _run(config, stop, live)
        return 0
    if LAUNCHED in os.environ:
        run_directory = RunDirectory.join(config)
    else:
        from megatron_lora.commands.checks import check_run, choice, config_to_repeat, say_failed
        from megatron_lora.environment import environment

        config = config_to_repeat(config, live)
        inputs = check_run(config, from_older=live.from_older, keep_alive=live.keep_alive)
        say_failed(inputs)
        chosen = choice(live.from_older)
        run_directory = RunDirectory.create(config, environment(), inputs.failed, chosen, inputs.rests_on, live.keep_alive)
    with run_directory:
        _run(config, stop, live)
        status = run_directory.finish()
        write_report_page(run_directory.path)
    return status


def _run(config: RunConfig, stop: StopRequest, live: Live) -> None:
    import torch.distributed as dist

    from megatron_lora.training import train

    folder = os.environ.get(LAUNCHED)
    train.run(config, stop, live, None if folder is None else Whereabouts(Path(folder), int(os.environ["RANK"])).begin)
    if dist.is_initialized():
        dist.destroy_process_group()


def _exit_now(error: BaseException, status: int) -> NoReturn:
    """Record the exception and end this process without clean-up, which would wait for the other ranks."""
    record_failure(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
