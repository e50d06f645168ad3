"use strict";
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const touch = window.matchMedia("(pointer: coarse)").matches;
  const hidden = new Set();
  let printing = false;

  /** Replace every "@name" by the colour that the theme has for it. */
  function painted(value, palette) {
    if (typeof value === "string") return value[0] === "@" && palette[value.slice(1)] || value;
    if (Array.isArray(value)) return value;
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, painted(item, palette)]));
  }

  function axis(own, palette) {
    return {
      automargin: true, gridcolor: palette.grid, linecolor: palette.grid, zeroline: false,
      ...(own.tickformat ? {} : { exponentformat: "power" }), fixedrange: touch, nticks: own.type === "log" ? 5 : 0, ...own,
      title: { standoff: 6, font: { size: 12 }, ...own.title },
    };
  }

  function figure(name) {
    const palette = page.palettes[dark.matches && !printing ? "dark" : "light"];
    const { data, layout } = page.figures[name];
    const traces = data.map((trace) => ({
      ...painted(trace, palette), visible: !(trace.meta && hidden.has(trace.meta.run)),
    }));
    return [traces, {
      ...painted(layout, palette),
      xaxis: axis(layout.xaxis, palette),
      yaxis: axis(layout.yaxis, palette),
      autosize: true, showlegend: false, uirevision: "keep", hovermode: "closest",
      dragmode: touch ? false : "zoom",
      margin: { l: 48, r: 10, t: 10, b: 40 },
      paper_bgcolor: palette.background, plot_bgcolor: palette.background,
      font: { family: "system-ui, sans-serif", size: 12, color: palette.text },
      hoverlabel: { bgcolor: palette.surface, bordercolor: palette.grid, font: { color: palette.text } },
    }];
  }

  const settings = {
    responsive: true, displaylogo: false, scrollZoom: false,
    displayModeBar: false, doubleClick: "reset",
  };

  function draw() {
    return Promise.all(Object.keys(page.figures).map((name) => {
      const element = document.getElementById(name);
      const [data, layout] = figure(name);
      layout.width = element.clientWidth;
      layout.height = element.clientHeight;
      return Plotly.react(element, data, layout, settings);
    }));
  }

  function print(starts) {
    printing = starts;
    document.body.classList.toggle("printing", starts);
    draw();
  }

  for (const button of document.querySelectorAll(".run")) {
    button.addEventListener("click", () => {
      const run = Number(button.dataset.run);
      const shown = hidden.has(run);
      shown ? hidden.delete(run) : hidden.add(run);
      button.setAttribute("aria-pressed", String(shown));
      draw();
    });
  }
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (printing || window.innerWidth === width) return;
    width = window.innerWidth;
    draw();
  });
  dark.addEventListener("change", draw);
  window.addEventListener("beforeprint", () => print(true));
  window.addEventListener("afterprint", () => print(false));
  draw().then(() => { document.body.dataset.drawn = "yes"; });
})();
