"""The gate passes a candidate that writes its outputs and nothing else, and no other: one byte beyond an operand, one
changed input, or one wrong element of a large output is enough. Needs no GPU: candidates are functions on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from doratune.codegen.ops import OPS
from doratune.codegen.spec import KernelSpec
from doratune.runtime.reference import reference
from doratune.tuner.evaluation import Rejected
from doratune.tuner.gate import GUARD_BYTES, Gate, Guarded, gate_tokens

from ..specs import dtype_for

CPU = torch.device("cpu")


def spec_of(op: str, dtype: str = "bf16", **values: int) -> KernelSpec:
    sizes = {"d_out": 320, "d_in": 96, "rank": 8, "tokens": 128, **values}
    return KernelSpec.create(op, dtype=dtype_for(op, dtype), adapter=dtype, gpu="h200", **sizes)


def candidate(spec: KernelSpec, after: Callable[..., None] = lambda *operands: None) -> Callable[..., None]:
    """A right kernel of ``spec`` that does one thing more afterwards, with its operands by name."""
    inputs, outputs = spec.contract.inputs_of(spec), spec.contract.outputs_of(spec)

    def launch(*operands: torch.Tensor | float) -> None:
        scaling = operands[len(inputs) + len(outputs)] if spec.contract.scaling else 1.0
        by_name = dict(zip([operand.name for operand in (*inputs, *outputs)], operands, strict=False))
        given = {operand.name: by_name[operand.name] for operand in inputs}
        for name, value in reference(spec, given, scaling).items():  # type: ignore[arg-type]
            by_name[name].copy_(value)  # type: ignore[union-attr]
        after(by_name)

    return launch


def behind(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """The elements right behind the end of a contiguous tensor, or before its beginning if negative."""
    start = tensor.storage_offset() + (tensor.numel() if elements > 0 else elements)
    return torch.as_strided(tensor, (abs(elements),), (1,), start)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("op", sorted(OPS))
def test_a_right_candidate_passes_again_and_again(op: str, dtype: str) -> None:
    gate = Gate(spec_of(op, dtype), CPU)
    errors = [gate.check(candidate(spec_of(op, dtype))) for _ in range(2)]
    assert errors[0] == errors[1]
    assert (errors[0] == 0.0) == (op == "weight_dequantise")  # whose values are rounded by definition
    assert errors[0] < 0.05


@pytest.mark.parametrize("elements", [1, 200, -1, -200])
@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
@pytest.mark.parametrize("name", ["base", "h", "g", "y"])
def test_a_write_out_of_bounds_is_noticed_and_undone(name: str, value: float, elements: int) -> None:
    spec = spec_of("lora_compose")
    gate = Gate(spec, CPU)
    size = abs(elements) * (4 if name == "g" else 2)
    where = f"1 behind the end of {name}" if elements > 0 else f"{size} before {name}"
    for _ in range(2):
        with pytest.raises(Rejected, match=f"^writes out of bounds: byte {where}$"):
            gate.check(candidate(spec, lambda by_name: behind(by_name[name], elements).fill_(value)))
    gate.check(candidate(spec))


def test_what_is_read_behind_an_operand_does_not_pass_for_a_result() -> None:
    spec = spec_of("compose_forward")
    with pytest.raises(Rejected, match="inaccurate: y is off by nan"):
        Gate(spec, CPU).check(
            candidate(spec, lambda by_name: by_name["y"][-1, -1:].add_(1e-6 * behind(by_name["base"], 1)))
        )


@pytest.mark.parametrize("name", ["base", "lora", "g"])
def test_a_write_into_an_input_is_noticed_and_undone(name: str) -> None:
    spec = spec_of("compose_forward")
    gate = Gate(spec, CPU)
    with pytest.raises(Rejected, match=f"writes into its input {name}"):
        gate.check(candidate(spec, lambda by_name: by_name[name].view(-1)[-1:].mul_(1.01)))
    gate.check(candidate(spec))


@pytest.mark.parametrize(("dtype", "off"), [("bf16", 0.06), ("fp16", 0.01), ("fp32", 1e-4)])
@pytest.mark.parametrize("place", [(0, 0), (300, 1200), (508, 2047)])
@pytest.mark.parametrize("op", ["lora_compose", "compose_forward", "dora_linear_forward"])
def test_one_wrong_element_of_a_large_output_is_noticed(
    op: str, place: tuple[int, int], dtype: str, off: float
) -> None:
    spec = spec_of(op, dtype, d_out=2048, tokens=4096)
    row, column = place

    def spoil(by_name: dict[str, torch.Tensor]) -> None:
        by_name["y"][row, column] += off * by_name["y"][:, column].abs().mean()

    gate = Gate(spec, CPU)
    gate.check(candidate(spec))
    with pytest.raises(Rejected, match="inaccurate: y"):
        gate.check(candidate(spec, spoil))


def test_two_runs_that_differ_in_a_bit_are_not_deterministic() -> None:
    spec = spec_of("compose_forward", "fp32")
    runs = iter(range(2))

    def last_bit(by_name: dict[str, torch.Tensor]) -> None:
        by_name["y"].view(torch.int32)[3, 5] ^= next(runs)

    with pytest.raises(Rejected, match="not deterministic"):
        Gate(spec, CPU).check(candidate(spec, last_bit))


def test_an_unwritten_output_is_noticed_though_an_earlier_candidate_wrote_it() -> None:
    spec = spec_of("compose_forward")
    gate = Gate(spec, CPU)
    gate.check(candidate(spec))
    with pytest.raises(Rejected, match="inaccurate: y is off by nan"):
        gate.check(lambda *operands: None)


def test_guarded_tensors_are_aligned_contiguous_copies() -> None:
    originals = {"a": torch.arange(5.0), "b": torch.ones(3, 7, dtype=torch.float16), "c": torch.zeros(1)}
    guarded = Guarded(originals)
    for name, tensor in guarded.tensors.items():
        assert torch.equal(tensor, originals[name])
        assert tensor.is_contiguous()
        assert tensor.dtype == originals[name].dtype
        assert (tensor.data_ptr() - guarded.tensors["a"].data_ptr()) % 256 == 0
    assert guarded.tensors["b"].data_ptr() - guarded.tensors["a"].data_ptr() > GUARD_BYTES
    assert not guarded.changed()
    assert not guarded.guards_changed()
    guarded.tensors["b"][0, 0] = 2.0
    assert guarded.changed()
    assert not guarded.guards_changed()
    assert guarded.changed_tensor() == "b"
    guarded.restore()
    assert not guarded.changed()


def test_larger_token_buckets_share_their_gate() -> None:
    assert [gate_tokens(spec_of("lora_compose", tokens=tokens)) for tokens in (1, 16, 128, 512, 1024, 8192)] == [
        *(1, 16, 125, 509, 509, 509)
    ]
    assert gate_tokens(spec_of("weight_norm")) == 0
