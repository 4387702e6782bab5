"""A stored binary is not trusted: every fact that the emitted text determines is derived and compared. A binary with a
wrong, missing or additional fact, or without a valid image of this kernel and architecture, is refused by that name.

No GPU is needed. Compiling runs in other processes, because Triton's interpreter may be on in this one.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doratune.cache.entry import Binary
from doratune.codegen.binary import BinaryError, OtherSettingsError, check
from doratune.codegen.gpu import find_gpu
from doratune.codegen.image import ImageError, read_image
from doratune.codegen.launch_facts import tensor_maps, total_warps
from doratune.codegen.module import declared_kernels
from doratune.codegen.render import Source, render
from doratune.codegen.spec import Config, KernelSpec
from doratune.codegen.variants import VARIANTS, find_variant
from doratune.tuner import workers
from doratune.tuner.workers import binaries_job

from ..specs import read_by
from .test_compile import ARCHITECTURES, first_fitting_seed, spec_of

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon.language")  # while the interpreter is on, or it cannot be loaded later

TMA_IN_LOOPS = "weight_norm", "tma"
SEVERAL_TASKS = "lora_compose", "warp_specialized"


class Made(NamedTuple):
    """A compiled source and its binaries."""

    source: Source
    binaries: tuple[Binary, ...]

    def binary(self, kernel: str) -> Binary:
        return next(binary for binary in self.binaries if binary.kernel == kernel)

    def check(self, binary: Binary) -> None:
        target = find_gpu(self.source.spec.gpu).triton_target()
        check(self.source, binary.kernel, target, binary.metadata, binary.image)


class Makers:
    """Compiles each source once."""

    def __init__(self, workers: ProcessPoolExecutor) -> None:
        self._workers = workers
        self._made: dict[tuple[KernelSpec, Config], Future[tuple[Binary, ...]]] = {}

    def start(self, spec: KernelSpec, config: Config) -> Future[tuple[Binary, ...]]:
        if (spec, config) not in self._made:
            self._made[spec, config] = self._workers.submit(binaries_job, str(spec), str(config), spec.gpu)
        return self._made[spec, config]

    def make(self, op: str, variant: str, gpu: str, **values: object) -> Made:
        spec = spec_of(op, gpu, **values)
        config = first_fitting_seed(find_variant(op, variant), spec)
        return Made(render(spec, config), self.start(spec, config).result())


@pytest.fixture(scope="module")
def makers() -> Iterator[Makers]:
    switch = os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        pool.submit(os.getpid).result()
        yield Makers(pool)
    if switch is not None:
        os.environ["TRITON_INTERPRET"] = switch


@pytest.fixture(scope="module")
def norm(makers: Makers) -> Made:
    """Four kernels for sm_90, two with tensor descriptors, three with programmatic dependent launch."""
    return makers.make(*TMA_IN_LOOPS, "sm_90")


@pytest.fixture(scope="module")
def honest(norm: Made) -> Binary:
    return norm.binary("row_dots_kernel")


# Honest binaries.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_honest_binaries_are_accepted(makers: Makers, architecture: str) -> None:
    """Every variant on Hopper and on CDNA 3; elsewhere those of one operation, since the rest is the same."""
    gpu = find_gpu(architecture)
    jobs = []
    for variant in VARIANTS:
        if architecture not in ("sm_90", "gfx942") and variant.op != "lora_compose":
            continue
        forms = [read_by(variant, {"dtype": "bf16", "tokens": tokens}) for tokens in (4096, 16)]
        specs = [spec_of(variant.op, architecture, **values) for values in forms]
        spec = next((spec for spec in specs if variant.unavailable(spec, gpu) is None), None)
        if spec is not None:
            config = first_fitting_seed(variant, spec)
            jobs.append((render(spec, config), makers.start(spec, config)))
    assert len(jobs) >= (len(VARIANTS) if architecture == "sm_90" else 1)
    for source, job in jobs:
        made = Made(source, job.result())
        assert tuple(binary.kernel for binary in made.binaries) == declared_kernels(source)
        for binary in made.binaries:
            made.check(binary)
            read = read_image(binary.image)
            assert (read.kernel, read.architecture) == (binary.kernel, architecture)


def test_the_maps_of_narrow_and_wide_tiles_are_those_that_the_compiler_makes(makers: Makers) -> None:
    """Rows of 32, 64 and 128 bytes, and of several lines; fp16 as well as bf16."""
    narrow = makers.make(*TMA_IN_LOOPS, "sm_90", d_out=4304, d_in=1152, rank=24)
    half = makers.make("lora_compose", "tma", "sm_90", dtype="fp16", adapter="fp16")
    for made in (narrow, half):
        for binary in made.binaries:
            made.check(binary)
    types = {"a": "tensordesc<bf16[64, 16]>", "b": "tensordesc<fp16[128, 32]>", "c": "tensordesc<bf16[4, 256]>"}
    found = [(made["block_size"], made["swizzle"], made["elem_type"]) for made in tensor_maps(types)]
    assert found == [([64, 16], 1, 10), ([128, 32], 2, 6), ([4, 256], 0, 10)]


@pytest.mark.parametrize(
    ("first", "extra", "total"), [(8, (), 8), (2, (), 2), (8, (1,), 12), (8, (1, 2), 12), (4, (4, 4, 1), 16)]
)
def test_the_warps_of_several_tasks_are_counted_together(first: int, extra: tuple[int, ...], total: int) -> None:
    assert total_warps(first, extra) == total


def test_packing_fails_with_a_triton_whose_binaries_no_lookup_would_accept(
    norm: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer compiler may state unknown facts. Tuning must report that, not store binaries that never load."""
    made = [SimpleNamespace(name=binary.kernel, handle=binary) for binary in norm.binaries]
    monkeypatch.setattr(workers, "_compiled", lambda source, gpu: made)
    source = norm.source
    for newer in ({}, {"newer_fact": 1}):
        monkeypatch.setattr(
            workers, "pack", lambda binary, facts=newer: (edited(binary, (), facts).metadata, binary.image)
        )
        job = functools.partial(binaries_job, str(source.spec), str(source.config), "sm_90")
        if newer:
            with pytest.raises(BinaryError, match="newer_fact"):
                job()
        else:
            assert job() == norm.binaries


