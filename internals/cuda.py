"""Load and start CUDA kernels through libcuda, by ctypes, where Triton's launcher cannot be built.

Triton's driver for NVIDIA GPUs is a C file that it compiles at its first use. In a container without a C compiler, or
where nothing may be compiled, :class:`Driver` takes its place for doratune's own kernels: it has what doratune uses of
Triton's, with the same names. What a start costs has not been measured. Other kernels of Triton do not use it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from ctypes import (
    byref,
    c_char_p,
    c_double,
    c_float,
    c_int,
    c_int8,
    c_int16,
    c_int32,
    c_int64,
    c_uint,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any

from . import find
from .torch import current_device, current_stream

_PDL, _COOPERATIVE = 6, 2  # CUlaunchAttributeID
_MAX_DYNAMIC_SHARED, _PREFER_SHARED = 8, 1  # CUfunction_attribute, CUfunc_cache
_STATIC_SHARED = 1
_OPTIN_SHARED = 97  # CUdevice_attribute
_PLAIN_SHARED = 48 * 1024
_L2_128B = 2  # CUtensorMapL2promotion
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64

_SCALARS: dict[str, Any] = {
    "i1": c_int8,
    "i8": c_int8,
    "i16": c_int16,
    "i32": c_int32,
    "i64": c_int64,
    "u64": c_uint64,
    "fp32": c_float,
    "f32": c_float,
    "fp64": c_double,
}


class CudaError(RuntimeError):
    """A function of the CUDA driver failed."""


class _Attribute(ctypes.Structure):
    _fields_ = (("id", c_int), ("pad", c_int), ("value", c_int * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        *((f"{what}{axis}", c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared", c_uint),
        ("stream", c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", c_uint),
    )


class TensorMap:
    """A tensor map of the driver: 128 bytes at an aligned address."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
        start = ctypes.addressof(self._memory)
        self.address = start + -start % _MAP_ALIGNMENT


class Driver:
    """What doratune uses of Triton's driver for NVIDIA GPUs.

    ``functions`` are those of libcuda, the process's own by default.
    """

    def __init__(self, functions: Any = None) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1") if functions is None else functions
        self.utils = self

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            text = c_char_p()
            self._cuda.cuGetErrorString(c_int(code), byref(text))
            raise CudaError(f"{name} failed: {(text.value or b'unknown').decode(errors='replace')} (CUDA error {code})")

    def get_current_device(self) -> int:
        return current_device()

    def get_current_stream(self, device: int) -> int:
        return current_stream(device)

    def get_current_target(self) -> Any:
        """The ``GPUTarget`` of the current GPU."""
        import torch
        from triton.backends.compiler import GPUTarget

        major, minor = torch.cuda.get_device_capability()
        return GPUTarget("cuda", 10 * major + minor, 32)

    def load(self, name: str, image: bytes, shared: int, device: int) -> int:
        """Load a cubin on the current context and return the handle of its kernel ``name``.

        Raises:
            CudaError: the driver refuses it.
        """
        context, module, function = c_void_p(), c_void_p(), c_void_p()
        self._call("cuCtxGetCurrent", byref(context))
        if not context.value:
            self._call("cuDevicePrimaryCtxRetain", byref(context), c_int(device))
            self._call("cuCtxSetCurrent", context)
        self._call("cuModuleLoadData", byref(module), c_char_p(image))
        self._call("cuModuleGetFunction", byref(function), module, c_char_p(name.encode()))
        most = c_int()
        self._call("cuDeviceGetAttribute", byref(most), c_int(_OPTIN_SHARED), c_int(device))
        if shared > most.value:
            raise CudaError(f"{name} needs {shared} bytes of shared memory, and the GPU has {most.value}")
        if shared > _PLAIN_SHARED:
            static = c_int()
            self._call("cuFuncSetCacheConfig", function, c_int(_PREFER_SHARED))
            self._call("cuFuncGetAttribute", byref(static), c_int(_STATIC_SHARED), function)
            available = c_int(most.value - static.value)
            self._call("cuFuncSetAttribute", function, c_int(_MAX_DYNAMIC_SHARED), available)
        return int(function.value or 0)

    def launcher_cls(self, source: Any, metadata: Any) -> Launch:
        """The launcher of a kernel; ``source`` has its signature, ``metadata`` is Triton's."""
        return Launch(self, [*source.signature.values()], metadata)

    def fill_tma_descriptor_tiled(
        self,
        address: int,
        swizzle: int,
        element_bytes: int,
        element_type: int,
        block: Sequence[int],
        shape: Sequence[int],
        strides: Sequence[int],
        padding: int,
    ) -> TensorMap:
        """The tensor map of a matrix; sizes and strides in elements, the last dimension contiguous."""
        rank = len(block)
        sizes = [int(size) for size in reversed(shape)]
        steps = [element_bytes * int(stride) for stride in reversed(strides[:-1])]
        steps.append(sizes[-1] * (steps[-1] if steps else element_bytes))
        made = TensorMap()
        self._call(
            "cuTensorMapEncodeTiled",
            c_void_p(made.address),
            c_int(element_type),
            c_uint(rank),
            c_void_p(address),
            (c_uint64 * rank)(*sizes),
            (c_uint64 * rank)(*steps),
            (c_uint * rank)(*reversed(block)),
            (c_uint * rank)(*[1] * rank),
            c_int(0),  # not interleaved
            c_int(swizzle),
            c_int(_L2_128B),
            c_int(1 if padding == 1 else 0),
        )
        return made

    fill_tma_descriptor = fill_tma_descriptor_tiled
    """The name in Triton up to 3.7."""


