/** The elements of index.html, by their ids. */

export function element<T extends HTMLElement = HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (!found) throw new Error(`index.html has no #${id}`);
  return found as T;
}

/** Show one of the sections in the middle of the page, or none. */
export function showSection(name: "loading" | "consent" | "failure" | "welcome" | ""): void {
  for (const id of ["loading", "consent", "failure", "welcome"]) {
    element(id).hidden = id !== name;
  }
}

export function megabytes(bytes: number): string {
  const value = bytes / 1e6;
  const digits = value < 10 ? 1 : 0;
  return `${value.toLocaleString("en", { maximumFractionDigits: digits })} MB`;
}

/** The text of an error, as a sentence. */
export function sentence(error: unknown): string {
  const text = error instanceof Error ? error.message : String(error);
  const upper = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(upper) ? upper : `${upper}.`;
}
