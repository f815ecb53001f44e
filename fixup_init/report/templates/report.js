"use strict";
(() => {
  const failed = (message) => {
    const box = document.getElementById("error");
    box.hidden = false;
    box.textContent = `Drawing failed: ${message}`;
    document.documentElement.dataset.state = "failed";
  };
  window.addEventListener("error", (event) => failed(event.message));
  window.addEventListener("unhandledrejection", (event) => failed(event.reason));

  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  // Okabe and Ito's colours, which colour-blind readers can tell apart; lighter ones on dark ground.
  const COLOURS = {
    light: ["#0072b2", "#d55e00", "#009e73", "#b4548d", "#b07a00", "#2b8fc9", "#444444"],
    dark: ["#56b4e9", "#ff8c42", "#2cc79b", "#e29bc5", "#f0c040", "#9ecbff", "#dddddd"],
  };
  const DASHES = { sum: "solid", weight: "dash", branch: "dot", nonlinearity: "dashdot", norm: "longdash" };
  const SYMBOLS = {
    sum: "circle", weight: "square", branch: "diamond", nonlinearity: "triangle-up", norm: "cross", input: "star",
    output: "hexagram",
  };
  const QUANTITIES = {
    second_moment: "second moment", variance: "variance", mean: "absolute mean",
    squared_channel_mean: "mean of squared channel means",
  };
  const CONFIG = {
    displayModeBar: true, displaylogo: false, responsive: true, showSendToCloud: false, plotlyServerURL: "",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };
  const colour = (k) => (dark.matches ? COLOURS.dark : COLOURS.light)[k % 7];
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // Plotly reads a little HTML in texts; names are no HTML.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const figures = (x) => {
    if (x === null || x === undefined) return "–";
    if (x === 0) return "0";
    const size = Math.abs(x);
    return size >= 1e5 || size < 1e-3 ? x.toExponential(3).replace("e+", "e") : Number(x.toPrecision(4)).toString();
  };

  const percent = (x) => (x === null ? "–" : `${(100 * x).toFixed(1)}%`);

  const statistics = (values) =>
    values && Object.fromEntries(data.statistics.map((name, k) => [name, values[k]]));
  const rows = data.propagations.flatMap((one, run) =>
    one.rows.map((cells, index) => {
      const row = Object.fromEntries(data.fields.map((name, k) => [name, cells[k]]));
      return { ...row, run, index, forward: statistics(row.forward), backward: statistics(row.backward) };
    }));
  const kinds = [...new Set(rows.map((row) => row.kind))];
  const streams = [...new Set(data.propagations.map((one) => one.stream))];
  const runColours = new Map();
  data.propagations.forEach((one, k) => runColours.set(one.label, k));
  data.runs.forEach((run) => runColours.has(run.label) || runColours.set(run.label, runColours.size));

  // ---- the drift figures

  const controls = document.getElementById("controls");
  const kindBox = document.getElementById("kinds");
  for (const kind of kinds) {
    const label = document.createElement("label");
    const box = document.createElement("input");
    Object.assign(box, { type: "checkbox", name: "kind", value: kind, checked: streams.includes(kind) });
    label.append(box, ` ${kind}`);
    kindBox.append(label);
  }
  const settings = () => {
    const form = new FormData(controls);
    return {
      directions: form.getAll("direction"), scale: form.get("scale"), quantity: form.get("quantity"),
      kinds: form.getAll("kind"),
    };
  };

  const describe = (row, direction) => {
    const s = row[direction];
    const lines = [
      `<b>${plain(row.name)}</b>`,
      `${row.kind}; residual sums passed: ${row.block}`,
      row.scope && `in ${plain(row.scope)}`,
      `shape ${row.shape}, ${plain(row.dtype)}`,
      s.finite < 1
        ? `${(100 * s.finite).toPrecision(3)}% of the values are finite`
        : `mean ${figures(s.mean)}, variance ${figures(s.variance)}<br>second moment ${figures(s.second_moment)}, ` +
          `squared channel means ${figures(s.squared_channel_mean)}`,
      plain(data.propagations[row.run].label),
    ];
    return lines.filter(Boolean).join("<br>");
  };

  // The legend stands below the axes, a line for each entry.
  const layout = (title, traces, extra) => {
    const entries = traces.filter((trace) => trace.showlegend).length;
    return {
      title: { text: title, font: { size: 15 }, x: 0, xref: "paper", xanchor: "left", y: 0.985, yanchor: "top" },
      font: { color: css("--text"), family: "system-ui, sans-serif", size: 13 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest", uirevision: "same",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--quiet"), activecolor: css("--text") },
      height: 392 + 21 * entries, margin: { l: 76, r: 48, t: 44, b: 58 + 21 * entries }, showlegend: true,
      legend: { x: 0, y: 0, yref: "container", yanchor: "bottom", bgcolor: "rgba(0,0,0,0)", tracegroupgap: 0 },
      hoverlabel: { align: "left" },
      ...extra,
    };
  };
  const logTicks = (decades) => (decades < 1.2 ? "D1" : decades < 3 ? "D2" : decades < 9 ? 1 : undefined);
  const axis = (extra) => ({
    tickfont: { size: 12 }, gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true, ...extra,
  });

  const value = (row, direction, quantity) => {
    const s = row[direction];
    if (!s || s.finite < 1 || s[quantity] === null) return null;
    return Math.abs(s[quantity]);
  };

  function drift(direction, { scale, quantity, kinds: shown }) {
    const chosen = rows.filter((row) => shown.includes(row.kind) && row[direction]);
    const logarithmic = scale === "log";
    const positive = chosen.map((row) => value(row, direction, quantity)).filter((y) => y > 0).map(Math.log10);
    const low = positive.length ? positive.reduce((a, b) => Math.min(a, b)) : 0;
    const high = positive.length ? positive.reduce((a, b) => Math.max(a, b)) : 0;
    const margin = Math.max(0.08 * (high - low), 1 - (high - low) / 2);
    const inset = margin - 0.03 * (high - low + 2 * margin); // marks stand just inside the edges
    const edge = { zero: 10 ** (low - inset), bad: 10 ** (high + inset) };
    const worst = chosen.reduce((a, row) => Math.max(a, value(row, direction, quantity) ?? 0), 0);
    if (!logarithmic) edge.bad = worst * 1.05 || 1;

    const traces = [];
    const named = new Set();
    data.propagations.forEach((one, run) => {
      const streamFirst = [...shown].sort((a, b) => (b === one.stream) - (a === one.stream));
      for (const kind of streamFirst) {
        const own = chosen.filter((row) => row.run === run && row.kind === kind);
        if (!own.length) continue;
        const ys = own.map((row) => value(row, direction, quantity));
        const isStream = kind === one.stream;
        const shownY = ys.map((y) => (logarithmic && !(y > 0) ? null : y));
        // A long line needs no markers, but for points without a neighbour.
        const missing = (k) => shownY[k] === null || shownY[k] === undefined;
        const sizes = shownY.map((_, k) => (own.length <= 80 || (!missing(k) && missing(k - 1) && missing(k + 1)) ? 5 : 0));
        const style = { color: colour(run) };
        const group = `run ${run}`;
        const first = !named.has(run) && Boolean(named.add(run));
        const line = { ...style, dash: DASHES[kind] ?? "solid", width: isStream ? 2.5 : 1.2 };
        traces.push({
          type: "scatter", mode: sizes.some(Boolean) ? "lines+markers" : "lines",
          zorder: isStream ? 1 : 0,
          name: plain(quantity === "second_moment" ? `${one.label}: ${one.words[direction]}` : one.label),
          showlegend: first,
          x: own.map((row) => row.depth), y: shownY,
          hovertext: own.map((row) => describe(row, direction)), hoverinfo: "text", legendgroup: group, line,
          marker: { ...style, symbol: SYMBOLS[kind], size: sizes }, connectgaps: false,
        });
        const marks = own.flatMap((row, k) =>
          ys[k] === null ? [[row, "bad"]] : ys[k] === 0 && logarithmic ? [[row, "zero"]] : []);
        if (!marks.length) continue;
        traces.push({
          type: "scatter", mode: "markers", showlegend: false, legendgroup: group, hoverinfo: "text",
          x: marks.map(([row]) => row.depth), y: marks.map(([, what]) => edge[what]),
          hovertext: marks.map(([row]) => describe(row, direction)),
          marker: {
            ...style, size: 9,
            symbol: marks.map(([, what]) => (what === "bad" ? "triangle-up-open" : "triangle-down-open")),
          },
        });
      }
    });

    for (const kind of shown.length > 1 ? shown : []) {
      const grey = css("--quiet");
      traces.push({
        type: "scatter", mode: "lines+markers", name: kind, showlegend: true, x: [null], y: [null], hoverinfo: "skip",
        legendgroup: `kind ${kind}`, line: { color: grey, dash: DASHES[kind] ?? "solid", width: 1.5 },
        marker: { color: grey, symbol: SYMBOLS[kind], size: 6 },
      });
    }

    const has = (what) => chosen.some((row) => {
      const y = value(row, direction, quantity);
      return what === "bad" ? y === null : y === 0 && logarithmic;
    });
    const note = (text, what) => ({
      text, showarrow: false, xref: "paper", x: 1, xanchor: "left", xshift: 6, font: { color: css("--quiet") },
      y: logarithmic ? Math.log10(edge[what]) : edge[what],
    });
    const letter = direction === "forward" ? "x" : "g";
    const name = { second_moment: `E[${letter}²]`, variance: `Var[${letter}]`, mean: `|E[${letter}]|`,
      squared_channel_mean: `mean of E<sub>c</sub>[${letter}]²` }[quantity];
    const unit = streams.includes("sum") ? "residual sums" : "weight layers";
    const start = chosen.reduce((a, row) => Math.min(a, row.depth), 1);
    const end = chosen.reduce((a, row) => Math.max(a, row.depth), 2);
    const title = direction === "forward" ? "Forward: the signal" : "Backward: the gradient signal";
    return Plotly.react(direction, traces, layout(title, traces, {
      annotations: [
        ...(chosen.length ? [] : [{ text: "no such rows", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }]),
        ...(has("zero") ? [note("0", "zero")] : []),
        ...(has("bad") ? [note("not<br>finite", "bad")] : []),
      ],
      xaxis: axis({
        range: [start - 0.02 * (end - start), end + 0.02 * (end - start)],
        title: { text: `${unit} from the input${direction === "backward" ? " (← gradients flow left)" : ""}`, standoff: 8 },
      }),
      yaxis: axis({
        title: { text: `${QUANTITIES[quantity]}, ${name}` }, type: scale, exponentformat: "power",
        ...(logarithmic
          ? { range: [low - margin, high + margin], dtick: logTicks(high - low + 2 * margin) }
          : { rangemode: "tozero" }),
      }),
      uirevision: `${scale} ${quantity}`,
    }), CONFIG);
  }

  let drawings = 0;
  async function draw() {
    const mine = ++drawings;
    document.documentElement.dataset.state = "drawing";
    const set = settings();
    const started = [];
    for (const direction of ["forward", "backward"]) {
      document.getElementById(direction).hidden = !set.directions.includes(direction);
      if (set.directions.includes(direction)) started.push(drift(direction, set));
    }
    document.querySelectorAll(".card").forEach((card, k) => { card.style.borderTopColor = colour(k); });
    if (data.runs.length) started.push(...curves());
    await Promise.all(started);
    if (mine === drawings) document.documentElement.dataset.state = "ready";
  }

  // ---- the training figures

  function curves() {
    const seeds = [...new Set(data.runs.map((run) => run.seed))];
    const dashes = ["solid", "dash", "dot", "dashdot", "longdash"];
    const seen = new Set();
    const trace = (run, extra) => ({
      type: "scatter", name: plain(run.label), legendgroup: run.label,
      showlegend: !seen.has(run.label) && Boolean(seen.add(run.label)),
      line: { color: colour(runColours.get(run.label)), dash: dashes[seeds.indexOf(run.seed) % 5], width: 1.5 },
      hoverinfo: "text", ...extra,
    });
    const about = (run, step) => `${plain(run.label)}, seed ${run.seed}<br>step ${step}`;
    const losses = data.runs.flatMap((run) => run.loss).filter((y) => y > 0).map(Math.log10);
    const span = losses.length ? losses.reduce((a, b) => Math.max(a, b)) - losses.reduce((a, b) => Math.min(a, b)) : 1;
    const lossTraces = data.runs.map((run) => trace(run, {
      mode: "lines", x: run.steps, y: run.loss, opacity: 0.8,
      hovertext: run.steps.map((step, k) => `${about(run, step)}<br>loss ${figures(run.loss[k])}`),
    }));
    const loss = Plotly.react("loss", lossTraces, layout("Training loss", lossTraces, {
      xaxis: axis({ title: { text: "step", standoff: 8 } }),
      yaxis: axis({ title: { text: "loss" }, type: "log", exponentformat: "power", dtick: logTicks(span) }),
    }), CONFIG);
    seen.clear();
    const accuracyTraces = data.runs.map((run) => trace(run, {
      mode: "lines+markers", x: run.epochs_steps, y: run.accuracy,
      hovertext: run.epochs_steps.map((step, k) => `${about(run, step)}<br>accuracy ${percent(run.accuracy[k])}`),
    }));
    const accuracy = Plotly.react("accuracy", accuracyTraces, layout("Test accuracy", accuracyTraces, {
      xaxis: axis({ title: { text: "step", standoff: 8 } }),
      yaxis: axis({ title: { text: "accuracy" }, tickformat: ".0%", range: [0, 1.02] }),
    }), CONFIG);
    return [loss, accuracy];
  }

  // ---- the table

  const PAGE = 100;
  const columns = [
    ["run", (row) => data.propagations[row.run].label], ["#", (row) => row.index + 1, 1],
    ["block", (row) => row.block, 1], ["kind", (row) => row.kind], ["name", (row) => row.name],
    ["shape", (row) => row.shape],
    ["mean", (row) => row.forward?.mean, 1], ["variance", (row) => row.forward?.variance, 1],
    ["E[x²]", (row) => row.forward?.second_moment, 1],
    ["squared channel means", (row) => row.forward?.squared_channel_mean, 1],
    ["E[g]", (row) => row.backward?.mean, 1], ["Var[g]", (row) => row.backward?.variance, 1],
    ["E[g²]", (row) => row.backward?.second_moment, 1],
    ["finite", (row) => Math.min(row.forward?.finite ?? 1, row.backward?.finite ?? 1), 1],
    ["scope", (row) => row.scope],
  ];
  const filters = document.getElementById("filters");
  const order = { column: null, sign: 1, page: 0 };
  const option = (text, worth) => Object.assign(document.createElement("option"), { textContent: text, value: worth });
  data.propagations.forEach((one, k) => filters.elements.run.append(option(one.label, String(k))));
  kinds.forEach((kind) => filters.elements.kind.append(option(kind, kind)));

  const compare = (a, b) => {
    const x = columns[order.column][1](a), y = columns[order.column][1](b);
    const missing = (v) => v === null || v === undefined;
    if (missing(x) || missing(y)) return missing(x) - missing(y);
    return order.sign * (typeof x === "number" ? x - y : String(x).localeCompare(String(y), undefined, { numeric: true }));
  };
  function list() {
    const [run, kind, text] = ["run", "kind", "text"].map((name) => filters.elements[name].value);
    const wanted = text.toLowerCase();
    const found = rows.filter((row) =>
      (run === "" || row.run === Number(run)) && (kind === "" || row.kind === kind) &&
      (wanted === "" || `${row.name}\n${row.scope}`.toLowerCase().includes(wanted)));
    if (order.column !== null) found.sort(compare);
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    order.page = Math.min(Math.max(order.page, 0), pages - 1);
    const body = document.querySelector("#rows tbody");
    body.replaceChildren(...found.slice(order.page * PAGE, (order.page + 1) * PAGE).map((row) => {
      const line = document.createElement("tr");
      for (const [, get, isNumber] of columns) {
        const cell = line.insertCell();
        const content = get(row);
        cell.textContent = isNumber ? figures(content) : content;
        if (isNumber) cell.className = "n";
      }
      return line;
    }));
    document.querySelectorAll("#rows th").forEach((th, k) => {
      th.setAttribute("aria-sort", k !== order.column ? "none" : order.sign > 0 ? "ascending" : "descending");
      th.firstChild.textContent = columns[k][0] + (k !== order.column ? "" : order.sign > 0 ? " ▲" : " ▼");
    });
    document.getElementById("page").textContent =
      `${found.length.toLocaleString("en")} rows, page ${order.page + 1} of ${pages}`;
    document.getElementById("previous").disabled = order.page === 0;
    document.getElementById("next").disabled = order.page === pages - 1;
  }
  columns.forEach(([name, , isNumber], k) => {
    const th = document.createElement("th");
    if (isNumber) th.className = "n";
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: name });
    button.addEventListener("click", () => {
      order.sign = order.column === k ? -order.sign : 1;
      order.column = k;
      order.page = 0;
      list();
    });
    th.append(button);
    document.querySelector("#rows thead tr").append(th);
  });
  filters.addEventListener("input", () => { order.page = 0; list(); });
  filters.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("previous").addEventListener("click", () => { order.page -= 1; list(); });
  document.getElementById("next").addEventListener("click", () => { order.page += 1; list(); });

  controls.addEventListener("input", draw);
  controls.addEventListener("submit", (event) => event.preventDefault());
  dark.addEventListener("change", draw);
  list();
  draw();
})();
