"""The search space of a spec as Optuna sees it: the variant, then the parameters of that variant."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence

import optuna

from ..codegen.gpu import Gpu
from ..codegen.render import template_digest
from ..codegen.spec import Config, KernelSpec, SpecError
from ..codegen.variants import check_config, variants_of

VARIANT = "variant"


class Space:
    """The configs that can be tried for ``spec`` on ``gpu``; ``also`` adds the values of configs from elsewhere.

    Attributes:
        choices: for each variant, the values of each of its parameters, warps and stages included.
        seeds: the known-good configs that fit, the variants taking turns.

    Raises:
        SpecError: no variant can run the spec on this GPU.
    """

    def __init__(self, spec: KernelSpec, gpu: Gpu, also: Iterable[Config] = ()) -> None:
        self.spec, self.gpu = spec, gpu
        self.choices: dict[str, dict[str, tuple[int, ...]]] = {}
        by_variant: list[list[Config]] = []
        for variant in variants_of(spec, gpu):
            seeds = [config for config in variant.seeds(spec, gpu) if check_config(spec, config, gpu) is None]
            # A seed may lie outside the choices, and a categorical parameter of Optuna cannot grow later.
            values = {name: set(given) for name, given in variant.choices(spec, gpu).items()}
            for config in seeds:
                for name, value in _values(config).items():
                    values[name].add(value)
            self.choices[variant.name] = {name: tuple(sorted(given)) for name, given in sorted(values.items())}
            by_variant.append(seeds)
        if not self.choices:
            raise SpecError(f"{spec}: no variant of {spec.op} runs on {gpu.slug}")
        self._declared = repr(self.choices)
        for config in also:
            self._widen(config)
        turns = itertools.chain.from_iterable(itertools.zip_longest(*by_variant))
        self.seeds: tuple[Config, ...] = tuple(dict.fromkeys(config for config in turns if config is not None))

    def _widen(self, config: Config) -> None:
        """Add the values of a valid config to the choices."""
        choices = self.choices.get(config.variant, {})
        values = _values(config)
        if choices.keys() == values.keys() and self.refuse(config) is None:
            self.choices[config.variant] = {
                name: tuple(sorted({*given, values[name]})) for name, given in choices.items()
            }

    def __contains__(self, config: Config) -> bool:
        choices = self.choices.get(config.variant, {})
        values = _values(config)
        return values.keys() == choices.keys() and all(value in choices[name] for name, value in values.items())

    def digest(self) -> str:
        """SHA-256 over the space, without what was added, and the templates behind it: a study is valid for one."""
        digest = hashlib.sha256(self._declared.encode())
        for name in self.choices:
            digest.update(template_digest(self.spec.op, name).encode())
        return digest.hexdigest()

    def refuse(self, config: Config) -> str | None:
        """Why ``config`` cannot be used, as far as that is known without compiling, or None."""
        return check_config(self.spec, config, self.gpu)

    def suggest(self, trial: optuna.Trial) -> Config:
        """Let a trial pick a config."""
        variant = trial.suggest_categorical(VARIANT, tuple(self.choices))
        choices = self.choices[variant]
        picked = {name: trial.suggest_categorical(f"{variant}.{name}", values) for name, values in choices.items()}
        return Config.create(variant, **picked)

    def params(self, config: Config) -> dict[str, str | int]:
        """The parameters with which a trial picks ``config``, for ``study.enqueue_trial``."""
        named = {f"{config.variant}.{name}": value for name, value in _values(config).items()}
        return {VARIANT: config.variant, **named}

    def distributions(self, config: Config) -> dict[str, optuna.distributions.BaseDistribution]:
        """The distribution of each of :meth:`params`, as :meth:`suggest` declares them."""
        categorical = optuna.distributions.CategoricalDistribution
        choices = self.choices[config.variant]
        named = {f"{config.variant}.{name}": categorical(values) for name, values in choices.items()}
        return {VARIANT: categorical(tuple(self.choices)), **named}

    def draw(self, chance: random.Random, near: Sequence[Config] = ()) -> Config:
        """A config drawn uniformly over variants and values, or one of ``near`` with up to three values drawn anew.

        It may be one that is refused.
        """
        if not near:
            variant = chance.choice(tuple(self.choices))
            drawn = {name: chance.choice(values) for name, values in self.choices[variant].items()}
            return Config.create(variant, **drawn)
        start = chance.choice(near)
        choices = self.choices[start.variant]
        changed = chance.sample(tuple(choices), k=chance.randint(1, min(3, len(choices))))
        return Config.create(start.variant, **_values(start) | {name: chance.choice(choices[name]) for name in changed})

    def moves(self, config: Config) -> Iterator[Config]:
        """The configs that differ from ``config`` in one value. They may be refused."""
        for name, values in self.choices[config.variant].items():
            for value in values:
                if value != _values(config)[name]:
                    yield Config.create(config.variant, **_values(config) | {name: value})

    def steps(self, config: Config) -> Iterator[Config]:
        """The :meth:`moves` to the next larger or smaller value of a parameter."""
        values = _values(config)
        for name, choices in self.choices[config.variant].items():
            place = choices.index(values[name])
            for next_value in (*choices[max(0, place - 1) : place], *choices[place + 1 : place + 2]):
                yield Config.create(config.variant, **values | {name: next_value})

    def all(self) -> Iterator[Config]:
        """Every config, refused ones included."""
        for variant, choices in self.choices.items():
            for values in itertools.product(*choices.values()):
                yield Config.create(variant, **dict(zip(choices, values, strict=True)))

    def size(self) -> int:
        """The number of configs, refused ones included."""
        total = 0
        for values in self.choices.values():
            count = 1
            for given in values.values():
                count *= len(given)
            total += count
        return total


def _values(config: Config) -> dict[str, int]:
    return {**dict(config.params), "num_warps": config.num_warps, "num_stages": config.num_stages}
