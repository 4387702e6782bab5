"""The performance model fitted to recorded tables: which config of a spec is faster, on GPUs that were measured.

The roofline model (:mod:`.cost`) knows what limits a kernel, but not how well the compiler schedules it. The rest
is fitted: for each variant, the logarithm of the time, relative to the other configs of the spec, is a polynomial of
second degree in the logarithms of the parameters and of what the roofline model derives from them (:func:`features`).
``fit.json`` holds the coefficients; ``python -m doratune.benchmarks.tables.fit`` makes it from ``benchmarks/tables/``.

The result only compares configs of one spec: it is a time up to a factor that the spec's configs have in common.
"""

from __future__ import annotations

import functools
import json
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cost import DoesNotFitError, guessed, launch_us, library_us
from .gpu import Gpu
from .ops import DTYPE_BYTES
from .spec import Config, KernelSpec
from .variants import find_variant

FIT_FILE = Path(__file__).with_name("fit.json")
SIDE = "side_"
"""Features of the launches beside the main one: they enter alone and squared, not multiplied with others."""
NEVER_US = 1e4
"""What a launch counts that fits no multiprocessor, in microseconds."""


def features(spec: KernelSpec, config: Config, gpu: Gpu) -> dict[str, float]:
    """What the polynomial is made of, by name; logarithms are to base 2.

    ``p_*`` are the config's parameters. Of the main launch, the one with the most products or else bytes: ``programs``
    on a multiprocessor, the share of the last wave that is idle (``tail``), ``steps``, ``bytes`` of a program, its
    modelled time ``us``; ``total`` is that of all launches and cuBLAS calls. Of each other launch, its programs and its
    share of the total.
    """
    launches = [work for work in find_variant(spec.op, config.variant).work(spec, config) if work.programs > 0]
    values = {f"p_{name}": math.log2(value) if value else -1.0 for name, value in config.params}
    values["p_num_warps"], values["p_num_stages"] = math.log2(config.num_warps), math.log2(config.num_stages)
    times = []
    for work in launches:
        try:
            times.append(launch_us(config, work, guessed(config, work, gpu), gpu))
        except DoesNotFitError:
            times.append(NEVER_US)
    total = sum(times) + library_us(spec, config, gpu)
    main = max(range(len(launches)), key=lambda index: (launches[index].matrix_flops, launches[index].l2_bytes))
    for index, (work, us) in enumerate(zip(launches, times, strict=True)):
        programs = work.programs / gpu.multiprocessors
        if index == main:
            values["programs"] = math.log2(programs)
            values["tail"] = math.log2(math.ceil(programs) / programs)
            values["steps"] = math.log2(max(work.steps, 1))
            values["bytes"] = math.log2(work.l2_bytes / work.programs + 1)
            values["us"], values["total"] = math.log2(us), math.log2(total)
        else:
            values[f"{SIDE}programs_{work.kernel}"] = math.log2(programs)
            values[f"{SIDE}share_{work.kernel}"] = us / total
    return values


@dataclass(frozen=True)
class Polynomial:
    """The fitted polynomial of one variant.

    Each feature is clamped to the range in which it was measured, then centred and scaled. ``coefficients`` are the
    constant, one for each feature, one for each product of two features that are not :data:`SIDE` (in the order of
    :func:`terms`), and one for each square of a side feature.
    """

    names: tuple[str, ...]
    least: tuple[float, ...]
    most: tuple[float, ...]
    centre: tuple[float, ...]
    scale: tuple[float, ...]
    coefficients: tuple[float, ...]

    def scaled(self, values: Mapping[str, float]) -> list[float]:
        """The features as they enter the polynomial; one that a config does not have counts as 0."""
        rows = zip(self.names, self.least, self.most, self.centre, self.scale, strict=True)
        return [
            (min(max(values.get(name, 0.0), low), high) - centre) / scale for name, low, high, centre, scale in rows
        ]

    def __call__(self, values: Mapping[str, float]) -> float:
        """The logarithm of the relative time."""
        return math.fsum(map(operator.mul, self.coefficients, terms(self.names, self.scaled(values))))


def terms(names: tuple[str, ...], scaled: list[float]) -> list[float]:
    """The terms of the polynomial at these scaled features."""
    inner = [value for name, value in zip(names, scaled, strict=True) if not name.startswith(SIDE)]
    products = [one * other for index, one in enumerate(inner) for other in inner[index:]]
    squares = [value * value for name, value in zip(names, scaled, strict=True) if name.startswith(SIDE)]
    return [1.0, *scaled, *products, *squares]


@dataclass(frozen=True)
class Fit:
    """The polynomials by operation and variant, and the architectures that they were measured on.

    ``default_losses`` are by operation the average logarithm of the first built-in config's time over the best's.
    """

    architectures: frozenset[str]
    polynomials: Mapping[tuple[str, str], Polynomial]
    default_losses: Mapping[str, float] = field(default_factory=dict)

    def covers(self, spec: KernelSpec, gpu: Gpu) -> bool:
        """Whether configs of ``spec`` can be compared: measured architecture and operation, 16 bits, plain W."""
        known = gpu.architecture in self.architectures and DTYPE_BYTES[spec.wide] == 2
        return known and spec.format is None and any(op == spec.op for op, _ in self.polynomials)

    def default_loss(self, spec: KernelSpec) -> float | None:
        """What the first built-in config lost on average, None if not measured: exact fp32 adapters have others."""
        exact = spec.adapter == "fp32" and not spec.autocast
        return None if exact else self.default_losses.get(spec.op)

    def relative_us(self, spec: KernelSpec, config: Config, gpu: Gpu) -> float:
        """The time of a config up to a factor that all configs of ``spec`` have in common; infinite where unknown."""
        polynomial = self.polynomials.get((spec.op, config.variant))
        return math.inf if polynomial is None else math.exp(polynomial(features(spec, config, gpu)))


@functools.cache
def fitted() -> Fit:
    """The fit that comes with the package."""
    return read_fit(json.loads(FIT_FILE.read_text(encoding="utf-8")))


def read_fit(data: Any) -> Fit:
    """The fit in parsed JSON."""
    polynomials = {
        (op, variant): Polynomial(**{name: tuple(values) for name, values in part.items()})
        for op, variants in data["ops"].items()
        for variant, part in variants.items()
    }
    return Fit(frozenset(data["architectures"]), polynomials, data["default_losses"])
