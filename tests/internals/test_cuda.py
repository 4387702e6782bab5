"""Where Triton's launcher cannot be built, kernels are loaded and started by the same calls of the CUDA driver, with
the same arguments, as Triton's own C makes. A library that records stands in for the driver's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from doratune.codegen.gpu import find_gpu
from doratune.codegen.module import kernel_names, load_module
from doratune.codegen.render import render
from doratune.codegen.spec import KernelSpec
from doratune.codegen.variants import find_variant
from doratune.internals import cuda
from doratune.internals import triton as internals
from doratune.internals.cuda import CudaError, Driver, Launch, TensorMap
from doratune.internals.triton import Launcher

GPU = find_gpu("h100-sxm")
FUNCTION, OPTIN = 77, 232448


class Cuda:
    """libcuda without a GPU: every call succeeds and is kept, read as C would read it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails: dict[str, int] = {}

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append((name, *getattr(self, f"_{name}", lambda *_: ())(*arguments)))
            return self.fails.get(name, 0)

        if name.startswith("_"):
            raise AttributeError(name)
        return call

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]

    def _cuModuleLoadData(self, module: Any, image: Any) -> tuple[Any, ...]:
        return (image.value,)

    def _cuModuleGetFunction(self, function: Any, module: Any, name: Any) -> tuple[Any, ...]:
        function._obj.value = FUNCTION
        return (name.value,)

    def _cuDeviceGetAttribute(self, value: Any, attribute: Any, device: Any) -> tuple[Any, ...]:
        value._obj.value = OPTIN
        return (attribute.value, device.value)

    def _cuFuncGetAttribute(self, value: Any, attribute: Any, function: Any) -> tuple[Any, ...]:
        value._obj.value = 1024
        return (attribute.value,)

    def _cuFuncSetAttribute(self, function: Any, attribute: Any, value: Any) -> tuple[Any, ...]:
        return (attribute.value, value.value)

    def _cuTensorMapEncodeTiled(self, place: Any, dtype: Any, rank: Any, address: Any, *rest: Any) -> tuple[Any, ...]:
        assert place.value % 64 == 0
        shape, strides, box, steps, *modes = rest
        return (dtype.value, address.value, [*shape], [*strides], [*box], [*steps], [mode.value for mode in modes])

    def _cuLaunchKernelEx(self, config: Any, function: Any, places: Any, extra: Any) -> tuple[Any, ...]:
        c = config._obj
        grid, block = (c.gridx, c.gridy, c.gridz), (c.blockx, c.blocky, c.blockz)
        attributes = [(c.attributes[i].id, c.attributes[i].value[0]) for i in range(c.count)]
        return (grid, block, c.shared, c.stream, attributes, function.value, [*places])


def facts(**changed: Any) -> Any:
    given = {"launch_pdl": False, "launch_cooperative_grid": False, "num_ctas": 1, "tensordesc_meta": None}
    return SimpleNamespace(**{**given, "global_scratch_size": 0, "profile_scratch_size": 0, **changed})


def test_parameters_are_passed_by_address_with_their_types_and_two_empty_ones_for_scratch() -> None:
    library, read = Cuda(), []

    def launch(config: Any, function: Any, places: Any, extra: Any) -> tuple[Any, ...]:
        types = (
            ctypes.c_uint64,
            ctypes.c_int32,
            ctypes.c_int64,
            ctypes.c_float,
            ctypes.c_uint64,
            *[ctypes.c_uint64] * 2,
        )
        read.append([type_.from_address(place).value for type_, place in zip(types, places, strict=True)])
        return ()

    library._cuLaunchKernelEx = launch  # type: ignore[method-assign]
    start = Launch(Driver(library), ["*bf16", "i32", "i64", "fp32", "*fp32"], facts())
    tensor = SimpleNamespace(data_ptr=lambda: 0x7F00_0000_1000)
    start(2, 3, 4, 5, FUNCTION, (4, 1, 0), None, None, None, tensor, -7, 1 << 40, 0.5, None)
    assert read == [[0x7F00_0000_1000, -7, 1 << 40, 0.5, 0, 0, 0]]


def test_the_grid_block_stream_and_attributes_are_those_of_the_launch() -> None:
    library = Cuda()
    start = Launch(Driver(library), [], facts(launch_pdl=True))
    start(2, 3, 4, 5, FUNCTION, (8, 1, 4096), None, None, None)
    ((grid, block, shared, stream, attributes, function, places),) = library.named("cuLaunchKernelEx")
    assert (grid, block, shared, stream) == ((2, 3, 4), (256, 1, 1), 4096, 5)
    assert (attributes, function, len(places)) == ([(6, 1)], FUNCTION, 2)
    start(0, 3, 4, 5, FUNCTION, (8, 1, 4096), None, None, None)
    assert len(library.named("cuLaunchKernelEx")) == 1, "an empty grid starts nothing"


def test_structures_have_the_sizes_of_cudas() -> None:
    assert ctypes.sizeof(cuda._Attribute) == 72
    assert ctypes.sizeof(cuda._Config) == 56