# Forged metadata.


class Gone:
    """Marks a fact to leave out. Its repr is constant, so that test names are."""

    def __repr__(self) -> str:
        return "gone"


GONE = Gone()


def edited(binary: Binary, path: tuple[Any, ...], value: object) -> Binary:
    """The binary with one part of its metadata replaced, added or removed."""
    metadata = json.loads(binary.metadata)
    if not path:
        assert isinstance(value, dict)
        return replace(binary, metadata=json.dumps(metadata | value, sort_keys=True))
    *outer, last = path
    holder = metadata
    for step in outer:
        holder = holder[step]
    if value is GONE:
        del holder[last]
    else:
        holder[last] = value
    return replace(binary, metadata=json.dumps(metadata))


LIMIT = find_gpu("sm_90").shared_bytes_per_block
LARGEST_TILE = 128 * 128 * 2
"""Bytes of the largest tile of the descriptors of ``row_dots_kernel``."""
FORGED: list[tuple[tuple[Any, ...], object, str]] = [
    (("tensordesc_meta", 0, "block_size"), [64] * 1090, "tensordesc_meta"),
    (("tensordesc_meta", 0, "block_size"), [128], "tensordesc_meta"),
    (("tensordesc_meta", 0, "block_size"), [128, 64, 1], "tensordesc_meta"),
    (("tensordesc_meta", 0, "block_size"), [128, -64], "tensordesc_meta"),
    (("tensordesc_meta", 0, "block_size"), [128, 32], "tensordesc_meta"),
    (("tensordesc_meta", 0, "block_size"), [128, 2**70], "tensordesc_meta"),
    (("tensordesc_meta", 0, "block_size"), [128, 64.0], "tensordesc_meta"),
    (("tensordesc_meta", 0, "block_size"), ["128", "64"], "tensordesc_meta"),
    (("tensordesc_meta", 0, "block_size"), None, "tensordesc_meta"),
    (("tensordesc_meta", 0, "swizzle"), 4, "tensordesc_meta"),
    (("tensordesc_meta", 0, "swizzle"), 2, "tensordesc_meta"),
    (("tensordesc_meta", 0, "elem_size"), 4, "tensordesc_meta"),
    (("tensordesc_meta", 0, "elem_type"), 6, "tensordesc_meta"),
    (("tensordesc_meta", 0, "elem_type"), 99, "tensordesc_meta"),
    (("tensordesc_meta", 0, "fp4_padded"), True, "tensordesc_meta"),
    (("tensordesc_meta", 0, "fp4_padded"), 0, "tensordesc_meta"),
    (("tensordesc_meta", 0, "fp4_padded"), GONE, "tensordesc_meta"),
    (("tensordesc_meta", 0, "is_im2col"), True, "tensordesc_meta"),
    (("tensordesc_meta", 0), None, "tensordesc_meta"),
    (("tensordesc_meta",), [], "tensordesc_meta"),
    (("tensordesc_meta",), None, "tensordesc_meta"),
    (("tensordesc_meta",), GONE, "tensordesc_meta"),
    (("num_warps",), 64, "num_warps=64"),
    (("num_warps",), 1, "num_warps=1"),
    (("num_warps",), 0, "num_warps=0"),
    (("num_warps",), -8, "num_warps=-8"),
    (("num_warps",), 8.0, "num_warps=8.0"),
    (("num_warps",), "8", "num_warps='8'"),
    (("num_warps",), [8], "num_warps"),
    (("num_warps",), GONE, "num_warps"),
    (("num_ctas",), 2, "num_ctas=2"),
    (("num_ctas",), True, "num_ctas=True"),
    (("num_stages",), 7, "num_stages=7"),
    (("shared",), -1, "shared=-1"),
    (("shared",), 0, "shared=0"),
    (("shared",), LARGEST_TILE - 1, f"shared={LARGEST_TILE - 1}"),
    (("shared",), LIMIT + 1, f"shared={LIMIT + 1}"),
    (("shared",), 2**62, "shared="),
    (("shared",), 1024.0, "shared=1024.0"),
    (("shared",), math.nan, "shared=nan"),
    (("shared",), math.inf, "shared=inf"),
    (("shared",), True, "shared=True"),
    (("shared",), "much", "shared='much'"),
    (("shared",), None, "shared=None"),
    (("shared",), {"a": []}, "shared="),
    (("shared",), GONE, "lacks shared"),
    (("global_scratch_size",), 2**60, "global_scratch_size="),
    (("global_scratch_size",), 1, "global_scratch_size=1"),
    (("global_scratch_size",), False, "global_scratch_size=False"),
    (("global_scratch_align",), 0, "global_scratch_align=0"),
    (("profile_scratch_size",), -1, "profile_scratch_size=-1"),
    (("profile_scratch_align",), 2**40, "profile_scratch_align="),
    (("tmem_size",), 512, "tmem_size=512"),
    (("tmem_size",), None, "tmem_size=None"),
    (("launch_pdl",), False, "launch_pdl=False"),
    (("launch_pdl",), 1, "launch_pdl=1"),
    (("launch_cooperative_grid",), True, "launch_cooperative_grid=True"),
    (("warp_size",), 64, "warp_size=64"),
    (("maxnreg",), 24, "maxnreg=24"),
    (("target", "arch"), 80, "target"),
    (("target", "arch"), "90", "target"),
    (("target", "backend"), "hip", "target"),
    (("target", "warp_size"), 64, "target"),
    (("target", "extra"), 1, "target"),
    (("target",), [], "target"),
    (("arch",), "sm80", "arch='sm80'"),
    (("backend_name",), "hip", "backend_name='hip'"),
    (("triton_version",), "2.0", "triton_version='2.0'"),
    (("ptx_options",), "--maxrregcount=16", "ptx_options="),
    (("name",), "finish_kernel", "not belong to row_dots_kernel"),
    (("name",), "row_dots_kernel/../x", "not belong to row_dots_kernel"),
    (("name",), GONE, "not belong to row_dots_kernel"),
    (("hash",), "../../etc/passwd", "hash="),
    (("hash",), 7, "hash=7"),
    (("extern_libs",), [["libdevice", "/tmp/evil.bc"]], "extern_libs"),
    (("cluster_dims",), [2, 1, 1], "cluster_dims"),
    (("__class__",), "os.system", "__class__"),
    (("not a name",), 1, "not a name"),
    (("x" * 5000,), 1, "xxx"),
    (("doratune",), None, "not belong to row_dots_kernel"),
    (("doratune", "signature", 0, 1), "*fp32", "doratune"),
    (("doratune", "signature"), [], "doratune"),
    (("doratune", "signature"), GONE, "lacks signature"),
    (("doratune", "attributes"), [], "doratune"),
    (("doratune", "environment"), GONE, "lacks environment"),
    (("doratune", "environment"), {"LD_PRELOAD": "x"}, "environment"),
    (("doratune", "environment"), [], "doratune"),
    (("doratune", "constants"), {"RANK": 1}, "constants"),
]


