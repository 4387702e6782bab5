"""The few instructions that emitted kernels write in PTX, for Triton's interpreter, which knows no PTX.

Each is what the machine does: a lane holds the table's value of its number, a shuffle reads that of the lane whose
number the code is. The interpreter has no lanes, so the shuffle looks in the table of the format that its comment
names.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

from doratune.codegen.weight_formats import KINDS


class _Result(NamedTuple):
    handle: Any

    def get_result(self, index: int) -> Any:
        assert index == 0
        return self.handle


def _bf16_bits(values: Any) -> Any:
    """The bits of fp32 values rounded to bf16, to the nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint32)


def _inline_asm(
    builder: object, asm: str, constraints: str, values: list[Any], types: object, is_pure: bool, pack: int
) -> _Result:
    handle = interpreter.TensorHandle
    if asm.startswith("mov.u32 $0, %laneid;"):
        return _Result(handle(np.zeros_like(values[0].data), tl.int32))
    if asm.startswith("shfl.sync.idx.b32 $0, $1, $2, 0x101f, 0xffffffff; // "):
        table = np.array(KINDS[asm.rpartition(" ")[2]].table, dtype=np.float32)
        return _Result(handle(table[values[1].data & 15], tl.float32))
    if asm == "mul.rn.f32 $0, $1, $2;":
        return _Result(handle(np.multiply(values[0].data, values[1].data, dtype=np.float32), tl.float32))
    assert asm == "cvt.rn.bf16x2.f32 $0, $2, $1;", f"teach the interpreter {asm!r}"
    low, high = (_bf16_bits(value.data) for value in values)
    return _Result(handle((low | (high << 16)).view(np.int32), tl.int32))


@pytest.fixture
def assembler(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teach the interpreter these instructions."""
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", _inline_asm, raising=False)
