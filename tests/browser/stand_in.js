// Stands in for qcc.js where the page alone is tested: it echoes, slowly, and fails when told to.
export class QccError extends Error {}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const asked = new URLSearchParams(location.search);
window.calls = [];

export async function load(source, { onProgress, onFailure }) {
  const steps = Number(asked.get("steps") ?? 4);
  onProgress({ stage: "library", loaded: 0, total: 0, fromCache: true });
  await pause(50);
  if (asked.has("fails")) throw new QccError(asked.get("fails"));
  for (let i = 0; i <= steps; i++) {
    const fromCache = asked.has("cached");
    onProgress({ stage: "weights", loaded: i * 5.5e6, total: steps * 5.5e6, fromCache });
    await pause(Number(asked.get("pause") ?? 20));
  }
  window.lose = () => onFailure(new QccError("the GPU was lost (by the test); reload the page"));
  return new StandIn();
}

class StandIn {
  id = asked.get("name") ?? "stand-in-q4f32_1";
  task = asked.get("task") ?? "chat";
  canChat = !asked.has("base");
  contextWindowSize = asked.has("slides") ? undefined : 512;
  defaults = { temperature: 0.8, top_p: 0.95 };
  memory = { weights: 22e6, peak: 34.6e6 };

  chat(messages, { signal, ...options }) {
    window.calls.push({ messages: structuredClone(messages), options });
    const text = messages.at(-1).content;
    if (text.startsWith("fail")) return new Failing();
    return new Echo(`You said “${text}”. `.repeat(Number(asked.get("length") ?? 3)), signal);
  }

  generate(prompt, { signal }) {
    window.calls.push({ prompt });
    return new Echo(" and so on and on", signal);
  }

  async embed(text) {
    return [Float32Array.from([text.length, 1, text.charCodeAt(0) / 100])];
  }
}

class Failing {
  result = { text: "", tokenIds: [], seconds: {} };
  async *[Symbol.asyncIterator]() {
    await pause(20);
    throw new QccError("the prompt has 900 tokens, the context window 512");
  }
}

class Echo {
  result = { text: "", tokenIds: [], finishReason: "stop", seconds: { prefill: 0.2 } };

  constructor(text, signal) {
    this.pieces = text.match(/\s*\S+/g);
    this.signal = signal;
  }

  async *[Symbol.asyncIterator]() {
    for (const piece of this.pieces) {
      await pause(Number(asked.get("each") ?? 5));
      if (this.signal.aborted) {
        this.result.finishReason = "cancelled";
        return;
      }
      this.result.text += piece;
      this.result.tokenIds.push(1);
      this.result.decodeTokensPerSecond = 41.25;
      yield piece;
    }
  }
}
