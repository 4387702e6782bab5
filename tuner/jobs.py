"""From a model to tuning jobs: the distinct kernels that DoRA on all of the model's linear projections runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..codegen.gpu import find_gpu
from ..codegen.ops import DTYPE_BYTES, OPS
from ..codegen.spec import TOKEN_BUCKETS, KernelSpec, bucket_tokens
from ..errors import UsageError, near_names
from .models import Model, Projection


def plan_jobs(
    model: Model,
    *,
    ranks: Sequence[int],
    dtype: str = "bf16",
    adapter_dtype: str | None = None,
    autocast: bool = False,
    gpu: str,
    ops: Sequence[str] | None = None,
    tokens: Iterable[int] | None = None,
) -> list[KernelSpec]:
    """Return the distinct specs of DoRA on every projection of ``model``.

    ``weight_norm`` depends on (d_out, d_in, rank), ``lora_compose`` on (d_out, rank, tokens, bias), ``compose_forward``
    on (d_out, tokens, bias), ``compose_backward`` on (d_out, tokens), ``adapter_backward`` on (d_out, rank), the others
    on (d_out, d_in, rank, tokens); projections that agree in these share a job. ``compose_backward_exact`` serves
    layers that keep their output instead of the base product, which is not the default: it is planned where ``ops``
    names it, for the most tokens only, since it seldom finds a column to compute.

    Args:
        ranks: the adapter ranks, each an integer of at least 1, without repeats.
        dtype: of the weights and activations: bf16, fp16 or fp32.
        adapter_dtype: of A and B; None means ``dtype``, fp32 beside bf16 is PEFT's default.
        autocast: fp32 adapters are rounded to ``dtype``, as torch.autocast does, instead of kept exact.
        gpu: a slug or an architecture, as :func:`~doratune.codegen.gpu.find_gpu` takes it.
        ops: the operations to plan; None means all that a layer runs by default.
        tokens: token counts, each rounded up to its bucket; None means every bucket.

    Returns:
        The specs, ordered by operation (``weight_norm`` first), d_out and tokens.

    Raises:
        UsageError: an invalid rank, dtype, operation or token count, an unknown GPU, or a model without projections.
    """
    if not model.projections:
        raise UsageError(f"{model.name} has no linear layer that PEFT can put a DoRA adapter on: nothing to tune")
    adapter = dtype if adapter_dtype is None else adapter_dtype
    checked_ranks = _check_ranks(ranks)
    _check_dtypes(dtype, adapter, autocast)
    names = _check_ops(ops)
    slug = find_gpu(gpu).slug
    buckets = _check_tokens(tokens)
    specs = {
        KernelSpec.create(
            op,
            d_out=projection.d_out,
            d_in=projection.d_in,
            rank=rank,
            tokens=bucket,
            dtype=dtype if autocast or op != "adapter_backward" else adapter,  # the dtype that B is multiplied in
            adapter=adapter,
            gpu=slug,
            **_flags(op, projection, autocast),
        )
        for op in names
        for projection in model.projections
        for rank in checked_ranks
        for bucket in (buckets[-1:] if op == "compose_backward_exact" else buckets)
    }
    order = list(OPS)
    return sorted(specs, key=lambda s: (order.index(s.op), s.d_out, s.tokens, s.d_in, s.rank, s.bias, s.output))


def _flags(op: str, projection: Projection, autocast: bool) -> dict[str, bool]:
    """The flags with which a training step runs ``op``; a frozen bias needs no gradient."""
    if op == "compose_backward":
        return {}
    flags = {"bias": projection.bias, "autocast": autocast}
    return {flag: wanted for flag, wanted in flags.items() if flag in OPS[op].flags}


def _check_ranks(ranks: object) -> tuple[int, ...]:
    if isinstance(ranks, str) or not isinstance(ranks, Iterable):
        raise UsageError(f"ranks={ranks!r}: give a list of ranks, such as [384]")
    checked = tuple(ranks)
    if not checked:
        raise UsageError("no rank given: give at least one, such as 384")
    for rank in checked:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise UsageError(f"rank {rank!r}: a rank is an integer of at least 1, such as 384")
    repeated = sorted({rank for rank in checked if checked.count(rank) > 1})
    if repeated:
        raise UsageError(f"rank {repeated[0]} is given more than once: name each rank once")
    return checked


def _check_dtypes(dtype: str, adapter: str, autocast: bool) -> None:
    for role, value in (("dtype", dtype), ("adapter dtype", adapter)):
        if value not in DTYPE_BYTES:
            near = near_names(str(value), DTYPE_BYTES)
            raise UsageError(f"unsupported {role} {value!r}{near} (use one of {', '.join(DTYPE_BYTES)})")
    if adapter not in (dtype, "fp32"):
        raise UsageError(f"adapter dtype {adapter} with {dtype} weights: use {dtype} or fp32")
    if autocast and (adapter != "fp32" or dtype == "fp32"):
        raise UsageError(
            f"autocast with adapter dtype {adapter} and {dtype} weights: it rounds fp32 adapters beside 16-bit weights"
        )


def _check_ops(ops: Sequence[str] | None) -> tuple[str, ...]:
    if ops is None:
        return tuple(op for op in OPS if op != "compose_backward_exact")
    if isinstance(ops, str) or not ops:
        raise UsageError(f"ops={ops!r}: give a list of operations out of {', '.join(OPS)}, or None for all")
    for op in ops:
        if op not in OPS:
            raise UsageError(f"unknown operation {op!r}{near_names(str(op), OPS)} (known: {', '.join(OPS)})")
    return tuple(ops)


def _check_tokens(tokens: object) -> tuple[int, ...]:
    if tokens is None:
        return TOKEN_BUCKETS
    if isinstance(tokens, str) or not isinstance(tokens, Iterable):
        raise UsageError(f"tokens={tokens!r}: give a list of token counts, such as [1, 4096]")
    buckets = tuple(sorted({bucket_tokens(count) for count in tokens}))
    if not buckets:
        raise UsageError("no token count given: give at least one, or None for every bucket")
    return buckets
