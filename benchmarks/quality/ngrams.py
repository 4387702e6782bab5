"""Losses of counting: what a language model must be below to have learned more than which byte follows which."""

from __future__ import annotations

import torch

BYTES = 256


def ngram_loss(train: bytes, held_out: bytes, order: int) -> float:
    """Nats per byte of ``held_out`` after its first, predicted from the ``order`` - 1 bytes before each.

    The probabilities are relative frequencies in ``train``, with one added to every count. ``order``: 1 or 2.
    """
    counts = torch.bincount(_grams(train, order), minlength=BYTES**order).view(-1, BYTES) + 1
    logarithms = (counts / counts.sum(1, keepdim=True)).log().flatten()
    grams = _grams(held_out, order)[2 - order :]  # from the second byte on for either order
    return float(-logarithms[grams].mean(dtype=torch.float64))


def _grams(text: bytes, order: int) -> torch.Tensor:
    """A number for each run of ``order`` bytes."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return data if order == 1 else data[:-1] * BYTES + data[1:]
