"""Predicts the runs that need several GPUs (several_runs.py) from tables that profile_layers.py has measured on one.

    python scripts/bench/predict_several_gpus.py --memory-gb 85,150 [--only 32b] [--split] [-- --layers 32,32]

predicted_run.py says how, and what is assumed. Each run is predicted at each of its token budgets, and the fastest that fits is kept.
Appended to results/predictions.jsonl: a line per run and memory (`prediction`), a line per ratio between two of them (`ratio`), and for
every run of results/end_to_end.jsonl that has a table, the same beside what was measured (`measured`): how far the method can be trusted.
A run without a table is left out, and said. Memory is what a GPU shows a program: an H100 of 80 GB 85, an H200 of 141 GB 150.

`--pace` is the speed of a long run, of its table's; by itself it is what the one-GPU runs of the tables' commit and hardware show, so that
all of a prediction comes from one GPU.
"""

import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from e2e_options import Case, policies_in_runs, policies_in_words, read_options  # noqa: E402
from layer_table import at_pace, fit_error, read_table, read_tables, table_name  # noqa: E402
from one_line import OneLineParser, json_lines, numbers, output_file, positive  # noqa: E402
from predicted_run import Link, Prediction, predict  # noqa: E402
from several_runs import Run, check_runs, chosen, ratios  # noqa: E402
from stamp import RESULTS, append_line, stamp  # noqa: E402

from megatron_lora.errors import UserError  # noqa: E402
from scheduling.cost import DEVICES, Device  # noqa: E402
from scheduling.policies import POLICIES  # noqa: E402

NVLINK_GB_S = 450.0  # of an H100 or H200, in each direction


