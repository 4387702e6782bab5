"""A study so small that a CPU runs it at once, and its text."""

from __future__ import annotations

from dataclasses import replace

from doratune.benchmarks.quality.corpus import Document
from doratune.benchmarks.quality.sizes import SIZES

TINY = replace(
    SIZES["tiny"],
    pretrain_steps=8,
    steps=2,
    precision_steps=2,
    hidden=16,
    intermediate=24,
    seq=16,
    held_out_bytes=129,
)


def planted(word: str) -> list[Document]:
    """Documents of which no two have a line in common."""

    def text(number: int) -> str:
        return "\n".join(f"{word} {number}: line {line} of this document, {number * line}" for line in range(60))

    return [Document(f"{word}/{number}", lambda number=number: text(number)) for number in range(100)]
