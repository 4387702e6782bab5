"""A kernel launched from the binary in a store gives the bits that the compiled one gives, and nothing is compiled."""

from __future__ import annotations

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
from doratune.codegen.variants import VARIANTS, Variant, default_config
from doratune.runtime import loader
from doratune.runtime.device import find_device, gpu_of
from doratune.runtime.launch import bind
from doratune.tuner.inputs import make_inputs, make_outputs

from .test_kernels import IDS, fitting_config, served_spec, spec_of

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


def test_load_kernel_launches_what_the_store_has(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    spec = spec_of("lora_compose", "bf16", "bf16", gpu)
    source = render(spec, default_config(spec, gpu))
    path = str(tmp_path / "store.sqlite")
    with Store.open(path, create=True) as store:
        digest = template_digest(spec.op, source.config.variant)
        here = Environment(gpu=gpu.slug, architecture=gpu.architecture, triton=triton.__version__)
        store.put(Entry(spec, source.config, digest, source.digest, source.text, Evaluation(MEASURED, us=1.0), here))
        for binary in binaries_of(source, gpu).values():
            store.put_binary(binary)
    monkeypatch.setattr(loader, "_loaded", {})
    inputs, scaling = make_inputs(spec, 500, case="mixed", device="cuda")
    (expected,) = make_outputs(spec, 500, "cuda").values()
    bind(source).launch(*inputs.values(), expected, scaling)
    compile_nothing(monkeypatch)
    dims = {"d_out": spec.d_out, "d_in": 2304, "rank": spec.rank, "tokens": spec.tokens}
    kernel = doratune.load_kernel("lora_compose", **dims, store=path)
    assert f"binary    in {path}" in kernel.explain()
    assert torch.equal(kernel(**inputs, scaling=scaling), expected)  # type: ignore[arg-type]
