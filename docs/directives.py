"""Sphinx directives that print what the repository knows, so that no page repeats it by hand.

``{figures} h200/model.json``            the tables of result files (a pattern may name several), see ``figures.py``;
                                         with ``:if-measured:`` there may be none yet
``{quality} cpu/quality.json losses``    a part of what ``quality.py`` says of a file of ``doratune bench quality``
``{brings}``, ``{shortfalls} models``    what they say of doratune beside its peers, see ``benefits.py``
``{schema} doratune_entries``            the columns of a table of the store, with the meanings in the directive's text
``{gpus}``, ``{models}``, ``{operations}``   the GPUs, models and operations that are known
"""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Iterable
from typing import Any

import benefits
import click
import comparisons
import figures
import quality
from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

from doratune.cache.schema import Base, version_table
from doratune.codegen.gpu import known_gpus
from doratune.codegen.ops import OPS
from doratune.tuner.models import list_models


class _Markdown(SphinxDirective):
    """A directive whose result is Markdown."""

    def run(self) -> list[nodes.Node]:
        parent = nodes.container()
        self.state.nested_parse(StringList(self.markdown().splitlines(), self.get_source_info()[0]), 0, parent)
        return parent.children

    def markdown(self) -> str:
        raise NotImplementedError


def _table(head: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    titles = list(head)
    rows = [titles, ["---"] * len(titles), *([str(cell) for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


class Figures(_Markdown):
    required_arguments = 1
    option_spec = {"only": directives.unchanged, "if-measured": directives.flag}  # noqa: RUF012  as docutils declares it

    def markdown(self) -> str:
        files = sorted(figures.RESULTS.glob(self.arguments[0]))
        if not files and "if-measured" in self.options:
            return "Not measured."
        if not files:
            raise self.error(f"no results {self.arguments[0]} in {figures.RESULTS}")
        for file in files:
            self.env.note_dependency(str(file))
        return figures.markdown(files, self.options.get("only"))


class Quality(_Markdown):
    required_arguments = 2

    def markdown(self) -> str:
        name, part = self.arguments
        file = figures.RESULTS / name
        self.env.note_dependency(str(file))
        return quality.PARTS[part](quality.read(file))


class Brings(_Markdown):
    def markdown(self) -> str:
        return benefits.brings(_measured(self.env))


class Shortfalls(_Markdown):
    required_arguments = 1

    def markdown(self) -> str:
        return benefits.SHORTFALLS[self.arguments[0]](_measured(self.env))


def _measured(env: BuildEnvironment) -> comparisons.Measured:
    for file in figures.RESULTS.glob("*/*.json"):
        env.note_dependency(str(file))
    return comparisons.read_results()


class Schema(_Markdown):
    required_arguments = 1
    has_content = True

    def markdown(self) -> str:
        table = {**Base.metadata.tables, version_table.name: version_table}[self.arguments[0]]
        meanings = dict(line.split(": ", 1) for line in self.content)
        if meanings.keys() != {column.name for column in table.columns}:
            odd = meanings.keys() ^ {column.name for column in table.columns}
            raise self.error(f"{table.name}: the columns and their meanings differ in {', '.join(sorted(odd))}")
        lines = (
            (f"`{column.name}`", f"{column.type}", "yes" if column.nullable else "", meanings[column.name])
            for column in table.columns
        )
        unique = [", ".join(c.name for c in each.columns) for each in table.constraints if _is_unique(each)]
        indexes = sorted(", ".join(column.name for column in index.columns) for index in table.indexes)
        notes = [f"Unique: {text}." for text in unique] + [f"Index: {text}." for text in indexes]
        return "\n\n".join([_table(("column", "type", "null", "meaning"), lines), " ".join(notes)])


def _is_unique(constraint: Any) -> bool:
    return type(constraint).__name__ == "UniqueConstraint"


class Gpus(_Markdown):
    def markdown(self) -> str:
        return _table(
            ("name", "GPU", "architecture", "multiprocessors", "memory, TB/s", "bf16, TFLOP/s", "L2, MB"),
            (
                (
                    f"`{gpu.slug}`",
                    gpu.name,
                    gpu.architecture,
                    gpu.multiprocessors,
                    f"{gpu.memory_bytes_per_second / 1e12:.2f}",
                    f"{gpu.matrix_flops['bf16'] / 1e12:.0f}",
                    f"{gpu.l2_bytes / 2**20:.0f}",
                )
                for gpu in known_gpus()
            ),
        )


class Models(_Markdown):
    def markdown(self) -> str:
        return _table(
            ("name", "Hugging Face id", "layers"),
            ((f"`{model.name}`", model.hf_id, model.layers) for model in list_models()),
        )


class Operations(_Markdown):
    def markdown(self) -> str:
        return _table(
            ("operation", "sizes", "dtypes", "flags"),
            (
                (
                    f"`{op.name}`",
                    ", ".join(op.dims),
                    ", ".join([*op.dtypes, *(f"[{dtype}]" for dtype in op.optional_dtypes)]),
                    ", ".join(op.flags) or "none",
                )
                for op in OPS.values()
            ),
        )


def resolve_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.Element) -> nodes.Element | None:
    """Link a name that a docstring uses as the reader of its module sees it; else let a name of doratune's be text.

    Docstrings write ``ArgumentError`` for ``doratune.runtime.arguments.ArgumentError``, and refer to parts of doratune
    that are no part of the site. A name that does not exist is a warning of Sphinx's as before.
    """
    target = str(node.get("reftarget", ""))
    if node.get("refdomain") != "py" or not target:
        return None
    objects = env.domains.python_domain.objects
    found = [name for name in objects if name.rsplit(".", 1)[-1] == target and not objects[name].aliased]
    if len(found) == 1:
        place = objects[found[0]]
        return make_refnode(app.builder, node["refdoc"], place.docname, place.node_id, text, found[0])
    names = (target, f"{node.get('py:module')}.{target}")
    return text if any(name.startswith("doratune.") and _exists(name) for name in names) else None


def _exists(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def one_parameter_a_line(app: Sphinx, what: str, name: str, described: Any, options: object, lines: list[str]) -> None:
    """Break the lines of a docstring's ``Args:`` that say several parameters: ``x: [T, d_in]. bias: b [d_out].``"""
    try:
        names = [*inspect.signature(described).parameters]
    except (TypeError, ValueError):
        return
    another = re.compile(rf"(?<=\.) (?=(?:{'|'.join(map(re.escape, names))}): )") if names else None
    broken: list[str] = []
    inside = False
    for line in lines:
        inside = line.strip() in ("Args:", "Attributes:") or (inside and (not line.strip() or line.startswith(" ")))
        parts = another.split(line) if another and inside else [line]
        indent = " " * (len(line) - len(line.lstrip()))
        broken += [parts[0], *(indent + part for part in parts[1:])]
    lines[:] = broken


def preformatted_as_code(app: Sphinx, context: click.Context, lines: list[str]) -> None:
    """Show what click's help leaves as it stands (after a backspace) as code: commands, in columns."""
    shown: list[str] = []
    for line in lines:
        inside = bool(shown) and shown[-1].startswith("    ")
        if line.startswith("| "):
            shown += [] if inside else ["::", ""]
            shown.append(f"    {line[2:]}")
        else:
            shown += ["", line] if inside else [line]
    lines[:] = shown


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("missing-reference", resolve_name)
    app.connect("sphinx-click-process-description", preformatted_as_code)
    app.connect("autodoc-process-docstring", one_parameter_a_line, priority=400)  # before napoleon reads them
    for name, directive in (
        ("figures", Figures),
        ("quality", Quality),
        ("brings", Brings),
        ("shortfalls", Shortfalls),
        ("schema", Schema),
        ("gpus", Gpus),
        ("models", Models),
        ("operations", Operations),
    ):
        app.add_directive(name, directive)
    return {"parallel_read_safe": True}
