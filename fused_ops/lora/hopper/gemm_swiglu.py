"""SwiGLU in the pipeline of hopper/gemm.py: y = silu(gate) * up where gate and up are made, and its gradient where that of y is.

    forward     a tile is HALF columns of gate and the same of up (`PAIRED`); its quarters come in the order gate, up, gate, up
    backward    a quarter of dX is dy: with the same quarter of gate and up, a step of the ring, it becomes d gate and d up in their place

Every quarter is rounded before SwiGLU reads it, so that y and gradients are what elementwise/swiglu.py makes of stored numbers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from fused_ops.lora.hopper.gemm_tile import ADDED, BM, HALF, PART, QUARTER, STAGES, WM
from fused_ops.lora.hopper.names import as_block, async_load, async_store
from fused_ops.lora.hopper.ring import release_loaded


@gluon.jit
def column(i_col, num_cols, half, quarter, PAIRED: gl.constexpr):
    """Return the first column of a quarter (0 or 1) of half a tile at i_col: of gate (0) or of up (1) if PAIRED."""
    if PAIRED:
        return i_col // 2 + half * (num_cols // 2) + quarter * QUARTER
    else:
        return i_col + half * HALF + quarter * QUARTER


@gluon.jit
def load_gates(ring, step, gates_desc, i_row, i_col, num_cols):
    """Load a quarter's gate and up for both warp groups."""
    a_bufs, b_bufs, full_bars, empty_bars = ring
    stage = step % STAGES
    full_bar = full_bars.index(stage)
    mbarrier.wait(empty_bars.index(stage), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full_bar, 2 * BM * QUARTER * 2)
    for group in gl.static_range(2):
        i_own = i_row + group * WM
        async_load(gates_desc, [i_own, i_col], full_bar, as_block(a_bufs.index(2 * stage + group), WM, QUARTER, ADDED))
        async_load(gates_desc, [i_own, num_cols + i_col], full_bar, as_block(b_bufs.index(2 * stage + group), WM, QUARTER, ADDED))
    return step + 1


@gluon.jit
def store(output_desc, output_bufs, i_row, i_col, b_out, NUMBER: gl.constexpr, GROUP: gl.constexpr):
    """Store a quarter [WM, QUARTER] bfloat16; consecutive NUMBERs take turns with two buffers."""
    output_buf = output_bufs.index(2 * GROUP + NUMBER % 2)
    tma.store_wait(1)  # all but the latest: what this buffer held is stored
    output_buf.store(b_out)
    fence_async_shared()
    async_store(output_desc, [i_row + GROUP * WM, i_col], output_buf)


@gluon.jit
def activate(b_gate, b_up):
    """Return silu(gate) * up of bfloat16 blocks."""
    b_gate = b_gate.to(gl.float32)
    return (b_gate * (1.0 / (1.0 + gl.exp(0.0 - b_gate))) * b_up.to(gl.float32)).to(gl.bfloat16)


@gluon.jit
def store_gradients(
    ring, step, output_desc, y_desc, output_bufs, i_row, i_col, num_cols, b_dy,
    REFILL: gl.constexpr, NUMBER: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Store a quarter's d gate and d up, and with REFILL y, from dy [WM, QUARTER] bfloat16; return the next step."""
    a_bufs, b_bufs, full_bars, empty_bars = ring
    stage = step % STAGES
    mbarrier.wait(full_bars.index(stage), (step // STAGES) & 1)
    b_gate = as_block(a_bufs.index(2 * stage + GROUP), WM, QUARTER, ADDED).load(PART)
    b_up = as_block(b_bufs.index(2 * stage + GROUP), WM, QUARTER, ADDED).load(PART)
    release_loaded(empty_bars.index(stage))
    b_gate, b_up, b_dy = b_gate.to(gl.float32), b_up.to(gl.float32), b_dy.to(gl.float32)
    b_sigmoid = 1.0 / (1.0 + gl.exp(0.0 - b_gate))
    b_silu = b_gate * b_sigmoid
    b_dgate = b_dy * b_up * (b_sigmoid + b_silu * (1.0 - b_sigmoid))
    STORES: gl.constexpr = 3 if REFILL else 2
    store(output_desc, output_bufs, i_row, i_col, b_dgate.to(gl.bfloat16), NUMBER * STORES, GROUP)
    store(output_desc, output_bufs, i_row, num_cols + i_col, (b_dy * b_silu).to(gl.bfloat16), NUMBER * STORES + 1, GROUP)
    if REFILL:
        store(y_desc, output_bufs, i_row, i_col, (b_silu * b_up).to(gl.bfloat16), NUMBER * STORES + 2, GROUP)
    return step + 1
