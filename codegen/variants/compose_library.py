"""The variants of ``lora_compose`` and ``dora_linear_forward`` whose products are made by cuBLAS."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from ..gpu import Gpu
from ..spec import Config, KernelSpec
from .base import (
    LIBRARY_CONSTANTS,
    LibraryCall,
    Variant,
    Work,
    ceil_div,
    dtype_bytes,
    fit,
    library_products,
    library_unavailable,
    tiles_for,
    up_to,
)

LIBRARY_ORDER = 4
"""The default rank, behind every emitted product: a cuBLAS product costs one more pass over [T, d_out], or several."""

MAX_ELEMENTS = 64
"""Elements of the composition's tile per thread: each takes registers for three values and their addresses."""


class _ComposedProducts(Variant):
    """Products with fp32 results of [T, d_out], and one pass that composes them.

    fp32 adapters beside 16-bit h are split into two 16-bit parts, and the product runs over twice the ranks.
    """

    name = "library"
    library = True
    constants: ClassVar[Mapping[str, object]] = LIBRARY_CONSTANTS

    def unavailable(self, spec: KernelSpec, gpu: Gpu) -> str | None:
        return super().unavailable(spec, gpu) or library_unavailable(gpu)

    def default_order(self, spec: KernelSpec) -> int:
        return LIBRARY_ORDER

    def choices(self, spec: KernelSpec, gpu: Gpu) -> Mapping[str, tuple[int, ...]]:
        return {
            "block_t": up_to((1, 2, 4, 8, 16), spec.tokens),
            "block_n": up_to((128, 256, 512, 1024, 2048), spec.d_out),
            "num_warps": (2, 4, 8),
            "num_stages": (2,),
        }

    def seeds(self, spec: KernelSpec, gpu: Gpu) -> tuple[Config, ...]:
        return tuple(
            Config.create(
                self.name,
                block_t=fit(block_t, spec.tokens, smallest=1),
                block_n=fit(block_n, spec.d_out, smallest=128),
                num_warps=4,
                num_stages=2,
            )
            for block_t, block_n in ((4, 512), (8, 128))
        )

    def rederived(
        self, config: Config, source: KernelSpec, spec: KernelSpec, gpu: Gpu
    ) -> tuple[Mapping[str, int], ...]:
        choices = self.choices(spec, gpu)
        return tiles_for(config, source, spec, gpu, choices, {"block_t": "tokens", "block_n": "d_out"})

    def refuse(self, spec: KernelSpec, config: Config, gpu: Gpu) -> str | None:
        each = config["block_t"] * config["block_n"] // (config.num_warps * 32)
        if each > MAX_ELEMENTS:
            return f"{each} elements per thread ({config['block_t']}x{config['block_n']} on {config.num_warps} warps)"
        return None

    @abstractmethod
    def _base_bytes(self, spec: KernelSpec) -> int:
        """Bytes of one element of base as the composition reads it."""

    def work(self, spec: KernelSpec, config: Config) -> tuple[Work, ...]:
        block_t, block_n = config["block_t"], config["block_n"]
        written = dtype_bytes(spec.activation) * (2 if spec.save else 1)
        moved = spec.tokens * spec.d_out * (self._base_bytes(spec) + 4 + written)
        return (
            Work(
                "compose_kernel",
                programs=ceil_div(spec.tokens, block_t) * ceil_div(spec.d_out, block_n),
                dram_bytes=moved,
                l2_bytes=moved,
                steps=1,
            ),
        )

    def library_calls(self, spec: KernelSpec, config: Config) -> tuple[LibraryCall, ...]:
        if spec.adapter == spec.activation:
            return library_products(spec.tokens, spec.d_out, spec.rank, spec.activation)
        elements = spec.d_out * spec.rank
        rounding = LibraryCall(elements * 6)
        if spec.autocast:
            return (rounding, *library_products(spec.tokens, spec.d_out, spec.rank, spec.activation))
        return (
            rounding,
            LibraryCall(elements * 10),  # the rounding error, in fp32
            rounding,  # of the rounding error
            LibraryCall(spec.tokens * spec.rank * 6),  # h, repeated
            *library_products(spec.tokens, spec.d_out, 2 * spec.rank, spec.activation),
        )


class LoraComposeLibrary(_ComposedProducts):
    """h @ B.T by cuBLAS, then one pass over base and the product."""

    op = "lora_compose"

    def _base_bytes(self, spec: KernelSpec) -> int:
        return dtype_bytes(spec.activation)


class DoraLinearLibrary(_ComposedProducts):
    """x @ W.T and h @ B.T by cuBLAS in fp32, then one pass that adds and composes them."""

    op = "dora_linear_forward"

    def _base_bytes(self, spec: KernelSpec) -> int:
        return 4

    def library_calls(self, spec: KernelSpec, config: Config) -> tuple[LibraryCall, ...]:
        base = library_products(spec.tokens, spec.d_out, spec.d_in, spec.activation)
        return (*base, *super().library_calls(spec, config))
