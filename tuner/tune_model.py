"""One tuning run for a model: plan, choose the evaluator, search, store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..cache.entry import MEASURED
from ..cache.stack import user_store_path
from ..cache.store import Store
from ..codegen.gpu import Gpu, find_gpu
from ..codegen.spec import Config, KernelSpec
from ..errors import UsageError
from ..runtime.device import find_device, gpu_of
from ..runtime.loader import resolve
from .effort import find_effort
from .evaluation import Evaluator, GpuLostError
from .jobs import plan_jobs
from .models import Model, requested_model
from .outcome import FAILED, KEPT, PARTIAL, TUNED, UNFINISHED, TuneResult
from .predict import PredictEvaluator
from .progress import SilentProgress
from .report import layer_lines
from .search import tune
from .study_storage import default_study_storage

EVALUATORS = ("auto", "measure", "predict")


@dataclass(frozen=True)
class Request:
    """The options of ``doratune tune``.

    Exactly one of ``model`` and ``config`` is given; no ``ops`` or ``tokens`` means all. ``gpu`` is ``auto`` or a name
    for :func:`~doratune.codegen.gpu.find_gpu`; ``adapter_dtype`` None means ``dtype``; ``timeout`` is in seconds.
    """

    model: str | None = None
    config: Path | None = None
    ranks: tuple[int, ...] = (384,)
    dtype: str = "bf16"
    adapter_dtype: str | None = None
    autocast: bool = False
    ops: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    gpu: str = "auto"
    evaluator: str = "auto"
    effort: str = "standard"
    trials: int | None = None
    timeout: float | None = None
    jobs: int | None = None
    device: str | None = None
    store: str | None = None
    study_storage: str | None = None
    binaries: bool = True


@dataclass(frozen=True)
class ModelRun:
    """A finished run. ``store`` is the store's location."""

    model: Model
    gpu: Gpu
    provenance: str
    store: str
    result: TuneResult

    def summary(self) -> str:
        """The kernels by outcome and the store, in a sentence."""
        counts = ((self.result.count(outcome), outcome) for outcome in (TUNED, KEPT, PARTIAL, UNFINISHED, FAILED))
        stopped = {
            "": "",
            "timeout": "; the time limit ended the run",
            "interrupt": "; interrupted",
            "fault": "; the run broke off",
        }[self.result.stopped]
        again = ": the same command continues from here" if self.result.stopped in ("timeout", "interrupt") else ""
        return (
            f"{', '.join(f'{count} {outcome}' for count, outcome in counts if count)} in {self.store}{stopped}{again}"
        )


def tune_model(
    request: Request, progress: SilentProgress | None = None, model: Callable[[], Model] | None = None
) -> ModelRun:
    """Tune every kernel that DoRA on a model's linear projections needs.

    ``model`` is what :func:`~.models.requested_model` returned for the request, if the caller has called it already;
    ``progress`` lists the model's layers before the search.

    Raises:
        UsageError: an unknown model or GPU, a malformed config, an invalid option.
        NoHomeError: a store or study storage is not named, and this user has no folder for it.
        StoreError, StudyStorageError: a database failed.
    """
    found = (model or requested_model(request.model, request.config))()
    gpu, evaluator = choose_evaluator(request)
    specs = plan_jobs(
        found,
        ranks=request.ranks,
        dtype=request.dtype,
        adapter_dtype=request.adapter_dtype,
        autocast=request.autocast,
        gpu=gpu.slug,
        ops=request.ops or None,
        tokens=request.tokens or None,
    )
    effort = find_effort(request.effort)
    if request.trials is not None:
        effort.budget(evaluator.provenance).with_trials(request.trials)  # raises before a store is made
    study_storage = request.study_storage or default_study_storage()  # likewise
    said = progress or SilentProgress()
    with Store.open(request.store or user_store_path(), create=True) as store:
        for line in layer_lines(found):
            said.note(line)
        result = tune(
            specs,
            evaluator=evaluator,
            store=store,
            gpu=gpu,
            effort=effort,
            trials=request.trials,
            timeout=request.timeout,
            jobs=request.jobs,
            study_storage=study_storage,
            known=measured_elsewhere if evaluator.provenance == MEASURED else None,
            binaries=request.binaries,
            progress=said,
        )
        return ModelRun(found, gpu, evaluator.provenance, store.location, result)


def measured_elsewhere(spec: KernelSpec) -> Config | None:
    """The measured config that a lookup in the user's stores would give for ``spec``, or None.

    For a new rank, model or GPU of the same architecture it is a better start than a built-in seed.
    """
    resolution, _ = resolve(spec)
    entry = resolution.entry
    return entry.config if entry is not None and entry.evaluation.provenance == MEASURED else None


def choose_evaluator(request: Request) -> tuple[Gpu, Evaluator]:
    """The target GPU and its evaluator: candidates are measured if the target is the GPU here, else predicted.

    Raises:
        UsageError: measuring was requested for a GPU that is not here, or there is neither a GPU nor a named target.
        GpuLostError: PyTorch sees a GPU that does not answer.
    """
    from .measure import MeasureEvaluator, NoGpuError

    if request.evaluator not in EVALUATORS:
        raise UsageError(f"unknown evaluator {request.evaluator!r} (known: {', '.join(EVALUATORS)})")
    named = find_device(request.device) if request.device is not None else None
    if named is not None and named.type != "cuda":
        raise UsageError(f"--device {request.device}: kernels are measured on a GPU; leave --device out to predict")
    predicting = request.evaluator == "predict" and request.gpu != "auto"
    here = None if predicting else _gpu_here(named)
    if request.gpu == "auto":
        if here is None and request.evaluator == "measure":
            raise NoGpuError()
        if here is None:
            raise UsageError("no GPU is visible to PyTorch; name the one to tune for, such as --gpu h200")
        target = here
    else:
        target = find_gpu(request.gpu)
    if request.evaluator == "measure" or (request.evaluator == "auto" and here == target):
        if here is None:
            raise NoGpuError()
        if here != target:
            raise UsageError(
                f"cannot measure for {target.slug}: the GPU here is {here.slug}; "
                "leave --gpu out, or use --evaluator predict"
            )
        return target, MeasureEvaluator(target, named or find_device("cuda"))
    return target, PredictEvaluator(target)


def _gpu_here(device: torch.device | None) -> Gpu | None:
    """The GPU that PyTorch would measure on, None where it sees none."""
    try:
        return gpu_of(device or find_device("cuda")) if torch.cuda.is_available() else None
    except RuntimeError as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise GpuLostError(
            f"the GPU does not answer PyTorch: {reason}. Check it with nvidia-smi and the system's log (dmesg)"
        ) from error
