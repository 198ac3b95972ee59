"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const types = { f4: Float32Array, u1: Uint8Array, u2: Uint16Array };

  // Arrays are compressed; each is unpacked when it is first needed.
  async function unpack({ kind, bytes }) {
    const packed = Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const buffer = await new Response(stream).arrayBuffer();
    return kind === "text" ? new TextDecoder().decode(buffer).split("\n") : new types[kind](buffer);
  }
  const unpacked = new Map();
  const arrayOf = async (name, packed) => {
    if (!unpacked.has(name)) unpacked.set(name, await unpack(packed));
    return unpacked.get(name);
  };

  const names = await unpack(data.names);
  const n = names.length;
  const plots = [];
  let current = null, shown = null, chosen = null, groups = [], rowsOf = [];

  const format = (v) => (Number.isNaN(v) ? "none" : Number(v.toPrecision(3)).toString());
  // Points of one colour are a trace: a library that looks up a colour for each point is slow.
  const STEPS = 32;
  function shadesOf(column) {
    if (column.kind === "category") return [...column.colors, data.none];
    return [data.none, ...Array.from({ length: STEPS }, (_, k) => shadeAt(k / (STEPS - 1)))];
  }
  function shadeAt(at) {
    const scale = data.colorscale, last = scale.length - 1;
    return scale[Math.min(last, Math.round(at * last))][1];
  }
  function groupsOf(column, values) {
    const groups = shadesOf(column).map(() => []);
    const span = (column.high - column.low) || 1;
    for (let i = 0; i < n; i++) {
      let k = values[i];
      if (column.kind === "value") {
        const at = Math.round(((k - column.low) / span) * (STEPS - 1));
        k = Number.isNaN(k) ? 0 : 1 + Math.min(STEPS - 1, Math.max(0, at));
      }
      groups[k].push(i);
    }
    return groups.map((rows) => Int32Array.from(rows));
  }
  async function valuesOf(column) {
    const values = await arrayOf("column " + column.name, column.values);
    if (column.kind !== "value" || column.scale === undefined) return values;
    return Float32Array.from(values, (v) => v * column.scale);
  }
  const textOf = (column, values, i) =>
    column.kind === "value" ? format(values[i]) : column.names[values[i]] ?? "none";

  function makePlot(id, x, y, size, layout) {
    const axis = { visible: false, showgrid: false, zeroline: false };
    const full = {
      margin: { l: 0, r: 0, t: 0, b: 0 }, hovermode: "closest", dragmode: "pan", showlegend: false,
      xaxis: { ...axis, range: ends(x), ...layout.xaxis },
      yaxis: { ...axis, range: ends(y), scaleanchor: "x", ...layout.yaxis },
      images: layout.images ?? [], shapes: layout.shapes ?? [], annotations: layout.annotations ?? [],
      paper_bgcolor: "#fff", plot_bgcolor: "#fff", uirevision: "same",
    };
    plots.push({ div: $(id), x, y, size, layout: full });
  }
  function ends(values) {
    let low = Infinity, high = -Infinity;
    for (const v of values) { low = Math.min(low, v); high = Math.max(high, v); }
    const margin = 0.04 * (high - low) || 1;
    return [low - margin, high + margin];
  }
  const config = {
    scrollZoom: true, responsive: true, displaylogo: false,
    modeBarButtons: [["toImage", "pan2d", "zoom2d", "lasso2d", "resetScale2d"]],
  };
  // Draws all points; with some chosen, the others are pale and below them.
  async function draw(isChosen) {
    const shades = shadesOf(current);
    const parts = isChosen ? [(i) => !isChosen(i), isChosen] : [() => true];
    rowsOf = [];
    const looks = [];
    parts.forEach((isIn, part) => groups.forEach((group, k) => {
      const rows = isChosen ? group.filter(isIn) : group;
      if (!rows.length) return;
      rowsOf.push(rows);
      looks.push({ color: shades[k], opacity: isChosen && part === 0 ? 0.07 : 1 });
    }));
    await Promise.all(plots.map(({ div, x, y, size, layout }) => Plotly.react(div, rowsOf.map((rows, k) => ({
      type: "scattergl", mode: "markers", hoverinfo: "none",
      x: Float32Array.from(rows, (i) => x[i]), y: Float32Array.from(rows, (i) => y[i]),
      marker: { size, line: { width: 0 }, ...looks[k] },
    })), layout, config)));
  }

  async function recolor(column) {
    current = column;
    shown = await valuesOf(column);
    groups = groupsOf(column, shown);
    chosen = null;
    await draw(null);
    writeLegend(column);
    tell("");
    document.body.dataset.color = column.name;
    document.body.dataset.highlighted = "";
  }

  function writeLegend(column) {
    const legend = $("legend"), scale = $("scale");
    legend.replaceChildren();
    scale.style.display = column.kind === "value" ? "block" : "none";
    if (column.kind === "value") {
      const [bar, ends, note] = scale.children;
      const stops = data.colorscale.map(([at, c]) => c + " " + 100 * at + "%");
      bar.style.background = "linear-gradient(90deg, " + stops.join(", ") + ")";
      ends.children[0].textContent = format(column.low);
      ends.children[1].textContent = format(column.high);
      note.textContent = column.unit ?? "";
      return;
    }
    const counts = new Array(column.names.length).fill(0);
    for (const code of shown) if (code < counts.length) counts[code]++;
    column.names.forEach((name, code) => {
      if (!counts[code]) return;
      const row = document.createElement("button");
      row.type = "button";
      row.dataset.code = code;
      row.append(document.createElement("i"), document.createElement("span"), document.createElement("small"));
      row.children[0].style.background = column.colors[code];
      row.children[1].textContent = name;
      row.children[2].textContent = counts[code].toLocaleString("en");
      row.onclick = () => choose(code);
      legend.append(row);
    });
  }

  function tell(text) {
    $("state").textContent = text || n.toLocaleString("en") + " " + data.what;
  }
  async function highlight(isChosen, count, text) {
    await draw(isChosen);
    document.body.dataset.highlighted = isChosen ? count : "";
    tell(isChosen ? text + ": " + count.toLocaleString("en") + " " + data.what : "");
  }
  function choose(code) {
    chosen = chosen === code || code >= current.names.length ? null : code;
    for (const row of $("legend").children) row.setAttribute("aria-pressed", Number(row.dataset.code) === chosen);
    if (chosen === null) return highlight(null);
    return highlight((i) => shown[i] === chosen, groups[chosen].length, current.names[chosen]);
  }
  const rowOf = (point) => rowsOf[point.curveNumber][point.pointIndex];

  // A cell under the pointer is ringed in both plots, and described beside them.
  async function describe(i) {
    for (const { div, x, y } of plots) {
      const { xaxis, yaxis } = div._fullLayout, ring = div.parentNode.querySelector(".ring");
      const left = xaxis.l2p(x[i]) + xaxis._offset, top = yaxis.l2p(y[i]) + yaxis._offset;
      const isIn = left >= 0 && top >= 0 && left <= div.clientWidth && top <= div.clientHeight;
      Object.assign(ring.style, { left: left + "px", top: top + "px", display: isIn ? "block" : "none" });
    }
    const lines = [["", names[i]]];
    for (const column of data.columns) if (column.said || column === current) lines.push([column.label + ": ", textOf(column, await valuesOf(column), i)]);
    if (!data.columns.includes(current)) lines.push([current.label + ": ", textOf(current, shown, i)]);
    $("cell").replaceChildren(...lines.map(([label, text]) => {
      const p = document.createElement("p"), b = document.createElement("b");
      b.textContent = label;
      p.append(b, text);
      return p;
    }));
  }

  makePlot("map", await unpack(data.x), await unpack(data.y), data.size, data.layout);
  if (data.umap) makePlot("umap", await unpack(data.umap.x), await unpack(data.umap.y), data.umap.size, {});
  else {
    $("umap").parentNode.remove();
    document.querySelector(".plots").classList.add("single");
  }
  await recolor(data.columns[0] ?? data.genes[0]);
  const unring = () => document.querySelectorAll(".ring").forEach((ring) => (ring.style.display = "none"));
  for (const { div } of plots) {
    div.on("plotly_hover", ({ points }) => describe(rowOf(points[0])));
    div.on("plotly_unhover", unring);
    div.on("plotly_relayout", unring);
    div.on("plotly_click", ({ points }) => {
      if (current.kind !== "value") choose(shown[rowOf(points[0])]);
    });
    div.on("plotly_selected", (event) => {
      if (!event) return;
      const rows = new Set(event.points.map(rowOf));
      highlight((i) => rows.has(i), rows.size, "Selected");
    });
  }

  const select = $("color");
  data.columns.forEach((column, k) => select.append(new Option(column.label, k)));
  select.onchange = () => {
    $("gene").value = "";
    recolor(data.columns[select.value]);
  };
  const genes = new Map(data.genes.map((gene) => [gene.name.toLowerCase(), gene]));
  $("genes").append(...data.genes.map((gene) => new Option(gene.name)));
  $("gene").oninput = (event) => {
    const gene = genes.get(event.target.value.trim().toLowerCase());
    if (gene) recolor(gene);
  };
  $("gene").onchange = (event) => {
    const asked = event.target.value.trim();
    if (asked && !genes.has(asked.toLowerCase())) tell("No gene " + asked + " in this page, which has " + genes.size + ".");
  };
  document.querySelectorAll("[data-gene]").forEach((cell) => {
    cell.style.cursor = "pointer";
    cell.onclick = () => {
      const gene = genes.get(cell.dataset.gene.toLowerCase());
      if (!gene) return;
      $("gene").value = gene.name;
      recolor(gene);
      window.scrollTo({ top: 0, behavior: "smooth" });
    };
  });
  $("clear").onclick = () => {
    chosen = null;
    for (const row of $("legend").children) row.setAttribute("aria-pressed", false);
    highlight(null);
  };
  document.body.dataset.state = "ready";
})().catch((error) => {
  document.body.dataset.state = "failed";
  document.getElementById("state").textContent = "This page can't be drawn: " + error + ". It needs a browser of 2023 or newer, with WebGL.";
});
