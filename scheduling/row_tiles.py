"""The staircase of a GPU's linear layers: their time as a function of the number of row tiles (SlotCost.tiles)."""

from __future__ import annotations

from scheduling.cost import Device, ModelShape
from scheduling.slot_cost import TILE_ROWS

TILE_COLUMNS = 256  # of the GEMMs
_MAX_TILES = 256  # of rows: 32,768 tokens


def linear_tiles(shape: ModelShape, device: Device, tensor: int = 1) -> tuple[float, ...]:
    """Return SlotCost.tiles: the time of a layer's linears, forward and backward, by row tiles, in tokens that fill every wave of tiles.

    The device computes `processors` tiles of a GEMM at a time, and an incomplete last wave takes as long as a full one: 4,096 rows of 5,120
    columns are 640 tiles, five waves of 132, as many as 3,329 rows need. Empty where the device has no tiles.
    """
    if not device.processors:
        return ()
    query, key_value = shape.num_heads * shape.head_dim // tensor, shape.num_kv_heads * shape.head_dim // tensor
    ffn = shape.ffn_size // tensor
    hidden = shape.hidden_size
    forward = [(hidden, query + 2 * key_value), (query, hidden), (hidden, 2 * ffn), (ffn, hidden)]
    products = [*forward, *((columns, inner) for inner, columns in forward)]  # dX has the weight's sides the other way around
    wave = device.processors * TILE_ROWS * TILE_COLUMNS
    weights = sum(inner * columns for inner, columns in products)

    def tokens(row_tiles: int) -> float:
        waves = ((inner, -(-row_tiles * -(-columns // TILE_COLUMNS) // device.processors)) for inner, columns in products)
        return sum(inner * count for inner, count in waves) * wave / weights

    return tuple(map(tokens, range(_MAX_TILES + 1)))