def parser() -> OneLineParser:
    """Return the options."""
    found = OneLineParser(prog="predict_several_gpus.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    found.add_argument("--tables", type=Path, default=RESULTS / "layers.jsonl")
    found.add_argument(
        "--memory-gb", type=numbers(positive), default=(85.0, 150.0), help="of each GPU as it shows it, one prediction for each"
    )
    found.add_argument("--only", type=chosen, default="", help="runs whose names begin so: 32b,8b-tp2")
    found.add_argument("--split", action="store_true", help="move layers between stages, as `end_to_end.py --layers` can, by the tables")
    found.add_argument("--link-gb-s", type=positive, default=0.75 * NVLINK_GB_S, help="what messages reach, in each direction")
    found.add_argument("--link-us", type=positive, default=50.0, help="what a message takes besides")
    found.add_argument("--pace", type=positive, help="of long runs, of the tables' speed; default: as one-GPU runs of their commit show")
    found.add_argument("--measured", type=Path, default=RESULTS / "end_to_end.jsonl", help="runs to compare with")
    found.add_argument("--output", type=output_file, default=RESULTS / "predictions.jsonl")
    found.add_argument("passed", nargs="*", help="after --: options of end_to_end.py, as --layers 32,32")
    return found


def device_of(memory_gb: float) -> Device:
    """Return the GPU of the table with so much memory."""
    return replace(DEVICES["h100"], memory_bytes=memory_gb * 1e9)


def figures(found: Prediction) -> dict:
    """Return a prediction in numbers, as a line has it."""
    run, layers = found.forecast.figures, found.config.parallel.layers_per_stage or ()
    bubbles = [found.forecast.timeline.bubble(stage) for stage in range(len(layers))]
    return {
        "tokens_per_s": found.tokens_per_s,
        "makespan_s": run.seconds,
        "tokens": run.tokens,
        "slots": run.slots,
        "noops": run.noops,
        "fill": run.fill,
        "bubble": statistics.fmean(bubbles),
        "bubbles": bubbles,
        "communication": found.communication,
        "peak_gb": [peak / 1e9 for peak in found.peaks],
        "peaks": ", ".join(f"{peak / 1e9:.1f}" for peak in found.peaks),
        "fits": found.fits,
        "budget": found.config.microbatch_tokens,
        "layers": ", ".join(map(str, layers)),
        "recompute": policies_in_words(found.config.recompute),
        "layer_recompute": policies_in_runs(found.config.recompute),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """Makes lines of predictions from a file of tables, at a pace; `passed` are options of end_to_end.py for all runs."""

    tables: Path
    link: Link
    passed: tuple[str, ...] = ()
    split: bool = False
    pace: float = 1.0

    def table(self, shape: str, base_weights: str, tensor: int, adapters: str) -> dict:
        """Return the newest table of a shape and kind, at this pace; UserError where there is none."""
        return at_pace(read_table(self.tables, table_name(shape, base_weights, tensor, adapters)), self.pace)

    def at_best_budget(self, run: Run, device: Device) -> tuple[Case, Prediction, dict]:
        """Return a run at the fastest of its budgets that fits (or at the smallest where none does), and the table it is predicted from."""
        found = []
        for budget in run.budgets:
            options, (case,) = read_options([*run.options(), "--budget", str(budget), *self.passed])
            table = self.table(options.shape, case.base_weights, options.tensor, case.adapters)
            found.append((case, predict(options, case, table, device, self.link, split=self.split), table))
        fitting = [each for each in found if each[1].fits]
        return max(fitting, key=lambda each: each[1].tokens_per_s) if fitting else found[0]

    def lines(self, runs: Sequence[Run], memory_gb: float) -> Iterator[dict]:
        """Predict runs on GPUs of so much memory, then the ratios between them."""
        rates: dict[str, float] = {}
        on = f"{memory_gb:g} GB{', split by the table' if self.split else ''}"
        for run in runs:
            try:
                case, found, table = self.at_best_budget(run, device_of(memory_gb))
            except UserError as error:
                print(f"left out: {run.name}: {error}", file=sys.stderr)
                continue
            rates[run.name] = found.tokens_per_s
            yield {
                "case": f"{case.name}, {on}",
                "run": run.name,
                "goal": run.goal,
                "gpus": run.gpus,
                "memory_gb": memory_gb,
                "hardware": f"predicted for {run.gpus} x {memory_gb:g} GB from {table['hardware']}",
                "prediction": figures(found),
                "table": origin(table),
            }
        for ratio in ratios(rates):
            yield {"case": f"{ratio['fast']} over {ratio['slow']}, {on}", "memory_gb": memory_gb, "hardware": "predicted"} | ratio

    def beside(self, line: dict) -> dict | None:
        """Return a measured run beside its prediction: same steps, layers and recomputation. None where it is of a kind without a table."""
        settings, results = line["settings"], line["results"]
        recompute = settings.get("layer_recompute", settings["settled_recompute"])
        jobs, parallel = settings["jobs"], settings["parallel"]
        if settings["policy"] not in POLICIES or "prediction" not in results or any(jobs["dropouts"]) or "+" in recompute:
            return None
        try:
            table = self.table(settings["shape"], settings["base_weights"], parallel["tensor"], settings["adapters"])
        except UserError:
            return None
        words = {name: settings[name] for name in ("shape", "workload", "policy", "adapters")} | {"recompute": recompute}
        words |= {name: parallel[name] for name in ("pipeline", "tensor", "data")} | {"base-weights": settings["base_weights"]}
        words |= {"layers": ",".join(map(str, parallel["layers_per_stage"])), "budget": settings["microbatch_tokens"]}
        words |= {"jobs": jobs["count"], "ranks": ",".join(map(str, jobs["ranks"])), "completion": jobs["completion"]}
        words |= {"steps": results["steps"]} | ({"num-layers": settings["num_layers"]} if settings["num_layers"] else {})
        flags = ["--sequence"] if parallel["sequence"] else []
        options, (case,) = read_options(
            [*self.passed, *(word for name, value in words.items() for word in (f"--{name}", str(value))), *flags]
        )
        by_figures = results["prediction"]["cost_from"] == "table figures"
        found = predict(options, case, table, DEVICES["h200"], self.link, by_figures=by_figures)
        real = {name: results[name] for name in ("tokens_per_s", "bubble", "bubbles", "slots", "noops", "exposed_communication")}
        makespan_s = results["prediction"]["real_s"]
        return {
            "case": f"{line['case']}, on {line['hardware']}",
            "hardware": f"predicted from {table['hardware']}",
            "prediction_of": figures(found),
            "measured": real | {"makespan_s": makespan_s, "commit": line["commit"], "hardware": line["hardware"]},
            "predicted_over_real": found.forecast.figures.seconds / makespan_s,
            "table": origin(table),
        }


def pace_of(predictor: Predictor, measured: Iterable[dict]) -> tuple[float, list[str]]:
    """Return predicted / real of the runs on the GPU and commit of their table (the median; 1 where there are none), and their cases.

    `predictor` predicts at the tables' own pace.
    """
    marks = {(table["commit"], table["hardware"]) for table in read_tables(predictor.tables)}
    found = {}
    for line in measured:
        mark = line["commit"], line["hardware"]
        beside = predictor.beside(line) if mark in marks else None
        if beside and mark == (beside["table"]["commit"], beside["table"]["hardware"]):
            found[line["case"]] = beside["predicted_over_real"]
    return (statistics.median(found.values()) if found else 1.0), list(found)


def origin(table: dict) -> dict:
    """Say where a table was measured, and how well its costs fit."""
    return {key: table[key] for key in ("case", "commit", "hardware", "date", "settings")} | {"fit_error": fit_error(table)}


def main(arguments: list[str]) -> int:
    """Predict, print and keep; 2 where there is nothing to predict from."""
    options = parser().parse_args(arguments)
    try:
        check_runs(options.only, options.passed)
        read_tables(options.tables)
        measured = json_lines(options.measured)
    except UserError as error:
        parser().error(str(error))
    link = Link(bytes_per_s=options.link_gb_s * 1e9, latency_s=options.link_us / 1e6)
    predictor = Predictor(tables=options.tables, link=link, passed=tuple(options.passed), split=options.split)
    pace, cases = (options.pace, ["--pace"]) if options.pace else pace_of(predictor, measured)
    print(f"pace: {pace:.3f} of the tables', by {', '.join(cases) or 'nothing that was measured'}", flush=True)
    predictor = replace(predictor, pace=pace)
    mark = stamp() | {"link": {"gb_s": options.link_gb_s, "us": options.link_us}, "pace": pace, "pace_of": cases}

    def keep(line: dict, told: str) -> None:
        append_line(options.output, mark | line)
        print(f"{line['case']}: {told}", flush=True)

    predicted = 0
    for memory_gb in options.memory_gb:
        for line in predictor.lines(options.only, memory_gb):
            predicted += 1
            keep(line, summary(line["prediction"]) if "prediction" in line else f"{line['ratio']:.3f} {line['goal']}")
    if not predicted:
        parser().error(f"--tables: {options.tables} has a table of none of these runs; write some with profile_layers.py")
    for line in map(predictor.beside, measured):
        if line is not None:
            keep(line, f"predicted / real {line['predicted_over_real']:.3f}; predicted {summary(line['prediction_of'])}")
    return 0


def summary(found: dict) -> str:
    """Say the figures that matter in one line."""
    words = [f"{found['tokens_per_s']:,.0f} tokens/s", f"{found['makespan_s']:.1f} s", f"bubble {found['bubble']:.1%}"]
    words += [f"communication {found['communication']:.2%}", f"layers {found['layers']}", found["recompute"]]
    return ", ".join([*words, f"peaks {found['peaks']} GB{'' if found['fits'] else ': TOO MUCH'}"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
