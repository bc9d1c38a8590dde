/**
 * Token ids into text as they come: characters are never split, spaces never lost.
 *
 * The tokenizer's own decoder works on a short window, so no kind of tokenizer needs a case.
 */

const REPLACEMENT = "\ufffd"; // what decoders write for bytes that are not yet a character
const CONTEXT = 8; // tokens of the prompt that the window begins with
const ENDING = new RegExp(`${REPLACEMENT}+$`);

/** The text of one answer, which continues that of the prompt. */
export class Detokenizer {
  private window: number[];
  private shown: string; // text of the window, as far as it is out
  private start: number; // tokens whose text was shown

  constructor(
    private readonly decode: (ids: number[]) => string, prompt: number[] = [],
  ) {
    let size = CONTEXT;
    this.window = prompt.slice(-size);
    const most = Math.min(prompt.length, 8 * CONTEXT);
    while (size < most && this.text().startsWith(REPLACEMENT)) {
      size++; // the window would begin within a character
      this.window = prompt.slice(-size);
    }
    // The prompt's last character may be incomplete; the answer then begins with it.
    this.shown = this.text().replace(ENDING, "");
    this.start = this.window.length;
  }

  /** Add a token; returns the text that is certain now. */
  push(token: number): string {
    this.window.push(token);
    const text = this.text();
    return text.endsWith(REPLACEMENT) ? "" : this.show(text);
  }

  /** The answer is over: what was held back, its incomplete characters as U+FFFD. */
  finish(): string {
    return this.show(this.text());
  }

  private show(text: string): string {
    // Later bytes may spoil what was shown: then they are decoded alone.
    const fresh = text.startsWith(this.shown)
      ? text.slice(this.shown.length)
      : this.decode(this.window.slice(this.start));
    if (fresh) {
      // The window may begin anew where its text ended with a whole character.
      if (this.start < this.window.length) this.window = this.window.slice(this.start);
      this.shown = this.text();
      this.start = this.window.length;
    }
    return fresh;
  }

  private text(): string {
    return this.decode(this.window);
  }
}
