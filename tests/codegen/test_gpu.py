"""Property: a GPU is found under every name its users and drivers give it, with the limits of its architecture.

A wrong limit lets a kernel through that cannot launch; a wrong match stores winners under the wrong GPU.
"""

from __future__ import annotations

import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doratune.codegen.gpu import (
    ARCHITECTURES,
    MATRIX_DTYPES,
    Gpu,
    UnknownGpuError,
    find_gpu,
    gpu_of_device,
    known_gpus,
)
from doratune.codegen.spec import KernelSpec
from doratune.errors import UsageError

LISTED = known_gpus()
EVERY = [*LISTED, *(find_gpu(architecture) for architecture in ARCHITECTURES)]

# CUDA C++ Programming Guide and AMD's hardware specifications: bytes a block, bytes a multiprocessor, threads.
LIMITS = {
    "sm_80": (166912, 167936, 2048),
    "sm_86": (101376, 102400, 1536),
    "sm_89": (101376, 102400, 1536),
    "sm_90": (232448, 233472, 2048),
    "sm_100": (232448, 233472, 2048),
    "sm_120": (101376, 102400, 1536),
    "gfx90a": (65536, 65536, 2048),
    "gfx942": (65536, 65536, 2048),
}

every_gpu = pytest.mark.parametrize("gpu", EVERY, ids=lambda gpu: gpu.slug)
listed_gpu = pytest.mark.parametrize("gpu", LISTED, ids=lambda gpu: gpu.slug)


@every_gpu
def test_limits_are_those_of_the_architecture(gpu: Gpu) -> None:
    shared = (gpu.shared_bytes_per_block, gpu.shared_bytes_per_multiprocessor, gpu.max_threads_per_multiprocessor)
    assert shared == LIMITS[gpu.architecture]
    registers = (gpu.warp_size, gpu.registers_per_multiprocessor, gpu.max_registers_per_thread)
    assert registers == ((32, 65536, 255) if gpu.architecture.startswith("sm_") else (64, 131072, 512))
    assert gpu.backend == ("cuda" if gpu.architecture.startswith("sm_") else "hip")


@pytest.mark.parametrize(
    ("slug", "multiprocessors", "l2_mib", "terabytes", "bf16", "fp32"),
    [
        ("a100", 108, 40, 2.039, 312, 156),
        ("l40s", 142, 96, 0.864, 362.05, 183),
        ("rtx4090", 128, 72, 1.008, 165.2, 82.6),
        ("h100-sxm", 132, 50, 3.35, 989.4, 494.7),
        ("h100-pcie", 114, 50, 2.039, 756, 378),
        ("h200", 132, 60, 4.8, 989.4, 494.7),
        ("b200", 148, 126.5, 8.0, 2250, 1125),
        ("rtxpro6000", 188, 128, 1.792, 503.8, 251.9),
        ("mi300x", 304, 32, 5.3, 1307.4, 653.7),
    ],
)
def test_figures_are_the_dense_datasheet_ones(
    slug: str, multiprocessors: int, l2_mib: float, terabytes: float, bf16: float, fp32: float
) -> None:
    gpu = find_gpu(slug)
    assert (gpu.multiprocessors, gpu.l2_bytes) == (multiprocessors, l2_mib * 2**20)
    assert gpu.memory_bytes_per_second == pytest.approx(terabytes * 1e12)
    assert gpu.matrix_flops["bf16"] == gpu.matrix_flops["fp16"] == pytest.approx(bf16 * 1e12)
    assert gpu.matrix_flops["fp32"] == pytest.approx(fp32 * 1e12)


@listed_gpu
def test_tensor_core_rates_keep_their_ratio(gpu: Gpu) -> None:
    """A sparse figure among dense ones, or a slip of a digit, breaks the 2 : 1 of bf16 to TF32 (4 : 1 without TF32)."""
    assert set(gpu.matrix_flops) == set(MATRIX_DTYPES)
    expected = 4 if gpu.architecture == "gfx90a" else 2
    assert gpu.matrix_flops["bf16"] / gpu.matrix_flops["fp32"] == pytest.approx(expected, rel=0.02)
    assert gpu.matrix_flops["fp32_vector"] <= gpu.matrix_flops["fp32"]


