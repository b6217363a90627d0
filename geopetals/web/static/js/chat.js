// A conversation through the OpenAI-compatible gateway.

import { el, get } from "./dom.js";
import { events } from "./source.js";

const PLACE = "geopetals-gateway", KEY = "geopetals-api-key";
const messages = [];
let controller = null;

export function startChat() {
  get("gateway").value = localStorage.getItem(PLACE) || `http://${location.hostname || "127.0.0.1"}:8000`;
  get("key").value = sessionStorage.getItem(KEY) || "";
  get("chat-place").addEventListener("submit", (event) => event.preventDefault());
  get("gateway").addEventListener("change", () => localStorage.setItem(PLACE, get("gateway").value));
  get("key").addEventListener("change", () => sessionStorage.setItem(KEY, get("key").value));
  get("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = get("chat-text").value.trim();
    if (text && !controller) say(text);
  });
  get("chat-stop").addEventListener("click", () => controller && controller.abort());
}

async function ask(path, body) {
  const key = get("key").value;
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const url = get("gateway").value.replace(/\/+$/, "") + path;
  const answer = await fetch(url, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal: controller.signal });
  if (!answer.ok) {
    const told = await answer.json().catch(() => null);
    const error = new Error(told && told.error ? told.error.message : `the gateway answers ${answer.status}`);
    error.code = told && told.error && told.error.code;
    throw error;
  }
  return answer;
}

// The oldest turns are forgotten where the model's context is too short for all of them.
async function complete(model) {
  for (;;) {
    try {
      return await ask("/v1/chat/completions", { model, messages, stream: true });
    } catch (error) {
      if (error.code !== "context_length_exceeded" || messages.length < 3) throw error;
      messages.splice(0, 2);
    }
  }
}

async function say(text) {
  const log = get("chat-log");
  controller = new AbortController();
  get("chat-text").value = "";
  get("chat-stop").hidden = false;
  log.append(el("p", null, el("strong", null, "You: "), text));
  const words = document.createTextNode("");
  const line = el("p", null, el("strong", null, "Model: "), words);
  log.append(line);
  messages.push({ role: "user", content: text });
  try {
    const models = await (await ask("/v1/models")).json();
    const answer = await complete(models.data[0].id);
    await events(answer.body.pipeThrough(new TextDecoderStream()).getReader(), {
      message(chunk) {
        if (chunk && chunk.error) throw new Error(chunk.error.message);
        words.data += (chunk && chunk.choices[0] && chunk.choices[0].delta.content) || "";
        log.scrollTop = log.scrollHeight;
      },
    });
    messages.push({ role: "assistant", content: words.data });
  } catch (error) {
    if (error.name === "AbortError") {
      messages.push({ role: "assistant", content: words.data });
    } else {
      messages.pop();
      line.append(el("span", { class: "bad" }, ` (${error.message})`));
    }
  } finally {
    controller = null;
    get("chat-stop").hidden = true;
    get("chat-text").focus();
  }
}
