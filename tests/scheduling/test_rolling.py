"""The slots that actions may still read: indices, endings and moves, and no more than a window and the gap of them."""

from __future__ import annotations

from scheduling.follow import Window
from scheduling.pipeline import endings, final_backwards, window_actions, with_drain
from scheduling.rolling import RollingStream
from scheduling.types import Ending, Microbatch, Segment

EVALUATION = Microbatch((Segment(1, 0, (0,), 7),), evaluate=True)


def step(job: int, number: int) -> Microbatch:
    return Microbatch((Segment(job, number, (0,), 5),))


STREAM = with_drain((step(0, 0), EVALUATION, step(1, 0), step(0, 1), step(1, 1)), 2)
ENDED = endings(STREAM)


def test_slots_that_have_a_backward_are_counted_among_themselves():
    rolling = RollingStream()
    assert rolling.append(Window(STREAM[:3], ENDED[:3])) == range(3)
    assert rolling.append(Window(STREAM[3:], ENDED[3:])) == range(3, 7)
    assert [rolling.index_of(slot) for slot in range(7)] == [0, None, 1, 2, 3, 4, 5]
    assert [rolling.slot_at(index) for index in range(6)] == [0, 2, 3, 4, 5, 6]
    assert rolling[1] == EVALUATION and rolling.endings(1) == ()
    assert rolling.ended_at(1) == (Ending(1, 0), Ending(1, 0, True)) and rolling.ended_at(-1) == ()
    assert rolling.num_slots == 7 and rolling.num_indices == 6


def test_actions_by_hand_with_an_evaluation_and_a_move():
    """The evaluation comes between two backwards' worth of slots and moves none of them; rows of job 1 move after its first step."""
    rolling = RollingStream()
    slots = rolling.append(Window(STREAM, ENDED, frozenset({(1, 0)})))
    first, last = (
        " ".join(map(str, window_actions(rolling, stage, 2, 0, slots.start, slots.stop) + final_backwards(rolling, stage, 2)))
        for stage in range(2)
    )
    assert first == "F0 E1 F2 B0 S0 F3 B2 S1 M1 F4 B3 S0 F5 B4 S1 F6 B5 B6"
    assert last == "F0 B0 E1 F2 B2 S0 F3 B3 S1 M1 F4 B4 S0 F5 B5 S1 F6 B6"


def test_what_no_action_reads_any_more_is_forgotten():
    rolling = RollingStream()
    for number in range(50):
        microbatches = (step(0, number), EVALUATION)
        rolling.append(Window(microbatches, ((Ending(0, number),), ()), frozenset({(0, number)})))
        rolling.forget(2)
        held = range(2 * max(0, number - 1), 2 * number + 2)
        assert len(rolling) == len(held) and all(rolling[slot].evaluate == slot % 2 for slot in held)
        assert [rolling.moves_after(0, k) for k in (number - 2, number - 1, number)] == [False, number > 0, True]
