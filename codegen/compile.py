"""Compile emitted text to binaries for a named GPU, which need not be present.

Triton accepts an explicit target, so any machine can make a cubin or hsaco. The resources that it uses (registers,
spills, shared memory) are read from the binary and checked against the GPU's limits, which Triton does not do.
"""

from __future__ import annotations

import ast
import functools
import math
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import DoratuneError
from ..internals.triton import (
    assembler_output,
    cache_folder,
    compile_for,
    cuobjdump,
    frontend_complaint,
    prepare_launcher,
    source_for,
)
from .gpu import Gpu
from .module import kernel_names, load_module
from .ops import ALIGNMENT, DTYPE_BYTES, OPERAND_BYTES
from .render import Source
from .spec import KernelSpec

DESCRIPTOR = re.compile(r"tensordesc<(\w+)\[(?:(1), )?(\d+), (\d+)\](?:,.*)?>", re.DOTALL)
"""The type of a tensor descriptor: dtype, rows and columns of one tile, of many matrices if a 1 precedes them; in Gluon
also a layout."""

SPARE_REGISTERS = 16
"""If a kernel leaves this many registers per thread unused, its stack frame does not come from spilling."""

_REFUSED_BY_PASSES = "PassManager::run failed"
"""The text of the RuntimeError that MLIR's passes raise when they refuse a kernel."""

_ASSEMBLER_ERROR = re.compile(r"\berror\s*:(.*)")
"""How ptxas reports an error in a kernel. For unreadable files, unknown options and the like it prints ``fatal``."""

_MISSING_TOOL = ("Cannot find ", "Failed to find C compiler", "Could not create or locate cache dir")
"""The first words of the RuntimeErrors that Triton raises if a tool or its cache is missing."""


class CompileError(DoratuneError):
    """Triton or its assembler refused the emitted text; the message contains a line of the reason."""


class OverLimitError(CompileError):
    """The kernel compiled, but needs more than the GPU has."""


class ToolchainError(DoratuneError):
    """A compile failed, but not demonstrably because of the emitted text, so it may succeed later."""


class BrokenToolchainError(ToolchainError):
    """Nothing compiles on this machine: a folder or disk cannot be written, a tool is missing, or Triton is broken."""


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel's binary for one architecture.

    ``registers`` are per thread, ``spills`` bytes of local memory per thread, ``shared_bytes`` per block; ``image`` is
    the cubin or hsaco, ``handle`` Triton's own object.
    """

    name: str
    registers: int
    spills: int
    shared_bytes: int
    num_warps: int
    image: bytes = field(repr=False)
    handle: Any = field(repr=False, compare=False, default=None)


@functools.lru_cache(maxsize=16)
def _syntax(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except SystemError:  # CPython 3.11 counts recursion in one place for all threads (python/cpython issue 106905)
        return ast.parse(text)


@functools.lru_cache(maxsize=16)
def _calls(text: str) -> tuple[ast.Call, ...]:
    return tuple(node for node in ast.walk(_syntax(text)) if isinstance(node, ast.Call))


def launch_options(source: Source, kernel: str) -> dict[str, int | bool]:
    """The ``num_warps``, ``num_stages`` and ``launch_pdl`` with which the emitted text starts ``kernel``.

    The call is in ``launch`` or in a function that it calls.
    """
    for call in _calls(source.text):
        started = call.func.value if isinstance(call.func, ast.Subscript) else None
        if isinstance(started, ast.Name) and started.id == kernel:
            return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
    raise CompileError(f"the emitted text of {source.spec} does not start {kernel}")


def extra_warps(source: Source, kernel: str) -> tuple[int, ...]:
    """The additional warps of a warp-specialised ``kernel``, for each of its other tasks; empty for most kernels."""
    for call in (node for node in ast.walk(_definition(source, kernel)) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute) and call.func.attr == "warp_specialize":
            return tuple(ast.literal_eval(call.args[1]))
    return ()


def _definition(source: Source, kernel: str) -> ast.FunctionDef:
    for node in _syntax(source.text).body:
        if isinstance(node, ast.FunctionDef) and node.name == kernel:
            return node
    raise CompileError(f"the emitted text of {source.spec} does not define {kernel}")


def _is_gluon(definition: ast.FunctionDef) -> bool:
    names = (node for decorator in definition.decorator_list for node in ast.walk(decorator))
    return any(isinstance(node, ast.Name) and node.id == "gluon" for node in names)


def contiguous_alignments(spec: KernelSpec) -> dict[str, int]:
    """The bytes (up to :data:`ALIGNMENT`) that divide the row stride of each operand if it is contiguous.

    It assumes that addresses are multiples of :data:`ALIGNMENT`, as in memory that PyTorch allocates.
    """
    return {
        operand.name: math.gcd(ALIGNMENT, operand.sizes(spec)[-1] * OPERAND_BYTES[operand.dtype_of(spec)])
        if len(operand.shape) > 1
        else ALIGNMENT
        for operand in spec.contract.inputs_of(spec) + spec.contract.outputs_of(spec)
    }


def divisibility(
    signature: Mapping[str, str], alignments: Mapping[str, int]
) -> dict[tuple[int, ...], list[list[str | int]]]:
    """The divisibility that the compiler may assume for a kernel's parameters, in the form of Triton's attributes.

    Parameters ``x_ptr`` and ``x_stride`` belong to the operand x, whose address and row stride are multiples of
    ``alignments[x]`` bytes. Other pointers point into the launch's workspace, which is fully aligned. The exception is
    a pointer with a stride that names no operand: the kernel is called with several operands, so nothing is assumed.
    """
    by_name = {name.lower(): value for name, value in alignments.items()}
    attrs: dict[tuple[int, ...], list[list[str | int]]] = {}
    for index, (name, type_) in enumerate(signature.items()):
        divisor = 1
        if type_.startswith("*"):
            matrix = name.removesuffix("_ptr")
            divisor = by_name.get(matrix, 1 if f"{matrix}_stride" in signature else ALIGNMENT)
        elif name.endswith("_stride"):
            operand = name.removesuffix("_stride")
            divisor = by_name.get(operand, 1) // DTYPE_BYTES[signature[f"{operand}_ptr"].removeprefix("*")]
        if divisor > 1:
            attrs[(index,)] = [["tt.divisibility", divisor]]
    return attrs


def build(source: Source, kernel: Any, target: Any, alignments: Mapping[str, int] | None = None) -> Any:
    """Compile one jit function of an emitted module for a ``GPUTarget``; returns Triton's compiled kernel."""
    return compile_for(triton_source(source, kernel, alignments), target, launch_options(source, kernel.__name__))