@every_gpu
def test_every_figure_names_its_source(gpu: Gpu) -> None:
    not_figures = {"slug", "name", "driver_names", "architecture", "backend", "sources"}
    figures = {field.name for field in dataclasses.fields(gpu)} - not_figures
    unmeasured = {name for name in figures if name.startswith("measured") and not getattr(gpu, name)}
    assert gpu.sources.keys() == figures - unmeasured
    assert all(len(source) > 10 for source in gpu.sources.values())


@every_gpu
def test_slugs_name_the_gpu_in_specs_and_lookups(gpu: Gpu) -> None:
    assert find_gpu(gpu.slug) is gpu
    spec = KernelSpec.create("compose_forward", d_out=64, tokens=1, dtype="bf16", gpu=gpu.slug)
    assert KernelSpec.parse(str(spec)).gpu == gpu.slug


def test_slugs_are_distinct() -> None:
    assert len({gpu.slug for gpu in EVERY}) == len(EVERY)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("H200", "h200"),
        (" h100_SXM ", "h100-sxm"),
        ("RTX 4090", "rtx4090"),
        ("rtx pro 6000", "rtxpro6000"),
        ("SM_90", "sm_90"),
        ("sm90", "sm_90"),
        ("sm_90a", "sm_90"),
        ("GFX942", "gfx942"),
    ],
)
def test_a_name_is_found_however_it_is_written(name: str, slug: str) -> None:
    assert find_gpu(name).slug == slug


@given(st.sampled_from(EVERY), st.data())
def test_case_and_separators_never_matter(gpu: Gpu, data: st.DataObject) -> None:
    written = "".join(
        data.draw(st.sampled_from(["", " ", "_", "-"]) if char in "_-" else st.sampled_from([char, char.upper()]))
        for char in gpu.slug
    )
    assert find_gpu(written) is gpu


@pytest.mark.parametrize(("name", "near"), [("h20", "h200"), ("h100", "h100-sxm, h100-pcie?"), ("sm_91", "sm_90")])
def test_an_unknown_name_gets_near_names_and_the_list(name: str, near: str) -> None:
    with pytest.raises(UnknownGpuError) as caught:
        find_gpu(name)
    message = str(caught.value)
    assert message.startswith(f"unknown GPU {name!r}; did you mean ")
    assert near in message.split("Listed GPUs:")[0]
    assert all(gpu.slug in message.split("Listed GPUs:")[1] for gpu in EVERY)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["", "zzz", "sm_", "sm_9", "gfx", "sm_90b"])
def test_no_name_is_guessed(name: str) -> None:
    with pytest.raises(UnknownGpuError, match="For another GPU name its architecture: sm_80, "):
        find_gpu(name)


@pytest.mark.parametrize(
    ("device_name", "architecture", "slug"),
    [
        ("NVIDIA A100-SXM4-80GB", "sm_80", "a100"),
        ("A100-SXM4-80GB", "sm_80", "a100"),
        ("NVIDIA A100-SXM4-40GB", "sm_80", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "sm_80", "a100-pcie"),
        ("NVIDIA A10G", "sm_86", "a10g"),
        ("NVIDIA L4", "sm_89", "l4"),
        ("NVIDIA L40S", "sm_89", "l40s"),
        ("NVIDIA GeForce RTX 4090", "sm_89", "rtx4090"),
        ("NVIDIA H100 80GB HBM3", "sm_90", "h100-sxm"),
        ("NVIDIA H100 PCIe", "sm_90", "h100-pcie"),
        ("NVIDIA H200", "sm_90", "h200"),
        ("NVIDIA B200", "sm_100", "b200"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "sm_120", "rtxpro6000"),
        ("AMD Instinct MI300X", "gfx942:sramecc+:xnack-", "mi300x"),
        # Not listed: other clocks, memory or parts of the chip than their namesakes.
        ("NVIDIA L40", "sm_89", "sm_89"),
        ("NVIDIA A10", "sm_86", "sm_86"),
        ("NVIDIA H200 NVL", "sm_90", "sm_90"),
        ("NVIDIA H200 MIG 1g.18gb", "sm_90", "sm_90"),
        ("NVIDIA GeForce RTX 4090 D", "sm_89", "sm_89"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "sm_89", "sm_89"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "sm_120", "sm_120"),
        ("NVIDIA GH200 480GB", "sm_90", "sm_90"),
        ("AMD Instinct MI325X", "gfx942", "gfx942"),
        ("", "gfx90a", "gfx90a"),
    ],
)
def test_a_driver_name_gives_the_listed_gpu_or_its_architecture(device_name: str, architecture: str, slug: str) -> None:
    assert gpu_of_device(device_name, architecture).slug == slug


