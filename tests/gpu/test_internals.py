"""On a GPU, without any one of the guarded internals of Triton every kernel gives the same, by public ways."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from doratune import load_kernel
from doratune.internals import triton as internals
from doratune.runtime import loader
from doratune.runtime.kernel import Kernel
from doratune.tuner.inputs import make_inputs

from ..internals.test_triton import hide

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]

SIZES: dict[str, Any] = {"d_out": 512, "d_in": 256, "rank": 64, "tokens": 64, "device": "cuda"}
OPERATIONS: dict[str, dict[str, Any]] = {
    "weight_norm": {"save": True},
    "lora_compose": {"save": True},
    "compose_backward": {"bias": True},
    "adapter_backward": {},
}


def fresh(op: str) -> Kernel:
    """The kernel of ``op``, bound anew."""
    loader._loaded.clear()
    loader._asked.clear()
    return load_kernel(op, **SIZES, **OPERATIONS[op])


def results(kernel: Kernel, inputs: dict[str, torch.Tensor], scaling: float) -> list[torch.Tensor]:
    named = {"scaling": scaling} if kernel.spec.contract.scaling else {}
    made = kernel(*inputs.values(), **named)
    return [made] if isinstance(made, torch.Tensor) else [*made]


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("name", [*internals.NAMES, *internals.ATTRIBUTES, "driver.active.get_current_target"])
def test_without_it_a_kernel_gives_the_same(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = fresh(op)
    inputs, scaling = make_inputs(kernel.spec, 64)
    inputs = {key: tensor.cuda() for key, tensor in inputs.items()}
    expected = results(kernel, inputs, scaling)
    hide(name, monkeypatch)
    internals._warned.clear()
    try:
        reduced = fresh(op)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="an internal of Triton that doratune uses has changed")
            for _ in range(3):  # bound, recorded, repeated
                for found, wanted in zip(results(reduced, inputs, scaling), expected, strict=True):
                    assert torch.equal(found, wanted)
    finally:
        internals._warned.clear()
        loader._loaded.clear()
        loader._asked.clear()
