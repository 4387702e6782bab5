"""Every template compiles in bf16 to a real binary for every supported architecture, within that GPU's limits and
without spills in its default config; what does not fit is refused with the figures.

No GPU is needed, because Triton accepts an explicit target. Compiling runs in other processes, because Triton's
interpreter may be on in this one.
"""

from __future__ import annotations

import ast
import errno
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from subprocess import CalledProcessError
from types import SimpleNamespace

import pytest
from triton.compiler.errors import CompilationError
from triton.runtime.errors import PTXASError

import doratune.codegen.compile as compile_module
from doratune.codegen.compile import (
    BrokenToolchainError,
    CompileError,
    OverLimitError,
    ToolchainError,
    judge_failure,
)
from doratune.codegen.gpu import find_gpu
from doratune.codegen.ops import OPS
from doratune.codegen.spec import Config, KernelSpec
from doratune.codegen.variants import VARIANTS, Variant, check_config, default_config, find_variant
from doratune.codegen.weight_formats import parse_format
from doratune.internals.triton import cuobjdump
from doratune.tuner.workers import binaries_job, compile_job

from ..specs import read_by

ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942"]
IN_EVERY_FORM = ("sm_80", "sm_90", "sm_120", "gfx942")
"""One of each kind, in all that an operation can add; the others compile what their like compiles."""
TILES = Config.parse("tile:block_k=128,block_n=128,block_t=128,num_warps=8,num_stages=3")


@pytest.fixture(scope="module")
def workers() -> Iterator[ProcessPoolExecutor]:
    switch = os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        pool.submit(os.getpid).result()
        yield pool
    if switch is not None:
        os.environ["TRITON_INTERPRET"] = switch


SPILLS = {
    ("weight_norm_group", "warp_specialized"): 8,
    ("weight_norm", "packed_warp_specialized"): 128,
    ("weight_norm_group", "packed_warp_specialized"): 128,
}
"""Bytes that a default config may spill: two registers once a tile, beside 192 of sums, where a tile takes 70 us; and
addresses that are read back once a step of 64 columns, beside codes that are being decoded."""


def spec_of(op: str, gpu: str, **values: object) -> KernelSpec:
    dims = {"d_out": 4096, "d_in": 4096, "rank": 384, "tokens": 4096}
    return KernelSpec.create(op, **{**dims, "dtype": "bf16", "adapter": "bf16", "gpu": gpu, **values})


