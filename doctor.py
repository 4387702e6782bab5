"""Examine this machine for doratune: versions and whether they are tested, GPUs, the C compiler, stores."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import DoratuneError
from .internals.versions import TESTED, installed, is_tested, tested_range

if TYPE_CHECKING:
    from rich.table import Table

    from .cache.store import Store

OK, UNTESTED, MISSING, BROKEN = "ok", "untested", "missing", "broken"
"""Verdicts. doratune works here unless a finding is ``broken``."""

_NEEDED = ("torch", "jinja2", "optuna", "sqlalchemy", "alembic", "click", "rich", "platformdirs")
_OPTIONAL = ("transformers", "bitsandbytes", "torchao", "hqq")


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


def findings_table(findings: Iterable[Finding]) -> Table:
    """The findings as a table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table("", "found", "verdict", "remark")
    for finding in findings:
        table.add_row(*map(Text, (finding.what, finding.found, finding.verdict, finding.remark)))
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
    for package in _OPTIONAL:
        version = installed(package)
        if version is not None:
            found.append(Finding(package, version, OK, "optional"))
    return found


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


def _c_compiler() -> list[Finding]:
    named = os.environ.get("CC", "")
    for compiler in (named,) if named else ("gcc", "clang", "cc"):
        path = shutil.which(compiler)
        if path is not None:
            return [Finding("C compiler", path, OK)]
    verdict = BROKEN if _sees_gpu() else MISSING
    return [Finding("C compiler", named or "none", verdict, "Triton needs one for a kernel's first start; set CC")]


def _stores(store: str | None) -> list[Finding]:
    from .cache.stack import USER, open_place, stack_places

    found = []
    try:
        places = stack_places(store)
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
            count = len(opened.entries())
            remark = f"{count} entr{'y' if count == 1 else 'ies'}"
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

    here = [entry for gpu in gpus_here() for entry in store.entries(gpu=gpu)]
    count = sum(bool(changes_since(entry)) for entry in here)
    if not count:
        return []
    remark = "were measured under other versions: `doratune cache drift` measures them again"
    return [Finding("winners", f"{count} of {len(here)}", UNTESTED, remark)]