def triton_source(source: Source, kernel: Any, alignments: Mapping[str, int] | None = None) -> Any:
    """The input of Triton's compiler for one jit function of an emitted module.

    The signature is read from the parameter annotations of the emitted text (``"*bf16"``, ``"i32"``). ``alignments``
    are the bytes that divide the address and the row stride of each operand, by name; None means contiguous operands.
    """
    signature = signature_of(source, kernel.__name__)
    attrs = divisibility(signature, contiguous_alignments(source.spec) if alignments is None else alignments)
    return source_for(kernel, signature, attrs)


def signature_of(source: Source, kernel: str) -> dict[str, str]:
    """The types of a kernel's parameters by name, read from the text; in Gluon, with the layouts of descriptors."""
    definition = _definition(source, kernel)
    signature = {
        parameter.arg: ast.literal_eval(parameter.annotation)
        for parameter in definition.args.args
        if parameter.annotation is not None
    }
    if not _is_gluon(definition):
        return signature
    from triton.experimental.gluon import language as gl

    dtypes = {"bf16": gl.bfloat16, "fp16": gl.float16}
    for name, type_ in signature.items():
        if match := DESCRIPTOR.fullmatch(type_):
            layout = gl.NVMMASharedLayout.get_default_for(block_of(match), dtypes[match[1]])
            signature[name] = f"{type_[:-1]},{layout!r}>"
    return signature


def block_of(descriptor: re.Match[str]) -> list[int]:
    """The sizes of a descriptor's tile, from a match of :data:`DESCRIPTOR`."""
    return [int(size) for size in descriptor.groups()[1:] if size]


def prepare_launchers(compiled: Iterable[CompiledKernel]) -> None:
    """Make what Triton needs to start compiled kernels besides their binaries, where that takes long."""
    for kernel in compiled:
        prepare_launcher(kernel.handle)


def compile_source(source: Source, gpu: Gpu) -> tuple[CompiledKernel, ...]:
    """Compile every kernel of an emitted text for ``gpu`` and check it against the GPU's limits.

    Raises:
        OverLimitError: a kernel needs more shared memory or registers than the GPU has.
        CompileError: Triton or the assembler refused the text.
        BrokenToolchainError: nothing compiles on this machine.
        ToolchainError: the compile failed for another reason, which may not be the text.
    """
    try:
        target = gpu.triton_target()
        module = load_module(source)
        compiled = tuple(
            _inspect(name, build(source, getattr(module, name), target), gpu) for name in kernel_names(module)
        )
    except Exception as error:
        raise judge_failure(error, f"{source.spec} does not compile for {gpu.slug} with {source.config}") from error
    for kernel in compiled:
        if kernel.shared_bytes > gpu.shared_bytes_per_block:
            raise OverLimitError(
                f"{kernel.name} of {source.spec} needs {kernel.shared_bytes} bytes of shared memory; "
                f"a block on {gpu.slug} has {gpu.shared_bytes_per_block} ({source.config})"
            )
        used = kernel.registers * kernel.num_warps * gpu.warp_size
        if used > gpu.registers_per_multiprocessor:
            raise OverLimitError(
                f"{kernel.name} of {source.spec} needs {used} registers a block; "
                f"a multiprocessor of {gpu.slug} has {gpu.registers_per_multiprocessor} ({source.config})"
            )
    return compiled


