"""One run of ``doratune cache drift``: open the store, choose the evaluator, measure."""

from __future__ import annotations

from dataclasses import dataclass

from ..cache.stack import USER, Place, open_place, user_store_path
from ..cache.store import Store
from ..codegen.ops import OPS
from ..codegen.spec import Config, KernelSpec
from ..errors import UsageError, near_names
from ..runtime.loader import resolve
from .drift import drift
from .drift_report import DriftResult
from .measure import NoGpuError
from .progress import SilentProgress
from .tune_model import Request, choose_evaluators


@dataclass(frozen=True)
class DriftRequest:
    """The options of ``doratune cache drift``.

    ``store`` None means the user's own. ``op`` None means every operation. ``gpu`` and ``device`` are those of
    :class:`~.tune_model.Request`. ``everything`` also measures what was measured under the present versions;
    ``lookups`` likewise, but only against what lookups without any entry of the spec give.
    """

    store: str | None = None
    op: str | None = None
    gpu: str = "auto"
    device: str | None = None
    jobs: int | None = None
    everything: bool = False
    lookups: bool = False
    apply: bool = False


def drift_store(request: DriftRequest, progress: SilentProgress | None = None) -> DriftResult:
    """Measure the winners of a store again that are for the GPU here.

    Raises:
        UsageError: an unknown operation or GPU, no GPU here, or another one than ``request.gpu``.
        NoHomeError: no store is named, and this user has no folder for one.
        StoreError: the store cannot be opened, or cannot be written with ``apply``.
    """
    if request.op is not None and request.op not in OPS:
        raise UsageError(f"unknown operation {request.op!r}{near_names(request.op, OPS)} (known: {', '.join(OPS)})")
    if request.device is not None and (request.device == "all" or "," in request.device):
        raise UsageError(f"--device {request.device}: cache drift measures on one GPU; name one, such as cuda:0")
    with _opened(request) as store:
        location = store.location

        def without(spec: KernelSpec) -> tuple[Config, str]:
            resolution, _ = resolve(spec, request.store, without=location, exact=not request.lookups)
            return resolution.config, resolution.step

        try:
            _, (evaluator,) = choose_evaluators(Request(gpu=request.gpu, device=request.device, evaluator="measure"))
        except NoGpuError:
            raise UsageError(
                "cache drift measures kernels, and PyTorch sees no GPU; run it on the machine whose store this is"
            ) from None
        return drift(
            store,
            evaluator,
            without=without,
            op=request.op,
            everything=request.everything,
            lookups=request.lookups,
            apply=request.apply,
            jobs=request.jobs,
            progress=progress,
        )


def _opened(request: DriftRequest) -> Store:
    if request.apply:
        return Store.open(user_store_path() if request.store is None else request.store)
    if request.store is not None:
        return Store.open(request.store, readonly=True)
    return open_place(Place(str(user_store_path()), USER))
