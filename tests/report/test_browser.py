"""The page as a browser shows it, in light and in dark, on a wide and on a narrow screen: every plot is drawn, nothing
is requested or fails, nothing from a store runs, no text is cut off, and nothing is wider than the screen.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from doratune.report.data import Report, Request, gather
from doratune.report.page import page
from doratune.report.sections import document
from doratune.report.theme import DARK, LIGHT, MARKS, SCHEMES
from doratune.tuner.jobs import plan_jobs
from doratune.tuner.models import find_model

from . import world

WIDE, NARROW = 1280, 400
LEAST_FONT = 10.0  # CSS pixels

LOOK = """() => {
  const box = (element) => { const b = element.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
  const plots = [...document.querySelectorAll(".plot")].map((plot) => ({
    key: plot.id,
    label: plot.getAttribute("aria-label"),
    box: box(plot),
    traces: (plot.calcdata || []).map((points) => points.filter((p) => p.x !== undefined || p.p !== undefined).length),
    marks: plot.querySelectorAll(".scatterlayer .points path, .barlayer .point path, .scatterlayer .js-line").length,
    colours: [...plot.querySelectorAll(".scatterlayer .points path, .barlayer .point path")].map((path) => {
      const style = getComputedStyle(path);
      return [style.fill, style.stroke];
    }).flat(),
    background: getComputedStyle(plot.querySelector(".main-svg") || plot).backgroundColor,
    texts: [...plot.querySelectorAll("svg text")]
      .filter((text) => text.textContent.trim() && text.getClientRects().length)
      .map((text) => ({
        text: text.textContent, box: box(text), size: parseFloat(getComputedStyle(text).fontSize),
        colour: getComputedStyle(text).fill, tick: text.closest(".ytick") !== null,
      })),
  }));
  return {
    plots,
    width: document.documentElement.scrollWidth,
    screen: document.documentElement.clientWidth,
    ran: window.ran === true,
    images: document.querySelectorAll("img").length,
    text: document.body.innerText,
    background: getComputedStyle(document.body).backgroundColor,
    colour: getComputedStyle(document.body).color,
    headings: [...document.querySelectorAll("h1, h2, h3")].map((one) => Number(one.tagName[1])),
    ids: [...document.querySelectorAll("[id]")].map((one) => one.id),
    lang: document.documentElement.lang,
    title: document.title,
  };
}"""
"""What there is to see."""


@dataclass
class Visit:
    """A loaded page, what it complained of, and what it asked for."""

    tab: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def look(self) -> dict[str, Any]:
        """What is to be seen, once what changes has been drawn."""
        self.tab.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 60)))")
        seen: dict[str, Any] = self.tab.evaluate(LOOK)
        return seen

    def turn(self, scheme: str) -> None:
        """Prefer another colour scheme from now on."""
        self.tab.emulate_media(color_scheme=scheme)


def visit(browser: Any, path: Path, width: int, scheme: str, touch: bool = False) -> Visit:
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=touch)
    made = Visit(tab)
    tab.on("console", lambda told: made.complaints.append(told.text) if told.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: made.complaints.append(str(error)))
    tab.on("request", lambda request: made.requests.append(request.url))
    tab.goto(path.as_uri())
    return made


Seen = dict[tuple[int, str], dict[str, Any]]
"""What is seen at each width in each scheme."""


@pytest.fixture(scope="module")
def visits(browser: Any, page_file: Path) -> dict[int, Visit]:
    """The page on a wide screen in light, and on a narrow one in dark, each loaded once with everything unfolded."""
    made = {WIDE: visit(browser, page_file, WIDE, LIGHT), NARROW: visit(browser, page_file, NARROW, DARK, touch=True)}
    for one in made.values():
        one.tab.evaluate("() => document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    return made


@pytest.fixture(scope="module")
def states(visits: dict[int, Visit]) -> Seen:
    """What is seen at each width in each scheme; the second scheme comes while the page is open."""
    seen = {}
    for width, first, second in ((WIDE, LIGHT, DARK), (NARROW, DARK, LIGHT)):
        for scheme in (first, second):
            visits[width].turn(scheme)
            seen[width, scheme] = visits[width].look()
    return seen


STATES = [(width, scheme) for width in (WIDE, NARROW) for scheme in (LIGHT, DARK)]


def empty_plots(seen: dict[str, Any]) -> list[str]:
    """The plots that are not drawn, or of which a trace has no point."""
    return [plot["key"] for plot in seen["plots"] if not plot["traces"] or not all(plot["traces"]) or not plot["marks"]]


@pytest.mark.parametrize("state", STATES)
def test_every_plot_is_drawn_and_has_points(state: tuple[int, str], states: Seen, report: Report) -> None:
    seen = states[state]
    assert [plot["key"] for plot in seen["plots"]] == [block.key for block in document(report).figures]
    assert len(seen["plots"]) >= 11
    assert empty_plots(seen) == []


def test_nothing_fails_and_nothing_is_requested(visits: dict[int, Visit], states: Seen, page_file: Path) -> None:
    for one in visits.values():
        assert one.complaints == []
        assert {url for url in one.requests if not url.startswith(("data:", "blob:"))} == {page_file.as_uri()}


@pytest.mark.parametrize("state", STATES)
def test_nothing_is_wider_than_the_screen(state: tuple[int, str], states: Seen) -> None:
    assert states[state]["width"] <= states[state]["screen"] == state[0]


@pytest.mark.parametrize("state", STATES)
def test_no_text_of_a_plot_is_cut_off_overlapped_or_tiny(state: tuple[int, str], states: Seen) -> None:
    for plot in states[state]["plots"]:
        left, top, right, bottom = plot["box"]
        assert plot["texts"], plot["key"]
        for text in plot["texts"]:
            x0, y0, x1, y1 = text["box"]
            inside = x0 >= left - 1 and x1 <= right + 1 and y0 >= top - 1 and y1 <= bottom + 1
            assert inside, f"{plot['key']}: {text['text']} is cut off"
            assert text["size"] >= LEAST_FONT, f"{plot['key']}: {text['text']}"
        ticks = [text for text in plot["texts"] if text["tick"]]
        for one, other in itertools.combinations(ticks, 2):
            assert not overlap(one["box"], other["box"]), f"{plot['key']}: {one['text']} and {other['text']} overlap"


def overlap(one: list[float], other: list[float]) -> bool:
    """Whether two boxes share more than a line of pixels."""
    return all(min(one[at + 2], other[at + 2]) - max(one[at], other[at]) > 2.0 for at in (0, 1))


def rgb(colour: str) -> str:
    """A colour as a browser names it."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgb({red}, {green}, {blue})"


@pytest.mark.parametrize("state", STATES)
def test_page_and_plots_have_the_colours_of_the_scheme(state: tuple[int, str], states: Seen) -> None:
    seen, colours = states[state], SCHEMES[state[1]]
    assert seen["background"] == rgb(colours["background"])
    assert seen["colour"] == rgb(colours["text"])
    for plot in seen["plots"]:
        assert plot["background"] == rgb(colours["background"]), plot["key"]
        assert rgb(colours["text"]) in {text["colour"] for text in plot["texts"]}, plot["key"]
        own, other = (
            {rgb(mark) for mark in MARKS[scheme]} for scheme in (state[1], LIGHT if state[1] == DARK else DARK)
        )
        assert own & {*plot["colours"]} or any("url" in colour for colour in plot["colours"]), plot["key"]
        assert not other & {*plot["colours"]}, plot["key"]


def test_text_from_stores_and_files_is_text(states: Seen) -> None:
    for seen in states.values():
        assert not seen["ran"]
        assert seen["images"] == 0
        assert world.HOSTILE in seen["text"]  # in the table of environments
        peers = next(plot for plot in seen["plots"] if plot["key"] == "peers-0")
        assert any(text["text"].startswith("<script>") for text in peers["texts"])


def test_the_page_can_be_read_without_seeing_it(states: Seen) -> None:
    seen = states[WIDE, LIGHT]
    assert seen["lang"] == "en"
    assert seen["title"] == "doratune: llama-3.1-8b on h200"
    assert seen["headings"][0] == 1
    assert seen["headings"].count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(seen["headings"]))
    assert len(seen["ids"]) == len({*seen["ids"]})
    assert all(len(plot["label"]) > 20 for plot in seen["plots"])


