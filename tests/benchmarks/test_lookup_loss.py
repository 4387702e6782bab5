"""On the recorded tables a lookup without tuning loses little, its bound holds, and one more store does no harm.

Each spec is left out in turn, of the stores and of what the performance model is fitted to.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import pytest

from doratune.benchmarks.tables.fit import Fitting, document
from doratune.benchmarks.tables.lookup_loss import Loss, bounds, losses, nearest_measured, quantile, winners
from doratune.benchmarks.tables.read import SHORT, SpecTable, Table, Timing, read_tables, recorded
from doratune.cache.bound import ENOUGH_MEASURED, bound_of
from doratune.cache.entry import Entry
from doratune.cache.neighbours import Regret
from doratune.cache.stack import prebuilt_paths
from doratune.cache.store import Store
from doratune.codegen.fit import FIT_FILE, read_fit
from doratune.codegen.gpu import find_gpu
from doratune.codegen.spec import TILE_DTYPES, Config, KernelSpec

TABLES = {gpu: read_tables(gpu) for gpu in recorded()}
ALL = [table for tables in TABLES.values() for table in tables]
STEP_OPS = {
    "lora_compose", "lora_compose_group", "compose_backward", "compose_backward_group", "adapter_backward",
    "compose_swiglu", "compose_swiglu_backward", "weight_norm_group",
}  # fmt: skip
WHOLE = [gpu for gpu, tables in TABLES.items() if {table.op for table in tables} >= STEP_OPS]
"""GPUs with tables of every operation of a step. Others have tables of the specs where lookups lost most, with the
built-in configs, the winners of other specs and few more."""
DRAWN = [gpu for gpu in TABLES if gpu not in WHOLE]
MOST_MISSING = 0.05
"""Share of the lookups whose config is not in a table, at most. These are told apart: their times are a neighbour's."""


@functools.cache
def fitting() -> Fitting:
    return Fitting(ALL)


@functools.cache
def lost(gpu: str) -> dict[str, list[Loss]]:
    """What lookups lose on one GPU with the winners of this GPU, by operation."""
    return {table.op: losses(table, [winners(table)], fitting()) for table in TABLES[gpu]}


@pytest.mark.slow
@pytest.mark.parametrize("gpu", WHOLE)
def test_a_lookup_of_a_spec_that_was_never_measured_loses_little(gpu: str) -> None:
    every = [loss for found in lost(gpu).values() for loss in found]
    known = [loss for loss in every if not loss.missing]
    assert not [loss for loss in every if loss.rejected]
    assert len(every) - len(known) <= MOST_MISSING * len(every)
    regrets = [loss.regret for loss in known]
    assert statistics.median(regrets) <= 1.01
    assert statistics.mean(regrets) <= 1.025
    assert quantile(regrets, 0.95) <= 1.09
    assert max(regrets) <= 1.41
    for op, found in lost(gpu).items():
        assert statistics.median(loss.regret for loss in found) <= 1.03, op


@pytest.mark.parametrize("gpu", DRAWN)
def test_lookups_of_the_specs_that_lost_most_lose_little(gpu: str) -> None:
    """Before the built-in configs were chosen by these tables too, the average was 1.08 and the worst 1.69."""
    known = [loss.regret for found in lost(gpu).values() for loss in found if not (loss.missing or loss.rejected)]
    assert len(known) > 120
    assert statistics.median(known) <= 1.02
    assert statistics.mean(known) <= 1.035
    assert quantile(known, 0.95) <= 1.12
    assert max(known) <= 1.22


@pytest.mark.parametrize("gpu", WHOLE)
def test_where_the_built_in_config_is_good_no_entry_replaces_it_by_a_bad_one(gpu: str) -> None:
    """The operations of a model's step whose first built-in config loses 3 % at most on average."""
    losses_of_defaults = fitting().fit().default_losses
    good = {op: found for op, found in lost(gpu).items() if losses_of_defaults[op] < 0.03}
    assert good.keys() >= {"lora_compose", "compose_backward", "compose_swiglu", "compose_swiglu_backward"}
    assert good.keys() >= {"lora_compose_group", "compose_backward_group", "weight_norm_group", "adapter_backward"}
    for op, found in good.items():
        assert statistics.mean(loss.regret for loss in found) <= 1.04, op
        assert max(loss.regret for loss in found) <= 1.25, op


@pytest.mark.xfail(strict=True, reason="the target is not reached: 1.404 on the H100's tables")
@pytest.mark.parametrize("gpu", WHOLE)
def test_the_target_of_a_lookup_is_reached(gpu: str) -> None:
    regrets = [loss.regret for found in lost(gpu).values() for loss in found if not loss.missing]
    assert quantile(regrets, 0.95) <= 1.10
    assert max(regrets) <= 1.20


@pytest.mark.parametrize("gpu", TABLES)
def test_the_printed_bound_holds_for_19_lookups_of_20(gpu: str) -> None:
    tables = {table.op: table for table in TABLES[gpu]}
    pairs = [pair for op, found in lost(gpu).items() for pair in bounds(tables[op], found)]
    known = [(bound.loss, loss.regret - 1.0) for bound, loss in pairs if bound.loss is not None]
    assert len(known) >= 0.9 * len(pairs)
    assert sum(loss <= bound for bound, loss in known) >= 0.95 * len(known)


