"""Draws a plan: one lane per stage, time to the right, a bar per forward (pale) and backward (full colour), one colour per job.

The bar of a microbatch that several jobs share is divided by their tokens, so the picture shows which
job's work fills which bubble.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_lora.errors import UserError
from scheduling.simulate import Timeline
from scheduling.types import Op, Stream

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot_path(path: str) -> None:
    """Raise UserError for a file that cannot be written, or that exists already."""
    if not path.endswith(SUFFIXES):
        raise UserError(f"--plot: {path!r} is no kind of picture that can be drawn; end it in {', '.join(SUFFIXES)}")
    if Path(path).exists():
        raise UserError(f"--plot: {path!r} exists; choose another name, or remove it")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"--plot: {path!r} lies in no directory; make {str(Path(path).parent)!r} first")


def draw(path: str, panels: Sequence[tuple[str, Timeline]], stream: Stream, jobs: Sequence[str], unit: str = "tokens' forwards") -> None:
    """Draw timelines of one stream below one another, each with what it shows ("predicted", "real"), into a new picture file."""
    from matplotlib.colors import hsv_to_rgb
    from matplotlib.figure import Figure

    colours = [hsv_to_rgb((job * 0.618 % 1, 0.7, 0.85)) for job in range(len(jobs))]  # golden-ratio steps: neighbours differ
    num_stages = panels[0][1].num_stages
    figure = Figure(figsize=(14, 0.4 + (0.8 + 0.6 * num_stages) * len(panels)), layout="constrained")
    for axes, (what, timeline) in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels, strict=True):
        for event in timeline.events:
            if event.op is Op.STEP or event.index >= len(stream) or stream[event.index].is_noop:
                continue
            slot, start = stream[event.index], event.start_s
            for segment in slot.segments:
                width = (event.end_s - event.start_s) * segment.num_tokens / slot.num_tokens
                pale = 0.45 if event.op is Op.FORWARD else 1.0
                axes.barh(event.stage, width, left=start, height=0.8, color=colours[segment.job], alpha=pale, linewidth=0)
                start += width
        axes.set_yticks(range(num_stages), [f"stage {stage}" for stage in range(num_stages)])
        axes.invert_yaxis()
        axes.set_xlabel(f"{what} time, in {unit}")
    handles = [figure.axes[0].barh(0, 0, color=colour) for colour in colours]
    figure.axes[0].legend(handles, jobs, ncols=min(8, len(jobs)), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path, dpi=150)