def first_fitting_seed(variant: Variant, spec: KernelSpec) -> Config:
    gpu = find_gpu(spec.gpu)
    return next(config for config in variant.seeds(spec, gpu) if check_config(spec, config, gpu) is None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_template_compiles_in_bf16(workers: ProcessPoolExecutor, architecture: str) -> None:
    gpu = find_gpu(architecture)
    jobs = {}
    for variant in VARIANTS:
        odd = {"d_out": 4304, "d_in": 1152, "rank": 24}
        flags = OPS[variant.op].flags
        if variant.packed:  # other formats are below
            forms = (
                [{}, *({flag: True} for flag in flags if flag == "save")] if architecture in IN_EVERY_FORM else [odd]
            )
        else:
            forms = [{}, {"adapter": "fp32"}, odd]
            if variant.unavailable(spec_of(variant.op, architecture), gpu) is not None:
                forms.append({"tokens": 16})  # variants for few tokens
            if architecture in IN_EVERY_FORM:
                forms += [{flag: True} if flag != "autocast" else {flag: True, "adapter": "fp32"} for flag in flags]
        for values in forms:
            spec = spec_of(variant.op, architecture, **read_by(variant, {"dtype": "bf16", "tokens": 4096, **values}))
            if variant.unavailable(spec, gpu) is None:
                config = first_fitting_seed(variant, spec)
                jobs[spec, config] = workers.submit(compile_job, str(spec), str(config), architecture)
    assert {spec.op for spec, _ in jobs} == set(OPS)
    for (spec, config), job in jobs.items():
        for kernel in job.result():
            assert 0 < kernel.registers <= 512, (spec, kernel)
            assert kernel.shared_bytes <= gpu.shared_bytes_per_block, (spec, kernel)
            if config == default_config(spec, gpu):
                assert kernel.spills <= SPILLS.get((spec.op, config.variant), 0), (spec, config, kernel)


def test_tma_variants_are_offered_only_where_the_hardware_has_it() -> None:
    for architecture in ARCHITECTURES:
        gpu = find_gpu(architecture)
        offered = [v.unavailable(spec_of(v.op, architecture), gpu) is None for v in VARIANTS if v.name == "tma"]
        assert offered
        assert all(offered) == any(offered) == (architecture in ("sm_90", "sm_100", "sm_120"))
        specialized = [v for v in VARIANTS if v.name == "warp_specialized"]
        assert specialized
        for variant in specialized:  # they issue wgmma, which only Hopper has
            assert (variant.unavailable(spec_of(variant.op, architecture), gpu) is None) == (architecture == "sm_90")


@pytest.mark.parametrize(
    ("variant", "last"), [("fused", "finish_kernel"), ("tma", "finish_kernel"), ("warp_specialized", "row_dots_kernel")]
)
@pytest.mark.parametrize("values", [{"save": True}, {"magnitude": "fp32"}, {"save": True, "magnitude": "bf16"}])
def test_optional_parts_of_the_norm_compile(
    workers: ProcessPoolExecutor, variant: str, last: str, values: dict[str, object]
) -> None:
    spec = spec_of("weight_norm", "h200", **values)
    config = first_fitting_seed(find_variant("weight_norm", variant), spec)
    kernels = workers.submit(compile_job, str(spec), str(config), "h200").result()
    assert kernels[-1].name == last, "what makes w makes g and nW too"
    assert not any(kernel.spills for kernel in kernels)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
def test_the_gradient_of_a_magnitude_compiles(workers: ProcessPoolExecutor, architecture: str) -> None:
    spec = spec_of("compose_backward_exact", architecture, magnitude="bf16")
    config = default_config(spec, find_gpu(architecture))
    assert workers.submit(compile_job, str(spec), str(config), architecture).result()


@pytest.mark.parametrize("architecture", IN_EVERY_FORM)
@pytest.mark.parametrize(("rank", "kernels"), [(16, 1), (384, 2)])
def test_a_small_a_saves_the_check_for_cancelling_rows_a_launch(
    workers: ProcessPoolExecutor, architecture: str, rank: int, kernels: int
) -> None:
    spec = spec_of("weight_norm_exact", architecture, rank=rank, magnitude="fp32")
    config = default_config(spec, find_gpu(architecture))
    made = workers.submit(compile_job, str(spec), str(config), architecture).result()
    assert len(made) == kernels
    assert not any(kernel.spills for kernel in made)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
def test_the_substitutes_of_the_library_compile(workers: ProcessPoolExecutor, architecture: str, dtype: str) -> None:
    spec = spec_of("lora_compose", architecture, dtype=dtype, adapter=dtype)
    config = first_fitting_seed(find_variant("lora_compose", "library"), spec)
    kernels = workers.submit(compile_job, str(spec), str(config), architecture).result()
    assert [kernel.name for kernel in kernels] == [f"{dtype}_product_kernel", "compose_kernel"]
    assert not any(kernel.spills for kernel in kernels)


def test_fp32_results_are_requested_from_cublas_only() -> None:
    for architecture in ARCHITECTURES:
        gpu = find_gpu(architecture)
        offered = [v.unavailable(spec_of(v.op, architecture), gpu) is None for v in VARIANTS if v.library]
        assert offered
        assert all(offered) == any(offered) == (gpu.backend == "cuda")


def test_a_config_beyond_the_shared_memory_is_refused_before_compiling() -> None:
    spec = spec_of("lora_compose", "rtx4090")
    reason = check_config(spec, TILES, find_gpu("rtx4090"))
    assert reason is not None
    assert "shared memory" in reason
    assert "101376" in reason
    assert check_config(spec, TILES, find_gpu("h200")) is None


def test_a_binary_beyond_the_shared_memory_is_refused_after_compiling(workers: ProcessPoolExecutor) -> None:
    spec = spec_of("lora_compose", "rtx4090")
    with pytest.raises(OverLimitError, match=r"needs \d+ bytes of shared memory; a block on rtx4090 has 101376"):
        workers.submit(compile_job, str(spec), str(TILES), "rtx4090").result()


def test_text_that_triton_refuses_is_a_compile_error_with_its_reason(workers: ProcessPoolExecutor) -> None:
    spec = spec_of("lora_compose", "h200")
    with pytest.raises(CompileError, match=r"does not compile for h200 with .*: .*power of 2"):
        workers.submit(
            compile_job, str(spec), "tile:block_k=48,block_n=128,block_t=128,num_warps=8,num_stages=3", "h200"
        ).result()


def frontend_error(inner: Exception | None, message: str | None = None) -> Exception:
    """The error of Triton's frontend, which wraps every exception."""
    error = CompilationError("def kernel():\n    x = 1", ast.parse("x"), message)
    error.__cause__ = inner
    return error


PTXAS = "`ptxas` failed with error code 255\n`ptxas` stderr:\n{}\nRepro command: ptxas -v"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (frontend_error(None, "arange's range must be a power of 2"), "with CONFIG: arange's range"),
        (frontend_error(ValueError("shapes differ"), "shapes differ"), "shapes differ"),
        (frontend_error(frontend_error(None, "in a callee")), "in a callee"),
        (frontend_error(AssertionError()), "AssertionError"),
        (RuntimeError("PassManager::run failed"), "PassManager::run failed"),
        (
            PTXASError(PTXAS.format("ptxas error   : Entry function 'k' uses too much shared data (0x493e0 bytes)")),
            "ptxas: Entry function 'k' uses too much shared data",
        ),
        (
            PTXASError(PTXAS.format("ptxas a.ptx, line 4; error   : Not a name of any known instruction")),
            "ptxas: Not a name",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_that_triton_or_ptxas_finds_in_a_text_is_a_compile_error(error: Exception, said: str) -> None:
    judged = judge_failure(error, "SPEC with CONFIG")
    assert isinstance(judged, CompileError)
    assert re.search(said, str(judged))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"No space left on device; .*TRITON_CACHE_DIR and TMPDIR"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/c/k"),
            r"Permission denied \(/c/k\); make Triton's cache",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/bin/ptxas"), "/bin/ptxas"),
        (frontend_error(OSError(errno.EIO, "Input/output error")), "Input/output error"),
        (frontend_error(frontend_error(ImportError("no libdevice")), "in a callee"), "no libdevice; reinstall Triton"),
        (RuntimeError("Cannot find ptxas"), "Cannot find ptxas; reinstall Triton"),
        (
            RuntimeError("Failed to find C compiler. Please specify"),
            "install a C compiler such as gcc, or set CC to one",
        ),
        (RuntimeError("Could not create or locate cache dir"), "TRITON_CACHE_DIR"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_broken_toolchain_is_not_a_compile_error_and_says_what_to_do(error: Exception, said: str) -> None:
    judged = judge_failure(error, "SPEC with CONFIG")
    assert isinstance(judged, BrokenToolchainError)
    assert not isinstance(judged, CompileError)
    assert re.search(said, str(judged))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        AssertionError("surprise"),
        RuntimeError("something else"),
        CalledProcessError(-9, ["cuobjdump"]),
        PTXASError(PTXAS.format("ptxas fatal   : Output file '/full/a.o' could not be opened")),
        PTXASError(PTXAS.format("ptxas a.ptx, line 1; fatal   : Unsupported .version 99.0")),
        PTXASError("`ptxas` failed with error code -9\n`ptxas` stderr:\n\nRepro command: ptxas -v"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_any_other_failure_is_not_blamed_on_the_text(error: Exception) -> None:
    judged = judge_failure(error, "SPEC with CONFIG")
    assert type(judged) is ToolchainError
    assert "SPEC with CONFIG" in str(judged)


def test_a_judged_failure_survives_pickling() -> None:
    for error in (OSError(errno.ENOSPC, "No space left on device"), RuntimeError("x"), PTXASError("error: y")):
        judged = judge_failure(error, "SPEC")
        again = pickle.loads(pickle.dumps(judged))
        assert (type(again), str(again)) == (type(judged), str(judged))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("tile:block_k=64,block_n=128,block_t=100,num_warps=8,num_stages=3", "block_t must be a power of two, got 100"),
        ("tile:block_k=64,block_n=128,num_warps=8,num_stages=3", "takes block_k, block_n, block_t"),
        (
            "tile:block_k=64,block_n=128,block_t=128,num_warps=3,num_stages=3",
            "num_warps must be one of 1, 2, 4, 8, 16, got 3",
        ),
        (
            "tile:block_k=64,block_n=128,block_t=128,num_warps=8,num_stages=9",
            "num_stages must be between 1 and 8, got 9",
        ),
        ("tile:block_k=64,block_n=256,block_t=256,num_warps=4,num_stages=2", "do not fit the registers"),
        ("tile:block_k=8,block_n=128,block_t=128,num_warps=4,num_stages=2", "smaller than tl.dot's"),
        ("tiel:block_k=64,num_warps=4,num_stages=2", "did you mean tile"),
    ],
)
def test_an_invalid_config_is_refused_with_the_reason(config: str, said: str) -> None:
    reason = check_config(spec_of("lora_compose", "h200"), Config.parse(config), find_gpu("h200"))
    assert reason is not None
    assert said in reason


@pytest.mark.parametrize(("registers", "frame", "spills"), [(255, 136, 136), (76, 8, 0), (250, 0, 0)])
def test_a_stack_frame_counts_as_spilled_only_where_registers_ran_out(
    monkeypatch: pytest.MonkeyPatch, registers: int, frame: int, spills: int
) -> None:
    """ptxas gave a kernel of 76 registers a frame of 8 bytes for sm_120 (Triton 3.6); nothing was spilled there."""
    handle = SimpleNamespace(asm={"cubin": b""}, metadata=SimpleNamespace(num_warps=4, shared=0))
    monkeypatch.setattr(compile_module, "_cubin_usage", lambda cubin: (registers, frame))
    assert compile_module._inspect("a_kernel", handle, find_gpu("rtx5090")).spills == spills


PACKED = ["nf4.nested", "int8", "hqq4", "fp8.tile"]
"""One format of each kind of code; those that only sm_90 compiles here have nothing of the machine in them."""


@pytest.mark.parametrize(
    ("architecture", "form"),
    [(architecture, "nf4.nested") for architecture in ("sm_80", "sm_100", "sm_120", "gfx942")]
    + [("sm_90", form) for form in PACKED],
)
def test_a_packed_weight_is_decoded_without_spilling(
    workers: ProcessPoolExecutor, architecture: str, form: str
) -> None:
    values = {"weight": form, "adapter": "fp32", "autocast": True, "rank": 64, "layers": 8}
    spec = spec_of("weight_norm_group", architecture, **values)
    gpu = find_gpu(architecture)
    config = default_config(spec, gpu)
    kernels = workers.submit(compile_job, str(spec), str(config), architecture).result()
    assert [kernel.spills for kernel in kernels] == [0] * len(kernels)
    assert all(kernel.shared_bytes <= gpu.shared_bytes_per_block for kernel in kernels)


def copies(cubin: bytes, path: Path) -> Counter[int]:
    """How many asynchronous copies of so many bytes a thread makes, by the machine code."""
    path.write_bytes(cubin)
    code = subprocess.run([cuobjdump(), "-sass", str(path)], check=True, capture_output=True, text=True).stdout
    return Counter(int(bits or 32) // 8 for bits in re.findall(r"LDGSTS\.E\S*?(?:\.(64|128))? ", code))


@pytest.mark.parametrize(
    ("form", "ragged"), [("nf4", False), ("nf4", True), ("int8", False), ("int8", True), ("hqq4", True), ("fp8", False)]
)
def test_packed_codes_are_copied_sixteen_bytes_at_a_time(
    workers: ProcessPoolExecutor, tmp_path: Path, form: str, ragged: bool
) -> None:
    """Four at a time, Triton keeps rows next to each other in shared memory, and a warp waits for one bank of it.

    What is left of four bytes are scales; A and the codes are more.
    """
    spec = KernelSpec.create(
        "weight_norm", d_out=4096, d_in=4096 + 64 * ragged, rank=32, weight=form, adapter="bf16", gpu="h100-sxm"
    )
    gpu = find_gpu(spec.gpu)
    made = workers.submit(binaries_job, str(spec), str(default_config(spec, gpu)), gpu.slug).result()
    copied = copies(next(each.image for each in made if each.kernel == "sums_kernel"), tmp_path / "sums.cubin")
    assert copied[16] > copied[4]
    assert copied[4] == 0 or form in ("nf4", "hqq4")
    assert copied[8] == 0


SPECIALIZED = ["nf4", "nf4.128.nested", "fp4", "int8", "ao8.tensor", "ao8.block", "fp8", "fp8.tile", "fp8.exact"]


@pytest.mark.parametrize(("form", "rank"), [*((form, 384) for form in SPECIALIZED), ("nf4", 16), ("int8", 64)])
def test_products_of_codes_that_other_warps_decode_do_not_wait_for_each_other(
    workers: ProcessPoolExecutor, tmp_path: Path, form: str, rank: int
) -> None:
    """Where sums and addresses do not fit the registers, the assembler waits for each product before the next."""
    gpu = find_gpu("h100-sxm")
    values = {"weight": form, "adapter": "fp32", "autocast": True, "rank": rank}
    for spec in (
        spec_of("weight_norm", gpu.slug, save=True, **values),
        spec_of("weight_norm_group", gpu.slug, layers=8, **values),
    ):
        config = first_fitting_seed(find_variant(spec.op, "packed_warp_specialized"), spec)
        made = workers.submit(binaries_job, str(spec), str(config), gpu.slug).result()
        path = tmp_path / "sums.cubin"
        path.write_bytes(next(each.image for each in made if each.kernel == "sums_kernel"))
        code = subprocess.run([cuobjdump(), "-sass", str(path)], check=True, capture_output=True, text=True).stdout
        products = re.findall(r"HGMMA\.64x\d+x16\.\S+ R\d+, [^;]*;", code)
        halves = 2 * 4 // config.num_warps
        loops = 2 if parse_format(form).exact else 1  # the scales of exact formats are applied before the term of G
        assert len(products) == loops * halves * config["rank_tiles"] * 4  # 64 columns are four products
        assert sum("gsb0" in product for product in products) == loops * config["rank_tiles"]


MOVED = """
import re, sys
from doratune.codegen.compile import compile_source
from doratune.codegen.gpu import find_gpu
from doratune.codegen.render import render
from doratune.codegen.spec import KernelSpec
from doratune.codegen.variants import default_config

for spec in map(KernelSpec.parse, sys.argv[1:]):
    gpu = find_gpu(spec.gpu)
    config = default_config(spec, gpu)
    product, *rest = compile_source(render(spec, config), gpu)
    decoded = rf"local_alloc [^:]*: \\(tensor<{config['block_n']}x\\d+x(?:bf16|f32),"
    moved = len(re.findall(decoded, product.handle.asm["ttgir"]))
    print(spec.weight, moved, product.spills, *[kernel.spills for kernel in rest])
"""
"""Prints how many tiles of W a product of few tokens moves through shared memory when they are decoded, and spills."""


@pytest.mark.parametrize(
    ("architecture", "forms"),
    [(architecture, ["nf4.nested"]) for architecture in ("sm_80", "sm_89", "sm_120")]
    + [("sm_90", ["nf4", "nf4.nested", "int8", "ao8.block", "hqq8", "fp8", "fp8.tensor", "fp8.tile"])],
)
def test_the_product_of_few_tokens_decodes_where_tensor_cores_read(
    architecture: str, forms: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No element of W passes through shared memory. HQQ's 4-bit and strided formats are not here: theirs do."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    specs = [spec_of("dora_linear_forward", architecture, weight=form, rank=64, tokens=1) for form in forms]
    done = subprocess.run([sys.executable, "-c", MOVED, *map(str, specs)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{form} 0 0 0" for form in forms]


@pytest.mark.parametrize(
    "form", ["nf4", "nf4.128.nested", "fp4", "int8", "ao8", "ao8.tensor", "ao8.block", "fp8", "fp8.tile"]
)
def test_the_product_of_few_tokens_compiles_where_rows_begin_inside_a_block_or_a_word(
    form: str, workers: ProcessPoolExecutor
) -> None:
    """The interpreter does not mind a variable that changes its shape in a loop."""
    gpu, jobs = find_gpu("sm_90"), []
    for d_out, d_in in ((301, 517), (512, 1920), (510, 1056)):
        if not parse_format(form).refuse(d_out, d_in):
            values = {"d_out": d_out, "d_in": d_in, "rank": 24, "weight": form, "tokens": 5, "bias": True}
            spec = spec_of("dora_linear_forward", "sm_90", **values)
            jobs.append(workers.submit(compile_job, str(spec), str(default_config(spec, gpu)), "sm_90"))
    assert jobs
    for job in jobs:
        assert job.result()