@pytest.mark.parametrize(("path", "value", "said"), FORGED, ids=lambda part: repr(part)[:50])
def test_a_forged_fact_is_refused_by_its_name(
    norm: Made, honest: Binary, path: tuple[Any, ...], value: object, said: str
) -> None:
    norm.check(honest)
    with pytest.raises(BinaryError) as refused:
        norm.check(edited(honest, path, value))
    assert said in str(refused.value)
    assert len(str(refused.value)) <= 1000


@pytest.mark.parametrize("shared", [LARGEST_TILE, LIMIT])
def test_shared_memory_is_bounded_and_not_derived(norm: Made, honest: Binary, shared: int) -> None:
    """As documented, only the GPU can refuse a wrong number within the bounds."""
    assert json.loads(honest.metadata)["shared"] not in (LARGEST_TILE, LIMIT)
    norm.check(edited(honest, ("shared",), shared))


@pytest.mark.parametrize("warps", [4, 8, 12, 20])
def test_the_warps_of_a_kernel_with_several_tasks_are_checked_too(makers: Makers, warps: int) -> None:
    made = makers.make(*SEVERAL_TASKS, "sm_90")
    (binary,) = made.binaries
    stored = json.loads(binary.metadata)["num_warps"]
    if warps != stored:
        with pytest.raises(BinaryError, match=f"num_warps={warps}, expected {stored}"):
            made.check(edited(binary, ("num_warps",), warps))


