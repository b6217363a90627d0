// What the coordinator has decided, and why.

import { el, get } from "./dom.js";

const MOST = 200;
const known = new Set();

export function showEvents(entries, now) {
  const list = get("events");
  for (const entry of [...entries].sort((a, b) => a.number - b.number)) {
    if (known.has(entry.number)) continue;
    known.add(entry.number);
    const ago = Math.max(0, now - entry.at_s);
    const time = new Date(Date.now() - 1000 * ago);
    list.prepend(el("li", null, el("time", { datetime: time.toISOString() }, time.toLocaleTimeString()), " ", el("strong", null, entry.what), " ", entry.why, numbers(entry.predicted)));
  }
  while (list.children.length > MOST) list.lastChild.remove();
}

function numbers(text) {
  let found = {};
  try {
    found = JSON.parse(text || "{}");
  } catch {
    return null;
  }
  const parts = Object.entries(found).filter(([, value]) => typeof value === "number").map(([name, value]) => `${name} ${Number(value.toPrecision(3))}`);
  return parts.length ? el("span", { class: "dim" }, ` (${parts.join(", ")})`) : null;
}
