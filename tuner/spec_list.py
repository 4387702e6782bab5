"""Specs that a user names instead of a model: on the command line, in a file or on standard input, one a line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..codegen.gpu import UnknownGpuError, find_gpu
from ..codegen.spec import KernelSpec, SpecError
from ..codegen.variants import default_config
from ..errors import UsageError
from ..printable import shortened
from ..text_file import MOST_BYTES, decoded, read_text, reason_of

STANDARD_INPUT = Path("-")
PLAN = "`doratune bench coverage --plan 40`"
"""What prints a list of specs."""
MOST_SPECS = 100_000
"""Far more than anybody can tune."""
_REASON = 500
"""Characters of a spec's fault: the file, the line and the remedy stand around it."""


class SpecListError(UsageError):
    """A list of specs cannot be used; the message names the file, the line, the fault and the remedy."""


@dataclass(frozen=True)
class SpecList:
    """Specs of one GPU, each once, in the order in which they were named; ``name`` says where they are from."""

    name: str
    gpu: str
    specs: tuple[KernelSpec, ...]


def read_spec_list(named: Sequence[str] = (), file: Path | None = None, *, gpu: str = "auto") -> SpecList:
    """The specs of ``file``, then those of ``named``, in :class:`~doratune.codegen.spec.KernelSpec`'s text form.

    A file has one spec a line, as ``doratune bench coverage --plan N`` prints them; empty lines and what follows a
    ``#`` are left out. The file ``-`` is standard input. ``gpu`` is what the user said of the GPU, ``auto`` for
    nothing: a contradiction to the specs is refused.

    Raises:
        SpecListError: the file cannot be read or has no spec; a spec is malformed or has no kernel on its GPU; the
            specs are of several GPUs, or of another one than ``gpu``.
    """
    read: list[tuple[str, str]] = []
    if file is not None:
        read += [(f"{_place(file)}, line {number}", line) for number, line in _lines(file)]
    read += [("--spec", text) for text in named]
    if not read:
        raise SpecListError(f"{_place(file or STANDARD_INPUT)} has no spec; write one a line, as {PLAN} prints them")
    first, target = read[0][0], None if gpu == "auto" else find_gpu(gpu).slug
    specs: dict[KernelSpec, None] = {}
    for place, text in read:
        spec = _parsed(place, text)
        if target is None:
            target = spec.gpu
        elif spec.gpu != target and gpu != "auto":
            raise SpecListError(
                f"{place}: this spec is for {spec.gpu}, and --gpu says {target}; leave --gpu out or change the spec"
            )
        elif spec.gpu != target:
            raise SpecListError(
                f"{place}: this spec is for {spec.gpu}, and {first} is for {target}; tune each GPU in a run of its own"
            )
        specs[spec] = None
    assert target is not None
    parts = [] if file is None else [f"specs from {_place(file)}"]
    parts += [f"{len(named)} spec{'s' if len(named) > 1 else ''} of --spec"] if named else []
    return SpecList(" and ".join(parts), target, tuple(specs))


def _parsed(place: str, text: str) -> KernelSpec:
    """The spec of a text, on a GPU by its usual name. That some kernel can run it is tried here, not after a store was
    made."""
    try:
        spec = KernelSpec.parse(text)
        gpu = find_gpu(spec.gpu)
        spec = replace(spec, gpu=gpu.slug)
        default_config(spec, gpu)
    except (SpecError, UnknownGpuError) as error:
        raise SpecListError(
            f"{place}: {shortened(str(error).rstrip('.'), _REASON)}. Mend or remove this spec; {PLAN} prints valid ones"
        ) from error
    return spec


def _lines(file: Path) -> list[tuple[int, str]]:
    """The lines of a file that are not empty, with their numbers."""
    try:
        text = _standard_input() if file == STANDARD_INPUT else read_text(file.expanduser())
    except (OSError, ValueError, RuntimeError) as error:
        raise SpecListError(
            f"cannot read specs from {_place(file)}: {reason_of(error)}; name a text file with one spec a line, "
            "or - for standard input"
        ) from error
    found = [(number, line.partition("#")[0].strip()) for number, line in enumerate(text.splitlines(), 1)]
    found = [(number, line) for number, line in found if line]
    if len(found) > MOST_SPECS:
        raise SpecListError(
            f"{_place(file)} has {len(found)} specs; a run takes at most {MOST_SPECS}, so split the file"
        )
    return found


def _standard_input() -> str:
    data = sys.stdin.buffer.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES >> 20} MB")
    return decoded(data)


def _place(file: Path) -> str:
    return "standard input" if file == STANDARD_INPUT else shortened(str(file), 200)