def test_tensor_memory_must_be_a_size_that_blackwell_can_allocate(makers: Makers) -> None:
    made = makers.make("lora_compose", "tma", "sm_100")
    (binary,) = made.binaries
    assert json.loads(binary.metadata)["tmem_size"] > 0
    for columns in (-1, 1, 1024, True, None):
        with pytest.raises(BinaryError, match="tmem_size"):
            made.check(edited(binary, ("tmem_size",), columns))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "__import__('os')",
        "[]",
        "null",
        "NaN",
        '{"__class__": "x"}',
        "[" * 100_000,
        '{"name": ' + "9" * 10_000 + "}",
        '{"name": "\\ud800"}',
        '{"name": "row_dots_kernel", "doratune": {}, "name": "row_dots_kernel"}',
        " " * (1 << 17),
    ],
    ids=lambda text: text[:12],
)
def test_text_that_is_not_metadata_is_refused(norm: Made, honest: Binary, text: str) -> None:
    with pytest.raises(BinaryError, match="not belong to row_dots_kernel"):
        norm.check(replace(honest, metadata=text))


def test_other_settings_are_distinguished_from_forgeries(norm: Made, honest: Binary) -> None:
    """Both are refused, but only a binary that no settings could produce causes a warning."""
    for path, value, other in (
        (("enable_fp_fusion",), False, True),
        (("doratune", "environment"), {"TRITON_ENABLE_SOMETHING": "1"}, True),
        (("num_warps",), 4, False),
        (("launch_pdl",), False, False),
    ):
        with pytest.raises(BinaryError) as refused:
            norm.check(edited(honest, path, value))
        assert isinstance(refused.value, OtherSettingsError) == other, path


# Forged images.


def at(image: bytes, offset: int, form: str, *values: int) -> bytes:
    """The image with numbers written at an offset."""
    changed = bytearray(image)
    struct.pack_into(form, changed, offset, *values)
    return bytes(changed)


