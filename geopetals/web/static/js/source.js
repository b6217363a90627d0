// Facts from the coordinator: its stream of server-sent events, read by fetch because EventSource cannot carry a token.

const KEPT = "geopetals-http-token";
const RETRY_MS = 2000;

export class NeedsToken extends Error {}

export async function read(path) {
  const token = sessionStorage.getItem(KEPT);
  const answer = await fetch(path, { headers: token ? { Authorization: `Bearer ${token}` } : {}, cache: "no-store" });
  if (answer.status === 401) throw new NeedsToken();
  if (!answer.ok) throw new Error(`${path} answers ${answer.status}`);
  return answer;
}

export function remember(token) {
  sessionStorage.setItem(KEPT, token);
}

// Calls on[kind](value) for each event, for ever. `lost` hears of breaks, which are mended by asking again.
export async function follow(on, lost) {
  for (;;) {
    try {
      const answer = await read("/events");
      await events(answer.body.pipeThrough(new TextDecoderStream()).getReader(), on);
      lost(new Error("the coordinator has ended the stream"));
    } catch (error) {
      lost(error);
      if (error instanceof NeedsToken) return;
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

export async function events(reader, on) {
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      let kind = "message", data = "";
      for (const line of part.split("\n")) {
        if (line.startsWith("event: ")) kind = line.slice(7);
        if (line.startsWith("data: ")) data += line.slice(6);
      }
      if (on[kind] && data) on[kind](data === "[DONE]" ? null : JSON.parse(data));
    }
  }
}
