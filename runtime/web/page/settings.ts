/** What the visitor sets: kept in this browser, for each model apart. */

import type { SamplingOptions } from "../src/qcc";
import { element } from "./dom";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"] as const;

export interface Chosen {
  system: string;
  sampling: SamplingOptions;
}

export class Settings {
  private readonly dialog = element<HTMLDialogElement>("settings");
  private readonly system = element<HTMLTextAreaElement>("system");
  private key = "";
  private defaults: SamplingOptions = {};

  constructor() {
    element("open-settings").addEventListener("click", () => this.dialog.showModal());
    element("defaults").addEventListener("click", () => this.fill({ system: "", sampling: {} }));
    this.dialog.addEventListener("close", () => this.save());
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close(); // beside it
    });
    // Closing by Escape would keep what does not fit; the form checks on Done only.
    this.dialog.addEventListener("cancel", (event) => {
      if (!element<HTMLFormElement>("settings-form").reportValidity()) event.preventDefault();
    });
  }

  get isOpen(): boolean {
    return this.dialog.open;
  }

  /** Fill in what was kept for a model, else its own defaults. */
  open(model: string, defaults: SamplingOptions): void {
    this.key = `qcc:settings:${model}`;
    this.defaults = defaults;
    this.fill(this.kept());
  }

  /** What is set now; what is left empty is not there. */
  get chosen(): Chosen {
    const sampling: SamplingOptions = {};
    for (const name of NUMBERS) {
      const input = element<HTMLInputElement>(name);
      if (input.value.trim() && input.validity.valid) sampling[name] = input.valueAsNumber;
    }
    return { system: this.system.value.trim(), sampling };
  }

  private fill({ system, sampling }: Chosen): void {
    this.system.value = system;
    for (const name of NUMBERS) {
      const value = sampling[name] ?? this.defaults[name];
      element<HTMLInputElement>(name).value = value === undefined ? "" : String(value);
    }
  }

  private kept(): Chosen {
    const nothing = { system: "", sampling: {} };
    try {
      return { ...nothing, ...JSON.parse(localStorage.getItem(this.key) ?? "{}") };
    } catch {
      return nothing; // storage is off, or holds something else
    }
  }

  private save(): void {
    try {
      localStorage.setItem(this.key, JSON.stringify(this.chosen));
    } catch {
      // Storage is off: the settings hold until the page is closed.
    }
  }
}
