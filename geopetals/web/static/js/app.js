import { showBlocks } from "./blocks.js";
import { startChat } from "./chat.js";
import { showTimes } from "./charts.js";
import { el, get, seconds } from "./dom.js";
import { showEvents } from "./events.js";
import { showNetwork } from "./network.js";
import { showSessions } from "./sessions.js";
import { follow, NeedsToken, remember } from "./source.js";
import { startTheme } from "./theme.js";

let now = 0;

function summary(status) {
  const missing = status.replicas.filter((count) => count === 0).length;
  const ready = status.servers.filter((server) => server.state === "ready").length;
  const cover = missing ? el("span", { class: "bad" }, `${missing} blocks have no server`) : el("span", { class: "good" }, "all blocks are served");
  const parts = [
    `${ready} of ${status.servers.length} servers ready`,
    `${status.running} sessions, ${status.waiting} waiting`,
    `${status.clients} clients`,
    status.plan_due ? `a plan is due: ${status.plan_due}` : `up for ${seconds(status.coordinator.up_s)}`,
  ];
  const text = `${missing}|${parts.slice(0, 3).join("|")}|${status.plan_due}`;
  if (get("summary").dataset.text !== text) {
    get("summary").dataset.text = text;
    get("summary").replaceChildren(cover, ` · ${parts.join(" · ")}`);
  }
  const model = status.coordinator.model;
  get("model").textContent = `${status.coordinator.swarm} · ${model.startsWith("/") ? model.split("/").pop() : model}`;
}

function update(status) {
  get("login").hidden = true;
  now = status.coordinator.now;
  summary(status);
  showBlocks(status);
  showNetwork(status);
  showSessions(status);
  showTimes(status);
  showEvents(status.history, now);
  document.body.dataset.ready = "true";
}

function lost(error) {
  delete get("summary").dataset.text;
  if (error instanceof NeedsToken) {
    get("login").hidden = false;
    get("token").focus();
    get("summary").textContent = "A token is needed.";
    return;
  }
  get("summary").replaceChildren(el("span", { class: "warn" }, `No word from the coordinator (${error.message}); what is shown is old.`));
}

function start() {
  follow({ status: update, decision: (entry) => showEvents([entry], now) }, lost);
}

get("login").addEventListener("submit", (event) => {
  event.preventDefault();
  remember(get("token").value);
  start();
});
get("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(`${get("add-token").textContent}\n${get("add-serve").textContent}\n`);
  get("copied").textContent = "Copied.";
});
startTheme();
startChat();
start();
