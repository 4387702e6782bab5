"""``doratune bench quality``: text, pre-trained model, runs, until all is done or the time is over."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import UsageError
from ..adapted import bench_device
from ..results import Outcome, Row, environment
from . import base as base_model
from .base import mode_of
from .corpus import TEST, TRAIN, VALIDATION, Domain, code, documentation, make_domain, package_versions
from .ngrams import ngram_loss
from .results_file import earlier_rows, with_summaries, write
from .runs import Pretrained, Processes, finite
from .sizes import SIZES, Size
from .study import Study
from .training import Deadline, OutOfTimeError, Text, held_out_loss

CORPUS, PRETRAIN = "corpus", "pretrain"
DOCUMENTATION, CODE = "documentation", "code"


def bench_quality(
    *,
    size: str = "full",
    seeds: int = 5,
    minutes: float = 9.0,
    output: Path | None = None,
    base: Path | None = None,
    processes: int = 1,
    device: str | None = None,
    commit: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[Outcome, Mapping[str, str]]:
    """Run what of the study is not in ``output`` yet, for at most ``minutes``; returns all rows and the environment.

    ``size``: a name of :data:`~.sizes.SIZES`. ``seeds``: runs of each method at its learning rate. ``base``: the file
    of the pre-trained weights, written if it is not there; by default beside ``output``, with the suffix
    ``.base.safetensors``. ``output`` is written after every run. ``processes``: runs at the same time; a step's time is
    measured while none of them runs.

    Raises:
        UsageError: PEFT or transformers is missing, there is no GPU and ``device`` does not say cpu, or a file is of
            another study.
        CorpusError: the installed packages have too little text.
    """
    deadline = Deadline.after(60.0 * minutes)
    where = bench_device(device)
    sized = SIZES[size]
    progress("reading the text")
    domains = {
        name: make_domain(name, found(), train_bytes=sized.train_bytes, held_out_bytes=sized.held_out_bytes)
        for name, found in ((DOCUMENTATION, documentation), (CODE, code))
    }
    env = _environment(sized, domains, where, commit)
    rows = earlier_rows(output, env)
    if base is None and output is not None:
        base = output.with_suffix(".base.safetensors")
    if base is None and processes > 1:
        raise UsageError("--processes reads the pre-trained weights from a file: give --output or --base")
    outcome = Outcome(rows)

    def save() -> None:
        if output is not None:
            write(output, env, rows)

    try:
        texts = {name: Text.of(domain, sized, where) for name, domain in domains.items()}
        model = _pretrained(base, rows, sized, texts, env, deadline, progress)
        if not rows:
            rows += [_corpus_row(domain, sized) for domain in domains.values()]
            rows.append(_pretrain_row(model, sized, texts))
        save()
        study = Study(sized, seeds, model, texts[CODE], rows, save, deadline, progress)
        try:
            with contextlib.ExitStack() as stack:
                if base is not None and processes > 1:
                    source = Pretrained(sized, base, _origin(sized, env), domains[CODE], str(where))
                    study.processes = stack.enter_context(Processes(processes, source, deadline))
                study.run()
        except OutOfTimeError:
            again = "run the same command again" if output else "give it an --output to go on later"
            outcome.notes.append(f"the time is over; left: {study.left()}; {again}")
        progress(", ".join(f"{count} × {op}" for op, count in study.ran.items()) or "nothing was left to run")
    except OutOfTimeError:
        outcome.notes.append("the time was over before the model was pre-trained; give it more --minutes")
    outcome.rows = with_summaries(rows)
    return outcome, env


def _environment(size: Size, domains: Mapping[str, Domain], device: torch.device, commit: str | None) -> dict[str, str]:
    env = environment(commit)
    if device.type == "cpu":
        env |= {"gpu": "none", "driver": "none", "cpu": _processor()}
    env |= {"python": platform.python_version(), "study": str(size)}
    env["text"] = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    return env | {f"{name}_sha256": domain.sha256 for name, domain in domains.items()}


def _processor() -> str:
    """The processor's name: Linux has it in a file, elsewhere Python knows the family."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _pretrained(
    path: Path | None,
    rows: list[Row],
    size: Size,
    texts: Mapping[str, Text],
    env: Mapping[str, str],
    deadline: Deadline,
    progress: Callable[[str], None],
) -> nn.Module:
    """The model that ``rows`` are of; where there are none, from its file or trained now."""
    known = next((row["base_sha256"] for row in rows if row["op"] == PRETRAIN), None)
    text = texts[DOCUMENTATION]
    of = _origin(size, env)
    if path is not None and path.exists():
        model = base_model.load(path, size, text.train.device, of)
        if known not in (None, base_model.digest(model)):
            raise UsageError(f"{path} has other weights than the results are of; bring theirs or name another --output")
        return model
    if known is not None:
        raise UsageError(f"the results are of a pre-trained model whose file {path} is not here; name it with --base")
    progress(f"pre-training for {size.pretrain_steps} steps")
    model, _ = base_model.pretrain(size, text, deadline)
    if path is not None:
        base_model.save(model, path, of)
    return model


def _origin(size: Size, env: Mapping[str, str]) -> dict[str, str]:
    """What pre-trained weights are of."""
    return {"study": str(size), "text": env[f"{DOCUMENTATION}_sha256"]}


def _corpus_row(domain: Domain, size: Size) -> Row:
    return {
        "bench": "quality",
        "op": CORPUS,
        "impl": domain.name,
        **_no_adapter(size),
        "bytes": {split: len(part) for split, part in domain.parts.items()},
        "documents": domain.documents,
        "dropped": domain.dropped,
        "leaked": finite(domain.leaked),
        "unigram_loss": finite(ngram_loss(domain.parts[TRAIN], domain.parts[TEST], 1)),
        "bigram_loss": finite(ngram_loss(domain.parts[TRAIN], domain.parts[TEST], 2)),
        "sha256": domain.sha256,
    }


def _pretrain_row(model: nn.Module, size: Size, texts: Mapping[str, Text]) -> Row:
    device = texts[CODE].train.device
    mode = mode_of(device)
    evaluated = model if device.type == "cuda" else base_model.in_fp32(model)
    losses = {
        f"{name}_{split}_loss": finite(held_out_loss(evaluated, mode, text, split, size))
        for name, text in texts.items()
        for split in (VALIDATION, TEST)
    }
    row = {"bench": "quality", "op": PRETRAIN, "impl": "base", **_no_adapter(size), **losses}
    row["loss"] = losses[f"{CODE}_{TEST}_loss"]
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return {**row, "base_sha256": base_model.digest(model)}


def _no_adapter(size: Size) -> dict[str, Any]:
    return {**size.case, "rank": None, "dtype": "bf16", "adapter": None, "flags": []}
