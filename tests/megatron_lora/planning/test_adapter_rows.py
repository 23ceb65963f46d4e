"""The book of rank rows: nobody's rows overlap, what is free is found, moves make room, and nobody waits for ever."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_lora.config.rules import TARGET_MODULES
from megatron_lora.huggingface.architecture import MAGNITUDES
from megatron_lora.planning.adapter_rows import MAX_PASSED, Book, FreeRows, Waiting, admit, modules_of, needs, spans


@dataclass(frozen=True)
class Kind:
    """An adapter, as the book sees it."""

    lora_rank: int = 16
    target_modules: frozenset[str] = field(default=frozenset(TARGET_MODULES))
    expert_rank: int = 0
    adapter: str = "lora"


ranks = {"lora_rank": st.integers(1, 70), "expert_rank": st.sampled_from((0, 3, 8)), "adapter": st.sampled_from(("lora", "dora"))}
adapters = st.builds(Kind, **ranks, target_modules=st.sets(st.sampled_from(TARGET_MODULES), min_size=1).map(frozenset))
actions = st.lists(
    st.tuples(st.sampled_from(["join", "leave", "compact"]), adapters, st.integers(0, 99), st.sets(st.integers(0, 9))), max_size=30
)


def fits_alone(book: Book, adapter: Kind) -> bool:
    """Whether an adapter fits when it is the only one."""
    return Book(book.room).take("alone", adapter) is not None


def check(book: Book) -> None:
    """Check that in every space held, left and free rows are all rows, each once."""
    for space, free in book.free.items():
        held = [spans(each.adapter, each.places)[space] for each in book.residents.values() if space in needs(each.adapter)]
        every = sorted([*free.spans, *held, *(span for left_in, span in book.left if left_in == space)])
        ends, firsts = [0, *(end for _, end in every)], [*(first for first, _ in every), free.size]
        assert ends == firsts, (space, every)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 14), actions)
def test_whoever_joins_leaves_and_moves_rows_are_held_once(units, steps):
    book = Book(dict.fromkeys(TARGET_MODULES, 16 * units) | {MAGNITUDES: 2})
    for step, (what, adapter, which, movable) in enumerate(steps):
        number = f"{step:02}"
        if what == "join":
            places = book.take(number, adapter)
            assert places is None or json.loads(json.dumps(places)) == {module: list(rows) for module, rows in places.items()}
            if places is None:
                short = {
                    space for space, rows in needs(adapter).items() if all(end - first < rows for first, end in book.free[space].spans)
                }
                assert short, "rows were free and not found"
                assert book.residents or not fits_alone(book, adapter)
        elif what == "leave" and book.residents:
            book.give_back(sorted(book.residents)[which % len(book.residents)])
        elif what == "compact" and fits_alone(book, adapter):
            jobs = sorted(book.residents)
            moves = book.compact({jobs[each] for each in movable if each < len(jobs)}, adapter)
            check(book)
            if moves is not None:
                free = {space: list(rows.spans) for space, rows in book.free.items()}
                for job, places in moves.items():
                    assert job in {jobs[each] for each in movable if each < len(jobs)}
                    assert places.keys() == {*modules_of(book.residents[job].adapter)} and places != book.residents[job].places
                    before = spans(book.residents[job].adapter, book.residents[job].places)
                    for space, (first, end) in spans(book.residents[job].adapter, places).items():
                        rows = set(range(first, end)) - set(range(*before[space]))
                        assert all(any(low <= row < high for low, high in free[space]) for row in rows), "the rows were not free before"
                    book.move(job, places)
                    check(book)
                book.finish_moves()
                assert book.take(number, adapter) is not None, "the moves made no room"
        check(book)


def test_one_move_where_one_is_enough():
    one, two = Kind(16), Kind(32)
    book = Book(dict.fromkeys(TARGET_MODULES, 96))
    for job in "abcdef":
        assert book.take(job, one) is not None
    for job in "bd":
        book.give_back(job)
    assert book.take("w", two) is None
    assert book.compact(set(), two) is None and book.compact({"f"}, two) is None, "neither gap is beside it"
    moves = book.compact({"a", "c", "e", "f"}, two)
    assert moves is not None and len(moves) == 1
    ((job, places),) = moves.items()
    book.move(job, places)
    assert book.take("w", two) is None, "rows that a job has yet to leave were taken"
    book.finish_moves()
    assert book.take("w", two) is not None


def test_one_job_moves_in_all_linears_rather_than_several():
    """In down_proj another would do as well, and lies lower; q_proj needs `both` to move anyhow."""
    query, down = frozenset({"q_proj"}), frozenset({"down_proj"})
    book = Book({"q_proj": 64, "down_proj": 64})
    for job, targets in (("low", down), ("f", down), ("both", query | down), ("g", query), ("high", query)):
        book.take(job, Kind(16, targets))
    for job in ("f", "g"):
        book.give_back(job)
    moves = book.compact({"low", "both", "high"}, Kind(32, query | down))
    assert list(moves or ()) == ["both"]
    assert list(book.compact({"low", "high"}, Kind(32, query | down)) or ()) == ["high", "low"]


def test_what_one_job_leaves_another_does_not_take_in_the_same_window():
    """Of 9 x 16 rows 0, 1, 3 and 8 are free; x (5, 6) and y (4) make room for 48 beside w and v, which stay."""
    query = frozenset({"q_proj"})
    book = Book({"q_proj": 9 * 16})
    for job in ("free-01", "w", "free-3", "y", "x", "v", "free-8"):
        book.take(job, Kind(32 if job in ("free-01", "x") else 16, query))
    for job in ("free-01", "free-3", "free-8"):
        book.give_back(job)
    moves = book.compact({"x", "y"}, Kind(48, query))
    assert moves == {"x": {"q_proj": (0, 0)}, "y": {"q_proj": (128, 128)}}
    for job in ("y", "x"):
        book.move(job, moves[job])
    assert book.take("early", Kind(48, query)) is None
    book.finish_moves()
    assert book.take("waiting", Kind(48, query)) == {"q_proj": (48, 48)}


@settings(max_examples=40, deadline=None)
@given(st.lists(adapters, min_size=1, max_size=12), st.integers(1, 10))
def test_admission_keeps_the_order_of_those_that_fit_and_blocks_nobody_for_ever(kinds, units):
    book = Book(dict.fromkeys(TARGET_MODULES, 16 * units))
    queue = [Waiting(f"{number:02}", kind) for number, kind in enumerate(kinds) if fits_alone(book, kind)]
    assume(queue)
    order, turns = [], 0
    while queue:
        turns += 1
        assert turns <= 2 * len(kinds), "somebody waits for ever"
        joined = [job for job, _ in admit(book, queue)]
        assert joined == sorted(joined)
        order += joined
        queue = [waiting for waiting in queue if waiting.job not in joined]
        assert all(waiting.passed <= MAX_PASSED for waiting in queue)
        if book.residents:
            book.give_back(min(book.residents, key=order.index))
        check(book)
    assert len(order) == len(set(order))


def test_a_large_job_is_passed_by_eight_small_ones_and_then_by_none():
    book = Book(dict.fromkeys(TARGET_MODULES, 64))
    book.take("there", Kind(16))
    queue = [Waiting("large", Kind(64)), *(Waiting(str(number), Kind(16)) for number in range(30))]
    joined = []
    for _ in range(12):
        now = [job for job, _ in admit(book, queue)]
        queue = [waiting for waiting in queue if waiting.job not in now]
        joined += now
        if now == ["large"]:
            break
        book.give_back(next(iter(book.residents)))
    assert joined == [*map(str, range(MAX_PASSED)), "large"] and queue[0].job == str(MAX_PASSED)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.lists(st.tuples(st.integers(1, 40), st.integers(0, 99)), max_size=40))
def test_free_rows_are_what_nobody_holds(size, moves):
    free, held = FreeRows(size), []
    for count, which in moves:
        first = free.find(count)
        if first is None:
            used = sorted(held)
            gaps = [b[0] - a[1] for a, b in zip([(0, 0), *used], [*used, (size, size)], strict=True)]
            assert max(gaps) < count, "rows were free and not found"
            if held:
                free.give_back(*held.pop(which % len(held)))
            continue
        free.take(first, first + count)
        held.append((first, first + count))
        assert sum(end - low for low, end in free.spans) == size - sum(end - low for low, end in held)
    with pytest.raises(AssertionError):
        free.give_back(*(free.spans[0] if free.spans else (0, size + 1)))
