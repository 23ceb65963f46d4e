"""What `megatron-lora report` says of a run: real beside predicted, and where the time of each stage went. Reads its directory alone.

First the files that its jobs left, adapters too, are compared with the digests that the run recorded.
"""

from pathlib import Path

from megatron_lora.commands.finished_run import FinishedRun
from megatron_lora.errors import UserError
from megatron_lora.output.final_files import check_run_files
from megatron_lora.output.report_page import write_report_page
from megatron_lora.planning.plan_picture import check_plot_path, draw

COLUMNS = {
    "F": "forward",
    "E": "evaluation",
    "B": "backward",
    "STEP": "step",
    "wait F": "wait F",
    "wait B": "wait B",
    "wait plan": "wait plan",
}  # by span


def main(run_path: str, plot: str | None, html: str | None = None) -> int:
    """Print the report of a run, and draw it into the file `plot`; returns 0.

    With `html` write a page into that file, or for "" into the run's report.html, also of a run that has
    not ended; the report is printed too only where it is drawn.
    """
    if plot is not None:
        check_plot_path(plot)
    check_run_files(Path(run_path))
    if html is not None:
        print(f"Report: {write_report_page(Path(run_path), _checked(html) if html else None)}")
        if plot is None:
            return 0
    run = FinishedRun.read(Path(run_path))
    print("\n".join(report(run)))
    if plot is not None:
        panels = [("real", run.real()), *([("predicted", run.predicted())] if run.is_complete else [])]
        draw(plot, panels, run.stream, [run.names.get(number, "") for number in range(1 + max(run.names))], "seconds")
    return 0


def _checked(page: str) -> Path:
    """Return the path of a page to write; UserError where it exists or lies in no directory."""
    if Path(page).exists():
        raise UserError(f"--html: {page!r} exists; choose another name, or remove it")
    if not Path(page).absolute().parent.is_dir():
        raise UserError(f"--html: {page!r} lies in no directory; make {str(Path(page).parent)!r} first")
    return Path(page)


def report(run: FinishedRun) -> list[str]:
    """Return the report, line by line."""
    busy = [slot for number, slot in enumerate(run.slots) if slot and number not in run.evaluated]
    noops = len(run.slots) - len(busy) - len(run.evaluated)
    parallel, budget = run.config.parallel, int(run.config.microbatch_tokens)
    multiple = parallel.row_multiple
    rows = sum(-(-sum(entry[3] for entry in slot) // multiple) * multiple for slot in busy) * parallel.data
    lines = [
        f"{run.path}: {len(run.names)} jobs, {len(run.steps)} steps, {run.tokens:,} tokens in {run.makespan_s:.2f} s: "
        f"{run.tokens / run.makespan_s:,.0f} tokens/s",
        f"{len(run.slots)} slots, {f'{len(run.evaluated)} of them forward alone, ' if run.evaluated else ''}{noops} of them no-ops, "
        f"the others {run.tokens / (len(busy) * budget * parallel.data):.0%} full; "
        f"padding {1 - run.tokens / rows:.1%} of the rows; efficiency {_efficiency(run):.1%}, the share of all stages' time in forwards "
        "and backwards",
        "",
    ]
    return [*lines, *_comparison(run), "", *_stage_table(run), *_hops(run)]


def _efficiency(run: FinishedRun) -> float:
    passes = sum(run.seconds(stage, kind) for stage in range(run.num_stages) for kind in ("F", "E", "B"))
    return passes / (run.num_stages * run.makespan_s)


def _comparison(run: FinishedRun) -> list[str]:
    """Say how long the run should have taken."""
    if not run.is_complete:
        return ["The timeline holds the last part of this long run alone: nothing to compare with the prediction."]
    predicted, replayed = run.predicted().makespan_s, run.replayed().makespan_s
    return [
        f"predicted {predicted:.2f} s, {predicted / run.makespan_s:.3f} of the real time, by {run.cost['basis']}",
        f"replayed  {replayed:.2f} s, {replayed / run.makespan_s:.3f} of it: the plan, each pass as long as it was; the rest is messages, "
        "launches and late plans",
    ]


def _stage_table(run: FinishedRun) -> list[str]:
    """One line per stage: the shares of its time, and how long it was predicted to be idle."""
    names = ["stage", *COLUMNS.values(), "other", "bubble", "predicted"]
    widths = [max(9, len(name)) for name in names]
    lines = [" ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))]
    predicted = run.predicted() if run.is_complete else None
    for stage in range(run.num_stages):
        shares = [run.seconds(stage, kind) / run.makespan_s for kind in COLUMNS]
        shares += [max(0.0, 1 - sum(shares)), run.bubble(stage)]
        cells = [str(stage), *(f"{share:.1%}" for share in shares), f"{predicted.bubble(stage):.1%}" if predicted else ""]
        lines.append(" ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    return lines


def _hops(run: FinishedRun) -> list[str]:
    """Say which part of the waiting was for messages that were under way, and not for a neighbour's work."""
    hops = run.exposed_hops()
    if not hops:
        return []
    return ["", "waited for messages under way: " + ", ".join(f"{hop} {share:.2%}" for hop, share in hops.items()) + " of the time"]
