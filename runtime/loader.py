"""``load_kernel``: return a callable for an operation and its shapes, from what the stores hold. It never tunes."""

from __future__ import annotations

import functools
import itertools
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..codegen.spec import Config, KernelSpec, SpecError
from ..codegen.weight_formats import is_format, wide_dtype
from ..internals.torch import current_device
from .absent import ABSENT, AbsentKernel
from .absent import GPU as ABSENT_GPU
from .device import find_device, gpu_of
from .kernel import Kernel

if TYPE_CHECKING:
    from ..cache.entry import Entry
    from ..cache.lookup import Resolution
    from ..cache.store import Store
    from ..codegen.fit import Fit
    from ..codegen.render import Source
    from .binaries import Binaries

__all__ = ["Kernel", "explain", "load_kernel"]

CPU = "cpu"
"""The GPU field in the spec of a kernel for CPU tensors."""

_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_loaded: dict[tuple[KernelSpec, torch.device, str | None], Kernel] = {}
_asked: dict[tuple[object, ...], Kernel] = {}
"""Kernels by the arguments of :func:`load_kernel`: a hit makes no spec and takes no lock."""
_MOST_ASKED = 1 << 14
"""Size at which ``_asked`` is cleared. Each token count is a key of its own, so the number needs a limit."""
_lock = threading.Lock()


def load_kernel(
    op: str,
    *,
    d_out: int,
    d_in: int,
    rank: int,
    tokens: int,
    d_out_2: int | None = None,
    d_out_3: int | None = None,
    layers: int | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    adapter_dtype: torch.dtype | None = None,
    magnitude_dtype: torch.dtype | None = None,
    bias: bool = False,
    delta: bool = False,
    save: bool = False,
    output: bool = False,
    autocast: bool = False,
    gelu: bool = False,
    gelu_tanh: bool = False,
    device: torch.device | str | int | None = None,
    store: str | None = None,
) -> Kernel:
    """Return the best known kernel of ``op`` for these shapes on ``device``.

    The lookup takes an entry of the exact spec, else the config with the least expected loss of what entries around it
    and the package offer; ``explain()`` of the result says which, and what it may lose. Calls with equal arguments
    return the same object. On a CPU device the result is the eager fp32-accumulating reference, with ``provenance``
    "reference".

    Args:
        op: a name of :data:`~doratune.codegen.ops.OPS`: ``weight_norm``, ``lora_compose``, ``compose_backward``, …
        d_out, d_in, rank: sizes of W [d_out, d_in], A [rank, d_in], B [d_out, rank]. d_out_2, d_out_3: d_out of a
            group's other projections.
        tokens: the expected number of tokens; the kernel is correct for any number. layers: of a grouped operation, the
            expected number of layers, as with tokens.
        dtype: of W and of the activations, or the text of a weight format (``"nf4.nested"``) for the norms.
            adapter_dtype: of A and B; ``dtype`` when None, or that of the format's values.
        magnitude_dtype: the norms also take m of this dtype and return g; ``compose_backward_exact``,
            ``adapter_backward`` and the backward operations of groups and gated MLPs also take w and return the
            gradient of an m of this dtype instead of dg.
        bias: add a bias (in the backward pass: also return its gradient). delta: the delta form. save: also return nW
            or inner. output: ``compose_backward`` takes y instead of inner. autocast: round fp32 A and B to ``dtype``,
            as torch.autocast does, instead of keeping them exact. gelu, gelu_tanh: the activation of
            the operations of a gated MLP, which is SiLU without them.
        device: None means the current GPU, or the CPU if there is no GPU.
        store: path or URL of the store to search first, instead of those in ``DORATUNE_CACHE_PATH``.

    Raises:
        SpecError: an unknown operation, or a size or dtype that it does not support.
        DeviceError: an unknown device, or one that is not present.
        UnknownGpuError: the device's architecture is not supported.
        StoreError: a store cannot be read.
    """
    where = _settle(device)
    asked = (
        (op, d_out, d_out_2, d_out_3, d_in, rank, tokens, dtype, adapter_dtype, magnitude_dtype),
        (bias, delta, save, output, autocast, gelu, gelu_tanh, where, store, layers),
    )
    if type(d_out) is type(d_in) is type(rank) is type(tokens) is int:  # 8.0 == 8 would hit, but is refused below
        try:
            return _asked[asked]
        except (KeyError, TypeError):  # a first call, or an argument that cannot be hashed
            pass
    absent = where in ABSENT
    where = where if absent else find_device(where)
    weight = dtype if isinstance(dtype, str) and is_format(dtype) else _dtype_name("dtype", dtype)
    spec = KernelSpec.create(
        op,
        d_out=d_out,
        d_in=d_in,
        rank=rank,
        tokens=tokens,
        d_out_2=d_out_2,
        d_out_3=d_out_3,
        layers=layers,
        dtype=weight,
        adapter=_dtype_name("adapter_dtype", adapter_dtype) if adapter_dtype else wide_dtype(weight),
        magnitude=_dtype_name("magnitude_dtype", magnitude_dtype) if magnitude_dtype else None,
        bias=bias,
        delta=delta,
        save=save,
        output=output,
        autocast=autocast,
        gelu=gelu,
        gelu_tanh=gelu_tanh,
        gpu=ABSENT_GPU if absent else gpu_of(where).slug if where.type == "cuda" else CPU,
    )
    key = (spec, where, store)
    kernel = _loaded.get(key)
    if kernel is None:
        with _lock:
            kernel = _loaded.get(key) or _load(spec, where, store)
            _loaded[key] = kernel
    if len(_asked) >= _MOST_ASKED:
        _asked.clear()
    _asked[asked] = kernel
    return kernel


