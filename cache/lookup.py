"""Choose the config for a spec from a stack of stores, and say why.

1. ``exact``: an entry of exactly this spec. A measured one in any store goes before a predicted one in any store, and a
   predicted one before a stored default; among equals the earlier store wins.
2. Without one, the config with the least expected loss (:mod:`.weigh`) of all that the stores and the package offer:

   - ``nearest``: entries of the same op and dtypes on the same GPU, with other dims, flags or magnitude;
   - ``architecture``: such entries of the other GPUs of the architecture, those of the very shape included;
   - ``default``: the built-in configs.

   Entries' configs are offered as they are and with the parameters re-derived that are bound to the shape. Stores are
   equal here: one more store brings more offers, and hides none.

The same stores always give the same answer. What the lookup may lose is :mod:`.bound`'s to say.

An entry is refused if its config does not suit the spec, or if its template is not the installed one and the installed
one renders another text. An entry that was tuned under another Triton version is used, because its config is rendered
and compiled again; ``explain`` names the version.

A damaged row is refused too, and costs nothing but itself; a file that is damaged is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from ..codegen.spec import Config, KernelSpec
from ..printable import printable
from .bound import FAR_DISTANCE, Bound, bound_of, without_neighbours
from .distance import distance
from .entry import DEFAULT, MEASURED, PREDICTED, Entry
from .errors import CorruptRowError
from .neighbours import Candidate, Regret
from .weigh import NO_MODEL, Model, Offer, Weighed, weigh

if TYPE_CHECKING:
    from .store import Store

__all__ = ["STEPS", "Refusal", "Resolution", "distance", "lookup"]

STEPS = ("exact", "nearest", "architecture", "default")
NEIGHBOURS, MORE = 8, 1000
"""Entries of each GPU that a store is asked for: at first, and where none of these suits."""
CARRIED = 4
"""The nearest entries of each GPU whose configs are also offered re-derived."""
TEXTS_COMPARED = 4
"""Entries of another template that one lookup renders at most for each store: to compare a text takes some
milliseconds. The limit is each store's own, so that the order of the stores does not matter."""
REFUSALS_KEPT = 5
"""Refusals listed for each step; any further ones are only counted."""
WEIGHED_KEPT = 5
"""Offers listed in a resolution."""

_PROVENANCE_ORDER = {MEASURED: 0, PREDICTED: 1, DEFAULT: 2}

Accepts = Callable[[KernelSpec, Config], "str | None"]
"""Return why a config does not suit a spec, or None when it does."""
Reproduces = Callable[[Entry], "str | None"]
"""Return why an entry is not what its config is here: another text is rendered, or its time is impossible; or None."""
Carry = Callable[[Config, KernelSpec], Sequence[Config]]
"""Return the configs for the wanted spec that follow from one that did well for this one; itself first, if it suits."""
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
    locations searched. ``weighed`` are the best offers, the chosen one first, and ``offers`` their full number by step;
    both are empty for an exact entry. ``bound`` says what the lookup may lose, and is None for an exact entry.
    ``damaged`` has a message for each damaged row that was met.
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
    weighed: tuple[Weighed, ...] = ()
    offers: tuple[tuple[str, int], ...] = ()
    bound: Bound | None = None
    damaged: tuple[str, ...] = ()

    @property
    def rederived(self) -> bool:
        """Whether the config is not the entry's own: its shape-bound parameters were re-derived for this spec."""
        return self.entry is not None and self.config != self.entry.config

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
        lines += self._weighed_lines() + self._refusal_lines()
        return "\n".join(map(printable, lines))

    def _choice(self) -> str:
        if self.step == "exact":
            return "an entry of exactly this spec"
        if self.entry is None:
            return "a built-in config"
        where = "the same GPU" if self.step == "nearest" else f"another {self.entry.environment.architecture} GPU"
        changed = ", re-derived for this shape" if self.rederived else ""
        return f"{self.entry.spec} on {where}, distance {self.distance:.2f}{changed}"

    def _loss(self) -> str:
        if self.step == "exact" and self.entry is not None:
            provenance, against = self.entry.evaluation.provenance, _against_floor(self.entry)
            if provenance == MEASURED:
                return f"0 %: the winner measured for this spec{against}"
            return f"unknown: {provenance}, never timed{against}"
        known = self.bound is not None and self.bound.loss is not None
        bound = str(self.bound or "unknown") + ("" if known else "; tune this spec")
        if self.entry is None:
            return bound
        return f"{bound} (on its own shape: {self.entry.evaluation.provenance}{_against_floor(self.entry)})"

    def _weighed_lines(self) -> list[str]:
        total = sum(count for _, count in self.offers)
        if total < 2:
            return []
        lines = [f"weighed   {total} configs; expected loss of the best:"]
        for each in self.weighed:
            source = each.offer.candidate
            origin = "built in" if source is None else f"{source.spec}{', re-derived' if each.offer.rederived else ''}"
            lines.append(f"  {100 * each.loss:5.1f} %  {each.offer.config} ({each.offer.step}: {origin})")
        return lines

    def _refusal_lines(self) -> list[str]:
        counts, offered = dict(self.refused), dict(self.offers)
        lines: list[str] = []
        for step in STEPS[:1] if self.step == "exact" else STEPS[:-1]:
            listed = [refusal for refusal in self.trace if refusal.step == step]
            if not listed:
                if step != self.step and not offered.get(step):
                    lines.append(f"{step}: no entry in {_stores(self.stack)}")
                continue
            lines.append(f"{step}: {'also refused' if offered.get(step) else 'not used'}:")
            lines += [f"  {refusal.candidate} in {refusal.store}: {refusal.reason}" for refusal in listed]
            if counts.get(step, 0) > len(listed):
                lines.append(f"  and {counts[step] - len(listed)} more")
        return lines


