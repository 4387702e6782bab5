"""A roofline model of the kernels: which config of a spec is likely to be faster, judged without compiling.

The model is for **ranking configs of one kernel**, not for absolute times. A cuBLAS call takes its bytes or flops at a
share of what the GPU attains. Each launch of an emitted kernel is split into waves of programs that fit the GPU at
once. A wave takes as long as the slowest of its device memory traffic, its L2 traffic, its tensor core work, its
decoding of a quantised W and its chain of dependent loads; if few programs share a multiprocessor, part of the others
is added. Memory speed follows Little's law: bytes in flight over latency, up to what the GPU attains.

It leaves out bank conflicts, uncoalesced accesses, the instruction mix, the order of programs and what they share in
the L2, clocks under load, and how well the compiler schedules.

Both the tuner and the lookup use it, so it is plain Python over the variants' :class:`~.variants.Work`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from .gpu import Gpu
from .spec import Config, KernelSpec
from .variants import LibraryCall, Work, find_variant

LATENCY_US = 0.6
"""One load from device memory, issue to use (H100: 480-700 ns in "Dissecting the NVIDIA Hopper Architecture through
Microbenchmarking", arXiv 2402.13499, by clock)."""

L2_RATIO = 1.5
"""L2 bandwidth over device memory bandwidth (model assumption; measured ratios run from 1.3 on an H200 to 3 on cards
with GDDR memory)."""

LAUNCH_GAP_US = 1.2
"""From the end of one kernel to the start of the next one in a CUDA graph (model assumption, about what graph replays
of empty kernels show)."""

RESERVED_SHARED_BYTES = 1024
"""Shared memory CUDA takes from each block (CUDA C++ Programming Guide, compute capability 8.0 and later)."""

REGISTER_UNIT = 8
"""Registers a thread are allocated in units of this many (CUDA occupancy calculator)."""

MAX_RESIDENT = 24
"""Programs on a multiprocessor at most (CUDA C++ Programming Guide: 16 to 32 by compute capability)."""

HALF_INTENSITY = 10.0
"""Tensor core flops per byte loaded at which half the attained rate is reached (model assumption: a tile of m x n
16-bit values does m*n/(m+n) a byte, 64 for 128x128, 8 for 16x16, and cuBLAS's own rate belongs to the large tiles)."""

MMA_SYNC_SHARE = 0.62
"""Share of Hopper's tensor core rate that the warp-level instruction reaches (arXiv 2402.13499: 62.9 % on average).
Only warp groups, four warps on 64 rows or more, get the rest."""

WARP_GROUP, WARP_GROUP_ROWS = 4, 64

LIBRARY_SHARE = 0.9
"""Share of the attained rates that a cuBLAS product reaches (model assumption: W @ A.T takes 1.02 to 1.3 times its
floor at rank 384 on one H200, benchmarks/results/h200/weight_norm.json)."""

LIBRARY_FP32_SHARE = 0.75
"""The same for plain fp32 products, of the datasheet's rate: 46 to 50 of 66.9 TFLOP/s there."""

LIBRARY_FILL_US = 2.0
"""What a cuBLAS call takes besides its bytes and flops (model assumption)."""

FP32_SPLIT_SHARE = 0.33
"""Share of the tensor core rate that is left where fp32 operands are split in registers, each in every step: 27 to 34
TFLOP/s of products on one H200 (the same file) where three at the warp-level rate would make 92."""

EXPOSED = 0.5
"""Share of the faster resources' time that shows when a multiprocessor holds one program; it falls as more programs
fill each other's gaps (model assumption)."""

ELEMENTWISE_FLIGHT = 4
"""Loop steps of loads that a program without tensor core work keeps in flight at most: registers hold them (model
assumption)."""

BASE_REGISTERS, FLAT_REGISTERS = 40, 64
"""Registers a thread, guessed before the compile: beside the accumulators of a product, and without a product."""


class Resources(Protocol):
    """What a compiled kernel uses: its name, registers a thread, spilled bytes a thread, shared bytes a program."""

    @property
    def name(self) -> str: ...
    @property
    def registers(self) -> int: ...
    @property
    def spills(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def num_warps(self) -> int: ...


@dataclass(frozen=True)
class Guess:
    """The resources of a kernel before it is compiled (:class:`Resources`)."""

    name: str
    registers: int
    spills: int
    shared_bytes: int
    num_warps: int


class DoesNotFitError(ValueError):
    """Not even one program of a kernel fits a multiprocessor; the message names both."""


def floor_us(spec: KernelSpec, gpu: Gpu) -> float:
    """The least microseconds of any kernel of ``spec`` on ``gpu``: its bytes and flops at attainable rates."""
    contract = spec.contract
    return gpu.floor_us(contract.floor_bytes(spec), contract.matrix_flops(spec), spec.wide)


def estimate_us(spec: KernelSpec, config: Config, gpu: Gpu) -> float:
    """Microseconds as estimated before the compile: resources guessed, floor ignored; infinite if it cannot fit."""
    launches = find_variant(spec.op, config.variant).work(spec, config)
    try:
        us = sum(launch_us(config, work, guessed(config, work, gpu), gpu) for work in launches)
    except DoesNotFitError:
        return float("inf")
    return us + library_us(spec, config, gpu)


def resident_programs(kernel: Resources, gpu: Gpu) -> int:
    """How many programs of a kernel a multiprocessor holds at once, 0 when it cannot hold one."""
    threads = kernel.num_warps * gpu.warp_size
    registers = -(-max(kernel.registers, 1) // REGISTER_UNIT) * REGISTER_UNIT
    reserved = RESERVED_SHARED_BYTES if gpu.backend == "cuda" else 0
    return min(
        MAX_RESIDENT,
        gpu.max_threads_per_multiprocessor // threads,
        gpu.registers_per_multiprocessor // (registers * threads),
        gpu.shared_bytes_per_multiprocessor // max(kernel.shared_bytes + reserved, 1),
    )


def library_us(spec: KernelSpec, config: Config, gpu: Gpu) -> float:
    """Microseconds of a variant's cuBLAS calls."""
    return sum(_call_us(call, gpu) for call in find_variant(spec.op, config.variant).library_calls(spec, config))


def _call_us(call: LibraryCall, gpu: Gpu) -> float:
    bandwidth = gpu.attainable_bandwidth
    seconds = max(call.dram_bytes / (LIBRARY_SHARE * bandwidth), call.l2_bytes / (L2_RATIO * bandwidth))
    if call.matrix_flops:
        share = LIBRARY_FP32_SHARE if call.matrix_dtype == "fp32_vector" else LIBRARY_SHARE
        seconds = max(seconds, call.matrix_flops / (share * gpu.attainable_flops(call.matrix_dtype)))
    return LAUNCH_GAP_US + LIBRARY_FILL_US + 1e6 * seconds


def launch_us(config: Config, work: Work, kernel: Resources, gpu: Gpu) -> float:
    resident = resident_programs(kernel, gpu)
    if resident < 1:
        raise DoesNotFitError(f"{kernel.name} does not fit a multiprocessor of {gpu.slug}")
    slots = resident * gpu.multiprocessors
    full_waves, rest = divmod(work.programs, slots)
    us = LAUNCH_GAP_US
    if full_waves:
        us += full_waves * _wave_us(config, work, kernel, gpu, slots)
    if rest:
        us += _wave_us(config, work, kernel, gpu, rest)
    return us


def _wave_us(config: Config, work: Work, kernel: Resources, gpu: Gpu, programs: int) -> float:
    """Microseconds in which ``programs`` programs, running at once, do their share of a launch."""
    share = programs / work.programs
    steps = max(work.steps, 1)
    stages = max(config.num_stages - 1, 1) if work.matrix_flops else min(config.num_stages, ELEMENTWISE_FLIGHT)
    ahead = min(stages, steps)
    in_flight = programs * work.l2_bytes / work.programs / steps * ahead
    per_us = in_flight / LATENCY_US  # Little's law
    bandwidth = gpu.attainable_bandwidth / 1e6
    spilled = 2 * kernel.spills * kernel.num_warps * gpu.warp_size * programs * steps  # stored once, loaded once a step
    dram = share * work.dram_bytes / min(bandwidth, per_us)
    l2 = share * work.l2_bytes / min(L2_RATIO * bandwidth, per_us)
    chain = LATENCY_US * (1 + steps / ahead)  # the last store waits for the last load
    matrix = 0.0
    busiest = -(-programs // gpu.multiprocessors)
    if work.matrix_flops:
        rate = gpu.attainable_flops(work.matrix_dtype) / 1e6 * _matrix_share(config, work, kernel, gpu)
        matrix = busiest * work.matrix_flops / work.programs / (rate / gpu.multiprocessors)
    vector = 0.0
    if work.vector_ops:
        rate = gpu.attainable_flops("fp32_vector") / 2e6  # a multiply-add is one instruction
        vector = busiest * work.vector_ops / work.programs / (rate / gpu.multiprocessors)
    terms = (dram, l2, matrix, vector, chain)
    slowest = max(terms)
    exposed = EXPOSED * (dram + matrix + vector - max(dram, matrix, vector)) / busiest
    return slowest + exposed + spilled / (L2_RATIO * bandwidth)


def _matrix_share(config: Config, work: Work, kernel: Resources, gpu: Gpu) -> float:
    """The share of the attainable tensor core rate that this tile shape reaches."""
    intensity = work.matrix_flops / max(work.l2_bytes, 1)
    share = intensity / (intensity + HALF_INTENSITY)
    rows, _ = _tile(config)
    if work.matrix_dtype == "fp32":
        share *= FP32_SPLIT_SHARE
    if gpu.architecture == "sm_90" and (
        work.matrix_dtype == "fp32" or kernel.num_warps % WARP_GROUP or rows < WARP_GROUP_ROWS
    ):
        share *= MMA_SYNC_SHARE
    return share


def guessed(config: Config, work: Work, gpu: Gpu) -> Guess:
    """The resources of a kernel before it is compiled: accumulators in registers, pipeline stages in shared memory."""
    threads = config.num_warps * gpu.warp_size
    if not work.matrix_flops:
        return Guess(work.kernel, FLAT_REGISTERS, 0, 0, config.num_warps)
    rows, cols = _tile(config)
    registers = BASE_REGISTERS + rows * cols // threads
    stage = work.l2_bytes // work.programs // max(work.steps, 1)
    shared = min(stage * max(config.num_stages - 1, 1), gpu.shared_bytes_per_block)
    return Guess(
        work.kernel,
        min(registers, gpu.max_registers_per_thread),
        4 * max(registers - gpu.max_registers_per_thread, 0),
        shared,
        config.num_warps,
    )


def _tile(config: Config) -> tuple[int, int]:
    """Rows and columns of the output tile; the templates name them block_m or block_t, and block_n."""
    params: Mapping[str, int] = dict(config.params)
    return params.get("block_m", params.get("block_t", 1)), params.get("block_n", 1)
