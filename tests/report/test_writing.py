"""A report is written as one page, as Markdown or as images: text from stores is never markup, what is no report is
never replaced, and what is missing is named with its remedy.
"""

from __future__ import annotations

import itertools
import json
import struct
import webbrowser
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from doratune.cli import main
from doratune.codegen.ops import OPS
from doratune.report import output
from doratune.report.data import Report
from doratune.report.document import Block, Document, Section
from doratune.report.images import ImageError, is_image, write_images
from doratune.report.markdown import MOST_ROWS, escaped, markdown, sentence
from doratune.report.output import MissingPackageError, check, source_line
from doratune.report.page import figure_of, page
from doratune.report.sections import document
from doratune.report.tables import MOST_ROWS as MOST_ON_PAGE
from doratune.report.tables import NUMBER, TEXT, Table
from doratune.report.theme import DARK, LIGHT, MARKS, SCHEMES, SYMBOLS
from doratune.report.winners import Winner

from ..command_line import RUNNER
from . import world


def run(*args: str, home: Path) -> Result:
    """Run ``doratune report`` in the folder ``home`` for a user whose stores are there."""
    return RUNNER.invoke(main, ["report", *args], env={"DORATUNE_HOME": str(home), "DORATUNE_CACHE_PATH": None})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a store."""
    folder = tmp_path_factory.mktemp("home")
    world.write_store(folder / "store.sqlite", world.usual_entries()[:2])
    return folder


# The page.


def test_the_page_needs_nothing_beside_itself(html: str) -> None:
    seen = Elements()
    seen.feed(html)
    asked = [value for _, attributes in seen.found for name, value in attributes if name in ("src", "href", "action")]
    assert {value for value in asked if not value.startswith("#")} == {"data:,"}
    policy = next(values["content"] for tag, attributes in seen.found if "http-equiv" in (values := dict(attributes)))
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split(";")}
    assert rules.keys() == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == ["'none'"]
    assert len(rules["script-src"]) == 2
    assert all(allowed.startswith("'sha256-") for allowed in rules["script-src"])
    assert [dict(attributes) for tag, attributes in seen.found if tag == "script"] == [
        {"type": "application/json", "id": "figures"},
        {},
        {},
    ]


class Elements(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[tuple[str, str]]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, [(name, value or "") for name, value in attrs]))


def test_a_text_from_a_store_is_nowhere_markup(html: str) -> None:
    assert world.HOSTILE not in html
    assert "&lt;script&gt;window.ran" in html


def test_every_plot_says_in_words_what_it_shows_and_has_a_table(report: Report) -> None:
    for block in document(report).figures:
        assert block.alt, block.key
        assert block.table is not None, block.key
        assert block.table.rows, block.key


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_text_and_marks_stand_out_from_the_background(scheme: str) -> None:
    colours = SCHEMES[scheme]
    for name in ("background", "surface"):
        assert all(contrast(colours[text], colours[name]) >= 4.5 for text in ("text", "muted", "accent"))
    assert all(contrast(mark, colours["background"]) >= 3.0 for mark in MARKS[scheme])
    assert len({*MARKS[scheme]}) == len(MARKS[scheme])
    marks = [(MARKS[scheme][role % len(MARKS[scheme])], SYMBOLS[role % len(SYMBOLS)]) for role in range(2 * len(OPS))]
    assert len({*marks}) == len(marks), "two operations look the same"


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours (WCAG 2.2)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_a_table_that_is_too_long_says_what_it_leaves_out() -> None:
    table = Table.of((("x", NUMBER),), ([number] for number in range(MOST_ON_PAGE + 7)))
    assert (len(table.rows), table.more) == (MOST_ON_PAGE, 7)
    assert table.first(10).more == MOST_ON_PAGE - 3


def test_a_section_without_data_says_how_to_get_it_and_has_no_plot(report: Report) -> None:
    bare = replace(report, comparisons=(), shares=(), steps=(), covered=(), searches=replace(report.searches, found=()))
    sections = {section.key: section for section in document(bare).sections}
    for key in ("peers", "searches", "step", "bounds"):
        assert sections[key].words, key
        assert not sections[key].figures, key
    assert sections["bounds"].commands == ("doratune report --model llama-8b",)
    predicted = replace(bare, winners=tuple(winner for winner in bare.winners if not winner.measured))
    gains = next(section for section in document(predicted).sections if section.key == "gains")
    assert "predicted searches have none" in gains.words[0]
    assert not gains.figures


@pytest.mark.parametrize(
    "values", [(1.0,), (1.0, 1.0), (1.0, 1.004), (0.9, 1.5), (1.0, 3.9), (0.3, 40.0), (1.0, 5e3), (1e-9, 1e12)]
)
def test_an_axis_of_ratios_has_some_ticks_in_its_range_and_not_too_many(values: tuple[float, ...]) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed")
    from doratune.report.plots import _log_ticks

    ticks = _log_ticks(values)
    assert ticks == sorted(ticks)
    inside = [tick for tick in ticks if min(values) <= tick * 1.0000001 and tick <= max(values) * 1.0000001]
    assert 1 <= len(inside) <= 10


def test_the_command_that_is_proposed_names_the_model_as_it_was_named(report: Report) -> None:
    def proposed(**changes: str) -> tuple[str, ...]:
        sections = document(replace(report, **changes)).sections
        return next(section for section in sections if section.key == "bounds").commands

    assert proposed() == ("doratune tune --model llama-8b --rank 16 --gpu h200",)
    assert proposed(asked="--config 'a b.json'") == ("doratune tune --config 'a b.json' --rank 16 --gpu h200",)


def test_winners_that_a_lookup_may_refuse_are_counted(report: Report) -> None:
    def words(*winners: Winner) -> str:
        sections = document(replace(report, winners=winners)).sections
        return " ".join(next(section for section in sections if section.key == "winners").words)

    now, *_ = report.winners
    older = replace(now, entry=replace(now.entry, template_digest="older"))
    assert "another template" not in words(now)
    assert "1 winner was tuned with another template" in words(now, older)
    assert "2 winners were tuned with another template" in words(older, older)


# Markdown.


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<b>x</b>", "&lt;b&gt;x&lt;/b&gt;"),
        ("a|b", "a\\|b"),
        ("@everyone", "&#64;everyone"),
        ("*x* [a](b) `c`", "\\*x\\* \\[a\\](b) \\`c\\`"),
        ("lora_compose _x_", "lora_compose \\_x\\_"),
        ("&lt;", "&amp;lt;"),
        ("# 1", "\\# 1"),
    ],
)
def test_markdown_shows_a_text_letter_by_letter(text: str, shown: str) -> None:
    assert escaped(text) == shown


def test_what_stands_between_backticks_is_code_unless_it_could_be_markup() -> None:
    assert sentence("run `doratune tune`, a_b") == "run `doratune tune`, a_b"
    assert sentence("store `<script>`") == "store \\`&lt;script&gt;\\`"


def test_the_markdown_has_the_tables_and_no_plot(report: Report) -> None:
    text = markdown(document(report))
    assert "| operation | shape | GPU |" in text
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "A mark for each" not in text  # of a plot that is not there
    lines = [line for line in text.splitlines() if line.startswith("|")]
    for above, below in itertools.pairwise(lines):
        if set(below) <= set("|-: "):
            assert above.count(" | ") == below.count(" | ")


def test_a_long_table_is_cut_for_a_pull_request() -> None:
    table = Table.of((("x", TEXT),), ([number] for number in range(MOST_ROWS + 5)))
    text = markdown(Document("t", (), (), (Section("s", "S", blocks=(Block("b", "B", table),)),)))
    assert "5 more rows; `doratune report --json` has all." in text
    assert text.count("\n| ") == MOST_ROWS + 2


# Files.


def test_a_report_is_replaced_by_a_newer_one_and_nothing_else_is(report: Report, tmp_path: Path) -> None:
    page_file, tables = tmp_path / "r.html", tmp_path / "r.md"
    for file, format in ((page_file, "html"), (tables, "md")):
        check(format, file)
        written = output.write(report, document(report), format, file)
        assert written == ("", [file])
        check(format, file)
    notes = tmp_path / "notes.html"
    notes.write_text("<p>mine</p>")
    with pytest.raises(output.UsageError, match=r"notes\.html exists and is no report of doratune"):
        check("html", notes)
    with pytest.raises(output.UsageError, match="is a folder: name a file"):
        check("html", tmp_path)
    with pytest.raises(output.UsageError, match="is a file: name a folder"):
        check("png", notes)
    assert {path.name for path in tmp_path.iterdir()} == {"r.html", "r.md", "notes.html"}


def test_a_report_that_cannot_be_written_is_named(home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = run("--format", "md", "-o", str(tmp_path / "file" / "r.md"), home=home)
    assert result.exit_code == 2
    assert f"{tmp_path / 'file' / 'r.md'}: {tmp_path / 'file'} is a file and no folder" in result.stderr
    result = run("--format", "md", "-o", "/proc/r.md", home=home)
    assert result.exit_code == 1
    assert "/proc/r.md; check the path and its permissions" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("md", "my notes on <!-- doratune report -->\n"),
        ("html", '<p><meta name="generator" content="doratune report 0.1.0"></p>'),
        (
            "html",
            '<!doctype html>\n<html lang="en"><title>x</title><meta name="generator" content="doratune report ">',
        ),
        ("md", ""),
    ],
)
def test_a_file_that_quotes_a_report_is_none(format: str, text: str, home: Path, tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_text(text)
    result = run("--format", format, "-o", str(file), home=home)
    assert result.exit_code == 2
    assert "exists and is no report of doratune" in result.stderr
    assert file.read_text() == text


def test_a_link_to_a_report_stays_a_link(home: Path, tmp_path: Path) -> None:
    link, there = tmp_path / "link.md", tmp_path / "there.md"
    link.symlink_to(there.name)
    for _ in range(2):  # it leads nowhere, and then to a report
        assert run("--format", "md", "-o", str(link), home=home).exit_code == 0
        assert link.is_symlink()
        assert there.read_text().startswith("<!-- doratune report -->")
    assert {path.name for path in tmp_path.iterdir()} == {"link.md", "there.md"}


def test_a_dash_is_standard_output(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly", reason="plotly is not installed")
    monkeypatch.chdir(tmp_path)
    for format, start in (("md", "<!-- doratune report -->"), ("html", "<!doctype html>")):
        result = run("--format", format, "-o", "-", home=home)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.startswith(start)
    assert "name a folder" in run("--format", "png", "-o", "-", home=home).stderr
    assert "leave out -o -" in run("--open", "-o", "-", home=home).stderr
    assert list(tmp_path.iterdir()) == []


def test_without_plotly_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(output, "installed", lambda package: None)
    for format in ("html", "png"):
        with pytest.raises(MissingPackageError, match=r"pip install 'doratune\[report\]'"):
            check(format, tmp_path / "new")
    check("md", tmp_path / "new.md")


def test_a_name_can_be_no_markup_and_never_acts_on_a_terminal(report: Report) -> None:
    name = "a\x1b[2J\u202e<b>`\n```\n# heading"
    assert report.model is not None
    odd = replace(report, model=replace(report.model, name=name), asked=f"--config '{name}'")
    text = markdown(document(odd))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert [line for line in text.splitlines() if line.endswith("# heading")] == []
    pytest.importorskip("plotly", reason="plotly is not installed")
    whole = page(document(odd))
    assert "\x1b" not in whole
    assert "\u202e" not in whole
    assert "<b>" not in whole[: whole.index("<style>")]


# Images.


def test_an_image_of_somebody_else_is_never_replaced(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("kaleido", reason="kaleido is not installed")
    mine = tmp_path / "gains.png"
    mine.write_bytes(b"mine")
    with pytest.raises(ImageError, match=r"gains\.png exists and is no image of doratune"):
        write_images(document(report), tmp_path, "")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("gains.png", b"mine")]


def test_images_that_cannot_be_drawn_leave_the_folder_as_it_was(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("kaleido", reason="kaleido is not installed")
    monkeypatch.setenv("BROWSER_PATH", "/bin/false")
    with pytest.raises(ImageError) as failure:
        write_images(document(report), tmp_path / "new" / "folder", "")
    assert "(" not in str(failure.value).partition("failed: ")[2][:1]  # the lines of kaleido's error, not their tuple
    assert list(tmp_path.iterdir()) == []


def size_of(png: Path) -> tuple[int, int]:
    """Width and height of a PNG image."""
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def test_each_plot_is_an_image_for_a_slide(report: Report, chromium: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("BROWSER_PATH", chromium)
    whole = document(report)
    chosen = [block for section in whole.sections for block in section.blocks if block.key in ("gains", "steps")]
    two = replace(whole, sections=(Section("s", "S", blocks=tuple(chosen)),))
    files = write_images(two, tmp_path, source_line(report))
    assert [file.name for file in files] == ["gains.png", "steps.png"]
    for file in files:
        assert size_of(file) == (1920, 1080)
        assert file.stat().st_size > 20_000  # an empty plot has 15 kB
        assert is_image(file)
    assert write_images(two, tmp_path, source_line(report)) == files  # in place of the earlier ones
    assert {path.name for path in tmp_path.iterdir()} == {"gains.png", "steps.png"}


def test_without_a_browser_it_says_what_to_install(report: Report, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("kaleido", reason="kaleido is not installed")
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "nothing"))
    with pytest.raises(ImageError, match="no Chrome or Chromium was found"):
        write_images(document(report), tmp_path, "")
    assert list(tmp_path.iterdir()) == []


# The command.


def test_the_command_writes_a_page_here_and_says_where(home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or True)
    result = run("--open", home=home)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "doratune-report.html\n", "")
    written = tmp_path / "doratune-report.html"
    assert opened == [written.as_uri()]
    assert '<html lang="en">' in written.read_text(encoding="utf-8")
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    again = run("--open", home=home)
    assert (again.exit_code, again.stderr) == (0, "no browser could be opened here; open doratune-report.html in one\n")


def test_the_command_prints_markdown_and_json(home: Path) -> None:
    tables = run("--format", "md", home=home)
    assert tables.exit_code == 0
    assert tables.stdout.startswith("<!-- doratune report -->\n# doratune\n")
    values = json.loads(run("--json", home=home).stdout)
    assert values["schema"] == 1
    assert [winner["op"] for winner in values["winners"]] == ["lora_compose", "lora_compose"]
    assert values["studies"]["note"] == "there is no study storage yet"


def test_nothing_tuned_is_said_with_what_to_do(tmp_path: Path) -> None:
    result = run("--format", "md", home=tmp_path / "home")
    assert result.exit_code == 0
    assert "doratune tune --model llama-8b" in result.stdout
    assert result.stderr == "nothing was tuned yet: `doratune tune --model llama-8b` tunes a model\n"


def test_results_without_a_row_to_show_are_said_to_be_so(tmp_path: Path) -> None:
    path = world.write_results(tmp_path / "r.json", [])
    result = run("--format", "md", "--results", str(path), home=tmp_path / "home")
    assert result.exit_code == 0
    assert "no results file was given" not in result.stdout
    assert "no row of the results files can be shown" in result.stdout
    assert "no row of the results files can be shown" in result.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--open", "--format", "md"], "--open shows the page"),
        (["--open", "--json"], "--open shows the page"),
        (["--json", "-o", "x.html"], "leave out --output"),
        (["--model", "nobody"], "unknown model 'nobody'"),
        (["--model", "llama-8b", "--config", "x"], "name either a model"),
        (["--gpu", "nothing"], "unknown GPU"),
        (["--results", "nowhere.json"], "nowhere.json is not a results file"),
        (["--rank", "0"], "--rank"),
        (["--store", ""], "it is empty"),
        (["-o", ""], "it is empty"),
        (["--results", ""], "it is empty"),
        (["--config", ""], "it is empty"),
    ],
)
def test_a_wrong_request_is_named(options: list[str], told: str, home: Path, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*options, home=home)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert told in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_figures_have_no_colour_of_their_own(report: Report) -> None:
    """Colours come with the scheme; one that a plot brought along would be wrong in the other."""
    for block in document(report).figures:
        figure = figure_of(block)
        for trace in figure["data"]:
            assert "role" in trace["meta"], block.key
            for part in ("marker", "line", "error_x"):
                assert "color" not in trace.get(part, {}), block.key
        assert "template" not in figure["layout"], block.key


def test_a_page_of_hostile_words_is_a_page_of_text() -> None:
    made = page(
        Document(
            world.HOSTILE, ((world.HOSTILE,) * 2,), (world.HOSTILE,), (Section("s", world.HOSTILE, (world.HOSTILE,)),)
        )
    )
    assert "<script" not in made
    assert "<img" not in made
