"""The command line: `megatron-lora`, or `python -m megatron_lora`. It parses the arguments and calls a command.

Exit status of train: 0 all jobs done; 1 a crash; 2 wrong input; 3 some jobs failed, the others are
done; 75 stopped and saved, run again to resume; 128 + a signal's number. The other commands exit
with 0, or 2 for wrong input; check-adapter with 1 for an adapter that is wrong; calibrate and verify,
which start ranks, also with 1, or 128 + a signal's number. A command's modules are imported when it
is called, so that help and config errors are quick.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lora import __version__
from megatron_lora.errors import UserError

if TYPE_CHECKING:
    from megatron_lora.config.live import Live

OVERRIDE = "an override such as defaults.learning_rate=1e-4, jobs.0.r=32 or jobs.NAME.r=32"
EXAMPLES = {
    "train": """examples:
  megatron-lora train configs/quickstart.yaml
  megatron-lora train configs/quickstart.yaml output_dir=runs/second defaults.learning_rate=1e-4
  torchrun --nproc-per-node 8 -m megatron_lora train CONFIG     the same, with torchrun started by hand

Run it again with the same output_dir to resume a run that was stopped or has crashed.
With --keep-alive a run whose jobs are over waits for others (megatron-lora add) until it is stopped. With --max-restarts N
it is started again after a crash, up to N times within --restart-window-s.

exit status: 0 all jobs done, 1 a crash, 2 wrong input, 3 some jobs failed, 75 stopped and saved, 128 + a signal's number""",
    "add": """examples:
  megatron-lora add runs/quickstart-1 job.yaml
  megatron-lora add runs/quickstart-1 job.yaml name=second learning_rate=1e-4

JOB.yaml holds one job's mapping, or jobs: with defaults: and sweep:. The jobs are checked like those of a config, their data too.""",
    "pause": """example:
  megatron-lora pause runs/quickstart-1 summaries names""",
    "resume": """example:
  megatron-lora resume runs/quickstart-1 summaries

A whole run that was stopped is resumed with megatron-lora train.""",
    "cancel": """example:
  megatron-lora cancel runs/quickstart-1 summaries

A cancelled job is over. It keeps the checkpoints that it has written.""",
    "set": """examples:
  megatron-lora set runs/quickstart-1 summaries priority=2
  megatron-lora set runs/quickstart-1 summaries names save_steps=100 early_stopping_patience=null

Only what decides no update can be set: priority, save_steps, save_total_limit, early_stopping_patience, and the keys of watchdogs.""",
    "jobs": """examples:
  megatron-lora jobs runs/quickstart-1
  megatron-lora jobs runs/quickstart-1 --json""",
    "plan": """examples:
  megatron-lora plan configs/quickstart.yaml
  megatron-lora plan configs/quickstart.yaml --plot plan.png
  megatron-lora plan configs/quickstart.yaml --device h200 microbatch_tokens=auto
  megatron-lora plan configs/quickstart.yaml --policy round-robin
  megatron-lora plan configs/quickstart.yaml parallel.pipeline=4 parallel.layers_per_stage=null""",
    "calibrate": """examples:
  megatron-lora calibrate configs/quickstart.yaml
  megatron-lora calibrate configs/one_gpu_8b.yaml --output h200.json
  megatron-lora plan configs/one_gpu_8b.yaml --cost h200.json

Run it while nothing else runs here; plan and train use its table from then on. A table that was written with --output
shows plan another machine's costs.""",
    "report": """examples:
  megatron-lora report runs/quickstart-1
  megatron-lora report runs/quickstart-1 --plot timeline.png
  megatron-lora report runs/quickstart-1 --html""",
    "sweep": """examples:
  megatron-lora sweep runs/sweep
  megatron-lora sweep runs/sweep --json
  megatron-lora sweep runs/sweep --plot sweep.png""",
    "watch": """examples:
  megatron-lora watch runs/quickstart-1
  megatron-lora watch runs/quickstart-1 --job summaries names
  megatron-lora watch runs/quickstart-1 --once

It reads the run's directory alone: Ctrl-C leaves the run as it is.""",
    "check-adapter": """examples:
  megatron-lora check-adapter runs/quickstart-1/jobs/summaries
  megatron-lora check-adapter summaries --base models/SmolLM2-135M-Instruct --server http://localhost:8000 --name summaries
  megatron-lora check-adapter summaries --base models/SmolLM2-135M-Instruct --samples held_out.jsonl

The server is vLLM. VLLM_API_KEY is sent to it where it is set.

exit status: 0 right, 1 checked and found wrong, 2 wrong input, or a server that cannot be asked""",
    "tune": """examples:
  megatron-lora tune
  megatron-lora tune --output choices.json""",
    "preview": """examples:
  megatron-lora preview configs/quickstart.yaml --job summaries
  megatron-lora preview configs/quickstart.yaml --job names --samples 5 jobs.names.sequence_len=128""",
    "verify": """examples:
  megatron-lora verify configs/quickstart.yaml --job names
  megatron-lora verify configs/quickstart.yaml --job names --steps 50 parallel.pipeline=1 parallel.layers_per_stage=null

The job is trained twice for some steps, alone and among the config's other jobs, in a temporary directory and in fp32 (unless
precision=bf16 is given, whose rounding alone is beyond the bounds).

exit status: 0 the losses agree within 1e-5 and the adapters within 1e-4, 1 they do not, or a crash, 2 wrong input""",
    "merge": """examples:
  megatron-lora merge runs/quickstart-1/jobs/summaries merged
  megatron-lora merge runs/quickstart-1/jobs/summaries=0.7 runs/quickstart-1/jobs/names=0.3 merged --base models/SmolLM2-135M-Instruct

What an adapter adds is multiplied by its WEIGHT (default: 1); of several adapters it is added up. The sum is rounded once, to the type
in which the base model is stored. The memory of the adapters is enough, whatever the size of the model.""",
    "doctor": """example:
  megatron-lora doctor""",
}


