"""A kernel launched from the binary in a store gives the bits that the compiled one gives, and nothing is compiled."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import doratune
from doratune.cache.entry import MEASURED, Binary, Entry, Environment, Evaluation
from doratune.cache.store import Store
from doratune.codegen.binary import pack
from doratune.codegen.compile import build
from doratune.codegen.gpu import Gpu
from doratune.codegen.module import kernel_names, load_module
from doratune.codegen.render import Source, render, template_digest
from doratune.codegen.spec import KernelSpec
from doratune.codegen.variants import VARIANTS, Variant, default_config
from doratune.runtime import loader
from doratune.runtime.binding import bind
from doratune.runtime.device import find_device, gpu_of
from doratune.runtime.kernel import Kernel
from doratune.tuner.inputs import make_inputs, make_outputs

from .test_kernels import DTYPES, IDS, fitting_config, served_spec, spec_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU"),
]


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return gpu_of(find_device("cuda"))


def binaries_of(source: Source, gpu: Gpu) -> dict[str, Binary]:
    import triton

    module = load_module(source)
    target = gpu.triton_target()
    return {
        name: Binary(
            source.code_digest,
            name,
            triton.__version__,
            gpu.architecture,
            *pack(build(source, getattr(module, name), target)),
        )
        for name in kernel_names(module)
    }


def compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    def compile(*_: object, **__: object) -> None:
        raise AssertionError("a kernel is compiled although its binary is there")

    monkeypatch.setattr(triton, "compile", compile)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS.get)
def test_a_stored_binary_gives_the_bits_of_the_compiled_kernel(
    variant: Variant, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = served_spec(variant, "bf16", "bf16", gpu)
    source = render(spec, fitting_config(variant, spec, gpu))
    stored = binaries_of(source, gpu)
    inputs, scaling = make_inputs(spec, 500, case="mixed", device="cuda")
    scalars = (scaling,) if spec.contract.scaling else ()
    runs = []
    for binaries in (None, stored):
        if binaries:
            compile_nothing(monkeypatch)
        outputs = make_outputs(spec, 500, "cuda")
        for tensor in outputs.values():
            tensor.fill_(float("nan"))
        bind(source, None, binaries).launch(*inputs.values(), *outputs.values(), *scalars)
        runs.append(outputs)
    for name, tensor in runs[0].items():
        assert torch.equal(tensor, runs[1][name]), name


def stored(path: Path, source: Source, binaries: dict[str, Binary], gpu: Gpu) -> str:
    """A store with the entry of a source and these binaries; returns where it is."""
    import triton

    spec = source.spec
    digest = template_digest(spec.op, source.config.variant)
    here = Environment(gpu=gpu.slug, architecture=gpu.architecture, triton=triton.__version__)
    with Store.open(path, create=True) as store:
        store.put(Entry(spec, source.config, digest, source.digest, source.text, Evaluation(MEASURED, us=200.0), here))
        for binary in binaries.values():
            store.put_binary(binary)
    return str(path)


def load(spec: KernelSpec, store: str) -> Kernel:
    """The kernel of a spec as ``spec_of`` makes them."""
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtypes = {"dtype": names[spec.weight or spec.activation]}
    if spec.adapter:
        dtypes["adapter_dtype"] = names[spec.adapter]
    sizes = {"d_out": 1040, "d_in": 2304, "rank": 72, "tokens": spec.tokens or 512}
    kernel = doratune.load_kernel(spec.op, **sizes, **dtypes, store=store)
    assert kernel.spec == spec
    return kernel


def test_load_kernel_launches_what_the_store_has(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of("lora_compose", "bf16", "bf16", gpu)
    source = render(spec, default_config(spec, gpu))
    path = stored(tmp_path / "store.sqlite", source, binaries_of(source, gpu), gpu)
    monkeypatch.setattr(loader, "_loaded", {})
    inputs, scaling = make_inputs(spec, 500, case="mixed", device="cuda")
    (expected,) = make_outputs(spec, 500, "cuda").values()
    bind(source).launch(*inputs.values(), expected, scaling)
    compile_nothing(monkeypatch)
    kernel = load(spec, path)
    assert f"binary    in {path}" in kernel.explain()
    assert torch.equal(kernel(**inputs, scaling=scaling), expected)  # type: ignore[arg-type]


def described(variant: Variant, dtype: str, adapter: str, gpu: Gpu) -> Source:
    """A source whose tiles go through tensor maps, for many tokens."""
    spec = spec_of(variant.op, dtype, adapter, gpu, tokens=4096)
    return render(spec, fitting_config(variant, spec, gpu))


def compiled_outputs(source: Source) -> tuple[dict[str, torch.Tensor], float, list[torch.Tensor]]:
    """Inputs and scaling, and what the compiled kernel gives for them."""
    inputs, scaling = make_inputs(source.spec, 500, case="mixed", device="cuda")
    outputs = make_outputs(source.spec, 500, "cuda")
    bind(source).launch(*inputs.values(), *outputs.values(), scaling)
    return inputs, scaling, [*outputs.values()]


DESCRIBED = [variant for variant in VARIANTS if variant.descriptors]


@pytest.mark.parametrize(("dtype", "adapter"), [pair for pair in DTYPES if pair[0] != "fp32"])
@pytest.mark.parametrize("variant", DESCRIBED, ids=IDS.get)
def test_stored_binaries_with_tensor_maps_pass_the_checks_and_give_the_same_bits(
    variant: Variant, dtype: str, adapter: str, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = described(variant, dtype, adapter, gpu)
    path = stored(tmp_path / "store.sqlite", source, binaries_of(source, gpu), gpu)
    inputs, scaling, expected = compiled_outputs(source)
    compile_nothing(monkeypatch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="doratune compiles")
        kernel = load(source.spec, path)
        assert kernel.config == source.config
        assert f"binary    in {path}" in kernel.explain()
        for _ in range(3):  # as emitted, then repeated with maps made here
            outputs = kernel(**inputs, scaling=scaling)
            for tensor, wanted in zip([outputs] if len(expected) == 1 else outputs, expected, strict=True):
                assert torch.equal(tensor, wanted)


@pytest.mark.parametrize("variant", DESCRIBED, ids=IDS.get)
def test_forged_tensor_maps_are_compiled_instead_and_never_reach_the_host_code(
    variant: Variant, gpu: Gpu, tmp_path: Path
) -> None:
    source = described(variant, "bf16", "bf16", gpu)
    inputs, scaling, expected = compiled_outputs(source)
    binaries = binaries_of(source, gpu)
    for number, box in enumerate(([64] * 1090, [64], [2**40, 64])):
        forged = {}
        for name, binary in binaries.items():
            metadata = json.loads(binary.metadata)
            for made in metadata["tensordesc_meta"]:
                made["block_size"] = box
            forged[name] = replace(binary, metadata=json.dumps(metadata))
        path = stored(tmp_path / f"{number}.sqlite", source, forged, gpu)
        with pytest.warns(RuntimeWarning, match=r"tensordesc_meta\[0\]\.block_size"):
            kernel = load(source.spec, path)
        outputs = kernel(**inputs, scaling=scaling)
        for tensor, wanted in zip([outputs] if len(expected) == 1 else outputs, expected, strict=True):
            assert torch.equal(tensor, wanted)
