"""One tuning run for a model or for listed specs: plan, choose the evaluator, search, store."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..cache.entry import MEASURED
from ..cache.stack import user_store_path
from ..cache.store import Store
from ..codegen.compile_process import usable_cores
from ..codegen.gpu import Gpu, find_gpu
from ..codegen.spec import KernelSpec
from ..errors import UsageError
from ..runtime.device import find_device, gpu_of
from ..runtime.local_ranks import share_of_cores
from ..terminal.deadline import TimeUpError, time_limit
from .effort import find_effort
from .evaluation import Evaluator, GpuLostError
from .incumbents import Incumbents, incumbents_of
from .jobs import plan_jobs
from .launcher import check_hosts, launcher_device
from .models import Model, requested_model
from .outcome import FAILED, KEPT, PARTIAL, TUNED, UNFINISHED, TuneResult
from .predict import PredictEvaluator
from .progress import SilentProgress
from .report import layer_lines
from .search import PREPARE_SECONDS, tune
from .spec_list import SpecList, read_spec_list
from .study_storage import check_study_storage, default_study_storage

EVALUATORS = ("auto", "measure", "predict")


@dataclass(frozen=True)
class Request:
    """The options of ``doratune tune``.

    Given are exactly one of ``model`` and ``config``, or else ``specs``, ``spec_file`` or both: then exactly these
    kernels are tuned, and ``ranks`` to ``tokens`` mean nothing. No ``ops`` or ``tokens`` means all. ``gpu`` is ``auto``
    or a name for :func:`~doratune.codegen.gpu.find_gpu`; ``weight`` is a weight format or None;
    ``adapter_dtype`` None means ``dtype``; ``timeout`` is in seconds;
    ``device`` is a device, several with commas in between, or ``all``.
    """

    model: str | None = None
    config: Path | None = None
    specs: tuple[str, ...] = ()
    spec_file: Path | None = None
    ranks: tuple[int, ...] = (384,)
    dtype: str = "bf16"
    weight: str | None = None
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

    @property
    def listed(self) -> bool:
        """Whether specs are tuned that the user lists, and no model's."""
        return bool(self.specs) or self.spec_file is not None


@dataclass(frozen=True)
class ModelRun:
    """A finished run of a model, or of listed specs: then ``model`` is None.

    ``name`` says what was tuned; ``store`` is the store's location.
    """

    name: str
    model: Model | None
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
    request: Request,
    progress: SilentProgress | None = None,
    model: Callable[[], Model] | None = None,
    began: float | None = None,
) -> ModelRun:
    """Tune every kernel that DoRA on a model's linear projections needs, or those that the request lists.

    ``model`` is what :func:`~.models.requested_model` returned for the request, if the caller has called it already;
    ``progress`` lists the model's layers before the search. The request's timeout counts from the second ``began`` of
    the monotonic clock, by default from now.

    Raises:
        TimeUpError: in the main thread, the time was up before the kernels were known; nothing was tuned.
        UsageError: an unknown model or GPU, a malformed config or list of specs, an invalid option.
        NoHomeError: a store or study storage is not named, and this user has no folder for it.
        StoreError, StudyStorageError: a database failed.
    """
    began = time.monotonic() if began is None else began
    until = None if request.timeout is None else began + request.timeout
    with _in_time(request, until):
        found = _kernels_of(request, model)
    if isinstance(found, SpecList):
        request = replace(request, gpu=found.gpu)
    gpu, evaluators = choose_evaluators(request)
    provenance = evaluators[0].provenance
    with _in_time(request, until):
        specs = found.specs if isinstance(found, SpecList) else _plan(found, request, gpu)
    effort = find_effort(request.effort)
    if request.trials is not None:
        effort.budget(provenance).with_trials(request.trials)  # raises before a store is made
    study_storage = default_study_storage() if request.study_storage is None else request.study_storage  # likewise
    check_study_storage(study_storage)
    check_hosts(os.environ, study_storage)
    said = progress or SilentProgress()
    if isinstance(found, SpecList) and request.evaluator == "auto" and provenance != MEASURED:
        said.note(f"the GPU of these specs, {gpu.slug}, is not here: their times are predicted, not measured")
    location = user_store_path() if request.store is None else request.store

    def incumbents(spec: KernelSpec) -> Incumbents:
        return incumbents_of(spec, gpu, None if request.store is None else str(request.store))

    with Store.open(location, create=True) as store:
        for line in layer_lines(found) if isinstance(found, Model) else [found.name]:
            said.note(line)
        result = tune(
            specs,
            evaluators=evaluators,
            store=store,
            gpu=gpu,
            effort=effort,
            trials=request.trials,
            timeout=None if until is None else max(0.0, until - time.monotonic()),
            jobs=request.jobs or share_of_cores(os.environ, usable_cores(), os.cpu_count() or 1),
            study_storage=study_storage,
            incumbents=incumbents,
            binaries=request.binaries,
            progress=said,
        )
        model_tuned = found if isinstance(found, Model) else None
        return ModelRun(found.name, model_tuned, gpu, provenance, store.location, result)