RESTARTS = (
    ("--max-restarts", int, 0, "N", "after a crash resume from the newest checkpoints, up to N times"),
    ("--restart-window-s", float, 3600.0, "S", "count the restarts of the last S seconds (default: 3600)"),
    ("--memory-share", float, 1.0, "X", "share of the memory that choices left auto count on (default: 1)"),
)

OF_CHECK = (
    ("adapter", "ADAPTER", "a PEFT directory, such as RUN/jobs/NAME"),
    ("--base", "MODEL", "its base model: directory or hub id (default: what its run or its config says)"),
    ("--server", "URL", "a running vLLM that serves it, such as http://localhost:8000"),
    ("--name", "NAME", "what the server calls it (default: what it serves from ADAPTER, else the directory's name)"),
    ("--samples", "FILE", "lines of {text} or {messages} (default: the job's validation or training data, else our texts)"),
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all errors of this program."""

    def error(self, message: str):
        """Print the message and how to get help, and exit with status 2."""
        self.exit(2, f"megatron-lora: {message}; see {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = Parser(
        prog="megatron-lora",
        description="Train many LoRA adapters at once over one frozen base model.",
        epilog="megatron-lora COMMAND --help shows examples",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"megatron-lora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    train = add("train", "train the jobs of a config; starts torchrun itself, with the ranks the config needs")
    add_jobs = add("add", "add jobs to a run, which trains them beside the others")
    pause = add("pause", "have a run leave jobs out until they are resumed; their state is kept")
    resume = add("resume", "have a run train jobs again that were paused on request")
    cancel = add("cancel", "end jobs of a run for good, before they are done")
    set_values = add("set", "change what decides no update of jobs of a run: priority, how often they are saved, when they stop early")
    jobs = add("jobs", "show the jobs of a run: state, step, losses, share of the device, place in the queue, time left")
    plan = add("plan", "show how the jobs would share the pipeline: slots, fill, bubble, seconds, memory; needs no GPU and trains nothing")
    calibrate = add("calibrate", "time the ranks of a config on this machine, for plan and train to use in place of a table's figures")
    report = add("report", "show where the time of a run went, beside what was predicted; reads the run's directory alone")
    watch = add(
        "watch", "show a run in the terminal, while it trains or after it: jobs, losses, queue, events, the newest window of the plan"
    )
    sweep = add("sweep", "show the leaderboard of a run's sweep: points, their values and what they came to; draw curves and a heat map")
    tune = add("tune", "measure how to cut matrix products on this GPU; runs that start later take the fastest")
    preview = add("preview", "show the tokens of a few samples of a job, with those that the loss counts marked")
    verify = add("verify", "train a job alone and among the others for some steps, and show how far the two adapters lie apart")
    add_commands_of_adapters(add)
    add("doctor", "show versions, devices, the backends that a run will use, what is missing and what that costs")
    for command in (train, plan, calibrate, preview, verify):
        command.add_argument("config", metavar="CONFIG", help="a YAML config")
        command.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help=OVERRIDE)
    train.add_argument("--keep-alive", action="store_true", help="wait for more jobs when all are over, until the run is stopped")
    train.add_argument("--from-older", action="store_true", help="resume from an older checkpoint where the newest one is damaged")
    train.add_argument(
        "--replay", type=Path, metavar="RUN", help="repeat the first start of a run from its events.jsonl, in another output_dir"
    )
    for flag, kind, default, metavar, help in RESTARTS:
        train.add_argument(flag, type=kind, default=default, metavar=metavar, help=help)
    controls = {add_jobs: "", pause: "NAME", resume: "NAME", cancel: "NAME", set_values: "NAME | key=value"}
    for command, words in controls.items():
        command.add_argument("run", metavar="RUN", help="the output directory of a run")
        if words:
            command.add_argument("words", nargs="+", metavar=words, help="jobs of the run" + ("; what to set" if "=" in words else ""))
        command.add_argument("--no-wait", action="store_true", help="do not wait a few seconds for the run to take the request")
    add_jobs.add_argument("file", metavar="JOB.yaml", help="a job's mapping, or jobs: with defaults: and sweep:")
    add_jobs.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help="an override such as r=32, or jobs.NAME.r=32")
    plan.add_argument("--plot", metavar="FILE", help="also draw the plan, stage by stage, into a new .png, .svg or .pdf")
    plan.add_argument("--policy", default="ours", metavar="NAME", help="ours (default), or to compare flush, round-robin, grouped, greedy")
    plan.add_argument("--device", metavar="NAME", help="predict for h100, h200, a100 or cpu (default: this machine's GPU, else h100)")
    plan.add_argument("--cost", metavar="FILE", help="take seconds from a table that calibrate has written (default: this machine's own)")
    calibrate.add_argument("--output", metavar="FILE", help="write the table here (default: below the cache directory, where it is found)")
    for command in (jobs, report, watch, sweep):
        command.add_argument("run", metavar="RUN", help="the output directory of a run")
    for command in (jobs, sweep):
        command.add_argument("--json", action="store_true", help="print JSON in place of a table")
    report.add_argument("--plot", metavar="FILE", help="also draw what ran when, and what was predicted, into a new .png, .svg or .pdf")
    report.add_argument(
        "--html", nargs="?", const="", metavar="FILE", help="write a page with curves, states, accounting and a timeline (RUN/report.html)"
    )
    sweep.add_argument("--plot", metavar="FILE", help="also draw the points' curves and a heat map into a new .png, .svg or .pdf")
    watch.add_argument("--job", nargs="+", default=[], metavar="NAME", help="show these jobs alone (default: those that train come first)")
    watch.add_argument("--once", action="store_true", help="print one frame and end")
    tune.add_argument("--output", metavar="FILE", help="add the choices to this file (default: the one that runs read)")
    verify.add_argument("--job", required=True, metavar="NAME", help="the job that is trained twice")
    verify.add_argument("--steps", type=int, default=20, metavar="N", help="how many steps (default: 20)")
    preview.add_argument("--job", required=True, metavar="NAME", help="the job whose samples are shown")
    preview.add_argument("--samples", type=int, default=3, metavar="N", help="how many samples (default: 3)")
    return parser


def add_commands_of_adapters(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the commands that take finished adapters."""
    merge = add("merge", "write adapters into their base model, as a model directory that needs no adapter")
    merge.add_argument("adapters", nargs="+", metavar="ADAPTER", help="a PEFT directory, or ADAPTER=WEIGHT")
    merge.add_argument("out", metavar="OUT", help="the directory to make")
    merge.add_argument("--base", metavar="DIR", help="the base model (default: the one that the adapters name)")
    check = add("check-adapter", "compare an adapter with peft and with a server that has it, and say what is wrong with it")
    for flag, metavar, help in OF_CHECK:
        check.add_argument(flag, metavar=metavar, help=help)


CALLS: dict[str, Callable[[Any, argparse.Namespace], int]] = {  # of the module of commands/ that has the command's name
    "add": lambda command, a: command.main(a.run, a.file, a.overrides, not a.no_wait),
    "jobs": lambda command, a: command.main(a.run, a.json),
    "plan": lambda command, a: command.main(a.config, a.overrides, policy=a.policy, plot=a.plot, device_name=a.device, cost_file=a.cost),
    "report": lambda command, a: command.main(a.run, a.plot, a.html),
    "watch": lambda command, a: command.main(a.run, a.job, a.once),
    "sweep": lambda command, a: command.main(a.run, a.json, a.plot),
    "tune": lambda command, a: command.main(a.output),
    "preview": lambda command, a: command.main(a.config, a.overrides, a.job, a.samples),
    "check-adapter": lambda command, a: command.main(a.adapter, a.base, a.server, a.name, a.samples),
    "merge": lambda command, a: command.main(a.adapters, a.out, a.base),
    "doctor": lambda command, a: command.main(),
}


def run_as_rank(arguments: argparse.Namespace) -> int:
    """Call what a rank does of a command, in a process that torchrun has started; returns the exit status."""
    from megatron_lora.commands import rank

    if arguments.command == "calibrate":
        return rank.calibrate(arguments.config, arguments.overrides, arguments.output)
    live = live_of(arguments)
    if live.max_restarts:
        raise UserError(f"--max-restarts: {live.max_restarts} is for runs without a torchrun of your own; give it to torchrun")
    return rank.main(arguments.config, arguments.overrides, live)


def run_launcher(arguments: argparse.Namespace) -> int:
    """Call a command that starts ranks, and stop it on request from its first moment on; returns the exit status."""
    from megatron_lora.commands.output_streams import keep_running_unread
    from megatron_lora.commands.stop_signals import Stopped, StopSignals, stop_reason

    keep_running_unread()
    trains = arguments.command == "train"
    try:
        with StopSignals() as signals:
            command = importlib.import_module(f"megatron_lora.commands.{'launch' if trains else arguments.command}")
            if trains:
                return command.train(arguments.config, arguments.overrides, signals, live_of(arguments))
            words = (arguments.output,) if arguments.command == "calibrate" else (arguments.job, arguments.steps)
            return command.main(arguments.config, arguments.overrides, *words, signals)
    except Stopped as stopped:
        print(f"megatron-lora: {stop_reason(stopped.number, 'it took a step' if trains else 'it had measured')}", file=sys.stderr)
        return 75 if trains else 128 + stopped.number


def live_of(arguments: argparse.Namespace) -> "Live":
    """Return what train's options say of a run beside its config."""
    from dataclasses import fields

    from megatron_lora.config.live import Live

    return Live(**{field.name: getattr(arguments, field.name) for field in fields(Live)})


def run(arguments: argparse.Namespace) -> int:
    """Call the command; returns the exit status."""
    name = arguments.command
    if name in ("train", "calibrate", "verify"):
        from megatron_lora.environment import allocator_settings

        os.environ.update(allocator_settings(os.environ))  # before CUDA starts; the ranks inherit it
        under_torchrun = name != "verify" and "RANK" in os.environ and "LOCAL_RANK" in os.environ
        return run_as_rank(arguments) if under_torchrun else run_launcher(arguments)
    if name in ("pause", "resume", "cancel", "set"):
        from megatron_lora.commands import control

        return control.control(arguments.run, name, arguments.words, not arguments.no_wait)
    return CALLS[name](importlib.import_module(f"megatron_lora.commands.{name.replace('-', '_')}"), arguments)


def main(argv: list[str] | None = None) -> int:
    """Run one command of the command line; returns the exit status."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    flags = [argument for argument in rest if argument.startswith("-")]
    several = getattr(arguments, "overrides", getattr(arguments, "words", None))
    if flags or (rest and several is None):
        parser.error(f"unknown argument {(flags or rest)[0]!r}")
    if several is not None:  # argparse stops taking them at the first flag
        several += rest
    try:
        return run(arguments)
    except UserError as error:
        from megatron_lora.errors import one_line

        print(f"megatron-lora: {one_line(error, 1000)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # Ctrl-C in a command that starts no ranks
        print("megatron-lora: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `megatron-lora plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
