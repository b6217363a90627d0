// Who holds which blocks.

import { el, percent, show, short, span, svg, table } from "./dom.js";

const ROW = 18, LABEL = 170, TAIL = 90, TOP = 34;

export function showBlocks(status) {
  const servers = [...status.servers].sort((a, b) => order(a) - order(b) || String(a.peer).localeCompare(String(b.peer)));
  const facts = servers.map((s) => [s.peer, s.name, s.state, s.span, s.assigned, s.target, s.sessions, cacheUse(s), s.relayed]);
  show("blocks", [status.replicas, facts], () => map(status.replicas, servers));
  show("servers-table", facts, () =>
    table(`${servers.length} servers`, ["server", "peer", "state", "serves", "to hold", "#sessions", "#cache in use", "device", "network"],
      servers.map((s) => [s.name || "–", short(s.peer), s.state, span(s.span), span(s.assigned || s.target), s.sessions, cacheUse(s), `${s.device} ${s.dtype}`, s.relayed ? "relayed" : "direct"])));
}

const order = (server) => (server.span || server.assigned || server.target || [1e9])[0];

function cacheUse(server) {
  return server.cache ? percent(server.cache.total - server.cache.free, server.cache.total) : "–";
}

function map(replicas, servers) {
  const width = 1000, inner = width - LABEL - TAIL, blocks = replicas.length || 1, one = inner / blocks;
  const x = (block) => LABEL + block * one;
  const height = TOP + servers.length * ROW + 6;
  const missing = replicas.filter((count) => count === 0).length;
  const label = `${servers.length} servers, ${blocks} blocks, ${missing} of them without a server`;
  const figure = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  figure.append(svg("text", { x: 4, y: 24, class: "dim" }, "servers per block"));
  replicas.forEach((count, block) => {
    figure.append(svg("rect", { x: x(block), y: 14, width: Math.max(one - 0.5, 0.5), height: 12, class: `replicas${Math.min(count, 2)}` },
      svg("title", null, `block ${block}: ${count} server${count === 1 ? "" : "s"}`)));
    if (block % Math.max(1, Math.ceil(blocks / 16)) === 0) figure.append(svg("text", { x: x(block), y: 10, class: "dim" }, block));
  });
  servers.forEach((server, row) => figure.append(serverRow(server, TOP + row * ROW, x, inner, row)));
  return figure;
}

function serverRow(server, y, x, inner, row) {
  const group = svg("g", null,
    svg("title", null, `${server.name || ""} ${server.peer}: ${server.state}, serves ${span(server.span)}`),
    svg("text", { x: 4, y: y + 12 }, clip(server.name || short(server.peer), 22)),
    svg("rect", { x: x(0), y: y + 3, width: inner, height: ROW - 7, class: "row" }));
  if (server.span) {
    const kind = server.state === "gone" ? "away" : row % 2 ? "odd" : "";
    group.append(svg("rect", { x: x(server.span[0]), y: y + 3, width: x(server.span[1]) - x(server.span[0]), height: ROW - 7, class: `span ${kind}` }));
  }
  const target = server.assigned || server.target;
  if (target && span(target) !== span(server.span)) {
    group.append(svg("rect", { x: x(target[0]), y: y + 3, width: x(target[1]) - x(target[0]), height: ROW - 7, class: "target" }));
  }
  group.append(svg("text", { x: x(0) + inner + 8, y: y + 12, class: "dim" }, server.state === "ready" ? cacheUse(server) : server.state));
  return group;
}

function clip(text, length) {
  return text.length > length ? `${text.slice(0, length - 1)}…` : text;
}
