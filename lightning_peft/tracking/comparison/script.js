// Draws the plots that the page holds as JSON, in the colours of a light or dark page, and hides what a chip switches off.
"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)").matches;
  const plots = [...document.querySelectorAll(".plot")];
  const figures = new Map(plots.map((plot) => [plot, JSON.parse(plot.nextElementSibling.textContent)]));
  const hidden = new Set();

  function colours() {
    return dark.matches
      ? { ink: "#e8ebf0", soft: "#9aa5b5", line: "#2f3743", card: "#1b2028" }
      : { ink: "#1a1f28", soft: "#5c6675", line: "#e4e8ed", card: "#ffffff" };
  }

  function themed(figure) {
    const { ink, soft, line, card } = colours();
    const axis = (given) => ({ ...given, gridcolor: line, linecolor: line, tickcolor: line, color: soft, automargin: false });
    const layout = { ...figure.layout, template: {}, font: { ...figure.layout.font, color: ink, size: 12, family: getComputedStyle(document.body).fontFamily } };
    layout.xaxis = axis(figure.layout.xaxis);
    layout.yaxis = axis(figure.layout.yaxis);
    layout.hoverlabel = { bgcolor: card, bordercolor: line, font: { color: ink } };
    if (coarse) layout.dragmode = false; // a finger on a plot scrolls the page
    const data = figure.data.map((trace) => {
      const made = { ...trace, visible: !hidden.has(trace.meta) };
      if (made.type === "heatmap") made.colorbar = { ...made.colorbar, tickfont: { ...made.colorbar.tickfont, color: soft } };
      else if (made.marker && made.marker.line) made.marker = { ...made.marker, line: { ...made.marker.line, color: ink } };
      return made;
    });
    return { data, layout };
  }

  function draw() {
    const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
    if (coarse) options.displayModeBar = false;
    for (const [plot, figure] of figures) {
      const { data, layout } = themed(figure);
      Plotly.react(plot, data, layout, options);
    }
  }

  for (const chip of document.querySelectorAll(".chip")) {
    chip.addEventListener("click", () => {
      const label = chip.dataset.label;
      hidden.has(label) ? hidden.delete(label) : hidden.add(label);
      chip.setAttribute("aria-pressed", String(!hidden.has(label)));
      draw();
    });
  }
  dark.addEventListener("change", draw);
  draw();
})();
