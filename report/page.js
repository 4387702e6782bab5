"use strict";
(() => {
  const { figures, marks, templates } = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 600px)");
  const coarse = window.matchMedia("(pointer: coarse)").matches;
  const drawn = new Set();
  const MANY = 5; // names in a legend that take more than two lines of a narrow screen
  const LINE = 20, AXIS = 48; // pixels of a name in a legend, and of an axis with its title

  // Above a plot a legend of many names would scroll on a narrow screen: below it the plot grows by a line for each.
  function placeBelow(data, layout) {
    const names = new Set(data.filter((trace) => trace.showlegend !== false).map((trace) => trace.legendgroup || trace.name));
    if (!layout.showlegend || names.size < MANY) return;
    const height = LINE * names.size + 16;
    layout.height += height;
    layout.margin = { ...layout.margin, b: AXIS + height };
    layout.legend = {
      ...layout.legend, orientation: "v", xanchor: "left", x: 0, yref: "container", yanchor: "bottom", y: 0,
    };
  }

  function painted(figure) {
    const scheme = dark.matches ? "dark" : "light";
    const { data, layout } = structuredClone(figure);
    for (const trace of data) {
      const role = trace.meta && trace.meta.role;
      if (role === undefined) continue;
      for (const part of ["marker", "line", "error_x"]) {
        if (trace[part]) trace[part].color = marks[scheme][role % marks[scheme].length];
      }
    }
    layout.template = templates[scheme];
    if (narrow.matches) placeBelow(data, layout);
    if (coarse) layout.dragmode = false; // a finger scrolls the page
    return [data, layout];
  }

  function draw(plot) {
    const [data, layout] = painted(figures[plot.id]);
    drawn.add(plot);
    plot.style.height = `${layout.height}px`; // when its width changes, plotly takes the height from here
    return Plotly.react(plot, data, layout, { responsive: true, displayModeBar: false });
  }

  const hidden = (plot) => plot.closest("details:not([open])") !== null;
  for (const plot of document.querySelectorAll(".plot")) if (!hidden(plot)) draw(plot);
  for (const fold of document.querySelectorAll("details.fold")) {
    fold.addEventListener("toggle", () => {
      for (const plot of fold.querySelectorAll(".plot")) if (!hidden(plot) && !drawn.has(plot)) draw(plot);
    });
  }
  for (const query of [dark, narrow]) query.addEventListener("change", () => drawn.forEach(draw));
})();
