"""The first rank's book of rank rows: where each adapter lies, who may join, and who moves so that another fits.

An adapter takes rank rows of A in each kind of linear (one run, for all modules that it targets there)
and of B^T for each module, and with DoRA one of magnitudes. All linears of a kind have the same rows, on all ranks, so that one book
serves them all. What it hands out are `Places`, module -> (first row of A, first row of B^T): plain
data that travel with the plan's windows, and that every rank's arena follows (model/adapter_arena.py).

    book = Book(room)                               # module -> rank rows
    places = book.take("one", adapter)              # None where it does not fit now
    moves = book.compact(stepping, waiting)         # who moves where, so that another fits; None if that cannot be
    for job, places in moves.items():
        book.move(job, places)                      # to rows that are free already ...
    book.finish_moves()                                   # ... and a window later the rows that they left are free
    joined = admit(book, queue)

Rows are taken first-fit, so adapters that join an empty book lie in their order, without holes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_lora.huggingface.architecture import MAGNITUDES, SPACES
from scheduling.layer_memory import RANK_ALIGN, Adapter

KIND_OF = {module: kind for kind, modules in SPACES.items() for module in modules}
MAX_PASSED = 8  # later jobs that join before one that does not fit

Span = tuple[int, int]  # first row, end row
Places = Mapping[str, tuple[int, int]]


class Adapted(Protocol):
    """What the book needs to know of a job's adapter."""

    @property
    def lora_rank(self) -> int: ...

    @property
    def target_modules(self) -> Collection[str]: ...

    @property
    def expert_rank(self) -> int: ...

    @property
    def adapter(self) -> str: ...


class FreeRows:
    """The free rows among `size`, as sorted spans."""

    def __init__(self, size: int, free: Iterable[Span] | None = None):
        self.size = size
        self.spans: list[Span] = ([(0, size)] if size else []) if free is None else list(free)

    def find(self, count: int) -> int | None:
        """Return the first of `count` contiguous free rows, the lowest there are; None where there are not as many."""
        return next((first for first, end in self.spans if end - first >= count), None)

    def take(self, first: int, end: int) -> None:
        """Take rows, which must be free."""
        i, (low, high) = next((i, span) for i, span in enumerate(self.spans) if span[0] <= first < span[1])
        assert end <= high, f"rows {first} to {end} are not all free"
        self.spans[i : i + 1] = minus((low, high), (first, end))

    def give_back(self, first: int, end: int) -> None:
        """Give rows back, none of which may be free."""
        assert first >= 0 and end <= self.size and all(high <= first or end <= low for low, high in self.spans)
        merged: list[Span] = []
        for low, high in sorted([*self.spans, (first, end)]):
            if merged and merged[-1][1] == low:
                merged[-1] = (merged[-1][0], high)
            else:
                merged.append((low, high))
        self.spans = merged


def minus(span: Span, other: Span) -> list[Span]:
    """Return the parts of a span that are not in another."""
    parts = ((span[0], min(span[1], other[0])), (max(span[0], other[1]), span[1]))
    return [part for part in parts if part[0] < part[1]]


@dataclass(frozen=True, slots=True)
class Resident:
    """An adapter and where it lies."""

    adapter: Adapted
    places: Places


