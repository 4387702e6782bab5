"""The page on methods of adaptation says what its file says: what differs, what does not, and what was not run."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from doratune.benchmarks.quality.summary import summarise

from .pages import ROOT

DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
LORA, DORA, ROW_SCALED, FULL = "peft_lora", "doratune", "row_scaled_lora", "full"
NOISE = (0.3, -0.2, 0.1, -0.3, 0.1)
"""Of a seed, the same for all methods; far larger than what differs between them."""
APART = (0.0002, -0.0001, 0.0001, -0.0002, 0.0)
"""Of a seed in one method alone."""
Row = dict[str, Any]
Document = dict[str, Any]


@pytest.fixture(scope="module")
def quality() -> Iterator[ModuleType]:
    """The script, as the site's directives load it."""
    sys.path.insert(0, str(DOCS))
    try:
        spec = importlib.util.spec_from_file_location("quality", DOCS / "quality.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(DOCS))


def row(op: str, impl: str, rank: int | None = None, **values: Any) -> Row:
    case = {"bench": "quality", "op": op, "impl": impl, "model": "llama-d128-bytes", "shape": [3, 128], "rank": rank}
    return {**case, "dtype": "fp32", "adapter": None if rank is None else "fp32", "flags": [], **values}


def corpus(name: str) -> Row:
    sizes = {"train": 4_000_000, "validation": 1_000, "test": 2_000}
    return row("corpus", name, bytes=sizes, unigram_loss=3.3, bigram_loss=2.7)


def adapted(impl: str, rank: int | None, losses: list[float | None], edge: bool = False) -> list[Row]:
    facts = {"rate": 2e-3, "edge": edge, "parameters": 7, "start_loss": 2.0, "at": [1], "held_out_loss": [0.0]}
    return [row("adapt", impl, rank, seed=seed, loss=loss, **facts) for seed, loss in enumerate(losses, 1)]


def around(loss: float) -> list[float | None]:
    return [loss + wide + apart for wide, apart in zip(NOISE, APART, strict=True)]


def tried(impl: str, rank: int | None, losses: dict[int, float | None]) -> list[Row]:
    return [
        row("learning-rate", impl, rank, seed=0, exponent=exponent, rate=1e-3 * 2.0**exponent, loss=loss, parameters=7)
        for exponent, loss in losses.items()
    ]


def study(runs: list[Row], *, pretrained: float = 1.5, **env: str) -> Document:
    base = row("pretrain", "base", loss=2.0, parameters=668_544, code_test_loss=2.0, documentation_test_loss=pretrained)
    rows = [corpus("documentation"), corpus("code"), base, *runs]
    size = "hidden=128, layers=3, seq=128, batch=8, pretrain_steps=3000, steps=120, pretrain_rate=0.003"
    values = {"gpu": "none", "driver": "none", "cpu": "Abacus", "study": size, "doratune_commit": "f" * 40}
    return {"env": {**values, "date": "2026-12-01", **env}, "rows": [*rows, *summarise(rows)]}


METHODS = [
    *adapted(LORA, 8, [1.5 + wide for wide in NOISE]),
    *adapted(LORA, 64, [1.4 + wide for wide in NOISE]),
    *adapted(DORA, 8, around(1.49)),
    *adapted(DORA, 64, around(1.4)),
    *adapted(ROW_SCALED, 8, around(1.52)),
    *adapted(FULL, None, around(1.3), edge=True),
]


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"][2:]


def test_each_difference_is_told_as_the_file_judges_it(quality: ModuleType) -> None:
    said = quality.differences(study(METHODS))
    assert said.startswith("Of 5 differences at equal steps 3 are lower, 1 is higher, and 1 is within the intervals")
    assert "- DoRA beside LoRA: lower at r = 8; no difference is seen at r = 64." in said
    assert "- LoRA with row scales beside LoRA: higher at r = 8." in said
    assert "- full fine-tuning beside LoRA: lower at r = 8, r = 64." in said
    lines = {(line[0], line[1]): line[2:] for line in cells(said)}
    assert len(lines) == 5
    mean, interval, _, verdict = lines["DoRA − LoRA", "8"]
    assert (mean, verdict) == ("-0.0100", "lower than LoRA")
    assert interval == "-0.0102 to -0.0098"
    assert lines["DoRA − LoRA", "64"][-1] == "no difference is seen"
    assert lines["full fine-tuning − LoRA", "8"][-1].endswith("a learning rate is at the edge of what was tried")


def test_a_difference_below_what_a_neighbouring_rate_costs_is_told_as_doubtful(quality: ModuleType) -> None:
    # DoRA is 0.01 below LoRA, row scales 0.02 above it, full fine-tuning 0.2 and 0.1 below.
    searches = tried(LORA, 8, {0: 1.6, 1: 1.5, 2: 1.511}) + tried(FULL, None, {0: 1.65, 1: 1.5, 2: 1.66})
    said = quality.differences(study([*METHODS, *searches]))
    assert "Of the 4 that differ, 2 are smaller than what the neighbouring learning rate costs one of the two" in said
    assert "Of the 4 that differ, none are smaller" in quality.differences(study(METHODS))


def test_a_null_result_is_told_as_one(quality: ModuleType) -> None:
    said = quality.differences(study([*adapted(LORA, 8, around(1.5)), *adapted(DORA, 8, around(1.5)[::-1])]))
    assert said.startswith("Of 1 differences at equal steps none are lower, none are higher, and 1 is within")
    assert "- DoRA beside LoRA: no difference is seen at r = 8." in said
    assert "that differ" not in said
    tiny = [1.5 + apart * 1e-3 for apart in APART]
    said = quality.differences(study([*adapted(LORA, 8, [1.5] * 5), *adapted(DORA, 8, tiny)]))
    assert cells(said)[0][3] == "-2e-07 to +2e-07", "not +0.0000"


def test_losses_have_their_intervals_and_what_adaptation_brought(quality: ModuleType) -> None:
    said = quality.losses(study(METHODS))
    assert "begins at 2.0000 nats per byte of code and ends between 1.3000 and 1.5200" in said
    assert "lowers the loss by 0.480 to 0.700" in said
    assert "between an adapter and LoRA of the same rank is 0.0200, 4% of the smallest of these gains" in said
    lines = {line[0]: line[1:] for line in cells(said)}
    assert lines["LoRA"] == ["1.5000 (1.1959 to 1.8041)", "1.4000 (1.0959 to 1.7041)"]
    assert lines["LoRA with row scales"][1] == quality.ABSENT
    assert lines["full fine-tuning"][1] == "", "it has no rank"
    assert "r = 8 (1/16 of d)" in said
    assert "they did not learn" in quality.losses(study(adapted(LORA, 8, around(2.1))))
    diverged = quality.losses(study([*METHODS, *adapted(DORA, 16, [1.5, None, 1.6])]))
    assert "1 diverged" in diverged


def test_a_method_that_diverged_in_every_seed_is_told_and_not_left_out(quality: ModuleType) -> None:
    runs = [*METHODS, *adapted(ROW_SCALED, 64, [None] * 5), *adapted(DORA, 128, [None] * 3)]
    lines = {line[0]: line[1:] for line in cells(quality.losses(study(runs)))}
    assert lines["LoRA with row scales"][1] == "all 5 diverged"
    assert lines["DoRA"][2] == "all 3 diverged"
    assert lines["LoRA"][2] == quality.ABSENT, "it did not run at this rank"
    only = [*adapted(LORA, 8, around(1.5)), *adapted(FULL, None, [None] * 2)]
    assert ["full fine-tuning", "all 2 diverged"] in cells(quality.losses(study(only)))
    assert quality.losses(study(adapted(LORA, 8, [None] * 5))) == "Every adaptation diverged."
    document = study(METHODS)
    base = next(row for row in document["rows"] if row["op"] == "pretrain")
    base.update(loss=None, code_test_loss=None, documentation_test_loss=None)
    assert "The pre-trained model diverged" in quality.losses(document)
    assert "it has not learned" in quality.learned(document)


@pytest.mark.parametrize(("loss", "words"), [(1.5, "it has learned"), (2.71, "it has not learned")])
def test_the_page_says_whether_the_model_had_learned(loss: float, words: str, quality: ModuleType) -> None:
    assert words in quality.learned(study(METHODS, pretrained=loss))


def test_the_search_for_a_learning_rate_is_told_with_what_its_neighbours_cost(quality: ModuleType) -> None:
    searches = tried(LORA, 8, {0: 1.6, 1: 1.5, 2: 1.51, 3: None}) + tried(FULL, None, {-1: 2.5, -2: 1.6})
    searches += tried(DORA, 64, {-1: 1.43, 0: 1.4, 1: 1.42})
    said = quality.rates(study([*METHODS, *searches]))
    assert "2 to 4 rates" in said
    assert "In 2 of 3 searches" in said, "of full fine-tuning a neighbour costs more than its interval"
    assert cells(said) == [
        ["LoRA", "8", "7", "0.002", "4", "0.0100", ""],
        ["full fine-tuning", quality.ABSENT, "7", "0.00025", "2", "0.9000", "at the edge of what was tried"],
        ["DoRA", "64", "7", "0.001", "3", "0.0200", ""],
    ]


def test_what_did_not_run_is_named(quality: ModuleType) -> None:
    empty = study(METHODS)
    assert quality.precisions(empty) == quality.rates(empty) == "Not run."
    assert quality.equal_time(empty).startswith("Not measured")


def test_methods_are_compared_at_equal_time_beside_the_time_of_a_step(quality: ModuleType) -> None:
    times = {"step_ms": 1.0, "step_ms_samples": [0.9, 1.0, 1.2]}
    clocks = [row("clock", one["impl"], one["rank"], **times) for one in METHODS]
    compared, steps = quality.equal_time(study([*METHODS, *clocks])).split("\n\n")
    assert len(cells(compared)) == 5
    assert len(cells(steps)) == len(clocks)
    assert ["full fine-tuning", quality.ABSENT, "1.0", "0.9 to 1.2"] in cells(steps)
    missing = quality.equal_time(study([*METHODS, *(one for one in clocks if one["impl"] != DORA)]))
    assert missing.startswith("Not compared: the time of a step was not taken for every method")


def test_distances_of_curves_are_told_with_what_computed_them(quality: ModuleType) -> None:
    def curve(impl: str, adapter: str, dtype: str, far: float) -> list[Row]:
        found = []
        for seed, apart in enumerate(APART):
            values = {"train_loss": [1.0 + far + apart, 2.0], "loss": 1.0, "seed": seed}
            found.append(row("precision", impl, 8, **values) | {"adapter": adapter, "dtype": dtype})
        return found

    runs = [*curve("peft_dora", "fp32", "fp32", 0.0), *curve("peft_dora", "bf16", "bf16", 0.2)]
    runs += curve(DORA, "bf16", "bf16", 0.1)
    said = quality.precisions(study(runs))
    assert "PyTorch's own operations in bf16" in said
    assert [line[0] for line in cells(said)] == ["DoRA", "DoRA, by PEFT's own code"]
    assert "- DoRA − DoRA, by PEFT's own code, bf16 weights, bf16 adapters: -0.071" in said
    assert "lower than DoRA, by PEFT's own code" in said
    assert "PyTorch's own" not in quality.precisions(study(runs, gpu="NVIDIA H100"))


@pytest.mark.parametrize("change", [lambda one: one["rows"].clear(), lambda one: one["env"].update(study="")])
def test_a_file_of_something_else_is_no_page(change: Callable[[Document], None], quality: ModuleType) -> None:
    other = study(METHODS)
    change(other)
    with pytest.raises((KeyError, ValueError)):
        quality.what_ran(other)


def test_the_committed_page_is_made_of_its_files_alone(quality: ModuleType) -> None:
    page = (DOCS / "results" / "quality.md").read_text(encoding="utf-8")
    for part in quality.PARTS:
        assert f"```{{quality}} h100-sxm/quality.json {part}\n" in page
    shown = re.findall(r"^```{quality} (\S+) (\S+)$", page, flags=re.MULTILINE)
    assert {file for file, _ in shown} == {"h100-sxm/quality.json", "cpu/quality.json"}
    for file, part in shown:
        assert quality.PARTS[part](quality.read(RESULTS / file)), (file, part)
