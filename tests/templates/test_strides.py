"""Every variant takes matrices whose rows lie apart, as slices of wider ones do, without touching what lies between;
what a kernel cannot address is copied, and the compiler is told how far each operand's rows are aligned."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from math import gcd

import pytest
import torch

from doratune.codegen.compile import contiguous_alignments, divisibility
from doratune.codegen.gpu import find_gpu
from doratune.codegen.module import load_module
from doratune.codegen.ops import ALIGNMENT, OPS
from doratune.codegen.render import render
from doratune.codegen.spec import KernelSpec
from doratune.codegen.variants import Variant
from doratune.runtime.arguments import alignment_of, as_rows
from doratune.runtime.reference import definition
from doratune.tuner.accuracy import worst_error
from doratune.tuner.inputs import make_inputs, make_outputs

from ..specs import EVEN, every_variant, read_by
from .interpreter import GPU, IDS, INTERPRETED, forms, served_spec, small_config

SINGLE = [variant for variant in INTERPRETED if "layers" not in OPS[variant.op].dims]
"""The variants that do not take many layers at once: those must be contiguous."""

PADDING = 8
"""Elements between two rows: 16 bytes of fp16, so that tensor descriptors can say it too."""


def set_apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as a slice of a wider matrix, with NaN on both sides of every row."""
    if tensor.ndim < 2:
        return tensor
    wide = torch.full((tensor.shape[0], tensor.shape[1] + 2 * PADDING), float("nan"), dtype=tensor.dtype)
    wide[:, PADDING:-PADDING] = tensor
    return wide[:, PADDING:-PADDING]


def around(tensor: torch.Tensor) -> torch.Tensor:
    """The elements beside the rows of a tensor from :func:`set_apart`."""
    wide = tensor._base
    assert wide is not None
    return torch.cat([wide[:, :PADDING], wide[:, -PADDING:]], dim=1)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("variant", "form"),
    [pytest.param(v, form, id=f"{IDS[v]}-{'-'.join(form) or 'plain'}") for v in SINGLE for form in forms(v.op)],
)
@pytest.mark.parametrize("adapter", [None, "fp32"])
def test_rows_may_lie_apart(variant: Variant, form: dict[str, object], adapter: str | None) -> None:
    if adapter and ("adapter" not in OPS[variant.op].dtypes or "autocast" in form):
        pytest.skip("there is no adapter, or it is the form without this parameter")
    spec = served_spec(variant, "fp16", **({"adapter": adapter} if adapter else {}), **form)
    if variant.op != "weight_norm" and variant.unavailable(spec, GPU) is not None:
        pytest.skip("the variant leaves fp32 adapters to others")
    source = render(spec, small_config(variant, spec))
    plain, scaling = make_inputs(spec, 37)
    inputs = {name: set_apart(tensor) for name, tensor in plain.items()}
    outputs = {name: set_apart(tensor) for name, tensor in make_outputs(spec, 37).items()}
    load_module(source).launch(*inputs.values(), *outputs.values(), *((scaling,) if spec.contract.scaling else ()))
    assert worst_error(spec, outputs, definition(spec, plain, scaling))[1] is None
    for name, tensor in {**inputs, **outputs}.items():
        assert tensor.ndim < 2 or bool(around(tensor).isnan().all()), f"wrote beside the rows of {name}"


@every_variant
def test_every_matrix_is_addressed_by_its_row_stride_or_by_a_descriptor(variant: Variant) -> None:
    if "layers" in OPS[variant.op].dims:
        pytest.skip("layers are contiguous, and a table says where they are")
    for form in forms(variant.op):
        values = {**EVEN, **form} | ({"adapter": "fp32"} if "autocast" in form else {})
        spec = KernelSpec.create(variant.op, **read_by(variant, values))
        text = render(spec, variant.seeds(spec, find_gpu("h200"))[0]).text
        operands = spec.contract.inputs_of(spec) + spec.contract.outputs_of(spec)
        matrices = {operand.name.lower() for operand in operands if len(operand.shape) == 2}
        functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        kernels = [function for function in functions if function.name.endswith("_kernel")]
        for kernel in kernels:
            params = {arg.arg: ast.literal_eval(arg.annotation) for arg in kernel.args.args if arg.annotation}
            by_pointer = {name.removesuffix("_ptr") for name in params if name.endswith("_ptr")} & matrices
            strides = {name.removesuffix("_stride"): type_ for name, type_ in params.items() if "_stride" in name}
            assert strides == dict.fromkeys(by_pointer, "i64"), f"{kernel.name}: a row times its stride passes 2**31"
        assert ("TensorDescriptor" in text) == variant.descriptors


