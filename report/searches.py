"""The searches behind the winners, from the storage of the Optuna studies."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna

from ..cache.location import without_password
from ..codegen.spec import Config, KernelSpec
from ..tuner.studies import read_trials, spec_of_study
from ..tuner.study_storage import (
    StudyStorageError,
    default_study_storage,
    open_study_storage,
    patiently,
    quiet,
    release,
    storage_file,
)

if TYPE_CHECKING:
    from ..cache.entry import Evaluation

LEAST_TRIALS = 8
"""Completed trials of one variant from which the importance of its parameters is estimated."""


@dataclass(frozen=True)
class Search:
    """One study: the spec, whether times were measured or predicted, and each config tried with its time.

    ``tried`` are configs with their microseconds in the order of the search, None for a rejected one.
    """

    spec: KernelSpec
    provenance: str
    tried: tuple[tuple[Config, float | None], ...]

    @property
    def best_us(self) -> float | None:
        return min((us for _, us in self.tried if us is not None), default=None)

    @property
    def best(self) -> Config | None:
        """The fastest config."""
        timed = [(us, place) for place, (_, us) in enumerate(self.tried) if us is not None]
        return self.tried[min(timed)[1]][0] if timed else None

    @property
    def rejected(self) -> int:
        return sum(us is None for _, us in self.tried)

    def history(self) -> list[float]:
        """The best time so far over the best of all, after each trial from the first that was not rejected on."""
        best, found = float("inf"), []
        for _, us in self.tried:
            best = min(best, us if us is not None else float("inf"))
            if best < float("inf"):
                found.append(best / (self.best_us or best))
        return found

    def within(self, share: float) -> int | None:
        """The number of the first trial within ``share`` of the best time; None if none has a time."""
        if self.best_us is None:
            return None
        most = (1.0 + share) * self.best_us
        return next(number for number, (_, us) in enumerate(self.tried, 1) if us is not None and us <= most)

    def study(self, *, variants: bool = False) -> optuna.Study | None:
        """The trials of the best config's variant as an Optuna study, to plot; None without a timed trial.

        Parameters have their values among the trials as choices, in order. Rejected trials are pruned ones. With
        ``variants`` the trials of every variant, without parameters.
        """
        if self.best is None:
            return None
        if variants:
            return _study([({}, us) for _, us in self.tried], {})
        variant = self.best.variant
        trials = [(values_of(config), us) for config, us in self.tried if config.variant == variant]
        names = values_of(self.best).keys()
        trials = [(values, us) for values, us in trials if values.keys() == names]
        distributions: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.CategoricalDistribution(sorted({values[name] for values, _ in trials}))
            for name in names
        }
        return _study(trials, distributions)

    def importances(self) -> dict[str, float]:
        """How much each parameter of the best config's variant matters for the time, by Optuna's PED-ANOVA; sum 1.

        Empty with fewer than :data:`LEAST_TRIALS` completed trials, or where all took as long.
        """
        study = self.study()
        if study is None:
            return {}
        values = [trial.value for trial in study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))]
        varied = [name for name in values_of(self.best) if self._varies(study, name)] if self.best else []
        if len(values) < LEAST_TRIALS or len(set(values)) < 2 or not varied:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            found = optuna.importance.get_param_importances(study, evaluator=evaluator, params=varied)
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))

    @staticmethod
    def _varies(study: optuna.Study, name: str) -> bool:
        return len({trial.params[name] for trial in study.trials if trial.value is not None}) > 1

    def values(self) -> dict[str, Any]:
        """The search as values for JSON."""
        return {
            "spec": str(self.spec),
            "provenance": self.provenance,
            "trials": len(self.tried),
            "rejected": self.rejected,
            "best": None if self.best is None else str(self.best),
            "best_us": self.best_us,
            "within_1_percent": self.within(0.01),
            "importances": self.importances(),
        }


def _study(
    trials: Iterable[tuple[dict[str, int], float | None]],
    distributions: dict[str, optuna.distributions.BaseDistribution],
) -> optuna.Study:
    study = optuna.create_study()
    state = optuna.trial.TrialState
    study.add_trials(
        optuna.trial.create_trial(
            state=state.PRUNED if us is None else state.COMPLETE,
            value=us,
            params=dict(values),
            distributions=distributions,
        )
        for values, us in trials
    )
    return study


@dataclass(frozen=True)
class Searches:
    """The searches of a storage at ``location`` (without a password); ``note`` says why there are none."""

    location: str
    found: tuple[Search, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Importance:
    """The median importance of a parameter over the searches of one operation that a variant won."""

    op: str
    variant: str
    parameter: str
    share: float
    searches: int


def values_of(config: Config) -> dict[str, int]:
    """The parameters of a config, warps and stages included."""
    return {**dict(config.params), "num_warps": config.num_warps, "num_stages": config.num_stages}


def read_searches(location: str | None, specs: Collection[KernelSpec]) -> Searches:
    """The searches of ``specs``, or all if there are none, from the storage at ``location``, the user's own if None.

    A storage that does not exist is not made.

    Raises:
        LocationError, StudyStorageError: ``location`` is given and cannot be read.
    """
    quiet()
    named = default_study_storage() if location is None else location
    told = without_password(named)
    path = storage_file(named)
    if path is not None and not path.exists():
        if location is not None:
            raise StudyStorageError(f"study storage {told}: there is no such file; name that of `doratune tune`")
        return Searches(told, note="there is no study storage yet")
    try:
        storage = open_study_storage(named)
        try:
            return Searches(told, tuple(patiently(named, lambda: _read(storage, specs))))
        finally:
            release(storage)
    except StudyStorageError as error:
        if location is not None:
            raise
        return Searches(told, note=str(error))


def _read(storage: optuna.storages.BaseStorage, specs: Collection[KernelSpec]) -> list[Search]:
    found: dict[tuple[KernelSpec, str], Search] = {}
    for study in storage.get_all_studies():
        named = spec_of_study(study.study_name)
        if named is None or (specs and named[0] not in specs):
            continue
        trials = storage.get_all_trials(storage.get_study_id_from_name(study.study_name), deepcopy=False)
        tried: dict[Config, Evaluation | None] = {judged.config: judged.evaluation for judged in read_trials(trials)}
        search = Search(*named, tuple((config, None if one is None else one.us) for config, one in tried.items()))
        other = found.get(named)  # a study of another template, Triton or GPU; the larger one says more
        if tried and (other is None or len(search.tried) > len(other.tried)):
            found[named] = search
    return sorted(found.values(), key=lambda search: (str(search.spec), search.provenance))


def importances_by_op(searches: Iterable[Search]) -> list[Importance]:
    """The median importances, by operation and variant, the most important parameter first."""
    shares: dict[tuple[str, str], list[dict[str, float]]] = {}
    for search in searches:
        if search.best is not None and (found := search.importances()):
            shares.setdefault((search.spec.op, search.best.variant), []).append(found)
    rows = [
        Importance(op, variant, name, statistics.median(one.get(name, 0.0) for one in several), len(several))
        for (op, variant), several in shares.items()
        for name in {name: None for one in several for name in one}
    ]
    return sorted(rows, key=lambda row: (row.op, row.variant, -row.share))


def shown_searches(searches: Iterable[Search]) -> list[Search]:
    """For each operation the search whose own plots are shown: with the most timed trials, then the slowest kernel."""
    best: dict[str, Search] = {}

    def size(search: Search) -> tuple[int, float]:
        return len(search.tried) - search.rejected, search.best_us or 0.0

    for search in searches:
        other = best.get(search.spec.op)
        if search.best_us is not None and (other is None or size(search) > size(other)):
            best[search.spec.op] = search
    return list(best.values())
