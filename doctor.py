"""Examine this machine for doratune: versions and whether they are tested, GPUs, the C compiler, stores; and a model,
an adapter or a checkpoint."""

from __future__ import annotations

import importlib
import itertools
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DoratuneError
from .internals.versions import STORAGE, TESTED, TESTED_BESIDE, TESTED_PAIRS, installed, is_tested, minor, tested_range

if TYPE_CHECKING:
    from .adapters.fault import Fault
    from .cache.store import Store
    from .terminal.tables import Table
    from .tuner.examine_model import ModelReport

OK, UNTESTED, MISSING, BROKEN = "ok", "untested", "missing", "broken"
"""Verdicts. doratune works here unless a finding is ``broken``."""

_NEEDED = ("torch", "jinja2", "optuna", "sqlalchemy", "alembic", "click", "rich", "platformdirs")
_OPTIONAL = ("safetensors", "accelerate", "plotly", "psycopg")


@dataclass(frozen=True)
class Finding:
    """One finding: what was examined, what was found, the verdict, and a remark or remedy."""

    what: str
    found: str
    verdict: str
    remark: str = ""


def examine(store: str | None = None) -> list[Finding]:
    """Examine everything without changing anything; ``store`` is the first store, as for ``load_kernel``."""
    parts: dict[str, Callable[[], Iterable[Finding]]] = {
        "versions": _versions,
        "packages": _packages,
        "internals": _private_names,
        "GPUs": _gpus,
        "C compiler": _c_compiler,
        "stores": lambda: _stores(store),
    }
    return [finding for what, part in parts.items() for finding in _examined(what, part)]