def description(image: bytes, attribute: int) -> int:
    """The offset of the first such attribute of the kernel in a cubin."""
    return image.index(bytes((4, attribute, 12, 0)))


def header(image: bytes, name: str) -> int:
    """The offset of the header of a section."""
    (table,), (count, names) = struct.unpack_from("<Q", image, 40), struct.unpack_from("<HH", image, 60)
    (texts,) = struct.unpack_from("<Q", image, table + names * 64 + 24)
    for at in range(table, table + count * 64, 64):
        start = texts + struct.unpack_from("<I", image, at)[0]
        if image[start : image.index(b"\0", start)] == name.encode():
            return at
    raise AssertionError(name)


NAME, KIND, FLAGS, ADDRESS, OFFSET, SIZE, LINK, INFO, ALIGNMENT, EACH = 0, 4, 8, 16, 24, 32, 40, 44, 48, 56
"""Where the values of a section are in its header."""


Change = Callable[[bytes], bytes]


def section(name: str, place: int, value: int) -> Change:
    """Changes one value of a section's header."""
    return lambda image: at(
        image, header(image, name) + place, "<I" if place in (NAME, KIND, LINK, INFO) else "<Q", value
    )


def inside(name: str, place: int, form: str, value: int) -> Change:
    """Changes a number in a section."""
    return lambda image: at(
        image, struct.unpack_from("<Q", image, header(image, name) + OFFSET)[0] + place, form, value
    )


def segment(number: int, place: int, value: int) -> Change:
    """Changes one value of a segment's header."""
    return lambda image: at(image, struct.unpack_from("<Q", image, 32)[0] + number * 56 + place, "<Q", value)


def parameter(place: int, form: str, value: int) -> Change:
    """Changes what a cubin says of its last parameter, which it describes first."""
    return lambda image: at(image, description(image, 0x17) + place, form, value)


def parameters(place: int, form: str, value: int) -> Change:
    """Changes what a cubin says of where in constant memory its parameters lie."""
    return lambda image: at(image, image.index(bytes((4, 0x0A, 8, 0))) + place, form, value)


