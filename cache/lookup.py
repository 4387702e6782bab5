"""Choose the config for a spec from a stack of stores, and say why.

The steps, tried in order; the first that has an acceptable entry decides:

1. ``exact``: an entry of exactly this spec. A measured one in any store goes before a predicted one in any store, and a
   predicted one before a stored default; among equals the earlier store wins.
2. ``nearest``: an entry of the same op and dtypes on the same GPU, with other dims, flags or magnitude.
3. ``architecture``: the same on another GPU of the same architecture: first the same dims and flags, then the nearest.
4. ``default``: the built-in default config.

Within steps 2 and 3 measured goes before predicted before default, then the smaller :func:`distance`, then the earlier
store, then the spec's text: the same stores always give the same answer.

An entry is refused if its config does not suit the spec, or if its template is not the installed one and the installed
one renders another text. An entry that was tuned under another Triton version is used, because its config is rendered
and compiled again; ``explain`` names the version.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..codegen.spec import DIMS, FLAGS, Config, KernelSpec
from .entry import DEFAULT, MEASURED, PREDICTED, Entry

if TYPE_CHECKING:
    from .store import Store

STEPS = ("exact", "nearest", "architecture", "default")
DIM_WEIGHTS = {"d_out": 1.0, "d_in": 1.0, "rank": 2.0, "tokens": 1.0}
"""What a factor of two in a dim adds to the distance. The rank counts double: it is a side of the tiles themselves
(so it decides what fits into shared memory), where the others mostly change how many tiles there are."""
FLAG_PENALTY = 0.25
"""What each differing flag adds: it adds or drops one operand, which matters less than any halving of a dim."""
TEXTS_COMPARED = 4
"""Entries of another template that one lookup renders at most: to compare a text takes some milliseconds."""
REFUSALS_KEPT = 5
"""Refusals listed for each step; any further ones are only counted."""

_PROVENANCE_ORDER = {MEASURED: 0, PREDICTED: 1, DEFAULT: 2}

Accepts = Callable[[KernelSpec, Config], "str | None"]
"""Return why a config does not suit a spec, or None when it does."""
Reproduces = Callable[[Entry], "str | None"]
"""Return why an entry's source is not what its config renders to here, or None when it is."""
TemplateDigest = Callable[[str, str], "str | None"]
"""Return the digest of the installed template for an op and a variant, or None when there is no such variant."""


@dataclass(frozen=True)
class Refusal:
    """An entry that was not used: at which ``step``, its spec's text, the ``store`` that holds it, and why."""

    step: str
    candidate: str
    store: str
    reason: str


