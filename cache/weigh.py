"""Weigh the configs that could serve a spec that was never measured: which one is expected to lose the least?

A config comes from an :class:`Offer`: an entry near the wanted spec whose config won there or came close, as it is or
with its shape-bound parameters re-derived; or one of the built-in configs. Its expected loss has two parts:

- **what the performance model says of the wanted spec**: the config's time over that of the best offer. A model that is
  fitted to measurements is believed, a bare roofline model hardly;
- **where the config comes from**: it was measured at this very shape on a sister GPU, at another shape, or nowhere.

:data:`FITTED` and :data:`ROOFLINE` are chosen by leaving each spec of the recorded tables out in turn
(``benchmarks/tables/lookup_loss.py``); so are :data:`DEFAULT_FACTOR` and :data:`DEFAULT_MOST`. Measured times of
different entries are not compared: they come from many machines, and a store may come from anybody. The config that is
found depends on the offers only, not on their order; of entries that offer it equally, the first counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from ..codegen.spec import Config
from .entry import MEASURED
from .neighbours import Candidate


@dataclass(frozen=True)
class Weights:
    """How much the model is believed, and what each kind of origin is expected to lose besides (as logarithms).

    Attributes:
        trust: the share of a modelled difference that is believed.
        per_distance: the entry is for another shape: for each unit of its distance from the wanted one.
        farthest: beyond this distance a winner says no less than at it.
        rederived: its config was changed, so nobody timed it anywhere.
        unmeasured: its config was only predicted to win.
        built_in: the config is a built-in one, and it was not measured what the first of them loses.
        further: it is not the first of them, whose order says more than a bare roofline model.
    """

    trust: float
    per_distance: float
    farthest: float
    rederived: float
    unmeasured: float
    built_in: float
    further: float


FITTED = Weights(
    trust=1.0, per_distance=0.1, farthest=2.0, rederived=0.005, unmeasured=0.12, built_in=0.26, further=0.0
)
ROOFLINE = Weights(
    trust=0.1, per_distance=0.01, farthest=6.0, rederived=0.01, unmeasured=0.2, built_in=0.4, further=0.6
)
DEFAULT_FACTOR = 2.5
"""The first built-in config is expected to lose so many times what it lost on average."""
DEFAULT_MOST = 5.0
"""And at most so many times, whatever the model says of it."""
UNKNOWN = 0.2
"""The modelled loss of a config of which the model knows nothing, while it knows others."""


@dataclass(frozen=True)
class Model:
    """The performance model of one spec: relative times of configs, infinite where it cannot tell.

    ``fitted`` tells whether it was fitted to measurements on this architecture. ``default_loss`` is what the first
    built-in config lost there on average, as a logarithm; None if that was not measured of such dtypes.
    """

    relative_us: Callable[[Config], float]
    fitted: bool
    default_loss: float | None = None


NO_MODEL = Model(lambda config: 1.0, fitted=False)


@dataclass(frozen=True)
class Offer:
    """A config that could serve, by the ``step`` of the lookup that brought it.

    ``candidate`` is the entry that it comes from and ``store`` that entry's place, None for a built-in config.
    ``rederived``: it is not the entry's own config. ``behind`` is the measured time over the winner's at the entry.
    ``first``: it is the first of the built-in configs.
    """

    config: Config
    step: str
    candidate: Candidate | None = None
    store: str | None = None
    rederived: bool = False
    behind: float = 1.0
    first: bool = False


@dataclass(frozen=True)
class Weighed:
    """An offer with its expected loss against the best config, as a share of that one's time."""

    offer: Offer
    loss: float


def weigh(offers: Collection[Offer], model: Model = NO_MODEL) -> list[Weighed]:
    """Return the offers with their expected losses, the least first; of offers of one config the best one."""
    weights = FITTED if model.fitted else ROOFLINE
    best: dict[Config, tuple[tuple[float, float, str, str], Offer]] = {}
    for offer in offers:
        source = offer.candidate
        apart, text = (math.inf, "") if source is None else (source.distance, str(source.spec))
        key = (_origin_loss(offer, weights, model.default_loss), apart, offer.step, text)
        if offer.config not in best or key < best[offer.config][0]:
            best[offer.config] = (key, offer)
    times = {config: model.relative_us(config) for config in best}
    known = [us for us in times.values() if 0 < us < math.inf]
    least = min(known, default=1.0)
    losses = {
        config: key[0] + (weights.trust * math.log(us / least) if 0 < (us := times[config]) < math.inf else UNKNOWN)
        for config, (key, _) in best.items()
    }
    first = next((offer.config for offer in offers if offer.first), None)  # an entry may offer it too
    if first is not None and model.default_loss is not None:  # measurements know more of it than the model
        losses[first] = min(losses[first], DEFAULT_MOST * model.default_loss)
    order = sorted(best, key=lambda config: (losses[config], best[config][0][1:], str(config)))
    return [Weighed(best[config][1], math.expm1(min(losses[config], 20.0))) for config in order]


def _origin_loss(offer: Offer, weights: Weights, default_loss: float | None) -> float:
    """The expected loss of an offer by where it comes from."""
    source = offer.candidate
    if source is None:
        if offer.first and default_loss is not None:
            return DEFAULT_FACTOR * default_loss
        return weights.built_in + weights.further * (not offer.first)
    loss = weights.per_distance * min(source.distance, weights.farthest)
    loss += weights.rederived * offer.rederived + weights.unmeasured * (source.provenance != MEASURED)
    return loss + math.log(max(offer.behind, 1.0))