def _settle(device: torch.device | str | int | None) -> torch.device:
    """Resolve the device; fast path when it is explicit or the current GPU."""
    if device is None:
        return _cuda_device(current_device()) if torch.cuda.is_initialized() else find_device(None)
    if isinstance(device, torch.device) and device.index is not None:
        return device
    return find_device(device)


@functools.cache
def _cuda_device(index: int) -> torch.device:
    return torch.device("cuda", index)


def explain(spec: KernelSpec | str, store: str | None = None) -> str:
    """Say which config ``load_kernel`` would run for ``spec``, which lookup step found it, which entries were refused,
    which store has its binary, and what was upgraded since its entry was measured.

    Raises:
        SpecError: the text is not a spec.
    """
    from .present import upgrade_warning

    resolution, _, binaries = resolve_binaries(KernelSpec.parse(spec) if isinstance(spec, str) else spec, store)
    return resolution.explain(binaries.explain(), upgrade_warning(resolution))


def resolve(
    spec: KernelSpec, store: str | None = None, *, without: str | None = None, exact: bool = True
) -> tuple[Resolution, Source]:
    """Look ``spec`` up in the stores and render the config that was found, without compiling it.

    An entry that no longer renders to the text it was tuned with is refused. ``without`` is the location of a store
    that is read as if it had no entry of exactly ``spec``; without ``exact`` all stores are.
    """
    from ..codegen.render import render

    with _opened(store) as stack:
        opened = [each.without(spec) if each.location == without else each for each in stack]
        resolution = resolve_in(spec, opened, exact=exact)
        return resolution, render(spec, resolution.config)


def resolve_binaries(
    spec: KernelSpec, store: str | None = None, trusted: Sequence[str] = ()
) -> tuple[Resolution, Source, Binaries]:
    """As :func:`resolve`, and find the stored binaries of the rendered source.

    ``trusted`` are locations and keys whose binaries are used too, beside those of ``DORATUNE_TRUST``
    (:mod:`doratune.cache.trust`).

    Raises:
        TrustError, SigningError: an item of ``trusted`` or ``DORATUNE_TRUST`` cannot be used.
    """
    from ..cache.trust import trust
    from ..codegen.gpu import find_gpu
    from ..codegen.render import render
    from .binaries import find_binaries

    with _opened(store) as stack:
        resolution = resolve_in(spec, stack)
        source = render(spec, resolution.config)
        return resolution, source, find_binaries(source, stack, find_gpu(spec.gpu), trust(trusted))


class _Kept(threading.local):
    """The open stacks by the ``store`` argument, inside :func:`stores_open`; None outside."""

    stacks: dict[str | None, list[Store]] | None = None


_kept = _Kept()


@contextmanager
def stores_open() -> Iterator[None]:
    """Open the stores once for all lookups of this thread inside the block, which takes half of the time off each."""
    if _kept.stacks is not None:
        yield
        return
    _kept.stacks = {}
    try:
        yield
    finally:
        stacks, _kept.stacks = _kept.stacks, None
        for each in itertools.chain(*stacks.values()):
            each.close()


@contextmanager
def _opened(store: str | None) -> Iterator[list[Store]]:
    from ..cache.stack import open_stack

    if _kept.stacks is not None:
        if store not in _kept.stacks:
            _kept.stacks[store] = open_stack(store)
        yield _kept.stacks[store]
        return
    stack = open_stack(store)
    try:
        yield stack
    finally:
        for each in stack:
            each.close()


