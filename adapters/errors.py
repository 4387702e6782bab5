"""Why an adapter or a checkpoint cannot be read, converted or merged."""

from __future__ import annotations

from ..errors import DoratuneError


class AdapterError(DoratuneError):
    """An adapter or checkpoint on disk cannot be read; the message names the file, the problem and the remedy."""


class ConversionError(DoratuneError):
    """A conversion would lose something, or its result is not what its source is. No target was written."""
