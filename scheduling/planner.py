"""From sample lengths to a stream: try two constructions at several numbers of slots, then improve the best ones by local search.

The candidate with the shortest predicted makespan under 1F1B wins, fill and drain included. Where jobs have different priorities, the one
by shares wins, unless it has more no-ops or is over 1% slower. Effort is counted in proposals of the search, not in seconds, and nothing
depends on job numbers or hash seeds: the same workload gives the same plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scheduling.backlog import Backlog, Layout, costs_of, open_backlog, to_stream
from scheduling.packing import fill, fill_by_priority, first_fit, spread
from scheduling.search import anneal
from scheduling.slot_cost import SlotCost
from scheduling.timing import makespan
from scheduling.types import MAX_ENDINGS, Lengths, Stream

# Numbers of slots to try, as multiples of the fewest that hold the work.
_STRETCHES = (1.01, 1.02, 1.03, 1.045, 1.06, 1.08, 1.11, 1.15, 1.2, 1.25, 1.3, 1.36, 1.43, 1.5, 1.6, 1.7, 1.85, 2.0)
_NEARBY = (0.995, 1.005, 1.013)
_TIGHT = (0.0, 0.3, 0.6, 0.9)  # of the way from the fewest slots that the budget allows to the fewest that hold the work
_PATIENCE = 5  # candidates in a row without a better one
_PACKING_WORK = 40_000  # items that a construction may handle in all its tries, per unit of effort
_MANY_ITEMS = 4_000  # beyond these `fill` alone is tried
_SPREAD_WORK = 400_000  # items x slots / groups that `spread` may handle: its work is items x slots of a step
_SEARCH_WORK = 6_000_000  # proposals x (stages + 4)^2 per unit of effort: about 0.2 s
_FAIR = 0.01  # most that priorities may cost, of the makespan
_SEARCH_PER_ITEM = 300  # most proposals per sample and unit of effort


Build = Callable[[Backlog, int, int | None], Layout | None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout with its predicted makespan (per unit of work, when a horizon cuts it off)."""

    value: float
    layout: Layout


def plan_stream(
    lengths: Lengths,
    num_stages: int,
    capacity: int,
    delay: int = 0,
    effort: int = 1,
    cost: SlotCost | None = None,
    max_endings: int = MAX_ENDINGS,
) -> Stream:
    """Plan a whole workload as one stream, without drain slots (see pipeline.with_drain).

    Steps of a job are at least num_stages + delay slots apart, and at most `max_endings` steps end in one slot; `effort` multiplies
    the work of the search (1: a few tenths of a second for hundreds of slots). Raises PlanError where no plan exists.
    """
    backlog = open_backlog(lengths, num_stages, capacity, delay, cost or SlotCost(), max_endings=max_endings)
    return to_stream(backlog, plan_backlog(backlog, effort))


def plan_backlog(backlog: Backlog, effort: int = 1, horizon: int | None = None, known: Layout | None = None) -> Layout:
    """Return a layout of a backlog, or of its first `horizon` slots; never slower than a `known` one of the same items, but for shares."""
    if not backlog.tokens:
        return []
    proposals = effort * min(_SEARCH_WORK // (backlog.num_stages + 4) ** 2, _SEARCH_PER_ITEM * len(backlog.tokens))
    builds = (fill, spread, first_fit) if len(backlog.tokens) <= _MANY_ITEMS else (fill,)
    starts = [best for build in builds if (best := best_stretch(backlog, build, effort, horizon)) is not None]
    if known is not None:
        starts.append(_rate(backlog, known))
    starts.sort(key=lambda start: start.value)
    if backlog.has_shares:
        proposals -= proposals // 4  # as long as it takes to construct one layout more
        fair = best_stretch(backlog, fill_by_priority, effort, horizon)
        starts = [fair] if fair is not None and _costs_no_more(fair, starts[0]) else starts
    improved = [_improve(backlog, start, proposals // 4, seed=1) for start in starts[:2]]
    best = min(improved, key=lambda candidate: candidate.value)
    return _improve(backlog, best, proposals - len(improved) * (proposals // 4), seed=2).layout


def _costs_no_more(fair: Candidate, best: Candidate) -> bool:
    """Whether a layout by shares is as good as the best one without: no more no-ops, and hardly slower."""
    return fair.value <= best.value * (1 + _FAIR) and fair.layout.count([]) <= best.layout.count([])


def _improve(backlog: Backlog, start: Candidate, proposals: int, seed: int) -> Candidate:
    return min(start, _rate(backlog, anneal(backlog, start.layout, proposals, seed=seed)), key=lambda candidate: candidate.value)


def _rate(backlog: Backlog, layout: Layout) -> Candidate:
    """Value a layout by its makespan per unit of work laid out."""
    work = sum([backlog.times[item] for slot in layout for item in slot])
    return Candidate(makespan(costs_of(backlog, layout), backlog.num_stages) / work, layout)


def best_stretch(backlog: Backlog, build: Build, effort: int = 1, horizon: int | None = None) -> Candidate | None:
    """Return the best layout of one construction over growing numbers of slots, then over numbers near the best of these and below them.

    Long samples take more time than tokens: if the budget allows fewer slots than hold the work, these numbers are tried as well.
    Stops when larger numbers no longer help, or when the work allowed by `effort` is spent; None where the construction finds nothing.
    """
    least = backlog.least_slots()
    if build is spread and len(backlog.tokens) * least > _SPREAD_WORK * len(backlog.groups):
        return None
    best, best_at, misses = None, 1.0, 0
    remaining_tries = max(1, effort * _PACKING_WORK // len(backlog.tokens))
    for stretch in _STRETCHES:
        if remaining_tries == 0 or misses == _PATIENCE:
            break
        remaining_tries -= 1
        candidate = _try(backlog, build, least * stretch, horizon)
        if candidate is not None:
            misses += 1
            if best is None or candidate.value < best.value:
                best, best_at, misses = candidate, stretch, 0
    fewest = backlog.fewest_slots()
    tight = sorted({round(fewest + share * (least - fewest)) for share in _TIGHT}) if fewest < least else []
    closer = [*(least * best_at * nearby for nearby in _NEARBY), *tight]
    if best is None:
        return None
    for num_slots in closer[:remaining_tries]:
        candidate = _try(backlog, build, num_slots, horizon)
        if candidate is not None and candidate.value < best.value:
            best = candidate
    return best


def _try(backlog: Backlog, build: Build, num_slots: float, horizon: int | None) -> Candidate | None:
    layout = build(backlog, max(1, round(num_slots)), horizon)
    return None if layout is None else _rate(backlog, layout)