@dataclass(frozen=True)
class Resolution:
    """The config chosen for ``spec``, and how.

    ``step`` is one of :data:`STEPS`. ``entry`` and ``store`` (its location) are None for the built-in default.
    ``distance`` is 0 for an exact entry and None for the default. ``trace`` holds at most :data:`REFUSALS_KEPT`
    refusals for each step, in the order of the search; ``refused`` is their full number by step. ``stack`` lists the
    locations searched.
    """

    spec: KernelSpec
    step: str
    config: Config
    entry: Entry | None
    store: str | None
    distance: float | None
    trace: tuple[Refusal, ...]
    refused: tuple[tuple[str, int], ...]
    stack: tuple[str, ...]

    @property
    def fusion_pays(self) -> bool:
        """Whether an entry of exactly this spec says that the kernel is faster than its unfused sequence."""
        return self.step == "exact" and self.entry is not None and self.entry.evaluation.fusion_pays

    def explain(self, binary: str | None = None, versions: str | None = None) -> str:
        """Return lines of text: the choice, why the earlier steps gave nothing, and what is known of the loss.

        ``binary`` says where the binary comes from, ``versions`` under which other versions the entry was measured
        (:mod:`.upgrade`); None leaves that line out.
        """
        lines = [f"spec      {self.spec}", f"step      {self.step}: {self._choice()}", f"config    {self.config}"]
        if self.entry is not None:
            lines += [f"store     {self.store}", f"tuned     {_origin(self.entry)}"]
        if versions is not None:
            lines.append(f"versions  {versions}")
        lines.append(f"loss      {self._loss()}")
        if self.step == "exact" and self.entry is not None and self.entry.evaluation.unfused_us is not None:
            pays = "pays" if self.fusion_pays else "does not pay"
            lines.append(f"fusion    {pays}: {self.entry.evaluation.unfused_us:.4g} us unfused")
        if binary is not None:
            lines.append(f"binary    {binary}")
        lines += self._refusal_lines()
        return "\n".join(lines)

    def _choice(self) -> str:
        if self.entry is None:
            return "the built-in default"
        if self.step == "exact":
            return "an entry of exactly this spec"
        where = "the same GPU" if self.step == "nearest" else f"another {self.entry.environment.architecture} GPU"
        return f"{self.entry.spec} on {where}, distance {self.distance:.2f}"

    def _loss(self) -> str:
        if self.entry is None:
            return "unknown: no entry suits, and the default was never timed; tune this spec"
        provenance = self.entry.evaluation.provenance
        if self.step == "exact" and provenance == MEASURED:
            return f"0 %: the winner measured for this spec{_against_floor(self.entry)}"
        if self.step == "exact":
            return f"unknown: {provenance}, never timed{_against_floor(self.entry)}"
        own = f" (on its own shape: {provenance}{_against_floor(self.entry)})"
        return f"unknown: not measured for this spec{own}"

    def _refusal_lines(self) -> list[str]:
        counts = dict(self.refused)
        tried = STEPS[: STEPS.index(self.step) + 1]
        lines: list[str] = []
        for step in tried:
            if step == "default" or (step == self.step and not counts.get(step)):
                continue
            listed = [refusal for refusal in self.trace if refusal.step == step]
            if not listed:
                lines.append(f"{step}: no entry in {_stores(self.stack)}")
                continue
            lines.append(f"{step}: not used:")
            lines += [f"  {refusal.candidate} in {refusal.store}: {refusal.reason}" for refusal in listed]
            if counts.get(step, 0) > len(listed):
                lines.append(f"  and {counts[step] - len(listed)} more")
        return lines


def distance(wanted: KernelSpec, other: KernelSpec) -> float:
    """Return the distance of two specs of one op: ``sum(weight * |log2(ratio)|)`` over the dims, plus flag penalties.

    A different or missing magnitude dtype counts as a flag. Dims the op does not depend on, and
    the GPU, add nothing.
    """
    pairs = ((DIM_WEIGHTS[dim], getattr(wanted, dim), getattr(other, dim)) for dim in DIMS)
    dims = sum(weight * abs(math.log2(a / b)) for weight, a, b in pairs if a and b)
    flags = sum(bool(getattr(wanted, flag) != getattr(other, flag)) for flag in (*FLAGS, "magnitude"))
    return float(dims + FLAG_PENALTY * flags)


def lookup(
    spec: KernelSpec,
    stack: Sequence[Store],
    *,
    default: Config,
    architecture: str,
    accepts: Accepts,
    template_digest: TemplateDigest,
    reproduces: Reproduces = lambda entry: None,
) -> Resolution:
    """Choose the config for ``spec`` from the stores of a ``stack``, searched in that order; see the module's text.

    ``default`` is the built-in config. ``architecture`` is that of the spec's GPU (``sm_90``). ``accepts`` and
    ``template_digest`` describe the installed templates. ``reproduces`` may refuse an exact entry, the only kind whose
    source must be rendered as recorded.

    Raises:
        StoreError: a store cannot be read, or holds a damaged row.
    """
    search = _Search(spec, stack, architecture, accepts, template_digest, reproduces)
    for step in STEPS[:-1]:
        found = search.run(step)
        if found is not None:
            return search.resolution(step, found.entry.config, found)
    return search.resolution("default", default, None)


@dataclass(frozen=True)
class _Found:
    entry: Entry
    store: str
    distance: float