@pytest.mark.parametrize(("d_out", "bytes_"), [(4096, 16), (4304, 16), (1160, 16), (2706, 4), (1028, 8), (37, 2)])
def test_the_compiler_is_told_what_divides_contiguous_rows(d_out: int, bytes_: int) -> None:
    spec = KernelSpec.create("compose_forward", **{**EVEN, "d_out": d_out})
    alignments = contiguous_alignments(spec)
    assert alignments == {"base": bytes_, "lora": bytes_, "g": ALIGNMENT, "y": bytes_}
    base = torch.empty(3, d_out, dtype=torch.bfloat16)
    assert base.data_ptr() % ALIGNMENT == 0
    assert alignment_of(base) == bytes_
    signature = {"base_ptr": "*bf16", "base_stride": "i64", "g_ptr": "*fp32", "tokens": "i32", "sums_ptr": "*fp32"}
    expected = {0: bytes_, 1: bytes_ // 2, 2: ALIGNMENT, 4: ALIGNMENT}
    told = {index: value for (index,), [[_, value]] in divisibility(signature, alignments).items()}
    assert told == {index: value for index, value in expected.items() if value > 1}


def test_of_a_matrix_that_may_be_any_operand_the_compiler_is_told_nothing() -> None:
    signature = {"left_ptr": "*fp16", "left_stride": "i64", "result_ptr": "*fp32"}
    assert divisibility(signature, {"x": 16, "weight": 4}) == {(2,): [["tt.divisibility", ALIGNMENT]]}


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("stride", [64, 66, 68, 72])
def test_an_alignment_divides_address_and_row_stride(offset: int, stride: int) -> None:
    view = torch.empty(5, stride, dtype=torch.bfloat16)[:, offset : offset + 48]
    assert alignment_of(view) == gcd(16, 2 * offset, 2 * stride)


@pytest.mark.parametrize("descriptor", [False, True])
def test_only_what_cannot_be_addressed_is_copied(descriptor: bool) -> None:
    def copied(tensor: torch.Tensor) -> bool:
        rows = as_rows(tensor, descriptor=descriptor)
        assert rows.ndim == 2
        assert torch.equal(rows, tensor.reshape(-1, tensor.shape[-1]))
        return rows.data_ptr() != tensor.data_ptr()

    wide = torch.arange(2 * 3 * 64).reshape(2, 3, 64).bfloat16()
    assert not copied(wide[..., 8:24])
    assert not copied(wide[:, 1:2])
    assert copied(wide[:, :2])  # two rows of three: no one stride
    assert copied(wide.transpose(0, 1))
    assert copied(wide[..., 1:17]) == descriptor  # an address that is no multiple of 16 bytes
    assert copied(wide.reshape(-1, 12)[:, :8]) == descriptor  # a row stride that is none
    assert copied(wide[0, :1].expand(5, 64)) == descriptor  # one row for all


def test_aligned_rows_are_loaded_16_bytes_at_a_time() -> None:
    """A row stride known only at run time must not cost the wide accesses that a constant one allowed."""
    code = f"""
from doratune.codegen.compile import build
from doratune.codegen.gpu import find_gpu
from doratune.codegen.module import load_module
from doratune.codegen.render import render
from doratune.codegen.spec import KernelSpec
from doratune.codegen.variants import default_config
for d_out in (4096, 1160, 2706):
    spec = KernelSpec.create("compose_forward", **{EVEN | {"gpu": "sm_90"}} | {{"d_out": d_out}})
    source = render(spec, default_config(spec, find_gpu("sm_90")))
    ptx = build(source, load_module(source).compose_forward_kernel, find_gpu("sm_90").triton_target()).asm["ptx"]
    print(d_out, *(f"{{op}}.global.v4.b32" in ptx for op in ("ld", "st")))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout.split("\n")[:2] == ["4096 True True", "1160 True True"], done.stderr
    assert done.stdout.split("\n")[2].endswith("False"), "control: rows of 5412 bytes"