def judge_failure(error: Exception, what: str) -> CompileError | ToolchainError:
    """Classify the error of a failed compile and return the exception to raise; ``what`` begins its message.

    Only known errors count as errors of the text (:class:`CompileError`): Triton's frontend, its passes or ptxas
    refused it. All other errors, such as a full disk or a crash in Triton, do not.
    """
    if isinstance(error, CompileError | ToolchainError):
        return error
    causes = _causes(error)  # the frontend wraps every exception in its own error
    broken = next((cause for cause in causes if _is_broken(cause)), None)
    if broken is not None:
        return BrokenToolchainError(f"no kernel can be compiled here: {_reason(broken)}; {_remedy(broken)}")
    complaint = next((text for cause in causes if (text := _complaint(cause)) is not None), None)
    if complaint is not None:
        return CompileError(f"{what}: {complaint}")
    return ToolchainError(f"{what}: {_reason(error)} (the config may not be the cause)")


def _causes(error: BaseException) -> list[BaseException]:
    """The error and the chain of its causes, the innermost first."""
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.insert(0, at)
        at = at.__cause__ or at.__context__
    return found


def _is_broken(error: BaseException) -> bool:
    missing = isinstance(error, RuntimeError) and str(error).startswith(_MISSING_TOOL)
    return missing or isinstance(error, OSError | ImportError)


def _complaint(error: BaseException) -> str | None:
    """The line in which Triton or ptxas reports an error of the text; None for other errors."""
    printed = assembler_output(error)
    if printed is not None:
        complaint = _ASSEMBLER_ERROR.search(printed)
        return f"ptxas: {complaint[1].strip()}" if complaint else None
    said = frontend_complaint(error)
    if said is not None:
        return said.strip().splitlines()[-1].strip()
    return str(error).strip() if isinstance(error, RuntimeError) and _REFUSED_BY_PASSES in str(error) else None


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"


def _remedy(error: BaseException) -> str:
    if isinstance(error, OSError):
        return (
            f"make Triton's cache{_cache_folder()} and the folder for temporary files writable and free space on "
            "their disks, or set TRITON_CACHE_DIR and TMPDIR to other folders"
        )
    if "C compiler" in str(error):
        return "install a C compiler such as gcc, or set CC to one"
    if "cache dir" in str(error):
        return "set TRITON_CACHE_DIR to a writable folder"
    return "reinstall Triton in the version that PyTorch requires"


def _cache_folder() -> str:
    folder = cache_folder()
    return "" if folder is None else f" ({folder})"


def _inspect(name: str, handle: Any, gpu: Gpu) -> CompiledKernel:
    binary = "cubin" if gpu.backend == "cuda" else "hsaco"
    image = handle.asm[binary]
    registers, frame = _cubin_usage(image) if binary == "cubin" else _amdgcn_usage(handle.asm["amdgcn"])
    threads = handle.metadata.num_warps * gpu.warp_size
    most = min(gpu.max_registers_per_thread, gpu.registers_per_multiprocessor // threads)
    spills = frame if registers > most - SPARE_REGISTERS else 0
    return CompiledKernel(name, registers, spills, handle.metadata.shared, handle.metadata.num_warps, image, handle)


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of local memory per thread, from ``cuobjdump`` (shipped with Triton)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [cuobjdump(), "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", report)
    if usage is None:
        raise ToolchainError(
            f"cuobjdump printed no resource usage of a cubin of {len(cubin)} bytes: {report.strip()!r}"
        )
    return int(usage[1]), int(usage[2])


def _amdgcn_usage(assembly: str) -> tuple[int, int]:
    """Vector registers per thread and bytes of scratch per thread from the kernel descriptor's metadata."""
    values = {
        key: int(value)
        for key, value in re.findall(r"\.(vgpr_count|agpr_count|private_segment_fixed_size):\s*(\d+)", assembly)
    }
    return values["vgpr_count"], values["private_segment_fixed_size"]
