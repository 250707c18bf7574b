"use strict";
// Everything is in this file: Plotly lies in it compressed, and the policy above allows no other script.
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");
  const button = document.getElementById("theme");
  const charts = JSON.parse(document.getElementById("charts").textContent);

  const remembered = (value) => {
    try {
      if (value) localStorage.setItem("onnxport-theme", value);
      return localStorage.getItem("onnxport-theme");
    } catch {
      return value; // a file's page may have no storage
    }
  };
  const isDark = () => (root.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";

  // Colours are names of the style sheet's, so that a chart follows the theme.
  const coloured = (value, style) => {
    if (Array.isArray(value)) return value.map((each) => coloured(each, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(
      Object.entries(value).map(([key, item]) => [
        key,
        /color$/.test(key) && typeof item === "string" && item.startsWith("--")
          ? style.getPropertyValue(item).trim()
          : coloured(item, style),
      ]),
    );
  };
  const axis = (given) => ({
    automargin: true,
    gridcolor: "--grid",
    linecolor: "--grid",
    zeroline: false,
    ...given,
    title: { standoff: 8, ...given.title },
  });
  const shared = (layout) => {
    const axes = Object.keys(layout).filter((key) => /^[xy]axis/.test(key));
    return {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: narrow.matches ? 11 : 12, color: "--ink-2" },
      hoverlabel: { bgcolor: "--panel", bordercolor: "--line", font: { color: "--ink" } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: "--ink-2" } },
      margin: { l: 8, r: 12, t: 8, b: 8 },
      dragmode: false,
      ...layout,
      ...Object.fromEntries(axes.map((key) => [key, axis(layout[key])])),
    };
  };

  const draw = async () => {
    const style = getComputedStyle(root);
    for (const [name, { data, layout }] of Object.entries(charts)) {
      const place = document.getElementById(name);
      await Plotly.react(place, coloured(data, style), coloured(shared(layout), style), {
        displayModeBar: false,
        responsive: true,
      });
      await new Promise((go) => setTimeout(go)); // the page stays quick between charts
    }
    root.dataset.charts = "drawn";
  };

  const unpack = async () => {
    const packed = document.getElementById("plotly");
    const bytes = Uint8Array.from(atob(packed.textContent), (sign) => sign.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    packed.remove();
  };

  const show = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to the ${isDark() ? "light" : "dark"} theme`);
    if (window.Plotly) draw();
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remembered(root.dataset.theme);
    show();
  });
  dark.addEventListener("change", show);
  narrow.addEventListener("change", show);
  const chosen = remembered();
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;
  show();

  // A chapter of numbers is opened where an address or a search leads into it.
  addEventListener("hashchange", () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    target?.closest("details")?.setAttribute("open", "");
  });

  if (Object.keys(charts).length) {
    unpack()
      .then(draw)
      .catch(() => {
        document.getElementById("no-charts").hidden = false;
        for (const place of document.querySelectorAll(".chart")) place.hidden = true;
      });
  }
})();