def lookup(
    spec: KernelSpec,
    stack: Sequence[Store],
    *,
    defaults: Sequence[Config],
    architecture: str,
    accepts: Accepts,
    template_digest: TemplateDigest,
    reproduces: Reproduces = lambda entry: None,
    model: Model = NO_MODEL,
    carry: Carry = lambda config, source: (config,),
    exact: bool = True,
) -> Resolution:
    """Choose the config for ``spec`` from the stores of a ``stack``; see the module's text.

    ``defaults`` are the built-in configs, at least one, the default first. ``architecture`` is that of the spec's GPU
    (``sm_90``). ``accepts`` and ``template_digest`` describe the installed templates. ``reproduces`` may refuse the
    entry that was found, whose source must be rendered as recorded. ``model`` compares configs and ``carry``
    re-derives them; without these offers are told apart by where they come from. Without ``exact`` the entry of this
    very spec is left out: what would a lookup give if it were not there?

    Raises:
        StoreError: a store cannot be read.
    """
    search = _Search(spec, stack, architecture, accepts, template_digest, reproduces)
    found = search.exact() if exact else None
    if found is not None:
        return search.resolution("exact", found.entry.config, found)
    offers, regrets = search.offers(defaults, carry)
    weighed = weigh(offers, model)
    bound = bound_of(spec.op, spec.gpu, regrets)
    while weighed:
        chosen = weighed[0].offer
        found = search.fetch(chosen)
        if found is not None or chosen.candidate is None:
            resolution = search.resolution(chosen.step, chosen.config, found)
            near = any(each.distance <= FAR_DISTANCE and each.gpu in bound.gpus for each in regrets)
            if found.distance > FAR_DISTANCE if found else not near:
                bound = without_neighbours(bound)
            return replace(resolution, weighed=tuple(weighed[:WEIGHED_KEPT]), offers=_by_step(offers), bound=bound)
        # Its entry was refused, or a writer has replaced it since. Another one may offer the same config.
        gone = (chosen.store, chosen.candidate)
        offers = [offer for offer in offers if (offer.store, offer.candidate) != gone]
        weighed = weigh(offers, model)
    return replace(search.resolution("default", defaults[0], None), bound=without_neighbours(bound))


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
        self.damaged: dict[str, None] = {}
        self._fetched: dict[tuple[str | None, KernelSpec], _Found | None] = {}
        self._texts_compared: Counter[str] = Counter()

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
            damaged=tuple(self.damaged),
        )

    def exact(self) -> _Found | None:
        usable: list[_Found] = []
        for store in self.stack:
            entry = self._read(store, self.spec, "exact")
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

    def offers(self, defaults: Sequence[Config], carry: Carry) -> tuple[list[Offer], list[Regret]]:
        """Every config that could serve, and the regrets of the measured entries of such specs."""
        offers = [Offer(config, "default", first=not index) for index, config in enumerate(defaults)]
        regrets: list[Regret] = []
        for store in self.stack:
            around = store.neighbours(self.spec, self.architecture, count=NEIGHBOURS)
            usable, refused = self._usable(store, around.candidates)
            if not usable and len(around.candidates) >= NEIGHBOURS:  # those that suit may be farther away
                around = store.neighbours(self.spec, self.architecture, count=MORE)
                usable, refused = self._usable(store, around.candidates)
            regrets += around.regrets
            for message in around.damaged:
                self._damage("nearest", "a damaged row", store.location, message)
            for candidate, reason in refused:
                self._refuse(self._step(candidate), candidate.spec, store.location, reason)
            seen: dict[str, int] = {}
            for candidate in usable:
                rank = seen[candidate.spec.gpu] = seen.get(candidate.spec.gpu, 0) + 1
                offers += self._offered(candidate, store.location, carry, rank <= CARRIED)
        return offers, regrets

    def _usable(
        self, store: Store, candidates: Sequence[Candidate]
    ) -> tuple[list[Candidate], list[tuple[Candidate, str]]]:
        """The candidates whose templates are the installed ones, and those that are refused, with the reason."""
        usable, refused = [], []
        for candidate in candidates:
            unchanged = partial(self._is_unchanged, store, candidate.spec)
            reason = self._outdated(candidate.config, candidate.template_digest, unchanged)
            if reason is None:
                usable.append(candidate)
                reason = self.accepts(self.spec, candidate.config)
            if reason is not None:
                refused.append((candidate, reason))
        return usable, refused

    def _offered(self, candidate: Candidate, store: str, carry: Carry, near: bool) -> list[Offer]:
        """The configs of an entry and of its final's runners-up, and those re-derived from them if it is ``near``."""
        step, found = self._step(candidate), []
        for won, behind in ((candidate.config, 1.0), *candidate.beaten):
            for config in carry(won, candidate.spec)[: None if near else 1]:
                if self.accepts(self.spec, config) is None:
                    found.append(Offer(config, step, candidate, store, config != won, behind))
        return found

    def fetch(self, offer: Offer) -> _Found | None:
        """The entry of an offer; None if it has none, or if a writer has replaced it since."""
        if offer.candidate is None:
            return None
        place = (offer.store, offer.candidate.spec)
        if place not in self._fetched:
            self._fetched[place] = self._fetch(offer.candidate, offer.store)
        return self._fetched[place]

    def _fetch(self, candidate: Candidate, location: str | None) -> _Found | None:
        store = next(store for store in self.stack if store.location == location)
        step = self._step(candidate)
        entry = self._read(store, candidate.spec, step)
        if entry is None or entry.config != candidate.config:
            return None
        reason = self.reproduces(entry)
        if reason is not None:
            self._refuse(step, candidate.spec, store.location, reason)
            return None
        return _Found(entry, store.location, candidate.distance)

    def _read(self, store: Store, spec: KernelSpec, step: str) -> Entry | None:
        """The entry of ``spec`` in a store; None if there is none or its row is damaged."""
        try:
            return store.get(spec)
        except CorruptRowError as error:
            self._damage(step, str(spec), store.location, str(error))
            return None

    def _step(self, candidate: Candidate) -> str:
        return "nearest" if candidate.spec.gpu == self.spec.gpu else "architecture"

    def _objection(self, config: Config, digest: str, unchanged: Callable[[], bool]) -> str | None:
        """Why ``config`` cannot be used, or None. ``unchanged`` says whether its entry still renders to its text."""
        return self._outdated(config, digest, unchanged) or self.accepts(self.spec, config)

    def _outdated(self, config: Config, digest: str, unchanged: Callable[[], bool]) -> str | None:
        """Why what was measured with ``config`` says nothing of the installed templates, or None."""
        installed = self.template_digest(self.spec.op, config.variant)
        if installed is None:
            return f"no variant {config.variant!r} of {self.spec.op} is installed"
        if installed != digest and not unchanged():
            return f"tuned with another template {config.variant!r} ({digest[:12]}, installed is {installed[:12]})"
        return None

    def _is_unchanged(self, store: Store, spec: KernelSpec) -> bool:
        """Whether the installed template, though another one, renders the text that was tuned for ``spec``."""
        if spec != self.spec:  # an exact entry is compared in any case
            self._texts_compared[store.location] += 1
        few = self._texts_compared[store.location] <= TEXTS_COMPARED
        entry = self._read(store, spec, "nearest") if few else None
        return entry is not None and self.reproduces(entry) is None

    def _damage(self, step: str, row: str, store: str, message: str) -> None:
        if message not in self.damaged:
            self.damaged[message] = None
            self._refuse(step, row, store, message)

    def _refuse(self, step: str, spec: KernelSpec | str, store: str, reason: str) -> None:
        self.refused[step] = self.refused.get(step, 0) + 1
        if self.refused[step] <= REFUSALS_KEPT:
            self.trace.append(Refusal(step, str(spec), store, reason))


def _by_step(offers: Sequence[Offer]) -> tuple[tuple[str, int], ...]:
    configs = {(offer.step, offer.config) for offer in offers}
    return tuple((step, sum(of == step for of, _ in configs)) for step in STEPS[1:])


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