def resolve_in(spec: KernelSpec, stack: Sequence[Store], *, exact: bool = True, fit: Fit | None = None) -> Resolution:
    """Look ``spec`` up in these open stores; ``exact`` as in :func:`~doratune.cache.lookup.lookup`.

    ``fit`` replaces the performance model that comes with the package.
    """
    from ..cache.lookup import lookup
    from ..cache.weigh import Model
    from ..codegen.cost import estimate_us, floor_us
    from ..codegen.fit import fitted
    from ..codegen.gpu import UnknownGpuError, find_gpu
    from ..codegen.render import render, template_digest
    from ..codegen.variants import carried, check_config, default_configs, refuse_padding

    if spec.gpu == CPU:
        raise SpecError(f"{spec} has no kernel: CPU tensors run the eager reference; name a GPU after the @")
    gpu = find_gpu(spec.gpu)

    def installed_digest(op: str, variant: str) -> str | None:
        try:
            return template_digest(op, variant)
        except SpecError:
            return None

    def differs(entry: Entry) -> str | None:
        try:
            its_gpu = find_gpu(entry.spec.gpu)
            least = floor_us(entry.spec, its_gpu)
            if entry.evaluation.beats(least):
                return f"its time of {entry.evaluation.us:.3g} us is far below the floor of {least:.3g} us"
            unfit = check_config(entry.spec, entry.config, its_gpu)
            if unfit is not None:
                return f"its config does not suit the installed template: {unfit}"
            digest = render(entry.spec, entry.config).digest
        except (SpecError, UnknownGpuError) as error:
            return f"does not render here: {error}"
        if digest == entry.source_digest:
            return None
        return f"renders to {digest[:12]}, but was tuned as {entry.source_digest[:12]}"

    fit = fit or fitted()
    covered = fit.covers(spec, gpu)

    def relative_us(config: Config) -> float:
        return fit.relative_us(spec, config, gpu) if covered else estimate_us(spec, config, gpu)

    def carry(config: Config, source: KernelSpec) -> tuple[Config, ...]:
        try:
            return carried(config, source, spec, gpu)
        except SpecError:  # an entry whose config has other parameters than the installed template
            return ()

    return lookup(
        spec,
        stack,
        defaults=default_configs(spec, gpu),
        architecture=gpu.architecture,
        accepts=lambda wanted, config: check_config(wanted, config, gpu) or refuse_padding(wanted, config, gpu),
        template_digest=installed_digest,
        reproduces=differs,
        model=Model(relative_us, covered, fit.default_loss(spec) if covered else None),
        carry=carry,
        exact=exact,
    )


def emit(spec: KernelSpec | str, *, config: str | None = None, store: str | None = None) -> tuple[str, Source]:
    """Render the kernel of ``spec`` with ``config``; None means the config that ``load_kernel`` would run.

    Returns the provenance of the config and the source.

    Raises:
        SpecError: the spec or the config is malformed, or the config cannot serve the spec.
    """
    from ..codegen.gpu import find_gpu
    from ..codegen.render import render
    from ..codegen.variants import check_config

    wanted = KernelSpec.parse(spec) if isinstance(spec, str) else spec
    if config is None:
        resolution, source = resolve(wanted, store)
        return (resolution.entry.evaluation.provenance if resolution.entry else "default"), source
    given = Config.parse(config)
    reason = check_config(wanted, given, find_gpu(wanted.gpu))
    if reason is not None:
        raise SpecError(f"config {given} cannot serve {wanted}: {reason}")
    return "given", render(wanted, given)


def _load(spec: KernelSpec, device: torch.device, store: str | None) -> Kernel:
    if device.type != "cuda":
        return Kernel(spec, device)
    if device in ABSENT:
        return AbsentKernel(spec, device)
    resolution, source, binaries = resolve_binaries(spec, store)
    for problem in resolution.damaged:
        warnings.warn(f"doratune passes over a damaged row of a store: {problem}", RuntimeWarning, stacklevel=3)
    binaries.warn()
    return Kernel(spec, device, resolution, source, binaries)


def _dtype_name(argument: str, dtype: torch.dtype | str) -> str:
    if not isinstance(dtype, torch.dtype) or dtype not in _DTYPE_NAMES:
        names = ", ".join(map(str, _DTYPE_NAMES))
        raise SpecError(f"{argument} must be one of {names}, got {dtype!r}")
    return _DTYPE_NAMES[dtype]
