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
  const SYMBOLS = {
    sum: "circle", weight: "square", branch: "diamond", nonlinearity: "triangle-up", norm: "cross", input: "star",
    output: "hexagram",
  };
  const MARKED = 80; // points up to which each has a marker
  // What can be drawn: words, symbol for the signal or its gradient (x or g), and the axis that suits it.
  const share = [-0.02, 1.02];
  const QUANTITIES = {
    second_moment: { words: "second moment", symbol: (x) => `E[${x}²]` },
    variance: { words: "variance", symbol: (x) => `Var[${x}]` },
    mean: { words: "mean", symbol: (x) => `E[${x}]` },
    squared_channel_mean: { words: "squared channel means", symbol: (x) => `E<sub>c</sub>[${x}]²` },
    channel_variance: { words: "variance within channels", symbol: (x) => `Var<sub>c</sub>[${x}]` },
    mean_share: { words: "squared channel means, of the second moment", linear: true, range: share },
    zeros: { words: "fraction that is zero", linear: true, range: share },
    saturated: { words: "fraction that is saturated", linear: true, range: share },
    example_cosine: { words: "mean cosine between examples", linear: true },
    effective_rank: { words: "effective rank", linear: true },
    example_share: { words: "share of the variance across examples", linear: true, range: share },
    channel_share: { words: "share of the variance across channels", linear: true, range: share },
    position_share: { words: "share of the variance across positions", linear: true, range: share },
    ratio: { words: "gradient norm over parameter norm", weight: true },
    gradient_norm: { words: "gradient norm", weight: true },
    parameter_norm: { words: "parameter norm", weight: true },
  };
  const SHARES = [["example_share", "examples"], ["channel_share", "channels"], ["position_share", "positions"]];
  const CONFIG = {
    displayModeBar: true, displaylogo: false, responsive: true, showSendToCloud: false, plotlyServerURL: "",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
  };
  const byId = (id) => document.getElementById(id);
  const create = (tag, properties) => Object.assign(document.createElement(tag), properties);
  const colour = (k) => (dark.matches ? COLOURS.dark : COLOURS.light)[k % 7];
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // Plotly reads a little HTML in texts; names are no HTML.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const missing = (x) => x === null || x === undefined;
  const figures = (x) => {
    if (missing(x)) return "–";
    if (x === 0) return "0";
    if (!Number.isFinite(x)) return x > 0 ? "∞" : "−∞";
    const size = Math.abs(x);
    return size >= 1e5 || size < 1e-3 ? x.toExponential(3).replace("e+", "e") : Number(x.toPrecision(4)).toString();
  };
  const percent = (x) => (missing(x) ? "–" : `${(100 * x).toFixed(1)}%`);
  const percents = (x) => (missing(x) ? "–" : x > 0 && x < 0.005 ? "<1%" : `${Math.round(100 * x)}%`);
  const extreme = (values, pick, start) => values.reduce((a, b) => pick(a, b), start);

  // ---- rows from columns

  const number = (x) => (Math.abs(x) > 1e308 ? Math.sign(x) * Infinity : x); // JSON has no infinity
  const record = (columns, k) => {
    const found = {};
    for (const name in columns) if (!missing(columns[name][k])) found[name] = number(columns[name][k]);
    return Object.keys(found).length ? found : null;
  };
  const rows = data.propagations.flatMap((one, run) =>
    one.rows.name.map((_, index) => {
      const row = { run, index };
      for (const name in one.rows) row[name] = one.rows[name][index];
      for (const name of ["kind", "name", "scope", "shape", "dtype", "note"]) row[name] = data.texts[row[name]];
      for (const name of ["forward", "backward", "weight"]) row[name] = record(one[name], index);
      row.predicted = { forward: record(one.predicted_forward, index), backward: record(one.predicted_backward, index) };
      row.group = Math.ceil(row.depth);
      return row;
    }));
  const kinds = [...new Set(rows.map((row) => row.kind))];
  const streams = [...new Set(data.propagations.map((one) => one.stream))];
  const predictions = data.propagations.some((one) => one.paired);
  const runColours = new Map();
  data.propagations.forEach((one, k) => runColours.set(one.label, k));
  data.runs.forEach((run) => runColours.has(run.label) || runColours.set(run.label, runColours.size));
  const found = (row, direction, predicted) => (predicted ? row.predicted : row)[direction];
  // Null: not known. Infinity: not finite.
  const value = (row, direction, quantity, predicted = false) => {
    const s = QUANTITIES[quantity].weight ? (predicted ? null : row.weight) : found(row, direction, predicted);
    if (!s) return null;
    if (s.finite < 1) return Infinity;
    return s[quantity] ?? null;
  };

  // ---- the figures over depth

  const controls = byId("controls");
  for (const [name, { words, weight }] of Object.entries(QUANTITIES)) {
    const known = rows.some((row) => ["forward", "backward"].some((d) =>
      (weight ? row.weight : row[d] ?? row.predicted[d])?.[name] !== undefined));
    if (known) controls.elements.quantity.append(create("option", { value: name, textContent: words }));
  }
  byId("sources").hidden = !predictions;
  for (const kind of kinds) {
    const label = document.createElement("label");
    label.append(create("input", { type: "checkbox", name: "kind", value: kind, checked: streams.includes(kind) }), ` ${kind}`);
    byId("kinds").append(label);
  }
  let marked = null; // rows that a verdict or a note is about: { run, rows, words }
  const settings = () => {
    const form = new FormData(controls);
    return {
      directions: form.getAll("direction"), scale: form.get("scale"), quantity: form.get("quantity") ?? "second_moment",
      kinds: form.getAll("kind"), sources: predictions ? form.getAll("source") : ["measured"],
    };
  };

  const numbers = (s) => {
    if (!s) return [];
    if (s.finite < 1) return [`${(100 * s.finite).toPrecision(3)}% of the values are finite`];
    const given = (name, words, form = figures) => (missing(s[name]) ? "" : `${words} ${form(s[name])}`);
    const shares = SHARES.map(([name, words]) => given(name, words, percents)).filter(Boolean).join(", ");
    const lines = [
      [given("mean", "mean"), given("variance", "variance"), given("second_moment", "second moment")],
      [given("squared_channel_mean", "squared channel means"), given("channel_variance", "variance within channels")],
      [given("zeros", "zeros", percents), given("saturated", "saturated", percents)],
      [given("example_cosine", "cosine between examples"), given("effective_rank", "effective rank")],
      [shares && `variance across ${shares}`],
    ];
    return lines.map((parts) => parts.filter(Boolean).join(", ")).filter(Boolean);
  };
  const wrapped = (text, width = 64) => text.split(" ").reduce((lines, word) => {
    if (lines.length && lines.at(-1).length + word.length < width) lines[lines.length - 1] += ` ${word}`;
    else lines.push(word);
    return lines;
  }, []);
  const describe = (row, direction, predicted, weight) => {
    const other = row.predicted[direction];
    const lines = [
      `<b>${plain(row.name)}</b>`,
      `${row.kind}; residual sums passed: ${row.block}`,
      row.scope && `in ${plain(row.scope)}`,
      `shape ${row.shape}, ${plain(row.dtype)}`,
      ...(weight ? [] : numbers(predicted ? other : row[direction])),
      row.weight && (weight || direction === "backward") &&
        `parameter norm ${figures(row.weight.parameter_norm)}, gradient norm ${figures(row.weight.gradient_norm)}, ` +
        `ratio ${figures(row.weight.ratio)}`,
      !predicted && !weight && !missing(other?.second_moment) && `predicted second moment ${figures(other.second_moment)}`,
      ...wrapped(row.note).map(plain),
      `${plain(data.propagations[row.run].label)}${predicted ? ", predicted" : ""}`,
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
      modebar: { orientation: "v", bgcolor: "rgba(0,0,0,0)", color: css("--quiet"), activecolor: css("--text") },
      height: 392 + 21 * entries, margin: { l: 76, r: 56, t: 44, b: 58 + 21 * entries }, showlegend: true,
      legend: { x: 0, y: 0, yref: "container", yanchor: "bottom", bgcolor: "rgba(0,0,0,0)", tracegroupgap: 0 },
      hoverlabel: { align: "left", bgcolor: css("--card"), font: { color: css("--text"), size: 12.5 } },
      ...extra,
    };
  };
  const logTicks = (decades) => (decades < 1.2 ? "D1" : decades < 3 ? "D2" : decades < 9 ? 1 : undefined);
  const axis = (extra) => ({
    tickfont: { size: 12 }, gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true, ...extra,
  });
  const depthAxis = (chosen, note = "") => {
    const start = extreme(chosen, (a, row) => Math.min(a, row.depth), 1);
    const end = extreme(chosen, (a, row) => Math.max(a, row.depth), 2);
    const unit = streams.includes("sum") ? "residual sums" : "weight layers";
    return axis({
      range: [start - 0.02 * (end - start), end + 0.02 * (end - start)],
      title: { text: `${unit} from the input${note}`, standoff: 8 },
    });
  };
  const nothing = (text) => ({ text, showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 });

  const homes = new Map(); // what brings each figure back to the ranges that it was drawn with
  const render = (id, traces, about) => {
    homes.set(id, Object.fromEntries(["xaxis", "yaxis"].map((name) =>
      about[name].range ? [`${name}.range`, [...about[name].range]] : [`${name}.autorange`, true])));
    return Plotly.react(id, traces, about, CONFIG);
  };

  // A line for each run and kind of rows, and a dashed one of the same colour for its prediction.
  function drift(id, { direction, quantity, scale, kinds: wanted, sources, title, main = false }) {
    const about = QUANTITIES[quantity];
    const shown = about.weight ? ["weight"] : wanted;
    const logarithmic = scale === "log";
    const chosen = rows.filter((row) => shown.includes(row.kind));
    const shownAs = (y) => (logarithmic ? (quantity === "mean" ? Math.abs(y) : y) : y);
    const all = sources.flatMap((source) =>
      chosen.map((row) => value(row, direction, quantity, source === "predicted")).filter((y) => y !== null).map(shownAs));
    const finite = all.filter(Number.isFinite);
    const decades = finite.filter((y) => y > 0).map(Math.log10);
    const low = decades.length ? extreme(decades, Math.min, Infinity) : 0;
    const high = decades.length ? extreme(decades, Math.max, -Infinity) : 0;
    const margin = Math.max(0.08 * (high - low), 1 - (high - low) / 2);
    const inset = margin - 0.03 * (high - low + 2 * margin); // marks stand just inside the edges
    const top = extreme(finite, Math.max, 0);
    const edge = { zero: 10 ** (low - inset), bad: logarithmic ? 10 ** (high + inset) : about.range ? 1 : top * 1.05 || 1 };
    const markOf = (y) => (y === null ? null : !Number.isFinite(y) ? "bad" : logarithmic && !(y > 0) ? "zero" : null);

    const traces = [];
    const named = new Set();
    const has = { zero: false, bad: false };
    for (const source of ["measured", "predicted"].filter((name) => sources.includes(name))) {
      const predicted = source === "predicted";
      data.propagations.forEach((one, run) => {
        const streamFirst = [...shown].sort((a, b) => (b === one.stream) - (a === one.stream));
        for (const kind of streamFirst) {
          const own = chosen.filter((row) => row.run === run && row.kind === kind &&
            value(row, direction, quantity, predicted) !== null);
          if (!own.length) continue;
          const ys = own.map((row) => shownAs(value(row, direction, quantity, predicted)));
          const isStream = kind === one.stream || shown.length === 1;
          const y = ys.map((v) => (markOf(v) ? null : v));
          // A long line needs few markers: its kind's, now and then, and those of points without a neighbour.
          const every = Math.ceil(own.length / (MARKED / 2));
          const sizes = y.map((_, k) =>
            own.length <= MARKED || (missing(y[k - 1]) && missing(y[k + 1])) || (!isStream && k % every === 0)
              ? y[k] === null ? 0 : 5 : 0);
          const style = { color: colour(run) };
          const name = `${run} ${source}`;
          const first = !named.has(name) && Boolean(named.add(name));
          const dashed = predicted || one.source === "predicted";
          const ending = predicted ? ", predicted" : main && quantity === "second_moment" ? `: ${one.words[direction]}` : "";
          const hover = (row) => describe(row, direction, predicted, about.weight);
          traces.push({
            type: "scatter", mode: sizes.some(Boolean) && !dashed ? "lines+markers" : "lines", zorder: isStream ? 1 : 0,
            name: plain(one.label + ending), showlegend: first, legendgroup: name,
            x: own.map((row) => row.depth), y, hovertext: own.map(hover), hoverinfo: "text", connectgaps: false,
            line: { ...style, dash: dashed ? "dash" : "solid", width: isStream ? (predicted ? 2 : 2.5) : 1.2 },
            marker: { ...style, symbol: SYMBOLS[kind], size: sizes, line: { width: 0 } },
          });
          const marks = own.map((row, k) => [row, markOf(ys[k])]).filter(([, what]) => what);
          if (!marks.length) continue;
          for (const [, what] of marks) has[what] = true;
          traces.push({
            type: "scatter", mode: "markers", showlegend: false, legendgroup: name, hoverinfo: "text",
            x: marks.map(([row]) => row.depth), y: marks.map(([, what]) => edge[what]),
            hovertext: marks.map(([row]) => hover(row)),
            marker: {
              ...style, size: 9,
              symbol: marks.map(([, what]) => (what === "bad" ? "triangle-up-open" : "triangle-down-open")),
            },
          });
        }
      });
    }
    const drawn = traces.length;

    for (const kind of shown.length > 1 ? shown : []) {
      const grey = css("--quiet");
      traces.push({
        type: "scatter", mode: "lines+markers", name: kind, showlegend: true, x: [null], y: [null], hoverinfo: "skip",
        legendgroup: `kind ${kind}`, line: { color: grey, width: 1.5 },
        marker: { color: grey, symbol: SYMBOLS[kind], size: 6 },
      });
    }
    if (marked && main) {
      const own = rows.filter((row) => row.run === marked.run && marked.rows.has(row.index) &&
        value(row, direction, quantity) !== null);
      const ys = own.map((row) => shownAs(value(row, direction, quantity)));
      if (own.length) {
        traces.push({
          type: "scatter", mode: "markers", name: "rows of the chosen verdict or note", showlegend: true, hoverinfo: "text",
          x: own.map((row) => row.depth), y: ys.map((y) => (markOf(y) ? edge[markOf(y)] : y)),
          hovertext: own.map((row) => describe(row, direction, false, about.weight)),
          marker: { color: css("--text"), symbol: "circle-open", size: 12, line: { width: 1.5 } },
        });
      }
    }

    const note = (text, what) => ({
      text, showarrow: false, xref: "paper", x: 1, xanchor: "left", xshift: 6, font: { color: css("--quiet") },
      y: logarithmic ? Math.log10(edge[what]) : edge[what],
    });
    const symbol = about.symbol?.(direction === "forward" ? "x" : "g") ?? "";
    const bars = quantity === "mean" && logarithmic ? `absolute mean, |${symbol}|` : [about.words, symbol].filter(Boolean).join(", ");
    const flow = direction === "backward" && !about.weight ? " (← gradients flow left)" : "";
    return render(id, traces, layout(title, traces, {
      annotations: [
        ...(drawn ? [] : [nothing("not known for these rows")]),
        ...(has.zero ? [note(about.range || quantity === "example_cosine" ? "≤ 0" : "0", "zero")] : []),
        ...(has.bad ? [{
          text: "△ not finite", showarrow: false, xref: "paper", x: 1, xanchor: "right", yref: "paper", y: 1,
          yanchor: "bottom", font: { color: css("--quiet") },
        }] : []),
      ],
      xaxis: depthAxis(chosen, flow),
      yaxis: axis({
        title: { text: bars }, type: scale, exponentformat: "power",
        ...(logarithmic
          ? { range: [low - margin, high + margin], dtick: logTicks(high - low + 2 * margin) }
          : about.range ? { range: about.range } : { rangemode: "tozero" }),
      }),
      uirevision: `${scale} ${quantity}`,
    }));
  }

  // ---- which axis the variance lies across

  const sharing = byId("sharing");
  const hasShares = (row) => ["forward", "backward"].some((d) => row[d]?.example_share !== undefined || row[d]?.channel_share !== undefined);
  const shared = data.propagations.map((_, run) => run).filter((run) => rows.some((row) => row.run === run && hasShares(row)));
  shared.forEach((run) => sharing.elements.run.append(create("option", { value: run, textContent: data.propagations[run].label })));
  if (!shared.length) {
    byId("axes").hidden = true;
    document.querySelector("nav [data-of=shares]").remove();
  }
  function shares(direction) {
    const run = Number(sharing.elements.run.value);
    const one = data.propagations[run];
    const own = rows.filter((row) => row.run === run && row.kind === one.stream && row[direction] && hasShares(row));
    const bands = SHARES.filter(([name]) => own.some((row) => row[direction][name] !== undefined));
    const rest = (row) => Math.max(0, 1 - bands.reduce((sum, [name]) => sum + (row[direction][name] ?? 0), 0));
    const trace = (words, name, get) => ({
      type: "scatter", mode: own.length > 1 ? "lines" : "markers", stackgroup: "shares", name: words, showlegend: true,
      x: own.map((row) => row.depth), y: own.map(get), line: { width: 0.5, color: css(`--${name}`) },
      fillcolor: css(`--${name}`), hoverinfo: "text",
      hovertext: own.map((row) => `<b>${plain(row.name)}</b><br>${words}: ${percents(get(row))}`),
    });
    const traces = own.length ? [
      ...bands.map(([name, words]) => trace(`across ${words}`, words, (row) => row[direction][name] ?? 0)),
      trace("in their combinations", "rest", rest),
    ] : [];
    const title = direction === "forward" ? "Forward: the signal" : "Backward: the gradient signal";
    return render(`shares-${direction}`, traces, layout(title, traces, {
      annotations: own.length ? [] : [nothing("not known for these rows")],
      xaxis: depthAxis(own), yaxis: axis({ title: { text: "share of the variance" }, range: [0, 1], tickformat: ".0%" }),
      uirevision: run,
    }));
  }

  // ---- all figures

  let drawings = 0;
  async function draw() {
    const mine = ++drawings;
    document.documentElement.dataset.state = "drawing";
    const set = settings();
    const weights = QUANTITIES[set.quantity].weight;
    const started = [];
    for (const direction of ["forward", "backward"]) {
      // Norms of weights have no direction: one figure, in the first place.
      const visible = weights ? direction === "forward" : set.directions.includes(direction);
      byId(direction).hidden = !visible;
      if (!visible) continue;
      const title = weights ? "Weights" : direction === "forward" ? "Forward: the signal" : "Backward: the gradient signal";
      started.push(drift(direction, { ...set, direction, title, main: true }));
    }
    const plot = { direction: "forward", scale: new FormData(byId("spp-axis")).get("scale"), sources: set.sources };
    started.push(
      drift("spp-mean", { ...plot, quantity: "squared_channel_mean", kinds: streams, title: "Squared channel means" }),
      drift("spp-variance", { ...plot, quantity: "channel_variance", kinds: streams, title: "Variance within channels" }),
    );
    byId("spp-branch").hidden = !kinds.includes("branch");
    if (kinds.includes("branch")) {
      started.push(drift("spp-branch", { ...plot, quantity: "channel_variance", kinds: ["branch"], title: "The same, at branch ends" }));
    }
    if (shared.length) started.push(shares("forward"), shares("backward"));
    document.querySelectorAll(".card").forEach((card, k) => { card.style.borderLeftColor = colour(k); });
    if (data.runs.length) started.push(...curves());
    await Promise.all(started);
    if (mine === drawings) document.documentElement.dataset.state = "ready";
  }

  // ---- zoom and keyboard

  const visible = () => [...document.querySelectorAll(".figure")].filter((plot) => plot.data && !plot.hidden);
  const home = (plot) => Plotly.relayout(plot, homes.get(plot.id));
  function zoom(plot, factor) {
    const [a, b] = plot._fullLayout.xaxis.range;
    const at = plot.at ? plot.data[plot.at[0]].x[plot.at[1]] : (a + b) / 2;
    return Plotly.relayout(plot, { "xaxis.range": [at - (at - a) * factor, at + (b - at) * factor] });
  }
  const points = (plot, k) => plot.data[k].x.map((_, j) => j).filter((j) => !missing(plot.data[k].x[j]) && !missing(plot.data[k].y[j]));
  function step(plot, key) {
    const lines = plot.data.map((_, k) => k).filter((k) => plot.data[k].hoverinfo !== "skip" && plot.data[k].visible !== "legendonly" && points(plot, k).length);
    if (!lines.length) return;
    let [line, point] = plot.at && lines.includes(plot.at[0]) ? plot.at : [lines[0], null];
    if (point !== null && (key === "ArrowUp" || key === "ArrowDown")) {
      const x = plot.data[line].x[point];
      line = lines[(lines.indexOf(line) + (key === "ArrowDown" ? 1 : lines.length - 1)) % lines.length];
      point = points(plot, line).reduce((a, b) => (Math.abs(plot.data[line].x[b] - x) < Math.abs(plot.data[line].x[a] - x) ? b : a));
    } else {
      const own = points(plot, line);
      const at = own.indexOf(point);
      const next = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: own.length - 1 }[key] ?? 0;
      point = own[point === null && key !== "End" ? 0 : Math.min(Math.max(next, 0), own.length - 1)];
    }
    plot.at = [line, point];
    Plotly.Fx.hover(plot, [{ curveNumber: line, pointNumber: point }]);
    const said = plot.data[line].hovertext[point].replaceAll("<br>", "; ");
    plot.nextElementSibling.textContent = new DOMParser().parseFromString(said, "text/html").body.textContent;
  }
  document.querySelectorAll(".figure").forEach((plot) => {
    plot.tabIndex = 0;
    plot.setAttribute("role", "application");
    plot.setAttribute("aria-label", "Figure; arrow keys go from value to value, plus and minus zoom, 0 returns");
    const readout = create("p", { className: "readout" });
    readout.setAttribute("aria-live", "polite");
    plot.after(readout);
    plot.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !plot.data) return;
      if (event.key.startsWith("Arrow") || event.key === "Home" || event.key === "End") step(plot, event.key);
      else if (event.key === "+" || event.key === "=") zoom(plot, 0.6);
      else if (event.key === "-") zoom(plot, 1 / 0.6);
      else if (event.key === "0") home(plot);
      else return;
      event.preventDefault();
    });
  });
  byId("reset").addEventListener("click", () => visible().forEach(home));

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
    const loss = render("loss", lossTraces, layout("Training loss", lossTraces, {
      xaxis: axis({ title: { text: "step", standoff: 8 } }),
      yaxis: axis({ title: { text: "loss" }, type: "log", exponentformat: "power", dtick: logTicks(span) }),
    }));
    seen.clear();
    const accuracyTraces = data.runs.map((run) => trace(run, {
      mode: "lines+markers", x: run.epochs_steps, y: run.accuracy,
      hovertext: run.epochs_steps.map((step, k) => `${about(run, step)}<br>accuracy ${percent(run.accuracy[k])}`),
    }));
    const accuracy = render("accuracy", accuracyTraces, layout("Test accuracy", accuracyTraces, {
      xaxis: axis({ title: { text: "step", standoff: 8 } }),
      yaxis: axis({ title: { text: "accuracy" }, tickformat: ".0%", range: [0, 1.02] }),
    }));
    return [loss, accuracy];
  }

  // ---- the table

  const PAGE = 100;
  const SHOWN_WHOLE = 60; // rows up to which blocks are not folded at first
  const least = (row) => {
    const known = [row.forward?.finite, row.backward?.finite].filter((x) => !missing(x));
    return known.length ? Math.min(...known) : null;
  };
  const across = (row, direction) => SHARES.map(([name, words]) => [words, row[direction]?.[name]])
    .filter(([, x]) => !missing(x)).sort((a, b) => b[1] - a[1]);
  const bar = (row, direction) => {
    const parts = across(row, direction);
    if (!parts.length) return null;
    const box = document.createElement("span");
    const strip = create("span", { className: "share" });
    strip.setAttribute("aria-hidden", "true");
    for (const [, words] of SHARES) {
      const own = parts.find(([name]) => name === words);
      if (!own) continue;
      const part = create("i", { className: words });
      part.style.width = `${100 * own[1]}%`;
      strip.append(part);
    }
    parts.push(["combinations", Math.max(0, 1 - parts.reduce((sum, [, x]) => sum + x, 0))]);
    parts.sort((a, b) => b[1] - a[1]);
    box.append(strip, parts.map(([words, x]) => `${words} ${percents(x)}`).join(", "));
    return box;
  };
  // Title, what to sort by and to show, and how to write a number.
  const ALL = [
    ["run", (row) => data.propagations[row.run].label], ["#", (row) => row.index + 1, figures],
    ["block", (row) => row.block, figures], ["kind", (row) => row.kind], ["name", (row) => row.name],
    ["shape", (row) => row.shape],
    ["E[x²]", (row) => row.forward?.second_moment, figures],
    ["predicted E[x²]", (row) => row.predicted.forward?.second_moment, figures],
    ["mean", (row) => row.forward?.mean, figures], ["variance", (row) => row.forward?.variance, figures],
    ["squared channel means", (row) => row.forward?.squared_channel_mean, figures],
    ["of E[x²]", (row) => row.forward?.mean_share, percents],
    ["zeros", (row) => row.forward?.zeros, percents], ["saturated", (row) => row.forward?.saturated, percents],
    ["cosine", (row) => row.forward?.example_cosine, figures], ["rank", (row) => row.forward?.effective_rank, figures],
    ["variance across", (row) => row.forward?.example_share ?? null, (x, row) => bar(row, "forward")],
    ["E[g²]", (row) => row.backward?.second_moment, figures],
    ["predicted E[g²]", (row) => row.predicted.backward?.second_moment, figures],
    ["E[g]", (row) => row.backward?.mean, figures], ["Var[g]", (row) => row.backward?.variance, figures],
    ["Var[g] across", (row) => row.backward?.example_share ?? null, (x, row) => bar(row, "backward")],
    ["finite", least, figures],
    ["parameter norm", (row) => row.weight?.parameter_norm, figures],
    ["gradient norm", (row) => row.weight?.gradient_norm, figures], ["ratio", (row) => row.weight?.ratio, figures],
    ["note", (row) => row.note], ["scope", (row) => row.scope],
  ];
  const columns = ALL.filter(([title, get], k) => k < 6 || rows.some((row) => !missing(get(row)) && get(row) !== ""));
  const filters = byId("filters");
  const order = { column: null, sign: 1, page: 0 };
  const open = new Set(); // groups that are unfolded
  data.propagations.forEach((one, k) => filters.elements.run.append(create("option", { value: k, textContent: one.label })));
  kinds.forEach((kind) => filters.elements.kind.append(create("option", { value: kind, textContent: kind })));
  filters.elements.fold.checked = rows.length > SHOWN_WHOLE;

  const compare = (a, b) => {
    const x = columns[order.column][1](a), y = columns[order.column][1](b);
    if (missing(x) || missing(y)) return missing(x) - missing(y);
    return order.sign * (typeof x === "number" ? (x === y ? 0 : x - y) : String(x).localeCompare(String(y), undefined, { numeric: true }));
  };
  const sorted = (some) => (order.column === null ? some : [...some].sort(compare));
  // Rows up to a value of the stream are its block; that value stands for them.
  function blocks(some) {
    const groups = new Map();
    for (const row of some) {
      const key = `${row.run} ${row.group}`;
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(row);
    }
    return [...groups].map(([key, own]) => {
      const lead = own.findLast((row) => row.kind === data.propagations[row.run].stream) ?? own.at(-1);
      return { key, lead, own };
    });
  }
  function chosen() {
    const [run, kind, text] = ["run", "kind", "text"].map((name) => filters.elements[name].value);
    const wanted = text.toLowerCase();
    return rows.filter((row) =>
      (!marked || (row.run === marked.run && marked.rows.has(row.index))) &&
      (run === "" || row.run === Number(run)) && (kind === "" || row.kind === kind) &&
      (wanted === "" || `${row.name}\n${row.scope}\n${row.note}`.toLowerCase().includes(wanted)));
  }
  const line = (row, extra = {}) => {
    const tr = create("tr", { className: extra.within ? "within" : "" });
    for (const [title, get, form] of columns) {
      const cell = tr.insertCell();
      const content = get(row);
      const shown = form ? form(content, row) : content;
      if (shown instanceof Node) cell.append(shown);
      else cell.textContent = shown ?? "–";
      if (form && !title.includes("across")) cell.className = "n";
      if (title === "note") cell.title = content;
      if (title === "name" && extra.toggle) cell.replaceChildren(extra.toggle);
    }
    return tr;
  };
  const toggle = ({ key, lead, own }) => {
    const button = create("button", { type: "button", textContent: `${lead.name} (${own.length} rows)` });
    button.setAttribute("aria-expanded", open.has(key));
    button.dataset.group = key;
    button.addEventListener("click", () => {
      if (!open.delete(key)) open.add(key);
      list();
      document.querySelector(`#rows button[data-group="${key}"]`)?.focus();
    });
    return button;
  };
  function list() {
    const some = chosen();
    const folded = filters.elements.fold.checked && !marked;
    let items = folded ? blocks(some) : sorted(some).map((row) => ({ lead: row, own: [row] }));
    if (folded && order.column !== null) items = items.sort((a, b) => compare(a.lead, b.lead));
    const pages = Math.max(1, Math.ceil(items.length / PAGE));
    order.page = Math.min(Math.max(order.page, 0), pages - 1);
    document.querySelector("#rows tbody").replaceChildren(
      ...items.slice(order.page * PAGE, (order.page + 1) * PAGE).flatMap((item) => {
        if (item.own.length === 1) return [line(item.own[0])];
        const top = line(item.lead, { toggle: toggle(item) });
        return open.has(item.key) ? [top, ...sorted(item.own).map((row) => line(row, { within: true }))] : [top];
      }));
    document.querySelectorAll("#rows th").forEach((th, k) => {
      th.setAttribute("aria-sort", k !== order.column ? "none" : order.sign > 0 ? "ascending" : "descending");
      th.firstChild.textContent = columns[k][0] + (k !== order.column ? "" : order.sign > 0 ? " ▲" : " ▼");
    });
    const count = `${some.length.toLocaleString("en")} rows${folded ? ` in ${items.length.toLocaleString("en")} blocks` : ""}`;
    byId("page").textContent = `${count}, page ${order.page + 1} of ${pages}`;
    byId("previous").disabled = order.page === 0;
    byId("next").disabled = order.page === pages - 1;
    byId("only").hidden = !marked;
    if (marked) byId("only").firstElementChild.textContent = `Only the rows of: ${marked.words}`;
  }
  columns.forEach(([name, , form], k) => {
    const th = create("th", { className: form && !name.includes("across") ? "n" : "" });
    const button = create("button", { type: "button", textContent: name });
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
  byId("previous").addEventListener("click", () => { order.page -= 1; list(); });
  byId("next").addEventListener("click", () => { order.page += 1; list(); });

  const mark = (of) => {
    marked = of;
    order.page = 0;
    if (of) {
      filters.elements.run.value = filters.elements.kind.value = filters.elements.text.value = "";
    }
    list();
    draw();
  };
  document.querySelectorAll("a.of").forEach((link) => link.addEventListener("click", () => mark({
    run: Number(link.dataset.run), rows: new Set(link.dataset.rows.split(" ").map(Number)),
    words: link.closest("li, tr").querySelector(".text").textContent,
  })));
  byId("only").lastElementChild.addEventListener("click", () => mark(null));

  controls.elements.quantity.addEventListener("change", ({ target }) => {
    controls.elements.scale.value = QUANTITIES[target.value].linear ? "linear" : "log";
  });
  controls.addEventListener("input", (event) => event.target.name !== "quantity" && draw());
  controls.addEventListener("change", (event) => event.target.name === "quantity" && draw());
  controls.addEventListener("submit", (event) => event.preventDefault());
  for (const form of [sharing, byId("spp-axis")]) {
    form.addEventListener("input", draw);
    form.addEventListener("submit", (event) => event.preventDefault());
  }
  dark.addEventListener("change", draw);
  list();
  draw();
})();
