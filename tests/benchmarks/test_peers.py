"""A peer computes what doratune's kernel computes: in fp32 on a CPU, where no GPU rounding hides a wrong formula, each
one agrees with the fp64 definition of the operation on inputs where every term matters.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from doratune.benchmarks import peers
from doratune.benchmarks.dorafactors import Dorafactors, PeerError
from doratune.benchmarks.peers import PEERS, Peer, peers_of
from doratune.codegen.ops import OPS
from doratune.codegen.spec import KernelSpec
from doratune.runtime.reference import definition
from doratune.tuner.accuracy import worst_error
from doratune.tuner.inputs import make_inputs, make_outputs

from ..specs import dtype_for

TOKENS = 16
WHOLE = {"peft_eager", "peft_compiled", "dense_ba", "eager", "compiled", "cublas_compose", "dorafactors"}
"""The peers that compute a whole operation."""


def spec_of(op: str, dtype: str = "fp32", **values: Any) -> KernelSpec:
    sizes = {"d_out": 80, "d_in": 144, "rank": 24, "tokens": TOKENS}
    return KernelSpec.create(op, **{**sizes, "dtype": dtype_for(op, dtype), "adapter": dtype, "gpu": "cpu", **values})


def forms() -> list[Any]:
    found = [(op, {}) for op in OPS if peers_of(spec_of(op), 0.75)]
    if "output" in OPS["compose_backward"].flags:
        found.append(("compose_backward", {"output": True}))
    return [pytest.param(op, form, id="-".join([op, *form])) for op, form in found]


def error_of(peer: Peer, spec: KernelSpec, case: str) -> float:
    inputs, scaling = make_inputs(spec, TOKENS, case=case)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    assert peer.outputs is not None
    outputs = peer.outputs(peer.run(inputs, make_outputs(spec, TOKENS)), inputs)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs), "the next one would get other inputs"
    return worst_error(spec, outputs, definition(spec, inputs, scaling))[0]


@pytest.fixture(autouse=True)
def _compile_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces into one graph as on a GPU, but runs the graph as it is: no C++ compiler is needed."""
    compiler = torch.compile

    def traced(function: Any, **options: Any) -> Any:
        return compiler(function, backend="aot_eager", **options)

    monkeypatch.setattr(peers.torch, "compile", traced)
    torch.compiler.reset()


@pytest.mark.parametrize(("op", "form"), forms())
@pytest.mark.parametrize("case", ["random", "large_lora"])
def test_every_peer_of_the_whole_operation_agrees_with_its_definition(op: str, form: dict[str, Any], case: str) -> None:
    spec = spec_of(op, **form)
    whole = [peer for peer in peers_of(spec, 0.75) if peer.outputs is not None]
    assert whole
    for peer in whole:
        assert error_of(peer, spec, case) < 1e-5, peer.name


@pytest.mark.parametrize(("op", "form"), forms())
@pytest.mark.parametrize("case", ["random", "large_lora"])
def test_dorafactors_agrees_with_the_definition(
    dorafactors: Dorafactors, op: str, form: dict[str, Any], case: str
) -> None:
    if op.startswith("compose_swiglu") or op.endswith("_group"):
        pytest.skip("dorafactors has no such kernel")
    spec = spec_of(op, **form)
    (theirs,) = (peer for peer in peers_of(spec, 0.75, dorafactors) if peer.name == "dorafactors")
    assert error_of(theirs, spec, case) < 1e-5


@pytest.mark.parametrize("op", ["weight_norm", "lora_compose"])
def test_fp32_adapters_beside_bf16_are_as_accurate_as_pefts_bf16_result_can_be(op: str) -> None:
    forms = [{}] + ([{"autocast": True}] if "autocast" in OPS[op].flags else [])
    for form in forms:
        spec = spec_of(op, "bf16", adapter="fp32", **form)
        for peer in peers_of(spec, 0.75):
            if peer.outputs is not None:
                assert error_of(peer, spec, "random") < 2e-2, (peer.name, form)


def test_a_peer_with_a_wrong_formula_would_be_told_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = peers.plain_lora  # forgets g
    monkeypatch.setattr(peers, "peft_compose", wrong)
    spec = spec_of("lora_compose")
    peer = next(peer for peer in peers_of(spec, 0.75) if peer.name == "peft_eager")
    assert error_of(peer, spec, "random") > 1e-2


def test_partial_work_is_not_passed_for_the_operation() -> None:
    for op in OPS:
        for peer in peers_of(spec_of(op), 0.75):
            assert (peer.name in WHOLE) == (peer.outputs is not None), (op, peer.name)
            assert peer.name in PEERS


def test_the_copy_moves_as_many_bytes_as_the_operation() -> None:
    class Copied(TorchDispatchMode):
        moved = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.copy_.default:
                self.moved += 2 * args[0].numel() * args[0].element_size()
            return func(*args, **(kwargs or {}))

    for op, flag in (("compose_forward", {}), ("compose_backward", {}), ("compose_forward", {"save": True})):
        spec = spec_of(op, **flag)
        inputs, _ = make_inputs(spec, TOKENS)
        with Copied() as copied:
            peers.copies(inputs, make_outputs(spec, TOKENS))
        matrices = [o for o in spec.contract.inputs_of(spec) + spec.contract.outputs_of(spec) if len(o.shape) == 2]
        assert copied.moved == sum(4 * operand.elements(spec, TOKENS) for operand in matrices)


def test_a_folder_without_dorafactors_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"no dorafactors there.*dora_fused\.py.*sockeye44/dorafactors"):
        Dorafactors(tmp_path)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        (("dora_fused.py",), "dora.py is missing; its layout has changed"),
        (("dora_fused.py", "dora.py", "variants.py"), "has no DoraLinearLayer"),
    ],
)
def test_a_changed_checkout_is_refused_by_the_name_of_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], complaint: str
) -> None:
    pytest.importorskip("peft")
    modules = ("dora_fused", "dorafactors_dora", "dorafactors_variants")
    for name in modules:  # a real checkout that another test has loaded comes back afterwards
        monkeypatch.setitem(sys.modules, f"peft.tuners.lora.{name}", None)
        monkeypatch.delitem(sys.modules, f"peft.tuners.lora.{name}")
    folder = tmp_path / "code/peft_patched/src/peft/tuners/lora"
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text("value = 1\n")
    with pytest.raises(PeerError, match=complaint):
        Dorafactors(tmp_path)


def test_the_unfused_layer_names_the_kernel_that_composes() -> None:
    peer = next(peer for peer in peers_of(spec_of("dora_linear_forward"), 0.75) if peer.name == "cublas_compose")
    assert peer.kernel is not None
    assert peer.kernel.spec == replace(spec_of("lora_compose"), d_in=0)
    assert all(peer.kernel is None for peer in peers_of(spec_of("lora_compose"), 0.75))