def _examined(what: str, part: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of a part; one broken finding if it fails, as where a package does not import."""
    try:
        return [*part()]
    except Exception as error:
        return [Finding(what, "not examined", BROKEN, _reason(error))]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def examine_files(adapter: Path | None, checkpoint: Path | None) -> tuple[list[Finding], list[Fault]]:
    """Examine an adapter, a checkpoint, or both, without loading a model: what they are, and the faults.

    Raises:
        AdapterError: one cannot be read.
    """
    from .adapters.adapter import Adapter
    from .adapters.checkpoint import Checkpoint
    from .adapters.examine_adapter import examine_adapter
    from .adapters.examine_checkpoint import examine_checkpoint
    from .adapters.fault import goes_wrong

    found: list[Finding] = []
    faults: list[Fault] = []
    with ExitStack() as stack:
        weights = None if checkpoint is None else stack.enter_context(Checkpoint(checkpoint))
        if adapter is not None:
            opened = stack.enter_context(Adapter(adapter))
            faults += examine_adapter(opened, weights)
            verdict = BROKEN if goes_wrong(faults) else OK
            remark = _faulty(faults) or (
                "" if weights is not None else "m is compared with W where --checkpoint names it"
            )
            found.append(Finding("adapter", f"{adapter}: {opened.describe()}", verdict, remark))
        if weights is not None:
            own = examine_checkpoint(weights)
            found.append(
                Finding(
                    "checkpoint",
                    f"{weights.path}: {weights.describe()}",
                    BROKEN if goes_wrong(own) else OK,
                    _faulty(own),
                )
            )
            faults += own
    return found, faults


def _faulty(faults: Sequence[Fault]) -> str:
    return f"{len(faults)} kind{'' if len(faults) == 1 else 's'} of faults, see below" if faults else ""


def model_tables(report: ModelReport) -> list[Table]:
    """A model's kernels by operation, and what would run its layers, as tables for the terminal."""
    from .terminal.tables import Table

    tables = []
    if report.kernels:
        kernels = Table(
            f"kernels on {report.gpu}", "number", "measured", "predicted", "near", "default", "binaries", "loss"
        )
        for one in report.operations():
            counts = (one.kernels, *one.by_status.values(), one.binaries)
            kernels.add_row(one.op, *(str(count or "") for count in counts), one.loss())
        tables.append(kernels)
    if report.layers:
        layers = Table("layers", "number", "base", "runs", "remark")
        runs = {"kernels": "doratune's kernels", "peft": "PEFT's code", "none": "no DoRA"}
        for kind in report.layers:
            layers.add_row(kind.name, kind.count, kind.base, runs[kind.runs], kind.why)
        tables.append(layers)
    return tables


def faults_table(faults: Iterable[Fault]) -> Table:
    """The faults of adapters and checkpoints as a table for the terminal."""
    from .terminal.tables import Table

    table = Table("", "what", "where", "why, and the remedy")
    for fault in faults:
        columns = (
            [fault.kind.verdict],
            [fault.kind.what],
            fault.lines(),
            [fault.kind.why, f"Remedy: {fault.kind.remedy}"],
        )
        for row in itertools.zip_longest(*columns, fillvalue=""):
            table.add_row(*row)
        table.add_section()
    return table


def findings_table(findings: Iterable[Finding]) -> Table:
    """The findings as a table for the terminal."""
    from .terminal.tables import Table

    table = Table("", "found", "verdict", "remark")
    for finding in findings:
        table.add_row(finding.what, finding.found, finding.verdict, finding.remark)
    return table


def _versions() -> list[Finding]:
    found = [Finding("Python", platform.python_version(), OK)]
    for package in TESTED:
        version, tested = installed(package), f"tested with {tested_range(package)}"
        if version is None:
            needed = package == "torch" or (package == "triton" and _sees_gpu())
            found.append(Finding(package, "not installed", BROKEN if needed else MISSING, tested))
        else:
            found.append(Finding(package, version, OK if is_tested(package, version) else UNTESTED, tested))
    for package in (*TESTED_BESIDE, *STORAGE):
        version = installed(package)
        if version is not None:
            used = "kernels read its weights" if package in STORAGE else "tested"
            verdict = OK if is_tested(package, version) else UNTESTED
            found.append(Finding(package, version, verdict, f"optional; {used} with {tested_range(package)}"))
    for package in _OPTIONAL:
        version = installed(package)
        if version is not None:
            found.append(Finding(package, version, OK, "optional"))
    return found + _together()


def _together() -> list[Finding]:
    """Whether this PyTorch is tested with this Triton: each may be tested, and their pair not."""
    versions = [installed(package) for package in ("torch", "triton")]
    pair = tuple(None if version is None else minor(version) for version in versions)
    if None in pair:
        return []
    pairs = "; ".join(f"{a}.{b} with {c}.{d}" for (a, b), (c, d) in TESTED_PAIRS)
    verdict = OK if pair in TESTED_PAIRS else UNTESTED
    return [Finding("torch with triton", " with ".join(map(str, versions)), verdict, f"tested: {pairs}")]


def _packages() -> list[Finding]:
    """The packages that doratune needs beside those above, where one is missing or does not import."""
    found = []
    for package in _NEEDED:
        try:
            importlib.import_module(package)
        except Exception as error:
            found.append(Finding(package, installed(package) or "not installed", BROKEN, _reason(error)))
    return found


def _private_names() -> list[Finding]:
    """The private names that PyTorch and Triton lack; slower public APIs replace them."""
    found = []
    for package in ("torch", "triton"):
        if installed(package) is None:
            continue
        if package == "torch":
            from .internals.torch import missing
        else:
            from .internals.triton import missing
        names = missing()
        remark = "slower public APIs replace: " + ", ".join(names) if names else ""
        found.append(Finding(f"{package} internals", f"{len(names)} missing", UNTESTED if names else OK, remark))
    return found


def _sees_gpu() -> bool:
    try:
        import torch

        return torch.cuda.is_available()
    except Exception:  # reported by _packages
        return False


def _gpus() -> list[Finding]:
    if installed("torch") is None:
        return []
    import torch

    from .runtime.device import gpu_of

    if not torch.cuda.is_available():
        return [Finding("GPU", "PyTorch sees none", MISSING, "CPU tensors run the eager reference")]
    found = []
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        try:
            gpu = gpu_of(torch.device("cuda", index))
        except DoratuneError as error:
            found.append(Finding(f"GPU {index}", name, BROKEN, str(error)))
        else:
            found.append(Finding(f"GPU {index}", name, OK, f"{gpu.slug}, {gpu.architecture}"))
    return found


def _is_amds() -> bool:
    import torch

    return torch.version.hip is not None


def _c_compiler() -> list[Finding]:
    named = os.environ.get("CC", "")
    for compiler in (named,) if named else ("gcc", "clang", "cc"):
        path = shutil.which(compiler)
        if path is not None:
            return [Finding("C compiler", path, OK)]
    remark = "Triton builds its driver with one, as torch.compile needs it; doratune's kernels start without; set CC"
    verdict = UNTESTED if _sees_gpu() else MISSING
    if _is_amds():
        remark, verdict = "Triton needs one for a kernel's first start on AMD's GPUs; set CC", BROKEN
    return [Finding("C compiler", named or "none", verdict, remark)]


def _stores(store: str | None) -> list[Finding]:
    from .cache.stack import USER, open_place, stack_places
    from .cache.trust import trust

    found = []
    try:
        places, trusted = stack_places(store), trust()
    except DoratuneError as error:
        return [Finding("stores", "cannot be located", BROKEN, str(error))]
    for place in places:
        try:
            opened = open_place(place)
        except DoratuneError as error:
            found.append(Finding("store", str(place), BROKEN, str(error)))
            continue
        drifted: list[Finding] = []
        try:
            problems = opened.verify()
            count = len(opened.readable_entries()[0])
            remark = f"{count} entr{'y' if count == 1 else 'ies'}"
            refusal = trusted.refusal(opened) if opened.binary_keys() else None
            if refusal is not None:
                remark += f"; its binaries are not used unless they are signed: {refusal}"
            if place.origin == USER:
                drifted = _drifted(opened)
        except DoratuneError as error:
            problems, remark = [str(error)], ""
        finally:
            opened.close()
        found.append(Finding("store", str(place), BROKEN if problems else OK, "; ".join(problems[:3]) or remark))
        found += drifted
    return found


def _drifted(store: Store) -> list[Finding]:
    """How many of the user's entries for the GPUs here were measured under other versions, if there are any."""
    from .runtime.present import changes_since, gpus_here

    here = [entry for gpu in gpus_here() for entry in store.readable_entries(gpu=gpu)[0]]
    count = sum(bool(changes_since(entry)) for entry in here)
    if not count:
        return []
    remark = "were measured under other versions: `doratune cache drift` measures them again"
    return [Finding("winners", f"{count} of {len(here)}", UNTESTED, remark)]