class _Search:
    """One lookup, with the refusals so far."""

    def __init__(
        self,
        spec: KernelSpec,
        stack: Sequence[Store],
        architecture: str,
        accepts: Accepts,
        template_digest: TemplateDigest,
        reproduces: Reproduces,
    ) -> None:
        self.spec = spec
        self.stack = stack
        self.architecture = architecture
        self.accepts = accepts
        self.template_digest = template_digest
        self.reproduces = reproduces
        self.trace: list[Refusal] = []
        self.refused: dict[str, int] = {}
        self._texts_compared = 0

    def run(self, step: str) -> _Found | None:
        return self._exact() if step == "exact" else self._near(step)

    def resolution(self, step: str, config: Config, found: _Found | None) -> Resolution:
        return Resolution(
            spec=self.spec,
            step=step,
            config=config,
            entry=found.entry if found else None,
            store=found.store if found else None,
            distance=found.distance if found else None,
            trace=tuple(self.trace),
            refused=tuple(self.refused.items()),
            stack=tuple(store.location for store in self.stack),
        )

    def _exact(self) -> _Found | None:
        usable: list[_Found] = []
        for store in self.stack:
            entry = store.get(self.spec)
            if entry is None:
                continue
            reason = self._objection(entry.config, entry.template_digest, partial(self._is_unchanged, store, self.spec))
            reason = reason or self.reproduces(entry)
            if reason is not None:
                self._refuse("exact", self.spec, store.location, reason)
                continue
            usable.append(_Found(entry, store.location, 0.0))
            if entry.evaluation.provenance == MEASURED:
                break  # no entry of a later store goes before it
        if not usable:
            return None
        best = min(usable, key=lambda found: _PROVENANCE_ORDER[found.entry.evaluation.provenance])
        for other in usable[: usable.index(best)]:
            passed_over = (
                f"only {other.entry.evaluation.provenance}: a later store has it {best.entry.evaluation.provenance}"
            )
            self._refuse("exact", self.spec, other.store, passed_over)
        return best

    def _near(self, step: str) -> _Found | None:
        architecture = self.architecture if step == "architecture" else None
        ranked = []
        for index, store in enumerate(self.stack):
            for candidate in store.candidates(self.spec, architecture=architecture):
                apart = distance(self.spec, candidate.spec)
                order = (apart > 0, _PROVENANCE_ORDER[candidate.provenance], apart, index, str(candidate.spec))
                ranked.append((order, candidate))
        for (_, _, apart, index, _), candidate in sorted(ranked, key=lambda pair: pair[0]):
            store = self.stack[index]
            reason = self._objection(
                candidate.config,
                candidate.template_digest,
                partial(self._is_unchanged, store, candidate.spec),
            )
            if reason is not None:
                self._refuse(step, candidate.spec, store.location, reason)
                continue
            entry = store.get(candidate.spec)
            # A writer may have replaced or removed the entry between the two reads.
            if entry is not None and entry.config == candidate.config:
                return _Found(entry, store.location, apart)
        return None

    def _objection(self, config: Config, digest: str, unchanged: Callable[[], bool]) -> str | None:
        """Why ``config`` cannot be used, or None. ``unchanged`` says whether its entry still renders to its text."""
        installed = self.template_digest(self.spec.op, config.variant)
        if installed is None:
            return f"no variant {config.variant!r} of {self.spec.op} is installed"
        if installed != digest and not unchanged():
            return f"tuned with another template {config.variant!r} ({digest[:12]}, installed is {installed[:12]})"
        return self.accepts(self.spec, config)

    def _is_unchanged(self, store: Store, spec: KernelSpec) -> bool:
        """Whether the installed template, though another one, renders the text that was tuned for ``spec``."""
        self._texts_compared += 1
        entry = store.get(spec) if self._texts_compared <= TEXTS_COMPARED else None
        return entry is not None and self.reproduces(entry) is None

    def _refuse(self, step: str, spec: KernelSpec, store: str, reason: str) -> None:
        self.refused[step] = self.refused.get(step, 0) + 1
        if self.refused[step] <= REFUSALS_KEPT:
            self.trace.append(Refusal(step, str(spec), store, reason))


def _origin(entry: Entry) -> str:
    evaluation, environment = entry.evaluation, entry.environment
    parts = [evaluation.provenance]
    if evaluation.provenance == MEASURED and environment.gpu_name:
        parts.append(f"on {environment.gpu_name}")
    if environment.triton:
        parts.append(f"under Triton {environment.triton}")
    if entry.created_at:
        parts.append(f"at {entry.created_at}")
    return " ".join(parts)


def _against_floor(entry: Entry) -> str:
    us, floor = entry.evaluation.us, entry.evaluation.floor_us
    if us is None:
        return ""
    return f", {us:.4g} us" + (f" = {us / floor:.2f} x its floor" if floor else "")


def _stores(stack: tuple[str, ...]) -> str:
    return f"{len(stack)} store{'' if len(stack) == 1 else 's'}"
