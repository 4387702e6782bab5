"""The specs, configs and entries that the store's tests speak about."""

from __future__ import annotations

from dataclasses import replace

from doratune.cache.entry import (
    DEFAULT,
    MEASURED,
    PREDICTED,
    SEARCH,
    Binary,
    Contender,
    Entry,
    Environment,
    Evaluation,
    Final,
)
from doratune.codegen.spec import Config, KernelSpec

ARCHITECTURES = {"h200": "sm_90", "h100": "sm_90", "a100": "sm_80", "sm_90": "sm_90"}
DEFAULT_CONFIG = Config.create("tile", num_warps=1, num_stages=1)


def a_spec(
    gpu: str = "h200",
    *,
    d_out: int = 4096,
    rank: int = 384,
    tokens: int = 4096,
    dtype: str = "bf16",
    bias: bool = False,
) -> KernelSpec:
    return KernelSpec.create(
        "lora_compose", d_out=d_out, rank=rank, tokens=tokens, dtype=dtype, adapter=dtype, bias=bias, gpu=gpu
    )


def an_entry(
    spec: KernelSpec | None = None,
    provenance: str = MEASURED,
    *,
    warps: int = 4,
    variant: str = "tile",
    template: str = "template-1",
    source_digest: str = "source-1",
    us: float | None = 20.0,
    triton: str = "3.7.1",
    code: str = "y = 1",
) -> Entry:
    spec = spec or a_spec()
    evaluation = Evaluation(
        provenance,
        us=us,
        floor_us=16.0,
        samples_us=(19.5, 20.0, 21.25) if provenance == MEASURED else (),
        error=1.5e-3,
        registers=128,
        spills=0,
        shared_bytes=98304,
        trials=40,
    )
    environment = Environment(
        gpu=spec.gpu,
        architecture=ARCHITECTURES[spec.gpu],
        triton=triton,
        torch="2.13.0",
        driver="580.1",
        gpu_name="NVIDIA H200" if provenance == MEASURED else "",
        doratune="0.1.0",
    )
    config = Config.create(variant, num_warps=warps, num_stages=3, block_n=128, block_t=64)
    source = f'"""A kernel: g ⊙ (base + s·hBᵀ).\n\n{spec}"""\n{code}\n'
    return Entry(spec, config, template, source_digest, source, evaluation, environment, "2026-11-23T10:00:00+00:00")


def a_final(config: Config, beaten: Config, *, origins: tuple[str, ...] = ("nearest",)) -> Final:
    """A final of two: ``config`` won, ``beaten`` takes 5 % longer."""
    return Final(
        contenders=(Contender(config, (SEARCH,), (20.0, 20.5, 19.5)), Contender(beaten, origins, (21.0, 21.5, 20.5))),
        confidence=0.999,
        noise=0.003,
        settled=True,
        notices=("clocks fell by 3 % during the final",),
    )


def with_final(entry: Entry | None = None, *, lookup_regret: float = 1.05) -> Entry:
    """An entry that won a final against what a lookup gave before."""
    entry = entry or an_entry()
    beaten = replace(entry.config, num_warps=8)
    return replace(entry, final=a_final(entry.config, beaten), lookup_regret=lookup_regret)


def a_binary(code_digest: str = "code-1", image: bytes = b"\x7fELF\x00\xff", *, triton: str = "3.7.1") -> Binary:
    return Binary(code_digest, "compose_kernel", triton, "sm_90", '{"shared": 98304}', image)


__all__ = [
    "ARCHITECTURES",
    "DEFAULT",
    "DEFAULT_CONFIG",
    "MEASURED",
    "PREDICTED",
    "a_binary",
    "a_final",
    "a_spec",
    "an_entry",
    "with_final",
]
