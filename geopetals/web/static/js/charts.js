// Times of finished sessions, and how well they were predicted.

import { el, seconds, show, svg, table } from "./dom.js";

const WIDTH = 460, HEIGHT = 150, LEFT = 56, BOTTOM = 20, KEPT = 2000;
const finished = new Map();

export function showTimes(status) {
  for (const session of status.finished) finished.set(session.session_id, session);
  while (finished.size > KEPT) finished.delete(finished.keys().next().value);
  const sessions = [...finished.values()].sort((a, b) => a.ended_s - b.ended_s);
  for (const [id, key, name] of [["ttft", "ttft_s", "TTFT"], ["tpot", "tpot_s", "TPOT"]]) {
    const points = sessions.filter((each) => each.measured[key]).map((each) => [each.ended_s, each.measured[key]]);
    show(id, points, () => timeline(name, points));
  }
  const pairs = sessions
    .filter((each) => each.predicted && each.predicted.tpot_s && each.measured.tpot_s)
    .map((each) => [each.predicted.tpot_s, each.measured.tpot_s]);
  show("scatter", pairs, () => scatter(pairs));
  const ratio = (value) => (value ? `${value.toFixed(2)}×` : "–");
  const known = status.accuracy;
  show("accuracy", known, () => document.createTextNode(
    `Measured over predicted, median of ${known.sessions} sessions: TTFT ${ratio(known.ttft_s)}, TPOT ${ratio(known.tpot_s)}, in all ${ratio(known.end_to_end_s)}; starts off by ${seconds(known.start_error_s)}.`));
}

function frame(label, top, marks) {
  const figure = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
  for (const share of [0, 0.5, 1]) {
    const y = HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - 12);
    figure.append(svg("line", { x1: LEFT, x2: WIDTH, y1: y, y2: y, class: "axis" }), svg("text", { x: 2, y: y + 4, class: "dim" }, seconds(top * share)));
  }
  marks.forEach(([x, text, anchor]) => figure.append(svg("text", { x, y: HEIGHT - 4, class: "dim", "text-anchor": anchor }, text)));
  return figure;
}

function timeline(name, points) {
  if (!points.length) return el("p", { class: "dim" }, `${name}: no session has finished yet.`);
  const first = points[0][0], last = Math.max(points[points.length - 1][0], first + 1);
  const top = Math.max(...points.map((point) => point[1])) * 1.1;
  const x = (time) => LEFT + ((time - first) / (last - first)) * (WIDTH - LEFT - 6);
  const y = (value) => HEIGHT - BOTTOM - (value / top) * (HEIGHT - BOTTOM - 12);
  const middle = [...points].sort((a, b) => a[1] - b[1])[Math.floor(points.length / 2)][1];
  const figure = frame(`${name} of ${points.length} sessions, median ${seconds(middle)}`, top, [[LEFT, `${seconds(last - first)} ago`, "start"], [WIDTH - 4, "now", "end"]]);
  for (const [time, value] of points) figure.append(svg("circle", { cx: x(time), cy: y(value), r: 2.5, class: "dot" }));
  const smooth = points.map((_, i) => points.slice(Math.max(0, i - 4), i + 1).map((p) => p[1]).sort((a, b) => a - b)).map((w) => w[Math.floor(w.length / 2)]);
  figure.append(svg("path", { class: "curve", d: `M${points.map(([time], i) => `${x(time)} ${y(smooth[i])}`).join("L")}` }));
  return [el("h3", null, `${name}, median ${seconds(middle)}`), figure, tabled(name, points)];
}

function tabled(name, points) {
  return el("details", null, el("summary", null, "As a table"), el("div", { class: "scroll" },
    table(`${name} of the last sessions`, ["#ended at", `#${name}`], points.slice(-50).reverse().map(([time, value]) => [`${time.toFixed(0)} s`, seconds(value)]))));
}

function scatter(pairs) {
  if (!pairs.length) return el("p", { class: "dim" }, "No session has finished yet.");
  const top = Math.max(...pairs.flat()) * 1.1;
  const figure = frame(`Measured against predicted TPOT of ${pairs.length} sessions`, top, [[LEFT, "0", "start"], [WIDTH - 4, `predicted TPOT ${seconds(top)}`, "end"]]);
  const x = (value) => LEFT + (value / top) * (WIDTH - LEFT - 6), y = (value) => HEIGHT - BOTTOM - (value / top) * (HEIGHT - BOTTOM - 12);
  figure.append(svg("line", { x1: x(0), y1: y(0), x2: x(top), y2: y(top), class: "diagonal" }));
  for (const [predicted, measured] of pairs) figure.append(svg("circle", { cx: x(predicted), cy: y(measured), r: 2.5, class: "dot" }));
  return figure;
}