def test_a_plot_that_lost_its_points_is_noticed(visits: dict[int, Visit], states: object) -> None:
    # Last: it breaks the page that the other tests look at.
    visits[WIDE].tab.evaluate("""() => {
      const [one, other] = ["floors", "bounds"].map((key) => document.getElementById(key));
      Plotly.react(one, [{ type: "scatter", x: [], y: [] }], {});
      Plotly.react(other, [{ type: "bar", x: [], y: [] }], {});
    }""")
    assert empty_plots(visits[WIDE].look()) == ["floors", "bounds"]


def test_a_page_without_plots_has_no_script_and_says_what_to_do(browser: Any, report: Report, tmp_path: Path) -> None:
    nothing = replace(
        report, winners=(), comparisons=(), shares=(), steps=(), covered=(), model=None,
        searches=replace(report.searches, found=()),
    )  # fmt: skip
    path = tmp_path / "empty.html"
    path.write_text(page(document(nothing)), encoding="utf-8")
    made = visit(browser, path, NARROW, DARK)
    seen = made.look()
    assert (made.complaints, seen["plots"]) == ([], [])
    assert seen["width"] <= NARROW
    assert "doratune tune --model llama-8b" in seen["text"]
    assert "<script" not in path.read_text(encoding="utf-8").replace("&lt;script", "")


def test_a_legend_of_every_operation_is_read_without_scrolling(browser: Any, tmp_path: Path) -> None:
    jobs = plan_jobs(find_model("llama-8b"), ranks=[16], dtype="bf16", gpu=world.GPU)
    by_op = {spec.op: spec for spec in jobs}
    assert len(by_op) >= 12
    store = world.write_store(tmp_path / "store.sqlite", [world.entry(spec) for spec in by_op.values()])
    path = tmp_path / "report.html"
    path.write_text(page(document(gather(Request(store=store)))), encoding="utf-8")
    made = visit(browser, path, NARROW, LIGHT, touch=True)
    look = """() => {
      const plot = document.getElementById("floors"), legend = plot.querySelector(".legend");
      const box = (one) => { const b = one.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
      return {
        scrolls: Number(legend.querySelector(".scrollbar").getAttribute("height")) > 0,
        names: [...legend.querySelectorAll("text")].map((one) => one.textContent),
        boxes: [...legend.querySelectorAll(".traces")].map(box),
        plot: box(plot),
        height: plot._fullLayout._size.h,
      };
    }"""
    for width in (NARROW, WIDE, NARROW):  # as where a phone is turned
        made.tab.set_viewport_size({"width": width, "height": 900})
        made.tab.wait_for_timeout(400)  # plotly waits for the last of several changes
        seen = made.tab.evaluate(look)
        assert sorted(seen["names"]) == sorted(by_op)
        assert not seen["scrolls"]
        assert all(seen["plot"][1] <= box[1] and box[3] <= seen["plot"][3] for box in seen["boxes"])
        assert seen["height"] >= 250.0, "the plot keeps its height"
    assert made.complaints == []