@pytest.mark.parametrize("part", ["shape", "rank", "tokens"])
def test_the_bounds_of_the_shipped_losses_hold_for_parts_that_are_left_out(part: str) -> None:
    """The rule is exact where shapes are drawn as the measured ones; here each part is judged by all the others."""
    parts: dict[str, Callable[[KernelSpec], object]] = {
        "shape": lambda spec: (*spec.widths, spec.d_in),
        "rank": lambda spec: spec.rank,
        "tokens": lambda spec: spec.tokens,
    }
    by_kind: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    (path,) = (path for path in prebuilt_paths() if path.stem == "h100-sxm")
    with Store.open(path, readonly=True) as store:
        for entry in store.entries():
            if entry.lookup_regret is not None:
                spec = entry.spec
                by_kind[spec.op, *(getattr(spec, role) for role in TILE_DTYPES)].append(entry)
    held = []
    for entries in by_kind.values():
        for one in entries:
            of = parts[part]
            others = [
                Regret(each.spec.gpu, str(each.spec), 0.0, each.lookup_regret or 1.0)
                for each in entries
                if of(each.spec) != of(one.spec)
            ]
            if len(others) >= ENOUGH_MEASURED:
                loss = bound_of(one.spec.op, one.spec.gpu, others).loss
                assert loss is not None
                held.append((one.lookup_regret or 1.0) - 1.0 <= loss + 1e-9)
    assert len(held) > 100
    assert sum(held) / len(held) >= 0.94


def _norms_of_llama(spec: KernelSpec) -> bool:
    return spec.rank in (0, 384) and spec.d_out in (1024, 4096, 14336)


def _small_models(spec: KernelSpec) -> bool:
    return spec.d_out in (896, 1152, 2048, 4864)


@functools.cache
def changes(gpu: str, model: Callable[[KernelSpec], bool]) -> list[float]:
    """The times of the other specs' lookups with a store of one model's winners in front, over those without it."""
    ratios = []
    for table in TABLES[gpu]:
        tuned = [entry for entry in winners(table) if model(entry.spec)]
        others: list[Entry] = [entry for entry in winners(table) if not model(entry.spec)]
        rest = replace(table, specs={spec: part for spec, part in table.specs.items() if not model(spec)})
        if not tuned or not rest.specs:
            continue
        alone, behind = losses(rest, [others], fitting()), losses(rest, [tuned, others], fitting())
        ratios += [
            after.regret / before.regret
            for before, after in zip(alone, behind, strict=True)
            if not before.missing and not after.missing
        ]
    return ratios


@pytest.mark.slow
@pytest.mark.parametrize("model", [_norms_of_llama, _small_models])
@pytest.mark.parametrize("gpu", WHOLE)
def test_one_more_store_makes_few_lookups_slower(gpu: str, model: Callable[[KernelSpec], bool]) -> None:
    ratios = changes(gpu, model)
    assert len(ratios) > 30
    assert sum(ratio > 1.02 for ratio in ratios) <= max(0.08 * len(ratios), 6)
    assert max(ratios) <= 1.25


@pytest.mark.xfail(strict=True, reason="the target is not reached: some lookups lose more than 2 %")
@pytest.mark.parametrize("gpu", WHOLE)
def test_one_more_store_makes_no_lookup_slower(gpu: str) -> None:
    ratios = [*changes(gpu, _norms_of_llama), *changes(gpu, _small_models)]
    assert max(ratios) <= 1.02


def test_the_shipped_fit_is_that_of_the_committed_tables() -> None:
    """Fitted again, it ranks as the shipped one (the last digits depend on the machine).

    After new tables run ``python -m doratune.benchmarks.tables.fit``.
    """
    made = read_fit(document(fitting().fit(), []))
    shipped = read_fit(json.loads(FIT_FILE.read_text(encoding="utf-8")))
    assert made.polynomials.keys() == shipped.polynomials.keys()
    assert shipped.default_losses == pytest.approx(dict(made.default_losses)), "also after a change of built-in configs"
    for table in ALL:
        part = next(iter(table))
        gpu = find_gpu(table.gpu)
        for config in list(part.times)[:20]:
            assert made.relative_us(part.spec, config, gpu) == pytest.approx(
                shipped.relative_us(part.spec, config, gpu), rel=1e-3
            )


SPEC = KernelSpec.parse("compose_forward/d_out=4096/tokens=128/activation=bf16@h100-sxm")


def config(block_n: int, warps: int) -> Config:
    return Config.create("tile", block_t=4, block_n=block_n, num_warps=warps, num_stages=2)


def test_a_missing_config_counts_as_the_nearest_measured_one() -> None:
    times = {config(256, 4): 3.0, config(512, 4): 4.0, config(1024, 8): 5.0}
    part = SpecTable(SPEC, {each: Timing(us, SHORT) for each, us in times.items()})
    assert nearest_measured(part, config(1024, 4)) == config(
        1024, 8
    )  # of two that differ by a factor of two, the slower
    assert nearest_measured(part, config(128, 4)) == config(256, 4)
    assert nearest_measured(part, replace(config(512, 8), variant="other")) is None


def test_the_bound_of_a_spec_does_not_use_its_own_loss() -> None:
    specs = [replace(SPEC, d_out=1024 * index) for index in range(1, 8)]
    found = [Loss(spec, config(256, 4), "nearest", 1.02) for spec in specs[:-1]]
    found.append(Loss(specs[-1], config(256, 4), "nearest", 3.0))
    table = Table(FIT_FILE, "h100-sxm", "compose_forward", {}, {})
    pairs = bounds(table, found)
    assert pairs[-1][0].loss is not None
    assert pairs[-1][0].loss < 0.1
    assert not math.isinf(pairs[-1][1].regret)
    assert all(bound.loss is not None and bound.loss > 1.0 for bound, _ in pairs[:-1])
