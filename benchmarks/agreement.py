"""Whether a contender computes what PEFT does: a fast result that is wrong takes no part."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..terminal.deadline import time_limit
from .adapted import STOCK, STOCK_LORA, Contender, Peers, contender, is_lora, relative_error
from .measuring import left_out
from .results import OURS, Outcome, Row
from .tasks import STEP, Results, Task

BOUNDS: dict[str, tuple[float, float]] = {
    "loss": (5e-4, 5e-3),
    "logits": (0.1, 0.1),
    "lora_A": (0.2, 0.2),
    "lora_B": (0.2, 0.2),
    "magnitude": (0.2, 0.2),
}
"""How far an implementation of LoRA, and of DoRA, may be from PEFT's: the loss relatively, logits and gradients in
relative Frobenius distance. Two right ones differ by what bf16 rounds on the way through all layers."""


def compare(
    task: Task, running: Iterable[Contender], peers: Peers, outcome: Outcome, *, until: float | None = None
) -> dict[str, Row]:
    """The fields on accuracy of each contender that computes what PEFT's LoRA, or its DoRA, does.

    A note says which peers fail or compute something else. Where doratune does, its row says so and the outcome has it
    among its failures. A contender's call, in which it may be compiled, ends at the second ``until`` of the monotonic
    clock.
    """
    stocks: dict[str, Results] = {}
    facts: dict[str, Row] = {}
    for one in running:
        stock = STOCK_LORA if is_lora(one.name) else STOCK
        try:
            with time_limit(until):
                found = _results(task, one.model)
            if stock not in stocks:
                stocks[stock] = found if one.name == stock else _stock_results(task, stock, peers)
        except Exception as failure:  # the others continue
            outcome.notes.append(left_out(f"{task.title}: {one.name}", failure))
            continue
        row, complaint = judge(found, stocks[stock], lora=is_lora(one.name))
        if one.name == stock:
            row["rel_err"], complaint = None, None
        if complaint and not one.name.startswith(OURS):
            outcome.notes.append(f"{task.title}: {one.name} left out: {complaint}")
            continue
        if complaint:
            outcome.failures.append(f"{task.title}: {one.name}: {complaint}")
        facts[one.name] = {**row, "complaint": complaint}
    return facts


def judge(found: Results, stock: Results, *, lora: bool) -> tuple[Row, str | None]:
    """The row's fields on accuracy, and what is beyond its bound.

    ``rel_err`` is the distance of the logits, or the largest one of the loss and the gradients by kind of parameter.
    """
    missing = [kind for kind in stock if kind not in found or found[kind].shape != stock[kind].shape]
    errors = {kind: relative_error(found[kind], stock[kind]) for kind in stock if kind not in missing}
    bounds = {kind: BOUNDS[kind][0 if lora else 1] for kind in errors}
    beyond = [
        f"{kind} {error:.2g} from PEFT's, at most {bounds[kind]:g} is right"
        for kind, error in errors.items()
        if not error <= bounds[kind]
    ]
    beyond += [f"gradients of {kind} are missing" for kind in missing]
    row: Row = {"rel_err": max(errors.values(), default=None)}
    if "loss" in found:
        row.update(loss=float(found["loss"]), loss_err=errors["loss"])
    return row, "; ".join(beyond) or None


def _results(task: Task, model: nn.Module) -> Results:
    task.before()
    try:
        return task.results(model)
    finally:
        task.before()


def _stock_results(task: Task, stock: str, peers: Peers) -> Results:
    """PEFT's results, where it is not among the contenders."""
    model = contender(stock, task.adapted, peers).model
    model.train(task.op == STEP)
    return _results(task, model)
