/** The one error that users meet: its message says where, what is wrong, and what to do. */

export class QccError extends Error {
  override name = "QccError";
}

/** The text of whatever was thrown; of TVM's many lines the last. */
export function messageOf(error: unknown): string {
  const text = (error as { message?: string } | undefined)?.message ?? String(error);
  const lines = text.split("\n").filter((line) => line.trim());
  return lines.at(-1)?.trim() ?? "unknown error";
}
