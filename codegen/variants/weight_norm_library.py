"""The variant of ``weight_norm`` whose products are made by cuBLAS."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from ..gpu import Gpu
from ..spec import Config, KernelSpec
from .base import (
    ADAPTER_CONSTANTS,
    LIBRARY_CONSTANTS,
    LibraryCall,
    Variant,
    Work,
    adapter_parts,
    adapter_parts_work,
    ceil_div,
    dtype_bytes,
    fit,
    format_unavailable,
    library_product,
    library_products,
    library_unavailable,
    nearest,
    up_to,
)
from .weight_norm import SQUARE_COLS, SUM_BLOCK

GRAM_SHARE = 1024
"""Columns of A in one sum of G at most. Tensor cores truncate a running sum: over 14336 columns G came out 5e-5 too
small on an H200, and the norm's error bound is 1e-5."""

PRODUCT_SHARE, MOST_PRODUCT_SHARE = 4096, 8192
"""Columns of W in one sum of W @ A.T, by default and at most. Where rows of W are parallel to those of A these sums
lose as many digits; the norm's relative error is half of theirs times their share of w**2, which is up to 0.5."""

MOST_SHARES = 64
"""Shares of a product at most: each takes as much memory as the result."""

MAX_ELEMENTS = 32
"""Elements per thread, at most, of each of the four tiles of the assembling kernel."""


