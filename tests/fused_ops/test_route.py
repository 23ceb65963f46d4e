"""Tables of the route against brute force, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fused_ops.lora.route import make_route


def route_of(pairs, tail=0):
    segments, row = [], 0
    for adapter, (gap, length) in enumerate(pairs):
        segments.append((row + gap, row + gap + length, adapter))
        row += gap + length
    return make_route(row + tail, segments, np.arange(row + tail, dtype=np.int32), "cpu"), segments


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), max_size=8), st.integers(0, 9), st.sampled_from([1, 4, 16]))
def test_tables_are_what_they_say(pairs, tail, block):
    route, segments = route_of(pairs, tail)
    kept = [s for s in segments if s[0] < s[1]]
    assert route.segment_table[:, :3].tolist() == [list(s) for s in kept]
    owners = [next((adapter for first, end, adapter in segments if first <= row < end), -1) for row in range(route.num_rows)]
    for i, (low, high, owner, _) in enumerate(route.tiles(block).tolist()):
        rows = set(range(i * block, min((i + 1) * block, route.num_rows)))
        assert [s for s in kept if rows & set(range(s[0], s[1]))] == kept[low:high]
        jobs = set(owners[i * block : (i + 1) * block])
        assert owner == (jobs.pop() if len(jobs) == 1 else -1)
    assert len(route.tiles(block)) == -(-route.num_rows // block)
    items = route.items(block).tolist()
    assert len(items) == route.num_items(block)
    assert all(0 < item[1] - item[0] <= block for item in items)
    for i, (first, end, adapter) in enumerate(kept):
        mine = [item for item in items if item[3] == i]
        low = items.index(mine[0])
        assert items[low : low + len(mine)] == mine and all(item[2:] == [adapter, i, low, low + len(mine)] for item in mine)
        assert [row for item in mine for row in range(item[0], item[1])] == list(range(first, end))
    assert not route.counters(5).any() and len(route.counters(5)) >= 5


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=8), st.data())
def test_a_cut_is_the_route_of_those_rows(pairs, data):
    route, segments = route_of(pairs)
    first = data.draw(st.integers(0, route.num_rows))
    end = data.draw(st.integers(first, route.num_rows))
    cut = route.rows(first, end)
    assert cut.row_keys.tolist() == list(range(first, end))
    owner = {row: adapter for a, b, adapter in segments for row in range(a, b)}
    assert {row + first: adapter for a, b, adapter in cut.segments for row in range(a, b)} == {
        r: s for r, s in owner.items() if first <= r < end
    }


def test_all_rows_is_the_same_object_and_tables_are_made_once():
    route, _ = route_of([(0, 5), (3, 7)])
    assert route.rows(0, route.num_rows) is route
    assert route.items(4) is route.items(4)
    assert route.rows(2, 9) is route.rows(2, 9)


@pytest.mark.parametrize(
    "segments",
    [[(0, 5, 0), (4, 6, 1)], [(4, 6, 0), (0, 2, 1)], [(0, 11, 0)], [(3, 2, 0)], [(0, 2, 1), (4, 6, 1)], [(0, 2, -1)], [(-1, 2, 0)]],
)
def test_bad_segments_are_refused(segments):
    with pytest.raises(ValueError, match="segment"):
        make_route(10, segments, np.zeros(10, np.int32), "cpu")


def test_bad_keys_are_refused():
    for keys in (np.zeros(9, np.int32), torch.zeros(10, dtype=torch.int64)):
        with pytest.raises(ValueError, match="row_keys must be int32"):
            make_route(10, [], keys, "cpu")