FORGED_IMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda image: b"", "not a 64-bit ELF"),
    "garbage": (lambda image: b"\x90" * 4096, "not a 64-bit ELF"),
    "text": (lambda image: b".version 8.0\n.target sm_90\n", "not a 64-bit ELF"),
    "fat": (lambda image: b"\x50\xed\x55\xba" + image, "not a 64-bit ELF"),
    "32 bits": (lambda image: at(image, 4, "B", 1), "not a 64-bit ELF"),
    "big endian": (lambda image: at(image, 5, "B", 2), "not a 64-bit ELF"),
    "host": (lambda image: at(image, 18, "<H", 62), "machine 62"),
    "header alone": (lambda image: image[:64], "cut off"),
    "half": (lambda image: image[: len(image) // 2], "cut off"),
    "last byte": (lambda image: image[:-1], "cut off"),
    "one byte more": (lambda image: image + b"\0", "1 more bytes follow"),
    "another image after it": (lambda image: image + image, "more bytes follow"),
    "no header": (lambda image: image[:40], "damaged"),
    "no sections": (lambda image: at(image, 60, "<H", 0), "0 sections"),
    "many sections": (lambda image: at(image, 60, "<H", 60000), "60000 sections"),
    "sections far away": (lambda image: at(image, 40, "<Q", 2**63), "cut off"),
    "names nowhere": (lambda image: at(image, 62, "<H", 60000), "sections"),
    "segments far away": (lambda image: at(image, 32, "<Q", 2**64 - 64), "cut off"),
    "architecture": (lambda image: at(image, 48, "<B", 80), "sm_80"),
    "renamed": (lambda image: image.replace(b"row_dots_kernel", b"row_dotz_kernel"), "row_dotz_kernel"),
    "threads": (lambda image: at(image, description(image, 0x10) + 4, "<I", 1024), "threads of a block 1024"),
    "threads in y": (lambda image: at(image, description(image, 0x10) + 8, "<I", 2), "threads"),
    "no threads": (lambda image: at(image, description(image, 0x10) + 1, "B", 0x05), "threads"),
    "parameter bytes": (lambda image: at(image, description(image, 0x17) + 12, "<I", 4096 << 18), "parameter"),
    "parameter gone": (lambda image: at(image, description(image, 0x17) + 1, "B", 0x77), "parameter"),
    "parameter twice": (lambda image: at(image, description(image, 0x17) + 8, "<H", 0), "twice"),
    "attribute too long": (lambda image: at(image, description(image, 0x17) + 2, "<H", 0xFFFF), "damaged"),
    "clusters": (lambda image: at(image, description(image, 0x10) + 1, "B", 0x3D), "threads"),
    "parameter beside the others": (parameter(10, "<H", 65528), "lies at 65528, expected"),
    "parameter in other memory": (parameter(12, "<I", 8 << 18), "not lie among the parameters"),
    "parameters far away": (parameters(8, "<H", 65000), "fill its constant memory"),
    "parameters too many": (parameters(10, "<H", 65000), "fill its constant memory"),
    "parameters nowhere": (parameters(4, "<I", 9999), "fill its constant memory"),
    "not said where parameters are": (parameters(1, "B", 0x05), "where its parameters lie"),
    "constants": (section(".nv.constant0.row_dots_kernel", SIZE, 8), "fill its constant memory of 8"),
    "object": (lambda image: at(image, 16, "<H", 1), "its header has type 1"),
    "entry": (lambda image: at(image, 24, "<Q", 64), "entry 64"),
    "first section": (lambda image: at(image, header(image, "") + SIZE, "<Q", 1), "section 0 is not empty"),
    "unknown kind": (section(".debug_frame", KIND, 0x60000000), "unknown kind 0x60000000"),
    "unknown flags": (section(".debug_frame", FLAGS, 1 << 40), "has flags 0x10000000000"),
    "address": (section(".nv.info", ADDRESS, 1 << 40), "and address 0x10000000000"),
    "two of a name": (section(".nv.callgraph", NAME, 0), "two of its sections have the same name"),
    "link to code": (section(".nv.info", LINK, 4), "refers to section 4, which is of kind 1"),
    "alignment": (section(".debug_frame", ALIGNMENT, 3), "aligned to 3 bytes"),
    "wide alignment": (section(".debug_frame", ALIGNMENT, 2**40), "aligned to"),
    "link": (section(".nv.info", LINK, 4000), "refers to sections 4000"),
    "target": (section(".rela.debug_line", INFO, 4000), "4000"),
    "symbols of another size": (section(".symtab", EACH, 12), "symbols of 12 bytes"),
    "symbols cut": (section(".symtab", SIZE, 25), "in parts of 24"),
    "names of symbols": (section(".symtab", LINK, 3), "names in section 3"),
    "symbol's section": (inside(".symtab", 24 + 6, "<H", 4000), "a symbol in section 4000"),
    "symbol far away": (inside(".symtab", 24 + 8, "<Q", 2**40), "a symbol outside its section"),
    "symbol's size": (inside(".symtab", 24 + 16, "<Q", 2**64 - 8), "a symbol outside its section"),
    "symbol's name": (inside(".symtab", 24, "<I", 2**31), "a name lies outside its table"),
    "relocation far away": (inside(".rela.debug_line", 0, "<Q", 2**33), "points outside section"),
    "relocation's symbol": (inside(".rela.debug_line", 12, "<I", 4000), "points outside section"),
    "relocation's size": (section(".rela.debug_line", EACH, 8), "parts of 8 bytes"),
    "endless shared memory": (section(".nv.shared.reserved.0", SIZE, 2**40), "needs 1099511627776 bytes"),
    "sections in each other": (section(".debug_line", OFFSET, 100), "overlap"),
    "segment in memory": (segment(2, 40, 2**40), "and 1099511627776 in memory"),
    "segment's alignment": (segment(2, 48, 12), "segment 2 is aligned to 12"),
    "segment of segments": (segment(0, 32, 56), "segment 0 is not the table"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), FORGED_IMAGES.values(), ids=FORGED_IMAGES.keys())
def test_a_damaged_or_foreign_image_is_refused(
    norm: Made, honest: Binary, change: Callable[[bytes], bytes], said: str
) -> None:
    assert change(honest.image) != honest.image
    with pytest.raises(BinaryError, match=r"image of row_dots_kernel") as refused:
        norm.check(replace(honest, image=change(honest.image)))
    assert said in str(refused.value)
    assert len(str(refused.value)) <= 1000


def test_another_kernels_image_is_refused_under_this_name(norm: Made, honest: Binary) -> None:
    other = norm.binary("gram_shares_kernel")
    with pytest.raises(BinaryError, match="the kernel 'gram_shares_kernel'"):
        norm.check(replace(honest, image=other.image))
    renamed = other.image.replace(b"gram_shares_kernel\0", b"row_dots_kernel\0\0\0\0")
    with pytest.raises(BinaryError, match="image of row_dots_kernel"):
        norm.check(replace(honest, image=renamed))


def test_an_image_of_the_same_kernel_with_other_parameters_is_refused(makers: Makers) -> None:
    """The driver reads as many parameters from the host's memory as the image states."""
    plain, biased = (makers.make("lora_compose", "tma", "sm_90", **values) for values in ({}, {"bias": True}))
    (with_bias,) = biased.binaries
    with pytest.raises(BinaryError, match="the bytes of each parameter"):
        plain.check(replace(plain.binaries[0], image=with_bias.image))


@pytest.mark.parametrize("other", ["sm_80", "sm_100", "sm_120", "gfx942"])
def test_an_image_for_another_architecture_is_refused(makers: Makers, other: str) -> None:
    here, there = (makers.make("lora_compose", "tile", gpu) for gpu in ("sm_90", other))
    with pytest.raises(BinaryError, match=f"the architecture '{other}', expected 'sm_90'"):
        here.check(replace(here.binaries[0], image=there.binaries[0].image))
    with pytest.raises(BinaryError):
        here.check(there.binaries[0])


AMD_IMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "architecture": (lambda image: at(image, 48, "<B", 0x3F), "gfx90a"),
    "unlisted architecture": (lambda image: at(image, 48, "<B", 0x4E), "AMD machine 0x4e"),
    "renamed": (lambda image: image.replace(b"lora_compose_kernel", b"lora_compozz_kernel"), "lora_compozz_kernel"),
    "described under another name": (
        lambda image: image.replace(b"\xa5.name\xb3lora_compose", b"\xa5.name\xb3lora_compozz"),
        "must describe its kernel 'lora_compose_kernel', got 'lora_compozz",
    ),
    "argument bytes": (lambda image: image.replace(b"\xa5.size\x08", b"\xa5.size\x7f", 1), "parameter 1 lies at 8"),
    "negative bytes": (lambda image: image.replace(b"\xa5.size\x08", b"\xa5.size\xff", 1), "parameter 1 lies at 8"),
    "no size": (lambda image: image.replace(b"\xa5.size\x08", b"\xa5.sizf\x08", 1), ".size in its description must be"),
    "no arguments": (lambda image: image.replace(b"\xa5.args", b"\xa5.argz", 1), ".args in its description must be"),
    "another type": (lambda image: image.replace(b"\xa5.size\x08", b"\xa5.size\xc2", 1), ".size"),
    "kernels too many": (lambda image: image.replace(b"amdhsa.kernels\x91", b"amdhsa.kernels\x9f", 1), ""),
    "argument elsewhere": (lambda image: image.replace(b".offset\x08", b".offset\x7f", 1), "lies at 127"),
    "arguments' bytes": (lambda image: image.replace(b".kernarg_segment_size", b".kernarg_segment_siz_"), ".kernarg"),
    "kernel's memory": (inside(".rodata", 0, "<I", 2**31), "its description has (0, 0, "),
    "kernel's arguments": (inside(".rodata", 8, "<I", 2**31), "its description has (0, 0, "),
    "descriptor elsewhere": (inside(".dynsym", 2 * 24 + 8, "<Q", 64), "a symbol outside its section '.rodata'"),
    "no description": (lambda image: image.replace(b"AMDGPU\0", b"BMDGPU\0", 1), "description of its kernels, got 0"),
    "cut off": (lambda image: image[:-1], "cut off"),
    "one byte more": (lambda image: image + b"\0", "1 more bytes follow"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), AMD_IMAGES.values(), ids=AMD_IMAGES.keys())