def _kernels_of(request: Request, model: Callable[[], Model] | None) -> Model | SpecList:
    """The model, or the listed specs, whose kernels are to be tuned."""
    if not request.listed:
        return (model or requested_model(request.model, request.config))()
    if request.model is not None or request.config is not None:
        raise UsageError("--spec and --specs tune the kernels that they list; leave --model and --config out")
    return read_spec_list(request.specs, request.spec_file, gpu=request.gpu)


@contextmanager
def _in_time(request: Request, until: float | None) -> Iterator[None]:
    """End the block, in which nothing is written yet, at the time limit; see :data:`PREPARE_SECONDS`."""
    try:
        with time_limit(None if until is None else max(until, time.monotonic() + PREPARE_SECONDS)):
            yield
    except TimeUpError as error:
        raise TimeUpError(
            f"the time limit, --timeout {request.timeout:g}, was up before it was known which kernels to tune: none "
            "was; give more time or name fewer kernels"
        ) from error


def _plan(model: Model, request: Request, gpu: Gpu) -> Sequence[KernelSpec]:
    return plan_jobs(
        model,
        ranks=request.ranks,
        dtype=request.dtype,
        weight=request.weight,
        adapter_dtype=request.adapter_dtype,
        autocast=request.autocast,
        gpu=gpu.slug,
        ops=request.ops or None,
        tokens=request.tokens or None,
    )


def choose_evaluators(request: Request) -> tuple[Gpu, list[Evaluator]]:
    """The target GPU and an evaluator for each device: candidates are measured if the target is here, else predicted.

    Without a device named, a process that a launcher started takes the GPU of its number.

    Raises:
        UsageError: measuring was requested for a GPU that is not here, the devices are of different models, or there
            is neither a GPU nor a named target.
        GpuLostError: PyTorch sees a GPU that does not answer.
    """
    from .isolation import IsolatedEvaluator
    from .measure import MeasureEvaluator, NoGpuError

    if request.evaluator not in EVALUATORS:
        raise UsageError(f"unknown evaluator {request.evaluator!r} (known: {', '.join(EVALUATORS)})")
    predicting = request.evaluator == "predict" and request.gpu != "auto"
    named = _devices(request.device)
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
                f"{'list specs for it' if request.listed else 'leave --gpu out'}, or use --evaluator predict"
            )
        isolated = [
            IsolatedEvaluator(functools.partial(MeasureEvaluator, target, str(device)), target)
            for device in named or [find_device("cuda")]
        ]
        for evaluator in isolated:
            evaluator.start()
        return target, [*isolated]
    return target, [PredictEvaluator(target)]


def _devices(named: str | None) -> list[torch.device]:
    """The devices of ``--device``; empty if it names none and no launcher started this process."""
    if named is None:
        visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
        named = launcher_device(os.environ, visible)
        if named is None:
            return []
    if named == "all":
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    devices = [find_device(name.strip()) for name in named.split(",")]
    for name, device in zip(named.split(","), devices, strict=True):
        if device.type != "cuda":
            raise UsageError(f"--device {name}: kernels are measured on a GPU; leave --device out to predict")
        if devices.count(device) > 1:
            raise UsageError(f"--device {named}: {device} is named twice; name each GPU once")
    return devices


def _gpu_here(devices: Sequence[torch.device]) -> Gpu | None:
    """The GPU that PyTorch would measure on, None where it sees none.

    Raises:
        UsageError: the devices are of different models, whose times do not compare.
        GpuLostError: one of them does not answer.
    """
    try:
        if not torch.cuda.is_available():
            return None
        found = devices or [find_device("cuda")]
        names = {torch.cuda.get_device_name(device) for device in found}
        if len(names) > 1:
            raise UsageError(
                f"--device {','.join(map(str, found))}: these are different GPUs ({', '.join(sorted(names))}), whose "
                "times do not compare; tune each model in a run of its own"
            )
        return gpu_of(found[0])
    except RuntimeError as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise GpuLostError(
            f"the GPU does not answer PyTorch: {reason}. Check it with nvidia-smi and the system's log (dmesg)"
        ) from error
