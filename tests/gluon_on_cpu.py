"""Gluon kernels on a CPU: blocks are numpy arrays, partitions of warps are threads, TMA copies boxes, and barriers count.

    with gluon_on_cpu():
        from fused_ops.lora.hopper.gemm import hopper_gemm          # a fresh import; float32 CPU tensors in place of bfloat16

What is checked is what a kernel's logic gets wrong: which box goes into which buffer, who waits for whom (a deadlock ends after PATIENCE_S,
a box of another size than its barrier expects is one), boundaries, masks. Layouts, swizzles and instructions are not: those need a GPU.
Values of 16 bits are kept in float32. The inline assembly of hopper/dropout.py is recognised by its instructions and done in numpy.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import sys
import threading
import types
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
from triton.language import constexpr

PATIENCE_S = 20.0


class Value:
    """A scalar or a block, with the operators and methods that kernels use."""

    __array_priority__ = 100

    def __init__(self, array):
        self.array = np.asarray(array)

    def to(self, dtype, bitcast=False):
        return Value(self.array.view(dtype) if bitcast else self.array.astype(dtype))

    def __bool__(self):
        return bool(self.array)

    def __index__(self):
        return int(self.array)

    __int__ = __index__
    __hash__ = None
    shape = property(lambda self: self.array.shape)


def _binary(name):
    function = getattr(operator, name.strip("_") + ("_" if name in ("__and__", "__or__") else ""))

    def forward(self, other):
        if isinstance(other, Pointer):
            return other + self
        with np.errstate(over="ignore", invalid="ignore"):
            return Value(function(self.array, raw(other)))

    def backward(self, other):
        with np.errstate(over="ignore", invalid="ignore"):
            return Value(function(raw(other), self.array))

    setattr(Value, name, forward)
    if name not in ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"):
        setattr(Value, name.replace("__", "__r", 1), backward)


for _name in ["add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift", "lt", "le", "gt", "ge", "eq", "ne"]:
    _binary(f"__{_name}__")


def raw(value):
    """Return a value as numpy needs it; a plain int gets the type of the other operand."""
    return value.array if isinstance(value, Value) else int(value.value) if isinstance(value, ConstInt | constexpr) else value


class Pointer:
    """Addresses of elements in a tensor's storage."""

    def __init__(self, data: np.ndarray, offset=0):
        self.data, self.offset = data, offset

    def __add__(self, other):
        return Pointer(self.data, self.offset + raw(other))


class Layout:
    """Any layout: nothing depends on it here."""

    value = property(lambda self: self)

    def __init__(self, *args, **kwargs):
        pass

    @classmethod
    def get_default_for(cls, *args):
        return cls()


class Descriptor:
    """A tensor as TMA addresses it, and the box of a copy."""

    base: torch.Tensor
    block_shape: list[int]
    layout, dtype = Layout(), np.float32

    @property
    def bytes(self) -> int:
        """Bytes of an element on the device."""
        return 1 if self.base.dtype == torch.float8_e4m3fn else 2

    @property
    def data(self) -> np.ndarray:
        return self.base.float().numpy() if self.bytes == 1 else self.base.numpy()

    @property
    def box(self) -> tuple[int, ...]:
        return tuple(self.block_shape)

    def places(self, coord):
        """Return the slices of the tensor and of the box that overlap."""
        first = [int(c) for c in coord]
        inside = [(max(f, 0), max(min(f + b, n), max(f, 0))) for f, b, n in zip(first, self.box, self.data.shape, strict=True)]
        return tuple(slice(*i) for i in inside), tuple(slice(i[0] - f, i[1] - f) for i, f in zip(inside, first, strict=True))


class Buffer:
    """A block of shared memory; several views may share the same numbers."""

    dtype = types.SimpleNamespace(primitive_bitwidth=16)

    def __init__(self, flat: np.ndarray, shape, transposed=False):
        self.flat, self.shape, self.transposed = flat, tuple(int(n) for n in shape), transposed

    @property
    def view(self) -> np.ndarray:
        found = self.flat[: int(np.prod(self.shape))].reshape(self.shape)
        return found.T if self.transposed else found

    def index(self, i):
        size = int(np.prod(self.shape[1:]))
        return Buffer(self.flat[int(i) * size : (int(i) + 1) * size], self.shape[1:])

    def _reinterpret(self, dtype, shape, layout):
        return Buffer(self.flat, shape)

    def permute(self, order):
        return Buffer(self.flat, self.shape, not self.transposed)

    def slice(self, start, length, dim=0):
        return Part(np.moveaxis(np.moveaxis(self.view, dim, 0)[int(start) : int(start) + int(length)], 0, dim))

    def load(self, layout):
        return Value(self.view.copy())

    def store(self, value):
        self.view[:] = value.array


class Part(Buffer):
    """Some rows or columns of a block of shared memory."""

    view = None

    def __init__(self, view: np.ndarray):
        self.view, self.shape = view, view.shape


