"""The command line as tests run it: standard output and standard error apart, under every version of click."""

from __future__ import annotations

import inspect

from click.testing import CliRunner

_APART = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
RUNNER = CliRunner(**_APART)
"""Keeps standard output and standard error apart, which click before 8.2 does only when told."""
