"""Persistent Optuna studies: one per spec, environment and template text.

A study is sampled in memory; each finished trial is added to the storage in one transaction, so that a run killed at
any moment leaves no half-made or running trials behind. A stored trial has the text of its config and not Optuna's
parameters, which follow from it: each would cost three statements.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import TrialState

from ..cache.entry import MEASURED, PREDICTED, Environment, Evaluation
from ..codegen.spec import Config, KernelSpec, SpecError
from ..errors import DoratuneError
from .effort import MOST_TRIALS, Budget
from .sampler import ModelSampler
from .space import Space
from .study_storage import patiently

GAIN = 0.01
"""A new best counts as a gain, for the patience, when it is this share faster."""

NEAR_FLOOR = 1.03
"""A kernel within this factor of its floor is not searched further."""

TRIED = 32
"""Attempts to draw a config that is valid and new, after which the space counts as exhausted."""

TRIED_BY_SAMPLER = 12
"""How many of :data:`TRIED` leave the choice to Optuna's sampler; the others are drawn uniformly."""

_DONE = "searched_with"
_SUSPECTS = "suspects"

_VERDICT = "rejected"
"""The trial attribute that says why a config is out. Earlier versions wrote ``reason`` instead, and did so for full
disks and lost GPUs too: such trials are ignored, and their configs tried again."""


def study_name(space: Space, environment: Environment, provenance: str) -> str:
    """The name of a spec's study: a changed template, search space, Triton or GPU starts a new one."""
    state = "|".join((space.digest(), environment.triton, environment.gpu_name))
    return f"{space.spec} {provenance} {hashlib.sha256(state.encode()).hexdigest()[:12]}"


def spec_of_study(name: str) -> tuple[KernelSpec, str] | None:
    """The spec and the provenance that :func:`study_name` gave a study; None for a name of another kind."""
    spec, _, rest = name.partition(" ")
    provenance, _, digest = rest.partition(" ")
    try:
        return (KernelSpec.parse(spec), provenance) if digest and provenance in (MEASURED, PREDICTED) else None
    except SpecError:
        return None


@dataclasses.dataclass
class Candidate:
    """A config that waits for its evaluation."""

    config: Config
    trial: optuna.Trial