class Barrier:
    """An mbarrier: a phase ends when all threads and all expected bytes have arrived."""

    def __init__(self, condition):
        self.condition, self.count, self.pending, self.bytes, self.phase = condition, 0, 0, 0, 0

    def resolve(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase ^ 1, self.count
            self.condition.notify_all()


class Launch:
    """The launch of the running program."""

    grid = program = (1, 1, 1)
    condition = threading.Condition()
    failed = False


class Kernel:
    """A jit function: called by kernels directly, launched as kernel[grid](...) one program after another."""

    def __init__(self, fn):
        self.fn = fn
        self.constants = {name for name, kind in fn.__annotations__.items() if "constexpr" in str(kind)}

    def __call__(self, *args, **kwargs):
        return self.fn(*args, **kwargs)

    def __getitem__(self, grid):
        def run(*args, num_warps=4, maxnreg=None, **kwargs):
            Launch.grid = (*(int(n) for n in grid), 1, 1)[:3]
            for z, y, x in itertools.product(*(range(n) for n in reversed(Launch.grid))):
                Launch.program = (x, y, z)
                Launch.failed = False
                self.fn(*map(argument, args), **kwargs)

        return run


def argument(value):
    """Return a launch argument as a kernel sees it."""
    if isinstance(value, torch.Tensor):
        return Pointer(value.numpy().reshape(-1) if value.is_contiguous() else np.lib.stride_tricks.as_strided(value.numpy()))
    if isinstance(value, tuple | list):
        return tuple(map(argument, value))
    return Value(np.int32(value)) if isinstance(value, int) and not isinstance(value, bool) else value


class ConstInt(int):
    """A constexpr number."""

    value = property(int)


class ConstTuple(tuple):
    """A constexpr tuple."""

    value = property(tuple)


def _constexpr(value):
    return {int: ConstInt, tuple: ConstTuple}.get(type(value), lambda same: same)(value)


def _where(condition, a, b):
    if isinstance(a, Pointer):
        return a if condition else b
    return Value(np.where(raw(condition), raw(a), raw(b)))


def _load(pointer, mask=True, other=0, cache_modifier=""):
    where, mask = np.broadcast_arrays(pointer.offset, raw(mask))
    if not mask.any():
        return Value(np.full(mask.shape, raw(other), pointer.data.dtype))
    return Value(np.where(mask, pointer.data[np.where(mask, where, 0)], np.asarray(raw(other), pointer.data.dtype)))


def _store(pointer, value, mask=True):
    where, mask, values = np.broadcast_arrays(pointer.offset, raw(mask), raw(value))
    pointer.data[where[mask]] = values[mask]


def _allocate(dtype, shape, layout):
    if dtype is np.int64:
        return Barriers([Barrier(Launch.condition) for _ in range(shape[0])])
    return Buffer(np.full(int(np.prod([int(n) for n in shape])), np.nan, np.float32), shape)


class Barriers(list):
    """Barriers as a kernel indexes them."""

    def index(self, i):
        return self[int(i)]


def _warp_specialize(partitions, worker_num_warps, worker_num_regs):
    errors = []

    def run(function, args):
        try:
            function(*args)
        except BaseException as error:
            with Launch.condition:
                Launch.failed = True
                Launch.condition.notify_all()
            errors.append(error)

    threads = [threading.Thread(target=run, args=each) for each in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _init(bar, count):
    bar.count = bar.pending = int(count)


def _expect(bar, bytes, pred=True):
    if pred:
        with bar.condition:
            bar.bytes += int(bytes)
            bar.pending -= 1
            bar.resolve()


def _arrive(bar, count=1, pred=True):
    if pred:
        with bar.condition:
            bar.pending -= int(count)
            assert bar.pending >= 0, "more arrivals than a barrier counts"
            bar.resolve()


def _wait(bar, phase):
    with bar.condition:
        there = bar.condition.wait_for(lambda: bar.phase != int(phase) or Launch.failed, PATIENCE_S)
        assert there and not Launch.failed, f"nobody arrives: {bar.pending} pending, {bar.bytes} bytes missing"


def _to_shared(desc, coord, bar, buffer, pred=True):
    if not pred:
        return
    assert buffer.shape == desc.box, f"a box of {desc.box} does not fit a buffer of {buffer.shape}"
    box = np.zeros(desc.box, np.float32)
    source, target = desc.places(coord)
    box[target] = desc.data[source]
    buffer.view[:] = box
    with bar.condition:
        bar.bytes -= desc.bytes * box.size
        bar.resolve()


def _to_global(desc, coord, buffer):
    assert buffer.shape == desc.box, f"a box of {desc.box} does not fit a buffer of {buffer.shape}"
    target, source = desc.places(coord)
    desc.data[target] = buffer.view[source]


def _product(a, b, acc, is_async=False):
    a, b = (x.view if isinstance(x, Buffer) else x.array for x in (a, b))
    with np.errstate(invalid="ignore"):
        return Value(acc.array + a.astype(np.float32) @ b.astype(np.float32))


def _fields(x, multiply):
    """Return the low and the high field of the hash h of x, as float16 compares them."""
    with np.errstate(over="ignore"):
        h = x * np.uint32(multiply) + ((x >> 16) | (x << 16))
    return h & 0x3FFF, h >> 16 & 0x3FFF


def _assembly(asm, constraints, args, dtype, pure, pack):
    """Do what the assembly of hopper/dropout.py does to pairs along the last axis."""
    args = [raw(each) for each in args]
    if pack == 1:
        assert "mov.b32 $0, $1;" in asm
        return Value(args[0])
    multiply = int(args[-1])
    shape = np.broadcast_shapes(*(np.shape(each) for each in args))
    acc, product, x, level = (np.broadcast_to(each, shape) for each in args[:4])
    assert "setp" in asm and (x[..., ::2] == x[..., 1::2]).all(), "the two features of a register do not share their hash"
    low, high = _fields(x, multiply)
    keep = np.where(np.arange(shape[-1]) % 2 == 0, low, high) >= (level & 0xFFFF)
    with np.errstate(invalid="ignore"):
        return Value(np.where(keep, acc + product, acc))


def _language() -> types.SimpleNamespace:
    names = {
        "constexpr": _constexpr,
        "program_id": lambda axis: Value(np.int32(Launch.program[axis])),
        "num_programs": lambda axis: Value(np.int32(Launch.grid[axis])),
        "cdiv": lambda a, b: (a + b - 1) // b,
        "static_range": lambda *bounds: range(*(int(n) for n in bounds)),
        "arange": lambda first, end, layout=None: Value(np.arange(int(first), int(end), dtype=np.int32)),
        "expand_dims": lambda x, axis: Value(np.expand_dims(raw(x), axis)),
        "where": _where,
        "multiple_of": lambda x, factor: x,
        "zeros": lambda shape, dtype, layout=None: Value(np.zeros([int(n) for n in shape], dtype)),
        "full": lambda shape, value, dtype, layout=None: Value(np.full([int(n) for n in shape], value, dtype)),
        "reshape": lambda x, shape: Value(x.array.reshape([int(n) for n in shape])),
        "permute": lambda x, order: Value(x.array.transpose(order)),
        "split": lambda x: (Value(x.array[..., 0]), Value(x.array[..., 1])),
        "convert_layout": lambda x, layout, assert_trivial=False: x,
        "load": _load,
        "store": _store,
        "allocate_shared_memory": _allocate,
        "warp_specialize": _warp_specialize,
        "inline_asm_elementwise": _assembly,
        "thread_barrier": lambda: None,
        "bfloat16": np.float32,
        "float8e4nv": np.float32,
    }
    names |= {name: getattr(np, name) for name in ("float32", "int32", "uint32", "int64")}
    names |= dict.fromkeys(("BlockedLayout", "NVMMADistributedLayout", "NVMMASharedLayout", "SliceLayout"), Layout)
    return types.SimpleNamespace(**names)


def _jit(fn=None, **options):
    return Kernel(fn) if fn is not None else Kernel


@contextlib.contextmanager
def gluon_on_cpu() -> Iterator[None]:
    """Let modules of fused_ops that are imported inside run their Gluon kernels here; those imported before are unchanged."""
    barrier = types.SimpleNamespace(init=_init, expect=_expect, arrive=_arrive, wait=_wait, MBarrierLayout=Layout)
    copies = {"async_copy_global_to_shared": _to_shared, "async_copy_shared_to_global": _to_global, "store_wait": lambda n: None}
    hopper = types.SimpleNamespace(
        mbarrier=barrier,
        tma=types.SimpleNamespace(**copies),
        warpgroup_mma=_product,
        warpgroup_mma_wait=lambda pending, deps: tuple(deps),
        fence_async_shared=lambda: None,
    )
    language, root = _language(), "triton.experimental"
    fakes = {
        f"{root}.gluon": types.SimpleNamespace(jit=_jit, language=language, __path__=[]),
        f"{root}.gluon.language": language,
        f"{root}.gluon.language.nvidia.hopper": hopper,
        f"{root}.gluon.nvidia.hopper": types.SimpleNamespace(TensorDescriptor=Descriptor),
    }
    import triton.experimental as experimental

    from fused_ops import lora

    with (
        mock.patch.dict(sys.modules, fakes),
        mock.patch.object(experimental, "gluon", fakes[f"{root}.gluon"], create=True),
        mock.patch.dict(vars(lora)),  # a package has its modules as attributes too
    ):
        for name in [name for name in sys.modules if name.startswith("fused_ops.lora.hopper")]:
            del sys.modules[name]
        vars(lora).pop("hopper", None)
        yield
