/** What the page does with an embedding model: each text is compared with those before it. */

import type { Model } from "../src/qcc";
import { element, sentence } from "./dom";

export class Comparison {
  private readonly log = element("log");
  private texts: { text: string; vector: Float32Array }[] = [];

  constructor(private readonly model: Model) {}

  async ask(text: string): Promise<void> {
    this.show("user", text);
    try {
      const [vector] = await this.model.embed(text);
      const near = this.texts
        .map((other) => ({ text: other.text, value: cosine(vector!, other.vector) }))
        .sort((a, b) => b.value - a.value);
      const lines = near.map(({ text: other, value }) => `${value.toFixed(3)}  ${other}`);
      this.show("assistant", lines.join("\n") || "Another text is compared with this one.");
      this.texts.push({ text, vector: vector! });
    } catch (error) {
      this.show("failed", sentence(error));
    }
  }

  clear(): void {
    this.texts = [];
    this.log.replaceChildren();
  }

  private show(kind: string, text: string): void {
    const message = document.createElement("div");
    message.className = `message ${kind}`;
    message.textContent = text;
    this.log.append(message);
    message.scrollIntoView({ block: "end" });
  }
}

function cosine(a: Float32Array, b: Float32Array): number {
  const product = (x: Float32Array, y: Float32Array): number =>
    x.reduce((sum, value, i) => sum + value * y[i]!, 0);
  return product(a, b) / Math.sqrt(product(a, a) * product(b, b));
}
