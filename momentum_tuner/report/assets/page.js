"use strict";
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const root = document.documentElement;
  const plots = [...document.querySelectorAll(".plot")];
  const PRINT_WIDTH = 690;

  // Light and dark

  const dark = () =>
    root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;

  function setTheme(theme) {
    root.dataset.theme = theme;
    try {
      localStorage.setItem("momentum-tuner-theme", theme);
    } catch { /* a page inside MLflow has no storage */ }
    nameTheme();
    redraw();
  }

  function nameTheme() {
    document.getElementById("theme").textContent = dark() ? "Light" : "Dark";
  }

  // Figures: colours are names of the page's own, "--c0", or "--c0/20" for 20% of it

  function painted(value, styles) {
    if (typeof value === "string" && value.startsWith("--")) {
      const [name, share] = value.split("/");
      const colour = styles.getPropertyValue(name).trim();
      if (!share) return colour;
      const parts = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
      return `rgba(${parts.join(",")},${Number(share) / 100})`;
    }
    if (Array.isArray(value)) return value.map((part) => painted(part, styles));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, painted(part, styles)]));
    }
    return value;
  }

  function layoutOf(figure, width) {
    const lines = { gridcolor: "--line", zerolinecolor: "--line", linecolor: "--line", automargin: true };
    const legend = { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 }, itemwidth: 30 };
    const layout = {
      height: figure.height,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: "--ink", size: 12, family: "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif" },
      hoverlabel: { bgcolor: "--panel", bordercolor: "--line", font: { color: "--ink" } },
      margin: { l: 56, r: 14, t: 28, b: 46 },
      legend,
      modebar: { bgcolor: "rgba(0,0,0,0)", color: "--soft", activecolor: "--accent" },
      ...figure.layout,
    };
    for (const key of ["xaxis", "yaxis"]) layout[key] = { ...lines, ...layout[key] };
    if (width) Object.assign(layout, { width, autosize: false });
    return painted(layout, getComputedStyle(root));
  }

  function draw(element, width) {
    const figure = data.figures[element.dataset.figure];
    const config = {
      displaylogo: false,
      responsive: !width,
      displayModeBar: "hover",
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
      toImageButtonOptions: { filename: element.dataset.figure, scale: 2 },
    };
    // Copies: Plotly keeps what it gets, and the next theme begins from the same figure.
    return Plotly.react(element, painted(figure.data, getComputedStyle(root)), layoutOf(figure, width), config);
  }

  async function redraw(width) {
    if (!window.Plotly) return;
    for (const element of plots) await draw(element, width);
  }

  async function unpack() {
    const packed = document.getElementById("plotly-packed");
    if (!packed) return;
    const bytes = Uint8Array.from(atob(packed.textContent.trim()), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    packed.remove();
  }

  async function drawAll() {
    try {
      await unpack();
      for (const element of plots) {
        await draw(element);
        element.dataset.drawn = "yes";
        await new Promise((done) => setTimeout(done, 0));
      }
      document.body.dataset.drawn = "yes";
    } catch (error) {
      const trouble = document.getElementById("trouble");
      trouble.hidden = false;
      trouble.textContent = "The figures cannot be drawn in this browser (it must be of 2023 or later): " + error;
    }
  }

  // The table of trials

  const SHOWN = 100;
  const state = { column: null, up: true, all: false };

  function textOf(value) {
    if (value === null || value === undefined) return "";
    return typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(5))) : String(value);
  }

  function matching() {
    const { columns, rows } = data.trials;
    const words = document.getElementById("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = [...document.querySelectorAll(".filters select")]
      .filter((select) => select.value)
      .map((select) => [columns.indexOf(select.dataset.column), select.value]);
    const found = rows.filter((row) => {
      if (!chosen.every(([at, value]) => row[at] === value)) return false;
      if (!words.length) return true;
      const line = row.map(textOf).join(" ").toLowerCase();
      return words.every((word) => line.includes(word));
    });
    if (state.column === null) return found;
    const at = state.column;
    const sign = state.up ? 1 : -1;
    const order = (a, b) => {
      if (a[at] === b[at]) return 0;
      if (a[at] === null) return 1; // what is missing is last either way
      if (b[at] === null) return -1;
      if (typeof a[at] === "number" && typeof b[at] === "number") return sign * (a[at] - b[at]);
      return sign * String(a[at]).localeCompare(String(b[at]), undefined, { numeric: true });
    };
    return [...found].sort(order);
  }

  function showTrials() {
    const { columns, rows } = data.trials;
    const found = matching();
    const body = document.querySelector("#trials-table tbody");
    const outcome = columns.indexOf("outcome");
    const lines = found.slice(0, state.all ? found.length : SHOWN).map((row) => {
      const line = document.createElement("tr");
      row.forEach((value, at) => {
        const cell = document.createElement("td");
        cell.textContent = textOf(value);
        if (typeof value === "number") cell.className = "number";
        if (columns[at] === "reason" && value) cell.className = "long";
        if (at === outcome) cell.className = `outcome-${value}`;
        line.append(cell);
      });
      return line;
    });
    body.replaceChildren(...lines);
    document.getElementById("count").textContent = `${found.length} of ${rows.length} trials`;
    const more = document.getElementById("more");
    more.hidden = lines.length === found.length;
    more.textContent = `Show all ${found.length}`;
    document.querySelectorAll("#trials-table th").forEach((heading, at) => {
      const sorted = at === state.column ? (state.up ? "ascending" : "descending") : "none";
      heading.setAttribute("aria-sort", sorted);
      heading.firstChild.textContent = data.trials.titles[at] + { ascending: " ▲", descending: " ▼", none: "" }[sorted];
    });
  }

  function prepareTrials() {
    const { columns, rows, titles } = data.trials;
    const heads = titles.map((title, at) => {
      const heading = document.createElement("th");
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = title;
      button.addEventListener("click", () => {
        state.up = state.column === at ? !state.up : true;
        state.column = at;
        showTrials();
      });
      heading.append(button);
      return heading;
    });
    document.querySelector("#trials-table thead tr").replaceChildren(...heads);
    for (const select of document.querySelectorAll(".filters select")) {
      const at = columns.indexOf(select.dataset.column);
      for (const value of new Set(rows.map((row) => row[at]))) {
        const option = document.createElement("option");
        option.value = option.textContent = value;
        select.append(option);
      }
      select.addEventListener("change", showTrials);
    }
    document.getElementById("filter").addEventListener("input", showTrials);
    document.getElementById("more").addEventListener("click", () => {
      state.all = true;
      showTrials();
    });
    showTrials();
  }

  // The page

  try {
    const kept = localStorage.getItem("momentum-tuner-theme");
    if (kept === "dark" || kept === "light") root.dataset.theme = kept;
  } catch { /* a page inside MLflow has no storage */ }
  nameTheme();
  document.getElementById("theme").addEventListener("click", () => setTheme(dark() ? "light" : "dark"));
  document.getElementById("print").addEventListener("click", () => window.print());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    nameTheme();
    redraw();
  });
  let before;
  window.addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    root.dataset.theme = "light"; // paper is
    redraw(PRINT_WIDTH);
  });
  window.addEventListener("afterprint", () => {
    if (before === undefined) delete root.dataset.theme;
    else root.dataset.theme = before;
    redraw();
  });
  if (data.trials && document.getElementById("trials-table")) prepareTrials();
  drawAll();
})();