class Launch:
    """Starts one kernel, called as Triton's launchers are.

    Raises:
        CudaError: the kernel needs what this does not offer: a cluster, scratch memory or an unknown type.
    """

    def __init__(self, driver: Driver, types: Sequence[str], metadata: Any) -> None:
        self.global_scratch_size = self.profile_scratch_size = 0
        scratch = [getattr(metadata, f"{kind}_scratch_size", 0) for kind in ("global", "profile")]
        if any(scratch) or getattr(metadata, "num_ctas", 1) != 1:
            raise CudaError("a kernel with scratch memory or clusters starts through Triton's launcher only")
        self._driver = driver
        self._types = types
        self._described = getattr(metadata, "tensordesc_meta", None) or []
        flags = ((_PDL, "launch_pdl"), (_COOPERATIVE, "launch_cooperative_grid"))
        on = [number for number, name in flags if getattr(metadata, name, False)]
        self._attributes = (_Attribute * max(1, len(on)))()
        for attribute, number in zip(self._attributes, on, strict=False):
            attribute.id, attribute.value[0] = number, 1
        self._count = len(on)

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, packed: Any, *others: Any) -> None:
        self.launch(x, y, z, stream, function, packed, others[3:])  # after the metadata and hooks of a profiler

    def launch(
        self, x: int, y: int, z: int, stream: int, function: int, packed: Sequence[int], arguments: Sequence[Any]
    ) -> None:
        """Start the kernel on a grid; ``packed`` are its warps, clusters and bytes of shared memory."""
        if not x * y * z:
            return
        values = self._values(arguments)
        addresses = [each.address if type(each) is TensorMap else ctypes.addressof(each) for each in values]
        places = (c_void_p * len(values))(*addresses)
        warps, _, shared = packed
        config = _Config(x, y, z, 32 * warps, 1, 1, shared, stream, self._attributes, self._count)
        self._driver._call("cuLaunchKernelEx", byref(config), c_void_p(function), places, c_void_p())

    def _values(self, arguments: Sequence[Any]) -> list[Any]:
        """The C values of all parameters, and tensor maps."""
        values: list[Any] = []
        described = iter(self._described)
        for type_, argument in zip(self._types, arguments, strict=True):
            if type_.startswith("*"):
                values.append(c_uint64(_address(argument)))
            elif type_ == "nvTmaDesc":
                values.append(argument)
            elif type_.startswith("tensordesc"):
                values += self._expanded(argument, next(described, None))
            elif type_ in _SCALARS:
                values.append(_SCALARS[type_](argument))
            else:
                raise CudaError(f"a parameter of type {type_} is passed by Triton's launcher only")
        return [*values, c_uint64(0), c_uint64(0)]  # no scratch memory, of either kind

    def _expanded(self, descriptor: Any, facts: Mapping[str, Any] | None) -> list[Any]:
        if facts is None or facts["fp4_padded"]:
            raise CudaError("a descriptor without a tensor map is passed by Triton's launcher only")
        types = getattr(find("triton.backends.nvidia.driver"), "TMA_DTYPE_DEVICE_TO_HOST", {})
        made = self._driver.fill_tma_descriptor_tiled(
            descriptor.base.data_ptr(),
            facts["swizzle"],
            facts["elem_size"],
            types.get(facts["elem_type"], facts["elem_type"]),
            facts["block_size"],
            descriptor.shape,
            descriptor.strides,
            1 if descriptor.padding == "nan" else 0,
        )
        return [made, *map(c_int32, descriptor.shape), *map(c_int64, descriptor.strides)]


def _address(argument: Any) -> int:
    if argument is None:
        return 0
    return argument if isinstance(argument, int) else int(argument.data_ptr())


def has_c_compiler() -> bool:
    """Whether Triton finds a C compiler here."""
    named = os.environ.get("CC")
    return bool(shutil.which(named) if named else shutil.which("gcc") or shutil.which("clang"))


def is_built() -> bool:
    """Whether Triton's cache has its driver for NVIDIA GPUs, so that using it compiles nothing."""
    try:
        driver = find("triton.backends.nvidia.driver")
        text = (Path(driver.__file__).parent / "driver.c").read_text()
        key = hashlib.sha256((text + find("triton.runtime.build.platform_key")()).encode()).hexdigest()
        name = f"cuda_utils{sysconfig.get_config_var('EXT_SUFFIX')}"
        return find("triton.runtime.cache.get_cache_manager")(key).get_file(name) is not None
    except Exception:  # another Triton: its own ways decide
        return False


@functools.cache
def own_driver() -> Driver:
    """The driver that stands in for Triton's in this process."""
    return Driver()
