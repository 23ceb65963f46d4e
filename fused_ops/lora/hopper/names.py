"""Names of Gluon that changed, under one name each, for every version of Triton of triton_version.py.

async_load, async_store     tma.async_copy_global_to_shared and tma.async_copy_shared_to_global before Triton 3.8
thread_barrier              gl.barrier since 3.7
as_block                    buf.reinterpret, which is buf._reinterpret before 3.9; 3.8 refuses to change the size
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_PUBLIC = gl.constexpr(hasattr(getattr(gl, "shared_memory_descriptor", None), "reinterpret"))


@gluon.jit
def as_block(buf, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """Return the beginning of a buffer in shared memory as a block [ROWS, COLUMNS] of bfloat16: the first of as many as it holds."""
    NUM: gl.constexpr = buf.shape[0] * buf.shape[1] * buf.dtype.primitive_bitwidth // (16 * ROWS * COLUMNS)
    if _PUBLIC:
        blocks = buf.reinterpret(gl.bfloat16, [NUM, ROWS, COLUMNS], LAYOUT)
    else:
        blocks = buf._reinterpret(gl.bfloat16, [NUM, ROWS, COLUMNS], LAYOUT)
    return blocks.index(0)