@listed_gpu
def test_every_driver_name_leads_back_to_its_gpu(gpu: Gpu) -> None:
    assert gpu.driver_names
    for name in gpu.driver_names:
        assert gpu_of_device(name, gpu.architecture, gpu.multiprocessors) is gpu


def test_a_partition_of_a_listed_gpu_is_not_that_gpu() -> None:
    assert gpu_of_device("AMD Instinct MI300X", "gfx942", 38).slug == "gfx942"


def test_a_driver_name_with_another_architecture_is_not_believed() -> None:
    assert gpu_of_device("NVIDIA H200", "sm_80").slug == "sm_80"


@pytest.mark.parametrize("architecture", ["sm_75", "sm_87", "sm_121", "gfx1100"])
def test_an_architecture_without_facts_is_refused_by_name(architecture: str) -> None:
    with pytest.raises(UnknownGpuError) as caught:
        gpu_of_device("Some GPU", architecture)
    message = str(caught.value)
    assert message.startswith(f"Some GPU has the architecture {architecture}, which is not listed")
    assert f"(supported: {', '.join(ARCHITECTURES)})" in message


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_fits_the_generic_gpu_fits_every_listed_one(architecture: str) -> None:
    generic = find_gpu(architecture)
    listed = [gpu for gpu in LISTED if gpu.architecture == architecture]
    assert (generic.slug, generic.driver_names) == (architecture, ())
    assert listed
    for gpu in listed:
        for name in ("multiprocessors", "shared_bytes_per_block", "l2_bytes", "memory_bytes_per_second"):
            assert getattr(generic, name) <= getattr(gpu, name)
        assert all(generic.matrix_flops[dtype] <= gpu.matrix_flops[dtype] for dtype in MATRIX_DTYPES)


@every_gpu
def test_tensor_memory_accelerator_is_there_from_hopper_on(gpu: Gpu) -> None:
    assert gpu.has_tma == (gpu.architecture in {"sm_90", "sm_100", "sm_120"})


def test_triton_targets() -> None:
    target = find_gpu("h200").triton_target()
    assert (target.backend, target.arch, target.warp_size) == ("cuda", 90, 32)
    target = find_gpu("sm_120").triton_target()
    assert (target.backend, target.arch, target.warp_size) == ("cuda", 120, 32)
    target = find_gpu("mi300x").triton_target()
    assert (target.backend, target.arch, target.warp_size) == ("hip", "gfx942", 64)


def test_ceilings_are_the_measured_ones_where_known() -> None:
    h200 = find_gpu("h200")
    assert h200.attainable_bandwidth == 4.27e12
    assert h200.attainable_flops("bf16") == 780e12
    assert h200.attainable_flops("fp16") == pytest.approx(989.4e12)
    assert find_gpu("b200").attainable_bandwidth == 8e12
    assert find_gpu("sm_90").attainable_flops("bf16") == 756e12


@listed_gpu
def test_no_measured_ceiling_exceeds_the_datasheet(gpu: Gpu) -> None:
    assert gpu.attainable_bandwidth <= gpu.memory_bytes_per_second
    assert all(gpu.attainable_flops(dtype) <= gpu.matrix_flops[dtype] for dtype in MATRIX_DTYPES)


def test_floor_is_the_longer_of_moving_and_computing() -> None:
    h200 = find_gpu("h200")
    weight_bytes = 2 * 4096 * 4096
    assert h200.floor_us(weight_bytes, 2 * 4096 * 4096 * 64, "bf16") == pytest.approx(7.858, rel=1e-3)
    assert h200.floor_us(weight_bytes, 2 * 4096 * 4096 * 384, "bf16") == pytest.approx(16.52, rel=1e-3)
    assert h200.floor_us(0, 0, "bf16") == 0


def test_an_unknown_dtype_has_no_rate() -> None:
    with pytest.raises(UsageError, match=r"h200 has no rate for dtype 'bf8'; did you mean bf16\? \(known: bf16, fp16"):
        find_gpu("h200").floor_us(1, 0, "bf8")


@every_gpu
def test_gpus_are_values(gpu: Gpu) -> None:
    copy = pickle.loads(pickle.dumps(gpu))
    assert copy == gpu
    assert hash(copy) == hash(gpu)
    with pytest.raises(dataclasses.FrozenInstanceError):
        gpu.slug = "other"  # type: ignore[misc]