class KernelStudy:
    """The search of one spec: what to try next, what was found, when to stop.

    Only evaluated and rejected configs count as trials and are stored. Refused ones, repeated ones, ones that could not
    be judged and ones that ``behind`` excludes are told to the sampler only.
    """

    def __init__(
        self,
        space: Space,
        storage: optuna.storages.BaseStorage,
        name: str,
        *,
        seeds: Sequence[Config],
        floor_us: float,
        url: str = "",
        sampler: Callable[[Space, int], optuna.samplers.BaseSampler] = ModelSampler,
    ) -> None:
        self.space = space
        self.seeds = tuple(seeds)
        self.floor_us = floor_us
        self.evaluated: dict[Config, Evaluation | None] = {}
        """Each config tried, in order, with its evaluation or None for a rejected one."""
        self.reasons: list[str] = []
        self.undecided: dict[Config, str] = {}
        """The configs that could not be judged, with the reason. The next process tries them again."""
        self.exhausted = False
        self._url = url
        self._stored, trials, attributes = patiently(url, lambda: _load(storage, name))
        past = read_trials(trials)
        self._done = _budget_of(attributes)
        suspects = attributes.get(_SUSPECTS, ())
        self._suspects = [str(name) for name in suspects] if isinstance(suspects, list) else []
        seed = int.from_bytes(hashlib.sha256(f"{name}+{len(past)}".encode()).digest()[:4], "big")
        self._chance = random.Random(seed)
        self._study = optuna.create_study(sampler=sampler(space, seed))
        # A config that an earlier process got from elsewhere may lie outside the space: the sampler cannot use it.
        self._study.add_trials([self._with_params(judged) for judged in past if judged.config in space])
        for judged in past:
            self._remember(judged)
        self._pending: set[Config] = set()

    @property
    def best(self) -> tuple[Config, Evaluation] | None:
        """The fastest config so far; the earlier one among equals."""
        found = [(config, result) for config, result in self.evaluated.items() if result is not None]
        return min(found, key=lambda pair: pair[1].us or float("inf"), default=None)

    def stop(self, budget: Budget) -> str | None:
        """Why the search may end, or None."""
        best = self.best
        if len(self.evaluated) >= budget.trials:
            return f"{len(self.evaluated)} trials"
        if self.exhausted:
            return "no configs left"
        if best is not None and self.floor_us and (best[1].us or 0.0) <= NEAR_FLOOR * self.floor_us:
            return "at the floor"
        idle = self._trials_without_gain()
        if idle >= budget.patience and self.seeded(budget):
            return f"no gain in {idle} trials"
        return None

    def seeded(self, budget: Budget) -> bool:
        """Whether every seed within the budget has been tried, successfully or not."""
        return all(seed in self.evaluated or seed in self.undecided for seed in self.seeds[: budget.trials])

    def finish(self, budget: Budget) -> None:
        """Record that the search of this effort is over; not while a config is undecided."""
        if self.undecided:
            return
        self._done = max(budget.trials, self._done)
        patiently(self._url, lambda: self._stored.set_user_attr(_DONE, self._done))

    def ask(self, behind: Callable[[Config], float | None]) -> Candidate | None:
        """Let the sampler pick a config that is new and valid; None when it finds none, and the space is exhausted.

        ``behind`` gives an estimate in microseconds for a config not worth a compile, else None.
        """
        for attempt in range(TRIED):
            if attempt >= TRIED_BY_SAMPLER:
                self._study.enqueue_trial(self.space.params(self.space.draw(self._chance)))
            trial = self._study.ask()
            config = self.space.suggest(trial)
            estimate = None
            if config in self._pending:
                self._study.tell(trial, state=TrialState.FAIL)
            elif config in self.evaluated:
                self._tell(trial, self.evaluated[config])
            elif self.space.refuse(config) is not None:
                self._tell(trial, None)
            elif (estimate := behind(config)) is not None:
                self._study.tell(trial, estimate)
            else:
                return self._candidate(config, trial)
        self.exhausted = True
        return None

    def propose(self, config: Config) -> Candidate | None:
        """Make a candidate of a known config; None when it is refused, outside the space, or was tried before."""
        known = config in self.evaluated or config in self._pending
        if known or config not in self.space or self.space.refuse(config) is not None:
            return None
        self._study.enqueue_trial(self.space.params(config))
        trial = self._study.ask()
        suggested = self.space.suggest(trial)
        assert suggested == config
        return self._candidate(config, trial)

    def accept(self, candidate: Candidate, evaluation: Evaluation) -> None:
        """Record the evaluation of a candidate."""
        assert evaluation.us is not None
        candidate.trial.set_user_attr("evaluation", json.dumps(dataclasses.asdict(evaluation)))
        self._record(candidate, evaluation)

    def reject(self, candidate: Candidate, reason: str) -> None:
        """Record why a candidate is out: a property of its config."""
        candidate.trial.set_user_attr(_VERDICT, reason)
        self._record(candidate, None)

    def set_aside(self, candidate: Candidate, reason: str) -> None:
        """Leave a candidate that could not be judged out of this process's search. Nothing is recorded."""
        self._study.tell(candidate.trial, state=TrialState.FAIL)
        self.undecided[candidate.config] = reason  # and it stays pending, so that it is not proposed again

    def retry(self, config: Config) -> None:
        """Let a config that could not be judged be proposed again in this process."""
        self.undecided.pop(config, None)
        self._pending.discard(config)

    def suspect(self, candidate: Candidate) -> bool:
        """Note that a candidate was running when the GPU failed; return whether it was in an earlier process too.

        A note is no trial: the next process tries the config again. Only a config that fails there as well is known
        to be the cause.
        """
        name = str(candidate.config)
        if name in self._suspects:
            return True
        self._suspects.append(name)
        patiently(self._url, lambda: self._stored.set_user_attr(_SUSPECTS, self._suspects))
        return False

    def _candidate(self, config: Config, trial: optuna.Trial) -> Candidate:
        self._pending.add(config)
        trial.set_user_attr("config", str(config))
        return Candidate(config, trial)

    def _record(self, candidate: Candidate, evaluation: Evaluation | None) -> None:
        frozen = self._tell(candidate.trial, evaluation)
        stored = copy.copy(frozen)
        stored.params, stored.distributions, stored.system_attrs = {}, {}, {}
        # If a broken connection has it stored twice, the second is read as the same trial.
        patiently(self._url, lambda: self._stored.add_trial(stored))
        self._pending.discard(candidate.config)
        self._remember(Judged(candidate.config, evaluation, str(frozen.user_attrs.get(_VERDICT, ""))))

    def _with_params(self, judged: Judged) -> optuna.trial.FrozenTrial:
        """A stored trial as the sampler needs it."""
        return optuna.trial.create_trial(
            state=TrialState.PRUNED if judged.evaluation is None else TrialState.COMPLETE,
            value=None if judged.evaluation is None else judged.evaluation.us,
            params=self.space.params(judged.config),
            distributions=self.space.distributions(judged.config),
        )

    def _tell(self, trial: optuna.Trial, evaluation: Evaluation | None) -> optuna.trial.FrozenTrial:
        if evaluation is None:
            return self._study.tell(trial, state=TrialState.PRUNED)  # the sampler ranks it behind every time
        return self._study.tell(trial, evaluation.us)

    def _remember(self, judged: Judged) -> None:
        if judged.evaluation is None:
            self.reasons.append(judged.reason)
        self.evaluated[judged.config] = judged.evaluation

    def _trials_without_gain(self) -> int:
        best, idle = float("inf"), 0
        for evaluation in self.evaluated.values():
            us = float("inf") if evaluation is None or evaluation.us is None else evaluation.us
            idle += 1
            if us < best * (1.0 - GAIN):
                idle = 0
            best = min(best, us)
        return idle