class Book:
    """Who has which rank rows. A *space* is the rows of A in a kind of linear, by its name, or those of a module's B^T, by the module's."""

    def __init__(self, room: Mapping[str, int]):
        """Begin with `room`, module -> rank rows, all free."""
        self.room = {module: room.get(module, 0) for module in KIND_OF}
        of_a = {kind: sum(self.room[module] for module in modules) for kind, modules in SPACES.items()}
        self.free = {space: FreeRows(rows) for space, rows in (of_a | self.room).items()}
        self.residents: dict[str, Resident] = {}
        self.left: list[tuple[str, Span]] = []  # by those that moved since the last `finish_moves`

    def take(self, job: str, adapter: Adapted) -> Places | None:
        """Take rows for the adapter of a job, which has this name; None, and none taken, where it does not fit."""
        assert job not in self.residents, f"job {job} is resident already"
        firsts = {space: self.free[space].find(rows) for space, rows in needs(adapter).items()}
        if None in firsts.values():
            return None
        places = places_at(adapter, {space: first for space, first in firsts.items() if first is not None})
        self.residents[job] = Resident(adapter, places)
        for space, span in spans(adapter, places).items():
            self.free[space].take(*span)
        return places

    def give_back(self, job: str) -> None:
        """Give a job's rows back."""
        resident = self.residents.pop(job)
        for space, span in spans(resident.adapter, resident.places).items():
            self.free[space].give_back(*span)

    def move(self, job: str, places: Places) -> None:
        """Move a job to other rows, free or its own. What it leaves is free after `finish_moves`."""
        adapter, before = self.residents[job].adapter, spans(self.residents[job].adapter, self.residents[job].places)
        for space, span in spans(adapter, places).items():
            for part in minus(span, before[space]):
                self.free[space].take(*part)
            self.left += [(space, part) for part in minus(before[space], span)]
        self.residents[job] = Resident(adapter, places)

    def finish_moves(self) -> None:
        """Free what those that moved have left."""
        for space, span in self.left:
            self.free[space].give_back(*span)
        self.left = []

    def compact(self, movable: Collection[str], adapter: Adapted) -> dict[str, Places] | None:
        """Return few moves of `movable` residents, job -> places, after which an adapter fits; None where there are none such.

        They are not yet made. They go to rows that are free now, or the job's own. Until they are made and
        finished no other job may take rows.
        """
        moved: dict[str, dict[str, int]] = {}  # job -> space -> first row
        for space, rows in needs(adapter).items():
            if self.free[space].find(rows) is None:
                found = self._empty(space, rows, movable, moved)
                if found is None:
                    return None
                for job, first in found.items():
                    moved.setdefault(job, {})[space] = first
        firsts = {
            job: {space: span[0] for space, span in spans(self.residents[job].adapter, self.residents[job].places).items()} for job in moved
        }
        return {job: places_at(self.residents[job].adapter, firsts[job] | there) for job, there in moved.items()}

    def _empty(self, space: str, rows: int, movable: Collection[str], moving: Collection[str]) -> dict[str, int] | None:
        """Return job -> first row of moves that leave `rows` contiguous rows of a space free: of few jobs besides those `moving`."""
        held: list[tuple[Span, str | None]] = [(span, None) for left_in, span in self.left if left_in == space]
        for job, resident in self.residents.items():
            if space in (there := spans(resident.adapter, resident.places)):
                held.append((there[space], job if job in movable else None))
        wanted = []
        for first in range(0, self.free[space].size - rows + 1, math.gcd(rows, RANK_ALIGN)):  # experts' ranks are not rounded up
            there = [(span, job) for span, job in held if span[0] < first + rows and first < span[1]]
            inside = [(span, job) for span, job in there if job is not None]
            if len(inside) == len(there):
                cost = sum(job not in moving for _, job in inside), sum(span[1] - span[0] for span, _ in inside)
                wanted.append((cost, (first, first + rows), inside))
        for _, gap, inside in sorted(wanted, key=lambda each: each[:2]):
            moves = self._rehouse(space, gap, inside)
            if moves is not None:
                return moves
        return None

    def _rehouse(self, space: str, gap: Span, inside: Sequence[tuple[Span, str]]) -> dict[str, int] | None:
        """Return job -> first row for those inside a gap that is to be free: free rows elsewhere, or their own; None without."""
        free = FreeRows(self.free[space].size, [part for span in self.free[space].spans for part in minus(span, gap)])
        moves = {}
        for span, job in sorted(inside, key=lambda each: each[0][0] - each[0][1]):  # the largest first
            own = minus(span, gap)
            for part in own:
                free.give_back(*part)
            first = free.find(span[1] - span[0])
            if first is None:
                return None
            moves[job] = first
            taken = (first, first + span[1] - span[0])
            free.take(*taken)
            for part in own:  # what it leaves of its own is not free before it has moved
                for left in minus(part, taken):
                    free.take(*left)
        return moves


@dataclass(slots=True)
class Waiting:
    """A job in the queue, and how many jobs behind it have joined because it did not fit."""

    job: str
    adapter: Adapted
    passed: int = 0


def admit(book: Book, queue: Sequence[Waiting]) -> list[tuple[str, Places]]:
    """Take rows for those of a queue that may join now, in its order; return them with their places.

    A job that does not fit lets MAX_PASSED of those behind it pass, over its whole wait. After that
    none of them joins before it does, so that rows that become free gather for it.
    """
    joined, passed = [], []
    for waiting in queue:
        if any(each.passed >= MAX_PASSED for each in passed):
            break
        places = book.take(waiting.job, waiting.adapter)
        if places is None:
            passed.append(waiting)
            continue
        joined.append((waiting.job, places))
        for each in passed:
            each.passed += 1
    return joined


def modules_of(adapter: Adapted) -> tuple[str, ...]:
    """Return what an adapter has rank rows of: its modules, and the magnitudes of DoRA."""
    return (*adapter.target_modules, *((MAGNITUDES,) if adapter.adapter == "dora" else ()))


def needs(adapter: Adapted) -> dict[str, int]:
    """Return space -> contiguous rows that an adapter takes."""
    of_b = {module: _rows_of(adapter, module) for module in sorted(modules_of(adapter))}
    of_a = {kind: sum(of_b.get(module, 0) for module in modules) for kind, modules in SPACES.items()}
    return {space: count for space, count in (of_a | of_b).items() if count}


def _rows_of(adapter: Adapted, module: str) -> int:
    return Adapter(adapter.lora_rank, expert_rank=adapter.expert_rank).rows_of(module)


def places_at(adapter: Adapted, firsts: Mapping[str, int]) -> Places:
    """Return the places of an adapter whose rows of each space begin at `firsts`."""
    places, ends = {}, dict(firsts)
    for module, kind in KIND_OF.items():
        if module in modules_of(adapter):
            places[module] = (ends[kind], firsts[module])
            ends[kind] += _rows_of(adapter, module)
    return places


def spans(adapter: Adapted, places: Places) -> dict[str, Span]:
    """Return the rows of each space that an adapter takes at these places."""
    firsts = {module: first for module, (_, first) in places.items()}
    for module, (first, _) in places.items():
        firsts[KIND_OF[module]] = min(first, firsts.get(KIND_OF[module], first))
    return {space: (firsts[space], firsts[space] + rows) for space, rows in needs(adapter).items()}
