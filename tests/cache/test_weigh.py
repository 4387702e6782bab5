"""Among offers the one with the least expected loss is chosen, whatever their order; absurd times in a store
attract nothing; the bound of the loss holds as often as it says.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doratune.cache.bound import (
    LEAST_LOSS,
    LEAST_MEASURED,
    LEVEL,
    MARGIN,
    MOST_LOSS,
    Bound,
    bound_of,
    stretch,
    without_neighbours,
)
from doratune.cache.entry import MEASURED
from doratune.cache.neighbours import Candidate, Regret
from doratune.cache.weigh import FITTED, ROOFLINE, Model, Offer, weigh
from doratune.codegen.spec import Config, KernelSpec

from .world import PREDICTED, a_spec


def a_config(warps: int) -> Config:
    return Config.create("tile", num_warps=warps, num_stages=2, block_n=128)


def near(
    spec: KernelSpec, warps: int = 4, *, distance: float = 1.0, provenance: str = MEASURED, us: float = 20.0
) -> Offer:
    candidate = Candidate(spec, a_config(warps), "template-1", provenance, us, distance=distance)
    step = "nearest" if spec.gpu == "h200" else "architecture"
    return Offer(candidate.config, step, candidate, "/team.sqlite")


def modelled(times: dict[int, float], *, fitted: bool = True) -> Model:
    """A model that knows the times of configs by their warps."""
    return Model(lambda config: times[config.num_warps], fitted)


BUILT_IN = Offer(a_config(1), "default")
HERE, SISTER = near(a_spec(rank=256), 4), near(a_spec("h100"), 8, distance=0.0)


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ({1: 10.0, 4: 10.0, 8: 10.0}, SISTER),  # the very shape was measured there
        ({1: 10.0, 4: 8.0, 8: 10.0}, HERE),  # the model sees a large difference
        ({1: 10.0, 4: 9.8, 8: 10.0}, SISTER),  # and a small one
        ({1: 5.0, 4: 10.0, 8: 10.0}, BUILT_IN),
        ({1: float("inf"), 4: 10.0, 8: 10.1}, SISTER),
    ],
)
def test_the_model_is_weighed_against_where_a_config_was_measured(times: dict[int, float], winner: Offer) -> None:
    best = weigh([BUILT_IN, HERE, SISTER], modelled(times))[0]
    assert best.offer == winner
    assert best.loss >= -1e-9


def test_the_first_built_in_config_counts_by_what_it_lost_where_that_was_measured() -> None:
    first, second = replace(BUILT_IN, first=True), Offer(a_config(2), "default")
    same = modelled({1: 10.0, 2: 10.0, 4: 10.0})
    order = {loss: weigh([second, first, HERE], replace(same, default_loss=loss)) for loss in (None, 0.01, 0.5)}
    assert [each.offer for each in order[0.01]] == [first, HERE, second]
    assert [each.offer for each in order[0.5]] == [HERE, second, first]
    assert order[None][0].offer == HERE
    assert order[None][1].loss == order[None][2].loss == order[0.5][1].loss


def test_an_entry_that_offers_the_first_built_in_config_too_makes_it_no_worse() -> None:
    first, rival = replace(BUILT_IN, first=True), Offer(a_config(2), "default")
    slow = replace(modelled({1: 20.0, 2: 10.0}), default_loss=0.01)
    alone = weigh([first, rival], slow)
    assert alone[0].offer == first
    too = weigh([first, rival, near(a_spec("h100"), 1, distance=0.0)], slow)
    assert too[0].offer.config == first.config
    assert too[0].loss <= alone[0].loss


def test_without_a_fit_the_built_in_configs_go_in_their_order() -> None:
    first, second = replace(BUILT_IN, first=True), Offer(a_config(2), "default")
    times = {1: 20.0, 2: 10.0}
    assert weigh([second, first], modelled(times, fitted=False))[0].offer == first
    assert weigh([second, first], modelled(times))[0].offer == second


def test_a_model_that_is_not_fitted_is_hardly_believed() -> None:
    times = {1: 4.0, 4: 10.0, 8: 10.0}
    assert weigh([BUILT_IN, HERE], modelled(times))[0].offer == BUILT_IN
    assert weigh([BUILT_IN, HERE], modelled(times, fitted=False))[0].offer == HERE


def test_predicted_winners_count_less_than_measured_ones() -> None:
    same = {4: 10.0, 8: 10.0}
    predicted = near(a_spec("h100"), 8, distance=0.0, provenance=PREDICTED)
    for fitted in (True, False):
        assert weigh([predicted, HERE], modelled(same, fitted=fitted))[0].offer == HERE


def test_a_runner_up_counts_by_what_it_lost_where_it_was_measured() -> None:
    behind = replace(HERE, config=a_config(2), behind=1.10)
    found = weigh([behind, HERE], modelled({2: 10.0, 4: 10.0}))
    assert [each.offer for each in found] == [HERE, behind]
    assert found[1].loss / found[0].loss > 1.5
    assert weigh([replace(behind, behind=0.01), HERE], modelled({2: 10.0, 4: 10.0}))[1].loss == pytest.approx(
        found[0].loss
    )  # a store may claim anything: a runner-up never counts more than a winner


def test_absurd_times_of_an_entry_attract_nothing() -> None:
    times = {4: 10.0, 8: 10.0}
    order = [each.offer.config for each in weigh([HERE, SISTER], modelled(times))]
    for us in (1e-9, 1e12):
        absurd = near(a_spec(rank=256), 4, us=us)
        assert [each.offer.config for each in weigh([absurd, SISTER], modelled(times))] == order


OFFERS = [
    BUILT_IN,
    *(near(a_spec(rank=rank), warps, distance=rank / 100) for rank in (16, 64, 256) for warps in (2, 4, 8)),
    *(near(a_spec("h100", rank=rank), warps, distance=rank / 100) for rank in (64, 384) for warps in (4, 16)),
]


@given(st.integers(0, 1 << 30), st.lists(st.floats(0.1, 100.0), min_size=5, max_size=5))
def test_the_order_of_the_offers_does_not_matter(seed: int, times: list[float]) -> None:
    model = modelled(dict(zip((1, 2, 4, 8, 16), times, strict=True)))
    shuffled = random.Random(seed).sample(OFFERS, len(OFFERS))
    assert weigh(shuffled, model) == weigh(OFFERS, model)


@given(st.lists(st.floats(0.5, 2.0), min_size=5, max_size=5), st.integers(1, len(OFFERS)))
def test_one_more_offer_never_makes_the_expected_time_worse(times: list[float], count: int) -> None:
    by_warps = dict(zip((1, 2, 4, 8, 16), times, strict=True))

    def expected_us(offers: list[Offer]) -> float:
        best = weigh(offers, modelled(by_warps))[0]
        least = min(by_warps[offer.config.num_warps] for offer in offers)
        return (1 + best.loss) * least

    assert expected_us(OFFERS[: count + 1]) <= expected_us(OFFERS[:count]) * (1 + 1e-9)


@pytest.mark.parametrize("weights", [FITTED, ROOFLINE])
def test_what_nobody_measured_is_expected_to_lose_more(weights: object) -> None:
    model = modelled({1: 10.0, 4: 10.0}, fitted=weights is FITTED)
    far = near(a_spec(rank=16), 4, distance=100.0)
    assert [each.offer for each in weigh([BUILT_IN, far], model)] == [far, BUILT_IN]


def regrets(*values: float, gpu: str = "h200") -> list[Regret]:
    return [Regret(gpu, f"spec-{index}", 1.0, value) for index, value in enumerate(values)]


def test_the_bound_is_the_95_percent_quantile_of_the_measured_lookups() -> None:
    values = [1.0 + index / 1000 for index in range(100)]
    bound = bound_of("lora_compose", "h200", regrets(*values))
    assert bound == Bound("lora_compose", pytest.approx(0.095), 100, ("h200",))
    assert str(bound) == "≤ 10 % (95 % of 100 measured lookups of lora_compose on h200)"


def test_from_19_lookups_on_the_largest_loss_is_not_widened() -> None:
    bounds = {count: bound_of("lora_compose", "h200", regrets(*[1.05] * count)).loss for count in (18, 19)}
    assert bounds[19] == pytest.approx(0.05)
    assert bounds[18] is not None
    assert 0.05 * MARGIN <= bounds[18] < 0.06 * MARGIN


def test_few_lookups_give_a_wider_bound_and_too_few_none() -> None:
    six = bound_of("lora_compose", "h200", regrets(1.0, 1.01, 1.02, 1.03, 1.02, 1.04))
    assert six.loss is not None
    assert 0.04 * MARGIN < six.loss < 0.08 * MARGIN
    assert str(bound_of("lora_compose", "h200", regrets(1.1, 1.2))) == (
        "unknown: only 2 measured lookups of lora_compose on h200"
    )
    assert (
        str(bound_of("lora_compose", "h200", regrets(1.1))) == "unknown: only 1 measured lookup of lora_compose on h200"
    )
    assert str(bound_of("lora_compose", "h200", [])) == "unknown: no measured lookups of lora_compose on h200"


def test_a_choice_without_entries_near_has_no_bound_whatever_was_measured() -> None:
    bound = without_neighbours(bound_of("lora_compose", "h200", regrets(*[1.02] * 10)))
    assert bound.loss is None
    assert str(bound) == "unknown: the 10 measured lookups of lora_compose on h200 are of shapes with entries near"


def test_an_absurd_regret_counts_as_a_large_one() -> None:
    assert bound_of("lora_compose", "h200", regrets(*[1e308] * 20)).loss == MOST_LOSS


def test_a_gpu_with_few_lookups_borrows_those_of_its_sisters_and_says_so() -> None:
    sister = regrets(*[1.02] * 10, gpu="h100")
    bound = bound_of("lora_compose", "h200", regrets(1.3) + sister)
    assert (bound.gpus, bound.measured) == (("h100", "h200"), 11)
    assert "on h100 and h200" in str(bound)
    assert bound_of("lora_compose", "h200", regrets(*[1.1] * LEAST_MEASURED) + sister).gpus == ("h200",)


def test_one_spec_in_two_stores_is_one_lookup_and_the_worse_counts() -> None:
    once = bound_of("lora_compose", "h200", regrets(*[1.05] * 6))
    twice = bound_of("lora_compose", "h200", regrets(*[1.05] * 6) + regrets(*[1.01] * 6))
    assert once == twice


@pytest.mark.parametrize("regret", [0.0, 0.5, 1.0])
def test_a_store_that_claims_gains_cannot_push_the_bound_below_the_noise(regret: float) -> None:
    assert bound_of("lora_compose", "h200", regrets(*[regret] * 30)).loss == LEAST_LOSS


def test_the_largest_of_19_needs_no_stretching() -> None:
    assert stretch(19) == pytest.approx(1.0, abs=1e-6)
    assert stretch(5) > stretch(10) > stretch(18) > 1.0


@pytest.mark.parametrize("count", [LEAST_MEASURED, 8, 12, 18, 19, 24, 60])
@pytest.mark.parametrize("shape", ["exponential", "uniform", "half-normal"])
def test_the_bound_holds_for_95_percent_of_the_next_lookups(count: int, shape: str) -> None:
    chance = random.Random(count)
    draw = {
        "exponential": lambda: chance.expovariate(20.0),
        "uniform": lambda: chance.uniform(0.0, 0.1),
        "half-normal": lambda: abs(chance.gauss(0.0, 0.05)),
    }[shape]
    trials, held = 4000, 0
    for _ in range(trials):
        loss = bound_of("lora_compose", "h200", regrets(*[1.0 + draw() for _ in range(count)])).loss
        assert loss is not None
        held += draw() <= loss
    assert held / trials >= LEVEL - 0.012
