// Sessions in progress and those that wait.

import { el, seconds, show, short, table } from "./dom.js";

const MOST = 100;

export function showSessions(status) {
  const names = new Map(status.servers.map((server) => [server.peer, server.name || short(server.peer)]));
  const chain = (session) => session.chain.map(([peer, start, end]) => `${names.get(peer) || short(peer)} ${start}:${end}`).join(" → ");
  const running = status.sessions.slice(0, MOST).map((session) => [
    short(session.session_id), short(session.client), chain(session), `${session.tokens_used} of ${session.max_length}`,
    seconds(session.predicted && session.predicted.tpot_s), session.end_s === null ? "–" : seconds(Math.max(0, Math.round(session.end_s))),
  ]);
  show("sessions", running, () => listing(running, status.running, "in progress", ["session", "client", "chain", "#tokens", "#TPOT", "#ends in"]));
  const queue = status.queue.slice(0, MOST).map((session) => [
    session.position + 1, short(session.session_id), short(session.client), `${session.batch} × ${session.max_length}`,
    session.start_s === null ? "not known" : seconds(Math.max(0, Math.round(session.start_s))),
  ]);
  show("queue", queue, () => listing(queue, status.waiting, "waiting", ["#place", "session", "client", "#tokens", "#starts in"]));
}

function listing(rows, count, what, heads) {
  if (!count) return el("p", { class: "dim" }, `Nobody is ${what}.`);
  return table(count > rows.length ? `the first ${rows.length} of ${count} ${what}` : `${count} ${what}`, heads, rows);
}
