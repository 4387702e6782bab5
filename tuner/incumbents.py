"""The incumbents of a search: the configs that lookups give for its spec today.

They are tried first and play in the final, so that no search can make a spec slower than it was.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..cache.entry import MEASURED
from ..codegen.gpu import Gpu
from ..codegen.spec import Config, KernelSpec
from ..codegen.variants import check_config, default_config
from ..runtime.loader import resolve


@dataclass(frozen=True)
class Incumbents:
    """What lookups give for a spec before its search.

    Attributes:
        played: the configs that play in the final, by priority, each with the step of the lookup that gives it: first
            what runs today, then what would run without an entry of this spec, then the built-in default.
        without: the config that a lookup without an entry of this spec gives: the time it takes over the winner's is
            the lookup's regret.
        starts: other configs that did well for similar specs, the most promising first.
        known: whether the winner of another GPU of the architecture, or one for almost the same shape, is among them,
            so that few trials are enough.
    """

    played: tuple[tuple[Config, str], ...]
    without: Config
    starts: tuple[Config, ...] = ()
    known: bool = False

    @property
    def configs(self) -> tuple[Config, ...]:
        return tuple(dict.fromkeys(config for config, _ in self.played))

    def origins(self, config: Config) -> tuple[str, ...]:
        """The steps of the lookup that give ``config``; empty if it is no incumbent."""
        return tuple(dict.fromkeys(step for each, step in self.played if each == config))


def built_in(spec: KernelSpec, gpu: Gpu) -> Incumbents:
    """The incumbents where there are no stores: the built-in default alone."""
    default = default_config(spec, gpu)
    return Incumbents(played=((default, "default"),), without=default)


def incumbents_of(spec: KernelSpec, gpu: Gpu, store: str | None = None) -> Incumbents:
    """What the stack of stores gives for ``spec``; ``store``, if named, is asked first.

    Raises:
        StoreError: a store cannot be read.
    """
    now, _ = resolve(spec, store)
    without = now if now.step != "exact" else resolve(spec, store, exact=False)[0]
    played = [(now.config, now.step), (without.config, without.step)]
    default = default_config(spec, gpu)
    played.append((default, "default"))
    usable = tuple(dict.fromkeys(pair for pair in played if check_config(spec, pair[0], gpu) is None))
    weighed = tuple(each.offer.config for each in without.weighed)
    entry = without.entry
    known = entry is not None and entry.evaluation.provenance == MEASURED and without.distance is not None
    return Incumbents(
        played=usable,
        without=without.config,
        starts=tuple(config for config in weighed if config not in {config for config, _ in usable}),
        known=known and without.distance <= KNOWN_DISTANCE,  # type: ignore[operator]
    )


KNOWN_DISTANCE = 0.5
"""Distance (:func:`~doratune.cache.distance.distance`) of an entry up to which its winner makes few trials enough."""