def _load(
    storage: optuna.storages.BaseStorage, name: str
) -> tuple[optuna.Study, list[optuna.trial.FrozenTrial], dict[str, Any]]:
    study = optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
    return study, study.get_trials(deepcopy=False), study.user_attrs


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a stored trial says: the config with its evaluation, or with the reason why it is out."""

    config: Config
    evaluation: Evaluation | None
    reason: str = ""


def read_trials(trials: Iterable[optuna.trial.FrozenTrial]) -> list[Judged]:
    """What stored trials say, in their order; those that say nothing or are damaged are left out."""
    return [judged for trial in trials if (judged := _judged(trial)) is not None]


def _judged(trial: optuna.trial.FrozenTrial) -> Judged | None:
    """What a trial says; None if it says nothing, or is damaged: then its config is tried again."""
    try:
        config = Config.parse(trial.user_attrs["config"])
        text = trial.user_attrs.get("evaluation")
        if text is None:
            return Judged(config, None, str(trial.user_attrs[_VERDICT]))
        values = json.loads(text)
        evaluation = Evaluation(**{**values, "samples_us": tuple(values["samples_us"])})
        return Judged(config, evaluation) if 0.0 < float(evaluation.us or 0.0) < math.inf else None
    except (DoratuneError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None


def searched_with(storage: optuna.storages.BaseStorage, name: str, url: str = "") -> int | None:
    """The trial budget with which this study was finished, 0 if it was not, None if there is no such study."""

    def attributes() -> dict[str, Any] | None:
        try:
            study_id = storage.get_study_id_from_name(name)
        except KeyError:
            return None
        return storage.get_study_user_attrs(study_id)

    found = patiently(url, attributes)
    return None if found is None else _budget_of(found)


def _budget_of(attributes: Mapping[str, Any]) -> int:
    """The trial budget with which a study was finished; 0 if it was not, or says nothing readable."""
    done = attributes.get(_DONE, 0)
    return done if isinstance(done, int) and 0 <= done <= MOST_TRIALS else 0
