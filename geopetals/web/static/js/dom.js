// Elements from code. What comes from the network becomes text nodes and attribute values, never markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return element;
}

export const el = (name, attributes, ...children) => fill(document.createElement(name), attributes, children);
export const svg = (name, attributes, ...children) => fill(document.createElementNS(SVG, name), attributes, children);
export const get = (id) => document.getElementById(id);

// Rebuilds the inside of an element only when what it shows has changed: the reader's place and selection stay.
const shown = new Map();
export function show(id, facts, build) {
  const signature = JSON.stringify(facts);
  if (shown.get(id) === signature) return;
  shown.set(id, signature);
  const place = get(id), top = place.scrollTop, left = place.scrollLeft;
  place.replaceChildren(...[build()].flat());
  place.scrollTop = top;
  place.scrollLeft = left;
}

export function table(caption, heads, rows) {
  const kind = (index) => (heads[index].startsWith("#") ? "number" : null);
  return el("table", null,
    el("caption", null, caption),
    el("thead", null, el("tr", null, heads.map((head, i) => el("th", { scope: "col", class: kind(i) }, head.replace("#", ""))))),
    el("tbody", null, rows.map((row) => el("tr", null, row.map((cell, i) => el("td", { class: kind(i) }, cell))))));
}

export const seconds = (value) =>
  value === null || value === undefined ? "–" : value < 1 ? `${Math.round(value * 1000)} ms` : value < 100 ? `${value.toFixed(1)} s` : `${Math.round(value)} s`;
export const span = (value) => (value ? `${value[0]}:${value[1]}` : "–");
export const short = (peer) => `…${String(peer).slice(-6)}`;
export const percent = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "–");
