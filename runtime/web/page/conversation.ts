/** The conversation on the page: questions, answers as they come, and what they cost. */

import type { Answer, Message, Model } from "../src/qcc";
import { element, megabytes, sentence } from "./dom";
import type { Settings } from "./settings";

const LONG = 1024; // tokens of an answer that nothing else bounds
const NEAR = 60; // pixels from the end within which the view follows the text

export class Conversation {
  private readonly log = element("log");
  private readonly scroller = this.log.parentElement!;
  private messages: Message[] = [];
  private running: AbortController | undefined;

  constructor(private readonly model: Model, private readonly settings: Settings) {}

  get busy(): boolean {
    return this.running !== undefined;
  }

  /** Answer a text; resolves when the answer is over. */
  async ask(text: string): Promise<void> {
    const running = new AbortController();
    this.running = running;
    this.show("user", text);
    const bubble = this.show("assistant", "");
    bubble.classList.add("waiting");
    this.log.ariaBusy = "true";
    const { messages } = this; // another list, where the conversation is cleared meanwhile
    messages.push({ role: "user", content: text });
    try {
      const answer = this.begin(text, running.signal);
      await this.stream(answer, bubble);
      messages.push({ role: "assistant", content: answer.result.text });
    } catch (error) {
      messages.pop();
      bubble.classList.add("failed");
      bubble.setAttribute("role", "alert");
      bubble.textContent = sentence(error);
      this.scrollToEnd();
    } finally {
      bubble.classList.remove("waiting");
      this.log.ariaBusy = "false";
      this.running = undefined;
    }
  }

  stop(): void {
    this.running?.abort();
  }

  /** Forget all; an answer under way ends first. */
  clear(): void {
    this.stop();
    this.messages = [];
    this.log.replaceChildren();
    element("figures").textContent = "\u00a0";
  }

  /** A model without a chat template continues the text. */
  private begin(text: string, signal: AbortSignal): Answer {
    const { system, sampling } = this.settings.chosen;
    const options = { ...sampling, signal };
    if (this.model.contextWindowSize === undefined) options.max_tokens ??= LONG;
    if (!this.model.canChat) return this.model.generate(text, options);
    const lead = system ? [{ role: "system", content: system }] : [];
    return this.model.chat([...lead, ...this.messages], options);
  }

  private async stream(answer: Answer, bubble: HTMLElement): Promise<void> {
    for await (const piece of answer) {
      const follow = this.atEnd;
      bubble.append(piece);
      if (follow) this.scrollToEnd();
      this.showFigures(answer);
    }
    if (bubble.isConnected) this.showFigures(answer);
    if (!answer.result.text) bubble.textContent = "(nothing)";
  }

  private showFigures(answer: Answer): void {
    const { decodeTokensPerSecond, finishReason, tokenIds, seconds } = answer.result;
    const parts = [`${tokenIds.length} tokens`];
    if (decodeTokensPerSecond) parts.push(`${decodeTokensPerSecond.toFixed(1)} tok/s`);
    if (seconds.prefill) parts.push(`first after ${seconds.prefill.toFixed(1)} s`);
    parts.push(`${megabytes(this.model.memory.peak)} of GPU memory`);
    if (finishReason === "length") parts.push("cut at the limit");
    element("figures").textContent = parts.join(" · ");
  }

  private show(role: "user" | "assistant", text: string): HTMLElement {
    const message = document.createElement("div");
    message.className = `message ${role}`;
    message.textContent = text;
    this.log.append(message);
    this.scrollToEnd();
    return message;
  }

  private get atEnd(): boolean {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight < NEAR;
  }

  private scrollToEnd(): void {
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }
}
