"""Render a spec and a config to source text.

The emitted text is a Python module: the Triton kernels of one variant, specialised to the spec, and a ``launch``
function that takes the operation's inputs, then its outputs, then the scaling s where the operation has one.
"""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import jinja2

from .digest import code_digest
from .gpu import find_gpu
from .ops import EPS, LEAST_SHARE, SMALLEST_GAIN, stored_unit, table_unit
from .spec import Config, KernelSpec
from .variants import Variant, find_variant
from .variants.base import ceil_div, power_of_two

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"

_TL_DTYPES = {"bf16": "tl.bfloat16", "fp16": "tl.float16", "fp32": "tl.float32"}
_REFERENCE = re.compile(r"""{%-?\s*(?:import|include|from)\s+["']([^"']+)["']""")


@dataclass(frozen=True)
class Source:
    """An emitted kernel module: its text and the SHA-256 of that text."""

    spec: KernelSpec
    config: Config
    text: str

    @property
    def digest(self) -> str:
        """SHA-256 of the text, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def code_digest(self) -> str:
        """SHA-256 of the text without its docstring: equal where only the token bucket or the GPU's name differ."""
        return code_digest(self.text)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["tl"] = _TL_DTYPES.__getitem__
    environment.filters["ceil_div"] = ceil_div
    environment.filters["power_of_two"] = power_of_two
    environment.filters["table_unit"] = table_unit
    environment.filters["stored_unit"] = stored_unit
    environment.filters["smallest_gain"] = SMALLEST_GAIN.__getitem__
    return environment


def template_files(variant: Variant) -> list[str]:
    """The names of a variant's template and of every template that it includes or imports, sorted."""
    pending, seen = [variant.template], set()
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += _REFERENCE.findall((TEMPLATES / name).read_text(encoding="utf-8"))
    return sorted(seen)


@functools.cache
def template_digest(op: str, variant: str) -> str:
    """SHA-256 over a variant's :func:`template_files` and its constants, in hexadecimal.

    Raises:
        SpecError: the operation has no such variant.
    """
    found = find_variant(op, variant)
    digest = hashlib.sha256()
    for name in template_files(found):
        digest.update(name.encode() + b"\0" + (TEMPLATES / name).read_bytes() + b"\0")
    if found.constants:
        digest.update(repr(sorted(found.constants.items())).encode())
    return digest.hexdigest()


def render(spec: KernelSpec, config: Config) -> Source:
    """Emit the kernel module of ``spec`` with ``config``; whether the config fits is not checked (``check_config``).

    Raises:
        SpecError: the operation has no such variant.
        UnknownGpuError: the spec's GPU is not listed.
    """
    variant = find_variant(spec.op, config.variant)
    gpu = find_gpu(spec.gpu)
    text = (
        _environment()
        .get_template(variant.template)
        .render(
            spec=spec,
            config=config,
            template=variant.template,
            backend=gpu.backend,
            fp32_precision="tf32x3" if gpu.backend == "cuda" else "bf16x6",
            eps=EPS,
            least_share=LEAST_SHARE,
            multiprocessors=gpu.multiprocessors,
            **variant.constants,
            **dict(config.params),
        )
    )
    return Source(spec, config, text)