def test_a_damaged_or_foreign_hsaco_is_refused(makers: Makers, change: Callable[[bytes], bytes], said: str) -> None:
    made = makers.make("lora_compose", "tile", "gfx942")
    (binary,) = made.binaries
    made.check(binary)
    assert change(binary.image) != binary.image
    with pytest.raises(BinaryError, match="image of lora_compose_kernel") as refused:
        made.check(replace(binary, image=change(binary.image)))
    assert said in str(refused.value)


# Random damage.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def mutated(data: st.DataObject, value: Any) -> Any:
    """A JSON value with one part, at any depth, replaced, removed or added."""
    if not isinstance(value, dict | list) or not value or data.draw(st.integers(0, 5)) == 0:
        near = [value + 1, -value, value * 2, float(value), bool(value)] if isinstance(value, int) else []
        return data.draw(st.sampled_from(near) | JSON if near else JSON)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = data.draw(st.sampled_from(keys))
    kind = data.draw(st.sampled_from(["inside", "inside", "inside", "gone", "added"]))
    changed = value.copy()
    if kind == "inside":
        changed[key] = mutated(data, value[key])
    elif kind == "gone":
        del changed[key]
    elif isinstance(changed, dict):
        changed[data.draw(st.text(max_size=8))] = data.draw(JSON)
    else:
        changed.insert(key, data.draw(JSON))
    return changed