def test_a_tensor_map_is_made_as_tritons_c_makes_it() -> None:
    library = Cuda()
    made = Driver(library).fill_tma_descriptor_tiled(4096, 3, 2, 9, [64, 128], [1000, 512], [520, 1], 0)
    assert isinstance(made, TensorMap)
    assert library.named("cuTensorMapEncodeTiled") == [
        (9, 4096, [512, 1000], [1040, 1040000], [128, 64], [1, 1], [0, 3, 2, 0])
    ]


def test_large_shared_memory_is_asked_for_and_too_much_is_refused() -> None:
    library = Cuda()
    driver = Driver(library)
    assert driver.load("k_kernel", b"\x7fELF", 1024, 0) == FUNCTION
    assert library.named("cuFuncSetAttribute") == []
    assert driver.load("k_kernel", b"\x7fELF", 100_000, 0) == FUNCTION
    assert library.named("cuFuncSetAttribute") == [(8, OPTIN - 1024)]
    assert library.named("cuModuleLoadData")[0] == (b"\x7fELF",)
    with pytest.raises(CudaError, match="needs 300000 bytes of shared memory, and the GPU has 232448"):
        driver.load("k_kernel", b"\x7fELF", 300_000, 0)


def test_a_failing_call_is_an_error_with_its_name_and_code() -> None:
    library = Cuda()
    library.fails["cuModuleLoadData"] = 209
    with pytest.raises(CudaError, match=r"cuModuleLoadData failed: .* \(CUDA error 209\)"):
        Driver(library).load("k_kernel", b"\x7fELF", 0, 0)


@pytest.mark.parametrize("changed", [{"num_ctas": 2}, {"global_scratch_size": 64}, {"profile_scratch_size": 8}])
def test_what_it_does_not_offer_is_refused(changed: dict[str, int]) -> None:
    with pytest.raises(CudaError, match="starts through Triton's launcher only"):
        Launch(Driver(Cuda()), [], facts(**changed))


@pytest.mark.parametrize(
    ("forbidden", "compiler", "built", "own"),
    [
        (True, True, False, True),
        (True, False, False, True),
        (False, False, False, True),
        (False, True, False, False),
        (True, False, True, False),
        (False, False, True, False),
    ],
)
def test_it_takes_tritons_place_only_where_that_would_have_to_be_built_and_cannot_or_must_not(
    forbidden: bool, compiler: bool, built: bool, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda, "has_c_compiler", lambda: compiler)
    monkeypatch.setattr(cuda, "is_built", lambda: built)
    monkeypatch.setattr(cuda, "own_driver", lambda: "own")
    monkeypatch.setattr(internals, "version", lambda: (3, 7))
    found = internals._own_driver.__wrapped__(forbidden)
    assert found == ("own" if own else None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert internals._own_driver.__wrapped__(forbidden) is None, "AMD's GPUs have other launchers"


def test_an_emitted_kernel_starts_through_it_with_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through :class:`Launcher`, as :mod:`doratune.runtime` starts kernels, and flat, as recordings do."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton.backends.nvidia.driver")
    from doratune.codegen.compile import signature_of

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    library = Cuda()
    driver = Driver(library)
    driver.get_current_device = lambda: 0  # type: ignore[method-assign]
    driver.get_current_stream = lambda device: 5  # type: ignore[method-assign]
    monkeypatch.setattr(internals, "own_driver", lambda: driver)
    spec = KernelSpec.create("lora_compose", d_out=256, rank=64, tokens=128, dtype="bf16", adapter="bf16", gpu=GPU.slug)
    variant = find_variant("lora_compose", "tma")
    source = render(spec, variant.seeds(spec, GPU)[0])
    module = load_module(source)
    (name,) = kernel_names(module)
    signature = signature_of(source, name)
    described = [type_ for type_ in signature.values() if type_.startswith("tensordesc")]
    assert described
    block = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [64, 64], "fp4_padded": False}
    compiled = SimpleNamespace(
        name=name,
        kernel=b"\x7fELF",
        packed_metadata=(4, 1, 1000),
        src=SimpleNamespace(signature=signature),
        metadata=_Metadata(tensordesc_meta=[block] * len(described)),
    )
    launcher = Launcher(compiled)
    setattr(module, name, launcher)
    base, h = torch.zeros(128, 256, dtype=torch.bfloat16), torch.zeros(128, 64, dtype=torch.bfloat16)
    b, g = torch.zeros(256, 64, dtype=torch.bfloat16), torch.zeros(256)
    module.launch(base, h, b, g, base, 2.0)
    module.launch(base, h, b, g, base, 2.0)
    assert len(library.named("cuModuleLoadData")) == 1, "it is loaded once"
    assert len(library.named("cuLaunchKernelEx")) == 2
    assert len(library.named("cuTensorMapEncodeTiled")) == 2 * len(described)
    extra = sum(4 for _ in described)  # shape and strides of each matrix
    (*_, places) = library.named("cuLaunchKernelEx")[0]
    assert len(places) == len(signature) + extra + 2
    flat = launcher.flat
    assert (flat.in_one, len(flat.descriptors)) == (True, len(described))


class _Metadata:
    """Triton's named tuple of metadata."""

    def __init__(self, **changed: Any) -> None:
        vars(self).update(vars(facts(**changed)), shared=1000)

    def _asdict(self) -> dict[str, Any]:
        return dict(vars(self))
