/** Stop strings, found while a text grows: no part of one is ever shown. */

/** Passes on text that no stop string can begin in; ends at the first that is complete. */
export class StopStrings {
  matched: string | undefined;
  private held = "";

  /** `include`: the stop string itself is shown, what follows it is not. */
  constructor(private readonly stops: string[], private readonly include = false) {}

  /** Add text; returns what can be shown now. After a match: nothing more. */
  push(text: string): string {
    if (this.matched !== undefined) return "";
    this.held += text;
    const found = this.firstMatch();
    const end = found
      ? found.start + (this.include ? found.stop.length : 0)
      : this.held.length - this.possibleStart();
    const shown = this.held.slice(0, end);
    this.held = found ? "" : this.held.slice(end);
    this.matched = found?.stop;
    return shown;
  }

  /** The text is over: what was held back, since it became no stop string. */
  finish(): string {
    const shown = this.held;
    this.held = "";
    return shown;
  }

  /** The match that ends first; of those that end there, the longest. */
  private firstMatch(): { start: number; stop: string } | undefined {
    return this.stops
      .map((stop) => ({ start: this.held.indexOf(stop), stop, end: 0 }))
      .filter((match) => match.start >= 0)
      .map((match) => ({ ...match, end: match.start + match.stop.length }))
      .sort((a, b) => a.end - b.end || a.start - b.start)[0];
  }

  /** Length of the longest tail that a stop string may begin with. */
  private possibleStart(): number {
    const longest = Math.max(1, ...this.stops.map((stop) => stop.length)) - 1;
    for (let size = Math.min(this.held.length, longest); size > 0; size--) {
      const tail = this.held.slice(-size);
      if (this.stops.some((stop) => stop.startsWith(tail))) return size;
    }
    return 0;
  }
}