def known_part(metadata: Any) -> str:
    """All facts that can be derived, as text, in which 1, 1.0 and true differ."""
    return json.dumps({key: value for key, value in metadata.items() if key not in ("shared", "hash")}, sort_keys=True)


def refusal(check: Callable[[], object], refused: type[Exception]) -> str | None:
    """The message of the refusal, or None; other errors fail the test."""
    try:
        check()
    except refused as error:
        return str(error)
    return None


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_mutation_of_the_metadata_is_accepted_or_ends_in_another_error(norm: Made, data: st.DataObject) -> None:
    binary = norm.binary(data.draw(st.sampled_from(declared_kernels(norm.source))))
    honest = json.loads(binary.metadata)
    forged = mutated(data, honest)
    reason = refusal(lambda: norm.check(replace(binary, metadata=json.dumps(forged))), BinaryError)
    if reason is None:
        assert known_part(forged) == known_part(honest)
        assert type(forged["shared"]) is int
        assert 0 <= forged["shared"] <= LIMIT
    else:
        assert len(reason) <= 1000


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_damage_to_the_text_of_the_metadata_is_accepted_or_ends_in_another_error(
    norm: Made, data: st.DataObject
) -> None:
    binary = norm.binary(data.draw(st.sampled_from(declared_kernels(norm.source))))
    text = binary.metadata
    start = data.draw(st.integers(0, len(text)))
    forged = text[:start] + data.draw(st.text(max_size=3)) + text[start + data.draw(st.integers(0, 3)) :]
    if refusal(lambda: norm.check(replace(binary, metadata=forged)), BinaryError) is None:
        assert known_part(json.loads(forged)) == known_part(json.loads(text))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_damage_to_an_image_ends_in_another_error(makers: Makers, norm: Made, data: st.DataObject) -> None:
    (hsaco,) = makers.make("lora_compose", "tile", "gfx942").binaries
    which = data.draw(st.sampled_from(range(len(norm.binaries) + 1)))
    image = bytearray((*norm.binaries, hsaco)[which].image)
    tables = [(0, 64), (max(len(image) - 4096, 0), len(image)), (0, len(image))]
    for _ in range(data.draw(st.integers(1, 4))):
        first, last = data.draw(st.sampled_from(tables))
        image[data.draw(st.integers(first, last - 1))] = data.draw(st.integers(0, 255))
    length = data.draw(st.sampled_from([len(image), len(image), len(image) // 2, 63, 0]))
    reason = refusal(lambda: read_image(bytes(image[:length])), ImageError)
    assert reason is None or len(reason) <= 1000
    assert reason is not None or length == len(image)
