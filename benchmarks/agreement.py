"""Whether a contender computes what PEFT does: a fast result that is wrong takes no part."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from ..terminal.deadline import time_limit
from .adapted import STOCK, STOCK_LORA, Contender, Mode, Peers, contender, fp32_copy, is_lora, relative_error
from .measuring import left_out, release_memory
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
relative Frobenius distance. Two right ones differ by what bf16 rounds on the way through all layers. In a deep model
that may be more than a bound; then the distance from fp32 decides, see :data:`FP32_FACTOR`."""

FP32_FACTOR = 1.1
"""How many times PEFT's own distance from the result in fp32 a contender may be from it, where it is beyond a bound.

A right one rounds about as much as PEFT, and an error of its own adds to that as a square: 1.1² is 1 + 0.46², so an
error of half of PEFT's rounding is refused. In small random models of 32 layers doratune's logits were 0.70 to 1.02
times as far as PEFT's. Gradients over few tokens (0.55 to 1.20 times) and the loss, a single value, depend more on
chance: there a right one may be refused, as it is by the bound alone."""


def compare(
    task: Task, running: Iterable[Contender], peers: Peers, outcome: Outcome, *, until: float | None = None
) -> dict[str, Row]:
    """The fields on accuracy of each contender that computes what PEFT's LoRA, or its DoRA, does; see :func:`judge`.

    A note says which peers fail or compute something else. Where doratune does, its row says so and the outcome has it
    among its failures. A contender's call, in which it may be compiled, ends at the second ``until`` of the monotonic
    clock; so does PEFT's in fp32, which is made once for LoRA and once for DoRA, and only where it is needed.
    """
    stocks: dict[str, Results] = {}
    facts: dict[str, Row] = {}

    @functools.cache
    def in_fp32(stock: str) -> Results | None:
        return _in_fp32(task, stock, peers, outcome.notes, until)

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
        row, complaint = judge(found, stocks[stock], functools.partial(in_fp32, stock), lora=is_lora(one.name))
        if one.name == stock:
            row["rel_err"], complaint = None, None
        if complaint and not one.name.startswith(OURS):
            outcome.notes.append(f"{task.title}: {one.name} left out: {complaint}")
            continue
        if complaint:
            outcome.failures.append(f"{task.title}: {one.name}: {complaint}")
        facts[one.name] = {**row, "complaint": complaint}
    return facts


def judge(
    found: Results, stock: Results, in_fp32: Callable[[], Results | None], *, lora: bool
) -> tuple[Row, str | None]:
    """The row's fields on accuracy, and what is wrong; None where nothing is.

    ``rel_err`` is the distance of the logits, or the largest one of the loss and the gradients by kind of parameter.
    Where a distance is beyond its bound, ``in_fp32`` gives PEFT's result in fp32, and the distances from that decide:
    ``fp32_err`` has the contender's and ``peft_fp32_err`` PEFT's, of each kind that is beyond. Where it gives None, all
    that is beyond its bound is wrong.
    """
    missing = [kind for kind in stock if kind not in found or found[kind].shape != stock[kind].shape]
    errors = {kind: relative_error(found[kind], stock[kind]) for kind in stock if kind not in missing}
    bounds = {kind: BOUNDS[kind][0 if lora else 1] for kind in errors}
    wrong = {
        kind: f"{kind} {error:.2g} from PEFT's, at most {bounds[kind]:g} is right"
        for kind, error in errors.items()
        if not error <= bounds[kind]
    }
    row: Row = {"rel_err": max(errors.values(), default=None)}
    if "loss" in found:
        row.update(loss=float(found["loss"]), loss_err=errors["loss"])
    if wrong and not missing and (exact := in_fp32()) is not None:
        own, pefts = ({kind: relative_error(one[kind], exact[kind]) for kind in wrong} for one in (found, stock))
        row.update(fp32_err=own, peft_fp32_err=pefts)
        wrong = {
            kind: f"{text} ({own[kind]:.3g} from fp32, PEFT's is {pefts[kind]:.3g})"
            for kind, text in wrong.items()
            if not (math.isfinite(own[kind]) and own[kind] <= FP32_FACTOR * pefts[kind])
        }
    return row, "; ".join([*wrong.values(), *(f"gradients of {kind} are missing" for kind in missing)]) or None


def _in_fp32(task: Task, stock: str, peers: Peers, notes: list[str], until: float | None) -> Results | None:
    """What PEFT's own code computes in fp32 from the parameters of the task's model.

    None where that fails or does not end by ``until``; a note says why. The memory of the model in fp32 is free again.
    """
    found = None
    try:
        with time_limit(until), _without_tf32():
            found = _stock_results(task.anew(Mode("fp32", autocast=False), fp32_copy(task.adapted)), stock, peers)
    except Exception as failure:
        notes.append(left_out(f"{task.title}: comparison with {stock} in fp32", failure))
    release_memory(next(task.adapted.parameters()).device)
    return found


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Multiply fp32 matrices in fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _results(task: Task, model: nn.Module) -> Results:
    task.before()
    try:
        return task.results(model)
    finally:
        task.before()


def _stock_results(task: Task, stock: str, peers: Peers) -> Results:
    """PEFT's results, by modules of its own."""
    model = contender(stock, task.adapted, peers).model
    model.train(task.op == STEP)
    return _results(task, model)
