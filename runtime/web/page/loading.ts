/** Loading the model: how far it is, what failed, and whether a large download may begin. */

import type { Model, ModelRecord, Progress } from "../src/qcc";
import { element, megabytes, sentence, showSection } from "./dom";
// The bundle beside the page, which anyone may import as well.
import { load } from "./qcc.js";

const LARGE = 200e6; // bytes that are not fetched unasked
const RECORD = "model-record.json";
const NAMES: Record<Progress["stage"], string> = {
  library: "Starting",
  weights: "Fetching the model",
  shaders: "Preparing the GPU",
  ready: "Ready",
};

/** Load the model beside this page; `failed` is told of errors that end it later on. */
export async function loadModel(failed: (error: Error) => void): Promise<Model> {
  await consent();
  showSection("loading");
  const model = await load("./", { onProgress: show, onFailure: failed });
  remember(model.id);
  return model;
}

/** Show an error, and let the visitor try again. */
export function showFailure(error: unknown): void {
  element("failure-text").textContent = sentence(error);
  showSection("failure");
  element("again").onclick = () => location.reload();
}

/** Ask before a large download, the first time. */
async function consent(): Promise<void> {
  const response = await fetch(RECORD).catch(() => undefined);
  if (!response?.ok) return; // loading says what is wrong
  const record = (await response.json()) as ModelRecord;
  element("title").textContent = document.title = record.model_id;
  const bytes = record.qcc?.weight_bytes ?? 0;
  if (bytes < LARGE || remembered() === record.model_id) return;
  element("consent-text").textContent = `The model is a download of ${megabytes(bytes)}.`;
  showSection("consent");
  await new Promise((resolve) => element("begin").addEventListener("click", resolve));
}

function show({ stage, loaded, total, fromCache }: Progress): void {
  const bar = element<HTMLProgressElement>("loading-bar");
  const fetched = stage === "weights" && total > 0;
  const kept = fetched && fromCache && loaded > 0;
  element("loading-text").textContent = kept ? "Reading the model from this browser" : NAMES[stage];
  element("loading-note").textContent = fetched
    ? `${megabytes(loaded)} of ${megabytes(total)}`
    : "\u00a0";
  if (fetched) {
    bar.max = total;
    bar.value = loaded;
  } else {
    bar.removeAttribute("value");
  }
}

const KEY = "qcc:loaded";

function remember(model: string): void {
  try {
    localStorage.setItem(KEY, model);
  } catch {
    // Storage is off: the visitor is asked again next time.
  }
}

function remembered(): string | null {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null;
  }
}
