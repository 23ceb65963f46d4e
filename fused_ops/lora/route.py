"""The route of a microbatch: which rows belong to which adapter, and the small tables that kernels read.

Invariants: segments are ascending, disjoint, inside [0, num_rows), and name each adapter at most once; they begin and end anywhere
(no padding); a row in no segment is base-only. One route serves all layers of a stage, forward and backward; `dropout` says whether
its rows meet the adapters' dropout, or none as in evaluation. Its device tables
are made on first use from host numbers alone, through pinned memory, so that nothing waits for the device:

    segment_table    [n, 4]                first row, end row, adapter, 0
    tiles(block)     [ceil(T / block), 4]  first and end index into `segment_table` of the segments that meet a tile of the row grid, the
                                           adapter of all rows of the tile (-1: there is none), 0
    items(block)     [n, 6]                first row, end row, adapter, segment, first item, end item of blocks that start at segment
                                           starts: rows of one job each; the last two delimit the items of the same segment
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_ops.launch.optional_triton import constants

# Columns of the tables, as kernels read them.
FIRST, END, ADAPTER = constants(0, 1, 2)  # of segments and items
SEGMENT, FIRST_ITEM, END_ITEM = constants(3, 4, 5)  # of items
FIRST_SEGMENT, END_SEGMENT, OWNER = constants(0, 1, 2)  # of tiles
SEGMENT_FIELDS, TILE_FIELDS, ITEM_FIELDS = constants(4, 4, 6)


class Route:
    """Rows to adapters for one microbatch. Build with `make_route`; immutable but for the caches of its tables."""

    def __init__(self, num_rows: int, segments: tuple[tuple[int, int, int], ...], row_keys: Tensor, dropout: bool = True):
        _check(num_rows, segments, row_keys)
        self.num_rows = num_rows
        self.segments = tuple(segment for segment in segments if segment[1] > segment[0])
        self.row_keys = row_keys
        self.dropout = dropout
        self._tables: dict[tuple, Any] = {}  # tensors, numbers, and the routes of parts of the rows

    @property
    def device(self) -> torch.device:
        """Return the device that holds the row keys and the tables."""
        return self.row_keys.device

    @cached_property
    def segment_table(self) -> Tensor:
        """Return int32 [num_segments, 4]: first row, end row, adapter, 0."""
        return self._upload([(first, end, adapter, 0) for first, end, adapter in self.segments], 4)

    @cached_property
    def segment_of_row(self) -> Tensor:
        """Return int32 [T]: the index of each row's segment; how many segments there are, where it has none."""
        found = np.full(self.num_rows, len(self.segments), np.int32)
        for index, (first, end, _) in enumerate(self.segments):
            found[first:end] = index
        return upload(torch.from_numpy(found), self.device)

    @cached_property
    def near_ties(self) -> Tensor:
        """Return int64 [num_segments + 1], zeros at first, in which layers count near ties of the choice of experts, by segment_of_row."""
        return torch.zeros(len(self.segments) + 1, dtype=torch.int64, device=self.device)

    @property
    def has_near_ties(self) -> bool:
        """Return whether any layer has counted them."""
        return "near_ties" in vars(self)

    def tiles(self, block: int) -> Tensor:
        """Return int32 [ceil(T / block), 4]: which segments meet each tile of `block` rows, and the adapter that has all of them."""
        return self._cached(("tiles", block), lambda: self._upload(_tiles(self.num_rows, self.segments, block), 4))

    def items(self, block: int) -> Tensor:
        """Return int32 [n, 6]: (first row, end row, adapter, segment, first item, end item) of at most `block` rows each."""
        return self._cached(("items", block), lambda: self._upload(_items(self.segments, block), 6))

    def counters(self, size: int) -> Tensor:
        """Return at least `size` int32 zeros; kernels count arrivals in them and reset them to zero."""
        size = 1 << (size - 1).bit_length()
        return self._cached(("counters", size), lambda: torch.zeros(size, dtype=torch.int32, device=self.device))

    def num_items(self, block: int) -> int:
        """Return how many items of at most `block` rows there are."""
        return sum(-(-(end - first) // block) for first, end, _ in self.segments)

    def item_rows(self, num_blocks: int, programs: int) -> int:
        """Return the fewest rows of an item for which at most `programs` are needed, one for each item and block of columns.

        More programs than run at once need a second wave, and more partial sums; fewer leave multiprocessors idle.
        """
        fits = (rows for rows in range(256, 2048, 64) if self.num_items(rows) * num_blocks <= programs)
        return self._cached(("item rows", num_blocks, programs), lambda: next(fits, 2048))  # every linear asks

    def rows(self, first: int, end: int) -> "Route":
        """Return the route of rows [first, end) alone, renumbered from 0; the same object when those are all rows."""
        if (first, end) == (0, self.num_rows):
            return self
        return self._cached(("rows", first, end), lambda: self._cut(first, end))

    def _cut(self, first: int, end: int) -> "Route":
        clipped = ((max(a, first) - first, min(b, end) - first, adapter) for a, b, adapter in self.segments)
        return Route(end - first, tuple(s for s in clipped if s[0] < s[1]), self.row_keys[first:end], self.dropout)

    def _cached(self, key: tuple, make):
        if key not in self._tables:
            self._tables[key] = make()
        return self._tables[key]

    def _upload(self, rows: list[tuple[int, ...]], width: int) -> Tensor:
        return upload(torch.tensor(rows, dtype=torch.int32).view(-1, width), self.device)


def make_route(
    num_rows: int, segments: Sequence[tuple[int, int, int]], row_keys: Tensor | np.ndarray, device, dropout: bool = True
) -> Route:
    """Build a route: `segments` are (first row, end row, adapter), `row_keys` int32 [num_rows]. No host-device synchronisation.

    Raises ValueError when segments overlap, leave the rows, are out of order or repeat an adapter.
    """
    keys = torch.from_numpy(np.ascontiguousarray(row_keys)) if isinstance(row_keys, np.ndarray) else row_keys
    return Route(num_rows, tuple((int(a), int(b), int(c)) for a, b, c in segments), upload(keys, torch.device(device)), dropout)


def upload(host: Tensor, device: torch.device) -> Tensor:
    """Copy a small host tensor to `device` without waiting for it; return tensors that are on it already unchanged."""
    if host.device == device or device.type != "cuda" or host.is_cuda:
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def _check(num_rows: int, segments, row_keys: Tensor) -> None:
    if row_keys.dtype != torch.int32 or tuple(row_keys.shape) != (num_rows,):
        raise ValueError(f"row_keys must be int32 [{num_rows}], not {row_keys.dtype} {list(row_keys.shape)}")
    previous_end, adapters = 0, set()
    for first, end, adapter in segments:
        if not previous_end <= first <= end <= num_rows:
            raise ValueError(f"segment ({first}, {end}, {adapter}) is out of order, overlaps, or leaves the {num_rows} rows")
        if adapter < 0 or adapter in adapters:
            raise ValueError(f"segment ({first}, {end}, {adapter}): adapter {adapter} is negative or appears twice in one route")
        adapters.add(adapter)
        previous_end = end


def _tiles(num_rows: int, segments, block: int) -> list[tuple[int, ...]]:
    tiles, low, high = [], 0, 0
    for start in range(0, num_rows, block):
        while low < len(segments) and segments[low][1] <= start:
            low += 1
        high = max(high, low)
        while high < len(segments) and segments[high][0] < start + block:
            high += 1
        one = high == low + 1 and segments[low][0] <= start and segments[low][1] >= min(start + block, num_rows)
        tiles.append((low, high, segments[low][2] if one else -1, 0))
    return tiles


def _items(segments, block: int) -> list[tuple[int, ...]]:
    items = []
    for index, (first, end, adapter) in enumerate(segments):
        low = len(items)
        high = low - (first - end) // block
        items += [(row, min(row + block, end), adapter, index, low, high) for row in range(first, end, block)]
    return items