def equal_shares(extent: int, longest: int) -> int:
    """The fewest equal shares of ``extent`` that are at most ``longest`` long."""
    small = [count for count in range(1, math.isqrt(extent) + 1) if extent % count == 0]
    return min(count for divisor in small for count in (divisor, extent // divisor) if count * longest >= extent)


class WeightNormLibrary(Variant):
    """W @ A.T, G = A @ A.T and B @ G by cuBLAS with fp32 results, then one kernel that dots their rows with those of B.

    ``split_k`` divides the sums of W @ A.T, ``gram_split`` those of G; cuBLAS takes equal shares, so both must divide
    d_in. For 16-bit adapters G is stored as a high and a low part, scaled so that fp16 does not overflow; for fp32
    adapters in fp32. fp32 adapters beside a 16-bit W are rounded (autocast) or, for W @ A.T, split in two.
    """

    op = "weight_norm"
    name = "library"
    library = True
    counts = frozenset({"split_k", "gram_split"})
    constants: ClassVar[Mapping[str, object]] = {
        **LIBRARY_CONSTANTS,
        **ADAPTER_CONSTANTS,
        "sum_block": SUM_BLOCK,
        "square_cols": SQUARE_COLS,
    }

    def unavailable(self, spec: KernelSpec, gpu: Gpu) -> str | None:
        reason = library_unavailable(gpu) or format_unavailable(spec, self.packed)
        if reason is None and equal_shares(spec.d_in, GRAM_SHARE) > MOST_SHARES:
            return f"d_in={spec.d_in} has no {MOST_SHARES} or fewer equal shares of at most {GRAM_SHARE} columns for G"
        return reason

    def default_order(self, spec: KernelSpec) -> int:
        # No other variant for fp16 has tensor descriptors: at 4096x4096, r=384 this takes 45 us on an H200, fused 85.
        return -1 if spec.weight == "fp16" else 3

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        splits = {equal_shares(spec.d_in, longest) for longest in (MOST_PRODUCT_SHARE, PRODUCT_SHARE, 2048, 1024)}
        gram_splits = {equal_shares(spec.d_in, longest) for longest in (2 * GRAM_SHARE, GRAM_SHARE, GRAM_SHARE // 2)}
        return {
            "block_m": up_to((1, 2, 4, 8, 16, 32), spec.d_out),
            "block_n": up_to((32, 64, 128, 256, 512), spec.rank),
            "split_k": tuple(sorted(count for count in splits if count <= MOST_SHARES)),
            "gram_split": tuple(sorted(count for count in gram_splits if count <= MOST_SHARES)),
            "num_warps": (1, 2, 4, 8),
            "num_stages": (2,),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        return tuple(
            Config.create(
                self.name,
                block_m=fit(block_m, spec.d_out, smallest=1),
                block_n=fit(block_n, spec.rank, smallest=32),
                split_k=equal_shares(spec.d_in, PRODUCT_SHARE),
                gram_split=equal_shares(spec.d_in, GRAM_SHARE),
                num_warps=warps,
                num_stages=2,
            )
            for block_m, block_n, warps in ((8, 128, 4), (4, 128, 2), (16, 64, 4))[
                : 1 if spec.weight == "bf16" else None
            ]
        )

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        choices = self.choices(spec, gpu)
        lengths = {name: source.d_in / config[name] for name in ("split_k", "gram_split")}
        return ({name: nearest(choices[name], spec.d_in / length) for name, length in lengths.items()},)

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        for name in ("split_k", "gram_split"):
            if spec.d_in % config[name]:
                return f"{name} must divide d_in={spec.d_in}, got {config[name]}: cuBLAS takes equal shares"
            if config[name] > MOST_SHARES:
                return f"{name} must be at most {MOST_SHARES}, got {config[name]}"
        if spec.d_in // config["split_k"] > MOST_PRODUCT_SHARE:
            return f"split_k={config['split_k']} makes sums over more than {MOST_PRODUCT_SHARE} columns of W"
        if spec.d_in // config["gram_split"] > 2 * GRAM_SHARE:
            return f"gram_split={config['gram_split']} makes sums over more than {2 * GRAM_SHARE} columns of A"
        each = config["block_m"] * config["block_n"] // (config.num_warps * 32)
        if each > MAX_ELEMENTS:
            return f"{each} elements per thread ({config['block_m']}x{config['block_n']} on {config.num_warps} warps)"
        return None

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        gram = spec.rank * spec.rank * 4
        shares = config["gram_split"] * gram
        weight = spec.d_out * spec.d_in * dtype_bytes(spec.weight) * spec.save
        products = spec.d_out * spec.rank * 4 * (self._adapter_parts(spec) * config["split_k"] + self._gram_parts(spec))
        factors = spec.d_out * spec.rank * dtype_bytes(spec.adapter) + 2 * spec.d_out * 4
        cast: tuple[Work, ...] = ()
        if spec.adapter != spec.weight:
            factors_of_b = ((spec.d_out, spec.rank),) if spec.autocast else ()
            cast = adapter_parts_work(spec, (spec.rank, spec.d_in), *factors_of_b)
        return (
            *cast,
            Work(
                "gram_kernel",
                programs=ceil_div(spec.rank * spec.rank, SUM_BLOCK),
                dram_bytes=0,
                l2_bytes=shares + gram,
                steps=config["gram_split"],
            ),
            Work(
                "assemble_kernel",
                programs=ceil_div(spec.d_out, config["block_m"]),
                dram_bytes=weight + factors,
                l2_bytes=weight + factors + products,
                steps=ceil_div(spec.rank, config["block_n"]) * config["split_k"]
                + (ceil_div(spec.d_in, SQUARE_COLS) if spec.save else 0),
            ),
        )

    def library_calls(self, spec: KernelSpec, config: Config) -> tuple[LibraryCall, ...]:
        adapter = spec.weight if spec.autocast else spec.adapter
        columns = spec.rank * self._adapter_parts(spec)
        split_k = config["split_k"]
        return (
            library_product(spec.rank, spec.rank, spec.d_in, adapter, config["gram_split"]),
            *(
                (library_product(spec.d_out, columns, spec.d_in, spec.weight, split_k),)
                if split_k > 1
                else library_products(spec.d_out, columns, spec.d_in, spec.weight)
            ),
            *library_products(spec.d_out, spec.rank * self._gram_parts(spec), spec.rank, adapter),
        )

    @staticmethod
    def _adapter_parts(spec: KernelSpec) -> int:
        """The number of parts of A in W @ A.T."""
        return 1 if spec.adapter == spec.weight else adapter_parts(spec)

    @staticmethod
    def _gram_parts(spec: KernelSpec) -> int:
        """The number of parts of G in B @ G."""
        return 1 if spec.adapter == "fp32" and not spec.autocast else 2
