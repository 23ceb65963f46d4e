"""The few calls of the CUDA driver that torch does not offer: memory shared between processes, copies and flags in stream order.

Everything here is asynchronous to the host unless its line says otherwise. Addresses are plain integers, streams are torch's. The
library is the one that torch itself has loaded; a call that fails raises CudaError with CUDA's own name for the reason. Memory and
streams live as long as the process: other processes map the memory, so nothing here frees it.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_uint32, c_uint64, c_void_p

import torch

LIBRARY = "libcuda.so.1"
HANDLE_BYTES = 64
GRANULE = 2 << 20  # memory smaller than this may share its pages, and then its handle, with other allocations
LAZY_ENABLE_PEER_ACCESS = 1
NON_BLOCKING = 1  # a stream that does not wait for the default stream
WAIT_GEQ = 0  # int32(*address - value) >= 0: a comparison that survives wrap-around
WAIT_FLUSH = 1 << 30
WRITE_DEFAULT = 0  # a system-wide fence stands before the write
CAN_FLUSH_REMOTE_WRITES = 98  # device attribute


class CudaError(RuntimeError):
    """A call of the CUDA driver failed."""


class IpcHandle(ctypes.Structure):
    """What names a piece of device memory to another process (CUipcMemHandle), passed by value."""

    _fields_ = [("reserved", c_char * HANDLE_BYTES)]


PROTOTYPES = {
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuCtxGetDevice": (POINTER(c_int),),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemsetD8_v2": (c_uint64, ctypes.c_ubyte, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, c_uint64, c_size_t),
    "cuMemcpyAsync": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuIpcGetMemHandle": (POINTER(IpcHandle), c_uint64),
    "cuIpcOpenMemHandle_v2": (POINTER(c_uint64), IpcHandle, c_uint),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamWaitValue32_v2": (c_void_p, c_uint64, c_uint32, c_uint),
    "cuStreamWriteValue32_v2": (c_void_p, c_uint64, c_uint32, c_uint),
}


class CudaDriver:
    """The driver's calls for one device, whose context they make current."""

    def __init__(self, device: torch.device, library: str = LIBRARY):
        """Load the library; CudaError when it or one of its functions is missing."""
        self.device = device
        try:
            loaded = ctypes.CDLL(library)
            self.functions = {name: getattr(loaded, name) for name in PROTOTYPES}
        except (OSError, AttributeError) as error:
            raise CudaError(f"the CUDA driver library cannot be used: {error}") from error
        for name, arguments in PROTOTYPES.items():
            self.functions[name].argtypes, self.functions[name].restype = arguments, c_int
        torch.cuda.set_device(device)
        torch.empty(1, device=device)  # the context exists and is current once memory has been allocated
        ordinal, can_flush = c_int(), c_int()
        self._call("cuCtxGetDevice", byref(ordinal))
        self._call("cuDeviceGetAttribute", byref(can_flush), CAN_FLUSH_REMOTE_WRITES, ordinal)
        self.wait_flags = WAIT_GEQ | (WAIT_FLUSH if can_flush.value else 0)

    def _call(self, name: str, *arguments) -> None:
        status = self.functions[name](*arguments)
        if status:
            raise CudaError(f"{name} on {self.device}: {self._describe(status)}")

    def _describe(self, status: int) -> str:
        name, text = c_char_p(), c_char_p()
        unknown = self.functions["cuGetErrorName"](status, byref(name)) or self.functions["cuGetErrorString"](status, byref(text))
        return f"error {status}" if unknown else f"{(name.value or b'').decode()} ({(text.value or b'').decode()})"

    def allocate(self, num_bytes: int) -> int:
        """Return the address of new device memory, zeroed, that other processes may map; waits for the device."""
        address, num_bytes = c_uint64(), -(-num_bytes // GRANULE) * GRANULE
        try:
            self._call("cuMemAlloc_v2", byref(address), num_bytes)
        except CudaError:
            torch.cuda.empty_cache()  # torch may hold what is missing
            self._call("cuMemAlloc_v2", byref(address), num_bytes)
        self._call("cuMemsetD8_v2", address, 0, num_bytes)
        torch.cuda.synchronize(self.device)
        return address.value

    def export(self, address: int) -> bytes:
        """Return what names allocated memory to another process."""
        handle = IpcHandle()
        self._call("cuIpcGetMemHandle", byref(handle), address)
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        """Return the address here of memory that another process exported; CudaError when this device cannot reach it."""
        address = c_uint64()
        self._call("cuIpcOpenMemHandle_v2", byref(address), IpcHandle.from_buffer_copy(handle), LAZY_ENABLE_PEER_ACCESS)
        return address.value

    def read(self, address: int, num_bytes: int) -> bytes:
        """Return bytes of device memory; waits for the copy, not for other streams."""
        buffer = ctypes.create_string_buffer(num_bytes)
        self._call("cuMemcpyDtoH_v2", ctypes.addressof(buffer), address, num_bytes)
        return buffer.raw

    def new_stream(self) -> torch.cuda.Stream:
        """Return a stream that nobody else has: torch's come from a pool and may be somebody's already."""
        stream = c_void_p()
        self._call("cuStreamCreate", byref(stream), NON_BLOCKING)
        return torch.cuda.ExternalStream(stream.value, device=self.device)

    def current_stream(self) -> torch.cuda.Stream:
        """Return the stream that torch computes on."""
        return torch.cuda.current_stream(self.device)

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """Return an event that completes when what the stream has been given so far is done."""
        return stream.record_event()

    def wait_event(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        """Let the stream wait for an event."""
        stream.wait_event(event)

    def synchronize(self, stream: torch.cuda.Stream) -> None:
        """Let the host wait for a stream."""
        self._call("cuStreamSynchronize", stream.cuda_stream)

    def copy(self, target: int, source: int, num_bytes: int, stream: torch.cuda.Stream) -> None:
        """Copy bytes between addresses of this process, either of which may be another device's memory."""
        self._call("cuMemcpyAsync", target, source, num_bytes, stream.cuda_stream)

    def write_flag(self, address: int, value: int, stream: torch.cuda.Stream) -> None:
        """Store a uint32 (`value` modulo 2^32) once all that the stream was given before is done and visible."""
        self._call("cuStreamWriteValue32_v2", stream.cuda_stream, address, value % 2**32, WRITE_DEFAULT)

    def wait_flag(self, address: int, value: int, stream: torch.cuda.Stream) -> None:
        """Let the stream wait until the uint32 at an address of this device has come to `value`; no kernel runs meanwhile."""
        self._call("cuStreamWaitValue32_v2", stream.cuda_stream, address, value % 2**32, self.wait_flags)
