// Members placed so that distances are round trips, as well as the plane allows, and chains of sessions over them.

import { seconds, show, short, svg, table } from "./dom.js";

const SIZE = 420, MARGIN = 26, LABEL = 90, MOST_LINKS = 600, MOST_NODES = 260, ROUNDS = 60;
const places = new Map();

export function showNetwork(status) {
  const links = status.links.measured.slice(0, MOST_LINKS);
  const servers = new Map(status.servers.map((server) => [server.peer, server]));
  const names = nodes(servers, links, status.sessions);
  const chains = status.sessions.slice(0, 40).map((session) => [session.client, ...session.chain.map((hop) => hop[0]), session.client]);
  const rtts = links.map(([a, b, rtt, relayed]) => [a, b, Math.round(rtt * 500) / 500, relayed]);
  show("network", [names, rtts, chains, [...servers.values()].map((s) => [s.state, s.name, s.relayed])], () => {
    settle(names, links);
    return drawing(names, rtts, chains, servers);
  });
  show("links-table", rtts, () => {
    const name = (peer) => (servers.get(peer) || {}).name || short(peer);
    return table(`${status.links.measured.length} measured links, ${status.links.estimated} estimated`, ["from", "to", "#round trip", "way"],
      rtts.map(([a, b, rtt, relayed]) => [name(a), name(b), seconds(rtt), relayed ? "relayed" : "direct"]));
  });
}

function nodes(servers, links, sessions) {
  const found = new Set(servers.keys());
  for (const session of sessions) found.add(session.client);
  for (const [a, b] of links) found.add(a).add(b);
  return [...found].slice(0, MOST_NODES).sort();
}

// Stress majorisation by gradient steps. Places are kept from one picture to the next.
function settle(names, links) {
  names.forEach((name, i) => {
    const angle = (2 * Math.PI * i) / names.length;
    if (!places.has(name)) places.set(name, { x: Math.cos(angle), y: Math.sin(angle) });
  });
  for (const name of [...places.keys()]) if (!names.includes(name)) places.delete(name);
  const pairs = links.filter(([a, b]) => places.has(a) && places.has(b) && a !== b);
  const longest = Math.max(...pairs.map((pair) => pair[2]), 1e-6);
  for (let round = 0; round < ROUNDS; round++) {
    const step = 0.3 * (1 - round / ROUNDS) + 0.02;
    for (const [a, b, rtt] of pairs) {
      const p = places.get(a), q = places.get(b);
      const dx = q.x - p.x, dy = q.y - p.y, distance = Math.hypot(dx, dy) || 1e-6;
      const wanted = 0.12 + (1.8 * rtt) / longest;
      const move = (step * (distance - wanted)) / distance / 2;
      p.x += dx * move; p.y += dy * move; q.x -= dx * move; q.y -= dy * move;
    }
  }
}

function drawing(names, links, chains, servers) {
  const points = names.map((name) => places.get(name));
  const bound = (pick, choose) => (points.length ? Math[choose](...points.map((point) => point[pick])) : 0);
  const box = { x: bound("x", "min"), y: bound("y", "min") };
  const across = bound("x", "max") - box.x, down = bound("y", "max") - box.y;
  const scale = Math.min((SIZE - 2 * MARGIN - LABEL) / Math.max(across, 1e-6), (SIZE - 2 * MARGIN) / Math.max(down, 1e-6));
  const left = (SIZE - LABEL - across * scale) / 2, top = (SIZE - down * scale) / 2;
  const at = (name) => {
    const place = places.get(name);
    return place ? [left + (place.x - box.x) * scale, top + (place.y - box.y) * scale] : null;
  };
  const figure = svg("svg", { viewBox: `0 0 ${SIZE} ${SIZE}`, role: "img", "aria-label": `${servers.size} servers, ${links.length} links, ${chains.length} chains of sessions` });
  for (const [a, b, rtt, relayed] of links) {
    const from = at(a), to = at(b);
    if (!from || !to) continue;
    figure.append(svg("line", { x1: from[0], y1: from[1], x2: to[0], y2: to[1], class: `link${relayed ? " relayed" : ""}` },
      svg("title", null, `${short(a)} – ${short(b)}: ${seconds(rtt)}${relayed ? ", relayed" : ""}`)));
  }
  for (const chain of chains) {
    const points = chain.map(at).filter(Boolean);
    if (points.length > 1) figure.append(svg("path", { d: `M${points.map((point) => point.join(" ")).join("L")}`, class: "chain" }));
  }
  const labelled = names.length <= 40;
  for (const name of names) {
    const server = servers.get(name), [x, y] = at(name);
    const kind = !server ? "client" : server.state === "gone" ? "away" : server.relayed ? "relayed" : "";
    const label = server ? server.name || short(name) : short(name);
    figure.append(svg("circle", { cx: x, cy: y, r: server ? 7 : 4, class: `node ${kind}` }, svg("title", null, `${label} ${server ? server.state : "client"}`)));
    if (labelled) figure.append(svg("text", { x: x + 9, y: y + 4 }, label.slice(0, 18)));
  }
  return figure;
}
