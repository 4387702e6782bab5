"""What doratune finds on this machine, and whether it is tested: versions, GPUs, the C compiler, stores."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import DoratuneError
from .internals.versions import TESTED, installed, is_tested, tested_range

if TYPE_CHECKING:
    from rich.table import Table

OK, UNTESTED, MISSING, BROKEN = "ok", "untested", "missing", "broken"
"""Verdicts. Only ``broken`` stops doratune from working here."""

_OPTIONAL = ("transformers", "bitsandbytes", "torchao", "hqq")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what it is, what was found, the verdict, and what to do or know."""

    what: str
    found: str
    verdict: str
    remark: str = ""


def examine(store: str | None = None) -> list[Finding]:
    """Look at everything; ``store`` is searched first, as by ``load_kernel``. Nothing is changed."""
    return [*_versions(), *_private_names(), *_gpus(), _c_compiler(), *_stores(store)]


def findings_table(findings: Iterable[Finding]) -> Table:
    """The findings for people."""
    from rich.table import Table
    from rich.text import Text

    table = Table("", "found", "verdict", "remark")
    for finding in findings:
        table.add_row(*map(Text, (finding.what, finding.found, finding.verdict, finding.remark)))
    return table


def _versions() -> list[Finding]:
    found = [Finding("Python", platform.python_version(), OK)]
    for library in TESTED:
        version, tested = installed(library), f"tested with {tested_range(library)}"
        if version is None:
            needed = library == "torch"
            found.append(Finding(library, "not installed", BROKEN if needed else MISSING, tested))
        else:
            found.append(Finding(library, version, OK if is_tested(library, version) else UNTESTED, tested))
    for library in _OPTIONAL:
        version = installed(library)
        if version is not None:
            found.append(Finding(library, version, OK, "optional"))
    return found


def _private_names() -> list[Finding]:
    """The private names of PyTorch and Triton that are gone: there a slower public way runs."""
    found = []
    for library in ("torch", "triton"):
        if installed(library) is None:
            continue
        if library == "torch":
            from .internals.torch import missing
        else:
            from .internals.triton import missing
        names = missing()
        remark = "a slower public way is taken for: " + ", ".join(names) if names else ""
        found.append(Finding(f"{library} internals", f"{len(names)} missing", UNTESTED if names else OK, remark))
    return found


def _gpus() -> list[Finding]:
    if installed("torch") is None:
        return []
    import torch

    from .runtime.device import gpu_of

    if not torch.cuda.is_available():
        return [Finding("GPU", "none that PyTorch sees", MISSING, "CPU tensors run the eager reference")]
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


def _c_compiler() -> Finding:
    named = os.environ.get("CC", "")
    for compiler in (named,) if named else ("gcc", "clang", "cc"):
        path = shutil.which(compiler)
        if path is not None:
            return Finding("C compiler", path, OK)
    return Finding("C compiler", named or "none", MISSING, "Triton needs one for a kernel's first start; set CC")


def _stores(store: str | None) -> list[Finding]:
    from .cache.stack import open_place, stack_places

    found = []
    try:
        places = stack_places(store)
    except DoratuneError as error:
        return [Finding("stores", "none can be named", BROKEN, str(error))]
    for place in places:
        try:
            opened = open_place(place)
        except DoratuneError as error:
            found.append(Finding("store", str(place), BROKEN, str(error)))
            continue
        try:
            problems = opened.verify()
            count = len(opened.entries())
            remark = f"{count} entr{'y' if count == 1 else 'ies'}"
        except DoratuneError as error:
            problems, remark = [str(error)], ""
        finally:
            opened.close()
        found.append(Finding("store", str(place), BROKEN if problems else OK, "; ".join(problems[:3]) or remark))
    return found
