"""The sampler proposes valid configs that were never tried, learns where the performance model errs, and leaves what it
is told to try alone.
"""

from __future__ import annotations

import math

import optuna
import pytest
from optuna.trial import TrialState

from doratune.codegen.cost import estimate_us
from doratune.codegen.gpu import find_gpu
from doratune.codegen.spec import Config, KernelSpec
from doratune.tuner.sampler import ModelSampler
from doratune.tuner.space import Space

GPU = find_gpu("h100-sxm")
SMALL = KernelSpec.create("compose_forward", d_out=4096, tokens=4096, dtype="bf16", gpu=GPU.slug)
LARGE = KernelSpec.create("weight_norm", d_out=4096, d_in=4096, rank=384, dtype="bf16", adapter="bf16", gpu=GPU.slug)


def study_of(space: Space, seed: int = 0) -> optuna.Study:
    return optuna.create_study(sampler=ModelSampler(space, seed))


def ask(study: optuna.Study, space: Space) -> tuple[optuna.Trial, Config]:
    trial = study.ask()
    return trial, space.suggest(trial)


@pytest.mark.parametrize("spec", [SMALL, LARGE], ids=lambda spec: spec.op)
def test_every_proposal_is_valid_and_new_even_while_others_are_being_evaluated(spec: KernelSpec) -> None:
    space = Space(spec, GPU)
    study = study_of(space)
    asked = [ask(study, space) for _ in range(4)]
    for turn in range(20):
        trial, config = asked[turn]
        study.tell(trial, estimate_us(spec, config, GPU))
        asked.append(ask(study, space))
    configs = [config for _, config in asked]
    assert len(set(configs)) == len(configs)
    assert [config for config in configs if space.refuse(config) is not None] == []


def test_the_first_proposal_is_the_models_best() -> None:
    space = Space(SMALL, GPU)
    valid = [config for config in space.all() if space.refuse(config) is None]
    _, first = ask(study_of(space), space)
    assert estimate_us(SMALL, first, GPU) == min(estimate_us(SMALL, config, GPU) for config in valid)


def test_a_parameter_about_which_the_model_is_wrong_is_found_out() -> None:
    space = Space(SMALL, GPU)
    valid = [config for config in space.all() if space.refuse(config) is None]

    def us(config: Config) -> float:  # the model, but for what eight warps gain
        return estimate_us(SMALL, config, GPU) * (0.5 if config.num_warps == 8 else 1.0)

    best = min(us(config) for config in valid)
    study = study_of(space)
    found = math.inf
    for _ in range(12):
        trial, config = ask(study, space)
        study.tell(trial, us(config))
        found = min(found, us(config))
    assert found <= 1.01 * best
    assert len(valid) > 5 * 12


def test_rejected_configs_and_their_neighbours_lose_their_attraction() -> None:
    space = Space(SMALL, GPU)
    study = study_of(space)
    accepted = []
    for _ in range(24):
        trial, config = ask(study, space)
        if config.num_warps == 1:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            accepted.append(config)
            study.tell(trial, estimate_us(SMALL, config, GPU))
    assert len(accepted) >= 16


def test_what_is_enqueued_is_tried_as_it_is() -> None:
    space = Space(LARGE, GPU)
    study = study_of(space)
    study.enqueue_trial(space.params(space.seeds[-1]))
    assert ask(study, space)[1] == space.seeds[-1]


def test_a_small_space_is_tried_to_the_last_config_and_then_draws_repeat() -> None:
    space = Space(SMALL, GPU)
    valid = {config for config in space.all() if space.refuse(config) is None}
    study = study_of(space)
    tried = set()
    for _ in valid:
        trial, config = ask(study, space)
        study.tell(trial, estimate_us(SMALL, config, GPU))
        tried.add(config)
    assert tried == valid
    assert ask(study, space)[1] in set(space.all())


def test_equal_seeds_give_equal_proposals_and_others_differ() -> None:
    space = Space(LARGE, GPU)

    def proposals(seed: int) -> list[Config]:
        study = study_of(space, seed)
        found = []
        for _ in range(20):
            trial, config = ask(study, space)
            study.tell(trial, estimate_us(LARGE, config, GPU) * 1.1)
            found.append(config)
        return found

    assert proposals(1) == proposals(1)
    assert proposals(1) != proposals(2)
