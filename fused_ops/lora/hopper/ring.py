"""The barriers of a ring of buffers in shared memory, which one warp fills by TMA ahead of the warp groups that multiply."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def ring_barriers(STAGES: gl.constexpr, READERS: gl.constexpr):
    """Return two barriers for each stage: full counts the bytes that TMA brings, empty the READERS that have released it."""
    full_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full_bars.index(stage), count=1)
        mbarrier.init(empty_bars.index(stage), count=READERS)
    return full_bars, empty_bars
