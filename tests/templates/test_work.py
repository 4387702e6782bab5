"""A variant's ``work()`` and ``library_calls()`` count what the emitted ``launch`` starts: each kernel, in order, with
its number of programs; each call of PyTorch with its floating-point operations and bytes.

Needs no GPU: ``launch`` runs on tensors without memory, with recorders in the place of its kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from doratune.codegen.module import kernel_names, load_module
from doratune.codegen.render import Source, render
from doratune.codegen.variants import Variant

from ..specs import every_variant
from ..strategies import kernels

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "i64": torch.int64, "u8": torch.uint8}
VIEWS = {"alias", "as_strided", "expand", "permute", "select", "slice", "split", "t", "transpose", "unsqueeze", "view"}


class Calls(TorchDispatchMode):
    """Records each operation of PyTorch that would start a kernel: its floating-point operations and bytes moved."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in ("mm", "bmm", "addmm_"):  # not run: without memory PyTorch 2.10 has no products with out_dtype
            left, right = args[-2:] if name == "addmm_" else args[:2]
            result = args[0] if name == "addmm_" else kwargs["out"]
            self.seen.append((2 * left.numel() * right.shape[-1], left.nbytes + right.nbytes + result.nbytes))
            return result
        result = func(*args, **kwargs)
        if name not in VIEWS and not name.startswith("empty") and isinstance(result, torch.Tensor):
            read = [arg for arg in args[name == "copy_" :] if isinstance(arg, torch.Tensor)]
            self.seen.append((0, sum(tensor.nbytes for tensor in (*read, result))))
        return result


def launched(source: Source, monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[str, int]], list[tuple[int, int]]]:
    """The kernels that ``launch`` starts with their numbers of programs, and PyTorch's calls, both in order."""
    module, started = load_module(source), []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **__: started.append((self.name, math.prod(grid)))

    for name in kernel_names(module):
        setattr(module, name, Recorder(name))
    spec = source.spec
    operands = [
        torch.empty(operand.sizes(spec), dtype=DTYPES[operand.dtype_of(spec)], device="meta")
        for operand in (*spec.contract.inputs_of(spec), *spec.contract.outputs_of(spec))
    ]
    with monkeypatch.context() as patched, Calls() as calls:
        # The emitted text multiplies in another way where there is no cuBLAS.
        patched.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True), raising=False)
        module.launch(*operands, *((1.0,) if spec.contract.scaling else ()))
    return started, calls.seen


@every_variant
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_model_counts_what_is_launched(
    variant: Variant, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, config = data.draw(kernels(variant))
    started, calls = launched(render(spec, config), monkeypatch)
    assert [(work.kernel, work.programs) for work in variant.work(spec, config)] == started
    assert [(call.matrix_flops, call.dram_bytes) for call in variant.library_calls(spec, config)] == calls
