"""The versions that are here, to compare with those that an entry was measured under. For ``explain`` and ``doctor``
only: no kernel waits for it.

The driver is asked through nvidia-smi and not through PyTorch, because ``explain`` must not initialise CUDA: a process
that did cannot use it in its forks.
"""

from __future__ import annotations

import functools
import shlex
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from ..cache.entry import Entry, Environment
    from ..cache.lookup import Resolution
    from ..cache.upgrade import Change

_QUERY = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
_SECONDS = 10


class _Board(NamedTuple):
    slug: str
    name: str
    driver: str


def present_environment(gpu: str) -> Environment:
    """The versions of Triton and PyTorch here, and of the driver if a GPU of the slug ``gpu`` is here.

    What is not here, or cannot be found, is an empty text.
    """
    from ..cache.entry import Environment

    boards = [board for board in _boards() if board.slug == gpu]
    name, driver = (boards[0].name, boards[0].driver) if boards else ("", "")
    return Environment(
        gpu=gpu, architecture="", triton=_triton(), torch=torch.__version__, driver=driver, gpu_name=name
    )


def gpus_here() -> frozenset[str]:
    """The slugs of the GPUs that nvidia-smi lists."""
    return frozenset(board.slug for board in _boards())


def changes_since(entry: Entry) -> tuple[Change, ...]:
    """What has changed here since ``entry`` was measured; nothing for an entry that never was."""
    from ..cache.entry import MEASURED
    from ..cache.upgrade import changes

    if entry.evaluation.provenance != MEASURED:
        return ()
    return changes(entry.environment, _present_for(entry))


def upgrade_warning(resolution: Resolution) -> str | None:
    """Say under which other versions the chosen entry was measured, what that may cost, and which command measures it
    again; None if nothing differs."""
    from ..cache.upgrade import warning

    entry = resolution.entry
    if entry is None:
        return None
    risk = warning(entry, _present_for(entry))
    return None if risk is None else f"{risk}; {_remedy(entry, resolution.store or '')}"


def _remedy(entry: Entry, store: str) -> str:
    """How to measure an entry of this store again. Prebuilt stores come with the package: nothing is written there."""
    from ..cache.location import Location
    from ..cache.stack import prebuilt_paths

    if store in {str(Location.parse(path)) for path in prebuilt_paths()}:
        return "`doratune tune` measures it here"
    named = "" if _is_own(store) else f" --store {shlex.quote(store)}"
    where = "" if entry.environment.gpu in gpus_here() else f" on {entry.environment.gpu}"
    return f"`doratune cache drift{named}`{where} measures it again"


def _present_for(entry: Entry) -> Environment:
    here = present_environment(entry.environment.gpu)
    names = {board.name for board in _boards() if board.slug == entry.environment.gpu}
    return replace(here, gpu_name=entry.environment.gpu_name) if entry.environment.gpu_name in names else here


def _is_own(store: str) -> bool:
    """Whether this is the user's own store, which ``doratune cache drift`` takes without a name."""
    from ..cache.errors import NoHomeError
    from ..cache.location import Location
    from ..cache.stack import user_store_path

    try:
        return store == str(Location.parse(user_store_path()))
    except NoHomeError:
        return False


def _triton() -> str:
    try:
        from triton import __version__ as version
    except ImportError:
        return ""
    return str(version)


@functools.cache
def _boards() -> tuple[_Board, ...]:
    """The GPUs that nvidia-smi lists; none where it does not run."""
    from ..codegen.gpu import UnknownGpuError, gpu_of_device

    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return ()
    boards = []
    for line in done.stdout.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if done.returncode or len(fields) != len(_Board._fields):
            continue
        name, driver, capability = fields
        try:
            slug = gpu_of_device(name, f"sm_{capability.replace('.', '')}").slug
        except UnknownGpuError:
            continue
        boards.append(_Board(slug, name, driver))
    return tuple(boards)
