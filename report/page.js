"use strict";
(() => {
  const { figures, marks, templates } = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const coarse = window.matchMedia("(pointer: coarse)").matches;
  const drawn = new Set();

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
    if (coarse) layout.dragmode = false; // a finger scrolls the page
    return [data, layout];
  }

  function draw(plot) {
    const [data, layout] = painted(figures[plot.id]);
    drawn.add(plot);
    return Plotly.react(plot, data, layout, { responsive: true, displayModeBar: false });
  }

  const hidden = (plot) => plot.closest("details:not([open])") !== null;
  for (const plot of document.querySelectorAll(".plot")) if (!hidden(plot)) draw(plot);
  for (const fold of document.querySelectorAll("details.fold")) {
    fold.addEventListener("toggle", () => {
      for (const plot of fold.querySelectorAll(".plot")) if (!hidden(plot) && !drawn.has(plot)) draw(plot);
    });
  }
  dark.addEventListener("change", () => drawn.forEach(draw));
})();
