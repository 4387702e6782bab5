"""From a model to tuning jobs: the distinct kernels that DoRA on all of the model's linear projections runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from ..codegen.gpu import find_gpu
from ..codegen.ops import DTYPE_BYTES, IN_ONE_KERNEL, IN_PLACE, OPS, WIDTHS, adds_in_place, composes_apart
from ..codegen.spec import MOST_RANK, TOKEN_BUCKETS, KernelSpec, bucket_tokens, most_tokens
from ..codegen.weight_formats import parse_format, stored_as
from ..errors import UsageError, near_names
from ..printable import brief
from .models import Model, Projection

_GATED = (*IN_ONE_KERNEL, *IN_PLACE)
"""The operations of a gated MLP."""

_GROUPED = ("lora_compose_group", "compose_backward_group")
"""The operations of several projections of one x."""

_WITH_MAGNITUDE = ("compose_swiglu_backward", "swiglu_backward", "compose_backward_group", "adapter_backward")
"""The operations that a training step gives m or w beside it; m's dtype is that of the adapters."""

_OF_PARAMETERS = ("weight_norm_group", "adapter_backward")
"""The operations that get A and B as they are kept. Others get them rounded under autocast."""


def plan_jobs(
    model: Model,
    *,
    ranks: Sequence[int],
    dtype: str = "bf16",
    weight: str | None = None,
    adapter_dtype: str | None = None,
    autocast: bool = False,
    gpu: str,
    ops: Sequence[str] | None = None,
    tokens: Iterable[int] | None = None,
) -> list[KernelSpec]:
    """Return the distinct specs of DoRA on every projection of ``model``.

    ``weight_norm`` depends on (d_out, d_in, rank), ``lora_compose`` on (d_out, rank, tokens, bias),
    ``compose_forward`` on (d_out, tokens, bias), ``compose_backward`` on (d_out, tokens), ``adapter_backward`` on
    (d_out, rank), the others on (d_out, d_in, rank, tokens), ``weight_dequantise`` on (d_out, d_in), and
    ``weight_norm_group`` on (d_out, d_in, rank) and the number of layers of that shape in the model; projections
    that agree in these share a job. ``compose_swiglu`` and its backward run where the model's MLP is gated by an
    activation that they know, once for gate and up, or with a high rank and many tokens ``swiglu_forward`` and
    ``swiglu_backward`` (on (d_out, tokens, bias)); ``lora_compose_group`` and ``compose_backward_group`` once for
    q, k and v, but where Hopper composes them apart. ``compose_backward_exact`` serves layers that keep their
    output instead of the base product, which is not the default: it is planned where ``ops`` names it, for the most
    tokens only, since it seldom finds a column to compute.

    Args:
        ranks: the adapter ranks, each an integer of at least 1, without repeats.
        dtype: of the weights and activations: bf16, fp16 or fp32.
        weight: the weight format of a quantised model, such as ``nf4.nested``: then operations that read W are planned
            if they read it packed.
        adapter_dtype: of A and B; None means ``dtype``, fp32 beside bf16 is PEFT's default.
        autocast: fp32 adapters are rounded to ``dtype``, as torch.autocast does, instead of kept exact. A layer rounds
            them once for all that multiplies by them; a norm pass does so in its kernels.
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
    layers: dict[tuple[int, int], int] = defaultdict(int)
    for projection in model.projections:
        layers[projection.shape] += projection.count
    _check_dtypes(dtype, adapter, autocast)
    names = _check_ops(ops, weight)
    stored = None if weight is None else stored_as(weight, dtype)
    target = find_gpu(gpu)
    slug, hopper = target.slug, target.architecture == "sm_90"
    buckets = _check_tokens(tokens)
    narrow = dtype if adapter == dtype or autocast else ""  # of products whose factors all have it
    kept = {*_OF_PARAMETERS, *(("weight_norm",) if stored else ())}  # a stored W has no rounded adapters beside it
    specs = {
        KernelSpec.create(
            op,
            d_in=projection.d_in,
            rank=rank,
            tokens=bucket,
            layers=layers[projection.shape],
            dtype=dtype if autocast or op != "adapter_backward" else adapter,  # the dtype that B is multiplied in
            adapter=dtype if autocast and op not in kept else adapter,
            magnitude=adapter if op in _WITH_MAGNITUDE else None,
            gpu=slug,
            **_flags(op, projection, autocast and op in kept),
            **{"d_out": projection.d_out, **added},
            **({"weight": stored} if stored and OPS[op].formats else {}),
        )
        for op in names
        for projection, added in _calls(op, model)
        for rank in checked_ranks
        for bucket in _buckets_of(op, buckets, stored)
        if _runs_with(op, rank, bucket, narrow)
        and not (op in _GROUPED and hopper and composes_apart(rank, bucket, [*added.values()], narrow))
    }
    order = list(OPS)
    return sorted(
        specs,
        key=lambda s: (order.index(s.op), *s.widths[:1], s.tokens, s.widths[1:], s.d_in, s.rank, s.bias, s.output),
    )


def _buckets_of(op: str, buckets: tuple[int, ...], stored: str | None) -> tuple[int, ...]:
    """The token buckets that are planned for ``op`` with W in the format ``stored``, or dense."""
    if op == "compose_backward_exact":
        return buckets[-1:]
    return tuple(bucket for bucket in buckets if stored is None or bucket <= most_tokens(op, stored))


def _runs_with(op: str, rank: int, bucket: int, dtype: str) -> bool:
    """Whether ``op`` runs at this rank and token bucket: of the two ways of a gated MLP one does."""
    in_place = op in _GATED and adds_in_place(rank, bucket, dtype)
    return op not in (IN_ONE_KERNEL if in_place else IN_PLACE)


def _calls(op: str, model: Model) -> list[tuple[Projection, dict[str, int | bool]]]:
    """The first of the projections that each call of ``op`` serves, and the fields that the others add to its spec."""
    if op in _GATED:
        flags: dict[str, int | bool] = {} if model.activation == "silu" else {model.activation: True}
        return [(gate, flags) for gate in model.gated()]
    if op in _GROUPED:
        groups = model.grouped()
        return [(group[0], {dim: one.d_out for dim, one in zip(WIDTHS, group, strict=False)}) for group in groups]
    return [(projection, {}) for projection in model.projections]


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
            raise UsageError(f"rank {brief(rank)}: a rank is an integer of at least 1, such as 384")
        if rank > MOST_RANK:
            raise UsageError(f"rank {brief(rank)}: no layer has such a rank; use at most {MOST_RANK}, such as 384")
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


def _reads_packed(op: str) -> bool:
    """Whether a quantised layer can run ``op``: it does not read W, or reads it packed."""
    return OPS[op].formats or all(operand.name != "weight" for operand in OPS[op].inputs)


def _runs(op: str, weight: str) -> bool:
    """Whether layers with W in this format run ``op``: not its product where they multiply by a rounded x."""
    return op != "dora_linear_forward" or not parse_format(weight).of.rounds_inputs


def _check_ops(ops: Sequence[str] | None, weight: str | None) -> tuple[str, ...]:
    if ops is None:
        usual = (op for op in OPS if op != "compose_backward_exact")
        if weight is None:
            return tuple(op for op in usual if not OPS[op].only_formats)
        return tuple(op for op in usual if _reads_packed(op) and _runs(op, weight))
    if isinstance(ops, str) or not ops:
        raise UsageError(f"ops={ops!r}: give a list of operations out of {', '.join(OPS)}, or None for all")
    for op in ops:
        if op not in OPS:
            raise UsageError(f"unknown operation {op!r}{near_names(str(op), OPS)} (known: {', '.join(OPS)})")
        if weight is None and OPS[op].only_formats:
            raise UsageError(f"{op} reads packed weights only: name their format, such as nf4, or leave it out")
        if weight is not None and not _reads_packed(op):
            raise UsageError(
                f"{op} reads plain weights only, not {weight}: leave it out, or leave out the weight format"
            )
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
