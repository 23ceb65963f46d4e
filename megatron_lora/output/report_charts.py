"""The pictures of report.html as SVG text: curves of losses, and who was in which slot of a window, stage by stage.

An axis is logarithmic where all values are above 0 and span a factor of LOG_FROM. Long curves are
drawn from means over equal parts of their steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from megatron_lora.output.job_view import JobView
from megatron_lora.output.report_style import NUM_COLOURS

LOG_FROM = 20.0
DETAILED = 40  # losses from which on a smoothed curve stands beside the raw one
Points = Sequence[tuple[float, float]]


def colour(number: int) -> str:
    """Return the CSS colour of a job, by its number on the page."""
    return f"var(--c{number % NUM_COLOURS})"


def thinned(steps: Sequence[int], values: Sequence[float], most: int) -> list[tuple[float, float]]:
    """Return at most `most` points of a curve, each the mean of a part of it; what is not finite is left out."""
    points, count = [], min(most, len(values))
    for at in range(count):
        begin, end = len(values) * at // count, len(values) * (at + 1) // count
        part = [value for value in values[begin:end] if math.isfinite(value)]
        if part:
            points.append((steps[begin] if count == len(values) else (steps[begin] + steps[end - 1]) / 2, math.fsum(part) / len(part)))
    return points


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the mean around each value of a curve, over a twentieth of it, less towards its ends, and as much of it before as behind."""
    sums, counts = [0.0], [0]
    for value in values:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    found, most = [], len(values) // 40
    for at in range(len(values)):
        half = min(most, at, len(values) - 1 - at)
        count = counts[at + half + 1] - counts[at - half]
        found.append((sums[at + half + 1] - sums[at - half]) / count if count else math.nan)
    return found


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers between two values, at most `most` + 1."""
    width = (high - low) / max(1, most)
    unit = 10.0 ** math.floor(math.log10(width)) if width > 0 else 1.0
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= width * 0.999)
    return [step * at for at in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


@dataclasses.dataclass(frozen=True)
class Axes:
    """A chart's area in pixels and the values at its edges."""

    left: float
    right: float
    top: float
    bottom: float
    first: float
    last: float
    low: float
    high: float
    log: bool

    @classmethod
    def around(cls, curves: Iterable[Points], area: tuple[float, float, float, float]) -> Axes:
        """Fit axes around curves, in the area (left, right, top, bottom)."""
        points = [point for curve in curves for point in curve] or [(0.0, 0.0)]
        values = [value for _, value in points]
        low, high = min(values), max(values)
        log = low > 0 and high / low >= LOG_FROM
        if not log:
            margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
            low, high = low - margin, high + margin
        return cls(*area, min(at for at, _ in points), max(at for at, _ in points), low, high, log)

    def x(self, step: float) -> float:
        """Return the pixel of a step; one alone lies in the middle."""
        if self.last == self.first:
            return (self.left + self.right) / 2
        return self.left + (self.right - self.left) * (step - self.first) / (self.last - self.first)

    def y(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        return self.bottom - (self.bottom - self.top) * ((math.log(value) if self.log else value) - low) / (high - low)

    def path(self, points: Points) -> str:
        """Return a curve's path data."""
        return "M" + "L".join(f"{self.x(at):.1f} {self.y(value):.1f}" for at, value in points) if points else ""

    def drawn(self, num_x: int, num_y: int) -> str:
        """Draw grid lines and numbers."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            values = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5) if self.low <= factor * 10.0**decade <= self.high]
            values = values if len(values) <= 2 * num_y else [value for value in values if f"{value:e}".startswith("1.0")]
        else:
            values = ticks(self.low, self.high, num_y)
        lines, texts = [], []
        for value in values:
            lines.append(f"M{self.left:.0f} {self.y(value):.1f}H{self.right:.0f}")
            texts.append(f'<text x="{self.left - 6:.0f}" y="{self.y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
        for step in [at for at in ticks(self.first, self.last, num_x) if at == int(at)] or [self.first]:
            texts.append(f'<text x="{self.x(step):.1f}" y="{self.bottom + 15:.0f}" text-anchor="middle">{step:g}</text>')
        return f'<path class="grid" d="{"".join(lines)}"/>{"".join(texts)}'


def job_chart(job: JobView, width: int, height: int) -> str:
    """Draw a job's training loss and, where there are any, its evaluation losses, the best step ringed; less detailed where it is small."""
    small = width < 300
    most = 60 if small else 300
    soft = smoothed(job.losses)
    train = thinned(job.steps, soft, most // 2 if small else 150)
    raw = [] if small else thinned(job.steps, job.losses, most)
    found = [(float(step), value) for step, value in job.evaluated()]
    axes = Axes.around(
        [train, raw, found], (34 if small else 44, width - (8 if small else 14), 6 if small else 22, height - (18 if small else 30))
    )
    parts = [axes.drawn(2 if small else width // 80, 2 if small else 4)]
    if raw and len(job.losses) >= DETAILED:
        parts.append(f'<path class="curve raw" stroke="{colour(0)}" d="{axes.path(raw)}"/>')
    parts.append(f'<path class="curve" stroke="{colour(0)}" d="{axes.path(train)}"/>')
    if found:
        parts.append(f'<path class="curve" stroke="{colour(1)}" d="{axes.path(found)}"/>')
        best = job.best()
        for step, value in found:
            is_best = best is not None and best[0] == step
            if is_best or (not small and len(found) <= 60):
                radius, inside = (4.5 if not small else 3.5, "var(--card)") if is_best else (2.5, colour(1))
                place = f'cx="{axes.x(step):.1f}" cy="{axes.y(value):.1f}" r="{radius}"'
                said = "" if small else f"<title>step {step:g}: eval loss {value:.4f}{', the best' if is_best else ''}</title>"
                parts.append(f'<circle {place} fill="{inside}" stroke="{colour(1)}" stroke-width="2">{said}</circle>')
    if not small:
        scale = ", logarithmic" if axes.log else ""
        parts.append(f'<text x="{axes.right}" y="{height - 2}" text-anchor="end">step</text>')
        parts.append(f'<text x="{axes.left}" y="10">loss{scale}</text>')
    return _svg(width, height, f"losses of {job.name}", "".join(parts))


def overview_chart(jobs: Sequence[JobView], metric: str | None, colours: Mapping[str, str]) -> str:
    """Draw one curve per job: evaluations where `metric` names their number, else the smoothed training loss.

    Jobs that `colours` has are drawn over the others and named beside their ends.
    """
    width, height, label_width = 1120, 340, 150
    curves = {job.name: _overview_points(job, metric) for job in jobs}
    curves = {name: points for name, points in curves.items() if points}
    axes = Axes.around(curves.values(), (52, width - label_width, 22, height - 30))
    parts, labels = [axes.drawn(10, 5)], []
    for name, points in sorted(curves.items(), key=lambda item: item[0] in colours):
        style = f'class="curve" stroke="{colours[name]}"' if name in colours else 'class="curve faint"'
        said = f"{escape(name)}: {points[-1][1]:.4g} at step {points[-1][0]:g}"
        parts.append(f'<path {style} d="{axes.path(points)}"><title>{said}</title></path>')
        if name in colours:
            labels.append((axes.y(points[-1][1]), axes.x(points[-1][0]), name))
    labels.sort()
    for at, (y, x, name) in zip(_apart([y for y, _, _ in labels], axes.top, axes.bottom), labels, strict=True):
        shown = name if len(name) <= 20 else name[:19] + "…"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colours[name]}"/>')
        bullet = f'<tspan fill="{colours[name]}">● </tspan>'
        parts.append(f'<text class="ink" x="{width - label_width + 12}" y="{at + 4:.1f}">{bullet}{escape(shown)}</text>')
    what = (metric or "training loss, smoothed").replace("_", " ") + (", logarithmic" if axes.log else "")
    parts.append(f'<text x="{axes.right}" y="{height - 2}" text-anchor="end">step</text><text x="52" y="10">{escape(what)}</text>')
    crowd = f'<g class="{"crowd" if len(curves) > 60 else ""}">{"".join(parts)}</g>'
    return _svg(width, height, what, crowd, "wide")


def _apart(wanted: Sequence[float], top: float, bottom: float) -> list[float]:
    """Move ascending places of labels apart, to 14 pixels at least, and up where they would end below `bottom`."""
    places: list[float] = []
    for place in wanted:
        places.append(max(place, places[-1] + 14 if places else top))
    limit = bottom
    for at in reversed(range(len(places))):
        places[at] = min(places[at], limit)
        limit = places[at] - 14
    return places


def _overview_points(job: JobView, metric: str | None) -> list[tuple[float, float]]:
    if metric is None:
        return thinned(job.steps, smoothed(job.losses), 60)
    found = job.evaluated(metric)
    return thinned([step for step, _ in found], [value for _, value in found], 60)


def bare_curve(job: JobView) -> str:
    """Draw the smoothed training loss without axes, for a table's cell."""
    points = thinned(job.steps, smoothed(job.losses), 40)
    if len(points) < 2:
        return ""
    path = Axes.around([points], (1, 109, 2, 20)).path(points)
    return _svg(110, 22, "training loss", f'<path class="curve" style="stroke-width:1.5" stroke="{colour(0)}" d="{path}"/>')


@dataclasses.dataclass(frozen=True)
class Pass:
    """A stage's work on a slot, between two points of time: `kind` is F, B or EVAL; `tokens` of jobs, or none: another window's slot."""

    stage: int
    kind: str
    slot: int
    start: float
    end: float
    tokens: Mapping[str, int]


def timeline_picture(
    passes: Sequence[Pass], num_stages: int, unit: str, colours: Mapping[str, str], marks: Sequence[tuple[float, str]]
) -> str:
    """Draw passes, a lane per stage: forwards pale, backwards full, evaluation hatched. `marks`: times, and what happened then."""
    width, lane, left, top = 1120, 34, 62, 8 + 15 * min(4, len(marks))
    begin, end = min(each.start for each in passes), max(each.end for each in passes)
    x: Callable[[float], float] = lambda when: left + (width - left - 6) * (when - begin) / (end - begin)  # noqa: E731
    bottom = top + num_stages * (lane + 6)
    parts = []
    for stage in range(num_stages):
        y = top + stage * (lane + 6)
        parts.append(f'<text x="0" y="{y + 21}">stage {stage}</text><path class="grid" d="M{left} {y + lane + 3}H{width}"/>')
    for each in passes:
        y, start, total = top + each.stage * (lane + 6), each.start, sum(each.tokens.values())
        if not total:
            place = f'x="{x(start):.1f}" y="{y}" width="{x(each.end) - x(start):.1f}" height="{lane}"'
            parts.append(f'<rect {place} fill="var(--line)"><title>slot {each.slot}, of another window</title></rect>')
            continue
        said = ", ".join(f"{name} {count}" for name, count in each.tokens.items())
        what = {"F": "forward", "B": "backward"}.get(each.kind, "evaluation")
        pale = "" if each.kind == "B" else ' opacity=".5"'
        parts.append(f"<g><title>slot {each.slot}, {what}: {escape(said)} tokens</title>")
        for name, count in each.tokens.items():
            ended = start + (each.end - each.start) * count / total
            place = f'x="{x(start):.1f}" y="{y}" width="{max(0.4, x(ended) - x(start) - 0.3):.1f}" height="{lane}"'
            parts.append(f'<rect {place} fill="{colours[name]}"{pale}/>')
            parts.append(f'<rect {place} fill="url(#hatch)"/>' if each.kind == "EVAL" else "")
            start = ended
        parts.append("</g>")
    for at, (when, what) in enumerate(sorted(marks)):
        y = 12 + 15 * (at % 4)
        anchor = "end" if x(when) > width - 200 else "start"
        parts.append(f'<path d="M{x(when):.1f} {y - 9}V{bottom - 4}" stroke="var(--ink)" stroke-dasharray="3 3"/>')
        offset = -5 if anchor == "end" else 5
        parts.append(f'<text class="ink" x="{x(when) + offset:.1f}" y="{y}" text-anchor="{anchor}">{escape(what)}</text>')
    for when in ticks(begin, end, 10):
        parts.append(f'<text x="{x(when):.1f}" y="{bottom + 10}" text-anchor="middle">{when:g}</text>')
    parts.append(f'<text x="0" y="{bottom + 10}">{escape(unit)}</text>')
    return _svg(width, bottom + 14, "who was in which slot, stage by stage", HATCH + "".join(parts), "wide")


HATCHED = '<rect width="12" height="12" fill="var(--muted)" opacity=".4"/><rect width="12" height="12" fill="url(#hatch)"/>'
HATCH = (
    '<defs><pattern id="hatch" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="2" height="5" fill="var(--ink)" opacity=".75"/></pattern></defs>'
)


def _svg(width: float, height: float, label: str, content: str, kind: str = "") -> str:
    return f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{content}</svg>'
