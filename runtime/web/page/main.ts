/** The page: load the model, then talk with it. */

import type { Model } from "../src/qcc";
import { Comparison } from "./comparison";
import { Conversation } from "./conversation";
import { element, sentence, showSection } from "./dom";
import { loadModel, showFailure } from "./loading";
import { Settings } from "./settings";

const input = element<HTMLTextAreaElement>("input");
const send = element<HTMLButtonElement>("send");
const stop = element<HTMLButtonElement>("stop");
const fresh = element<HTMLButtonElement>("new");
const settings = new Settings();

async function start(): Promise<void> {
  let model: Model;
  try {
    model = await loadModel((error) => ended(error));
  } catch (error) {
    showFailure(error);
    return;
  }
  element("title").textContent = document.title = model.id;
  settings.open(model.id, model.defaults);
  const embeds = model.task === "embedding";
  const talk = embeds ? new Comparison(model) : new Conversation(model, settings);
  element("welcome-text").textContent = greeting(model);
  showSection("welcome");
  connect(talk, embeds ? undefined : (talk as Conversation));
  element("open-settings").hidden = embeds;
}

function greeting(model: Model): string {
  if (model.task === "embedding") return "Give some texts: each is compared with those before it.";
  if (!model.canChat) return "Begin a text, and the model continues it.";
  return "What would you like to ask?";
}

interface Talk {
  ask(text: string): Promise<void>;
  clear(): void;
}

function connect(talk: Talk, conversation: Conversation | undefined): void {
  const submit = async (): Promise<void> => {
    const text = input.value.trim();
    if (!text || send.hidden) return;
    input.value = "";
    fit();
    showSection("");
    fresh.disabled = false;
    working(true, conversation !== undefined);
    await talk.ask(text);
    working(false, true);
    input.focus();
  };
  element("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    void submit();
  });
  input.addEventListener("keydown", (event) => {
    // While an input method composes a character, Enter is its own.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    void submit();
  });
  stop.addEventListener("click", () => conversation?.stop());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !settings.isOpen) conversation?.stop();
  });
  fresh.addEventListener("click", () => {
    talk.clear();
    fresh.disabled = true;
    showSection("welcome");
    input.focus();
  });
  input.disabled = false;
  input.focus();
  fit();
}

function working(busy: boolean, stoppable: boolean): void {
  send.hidden = busy && stoppable;
  stop.hidden = !(busy && stoppable);
  send.disabled = busy || !input.value.trim();
}

/** The field is as high as its text. */
function fit(): void {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  send.disabled = !input.value.trim();
}

/** The model can no longer run: what was said stays to be read. */
function ended(error: Error): void {
  input.disabled = true;
  element("figures").textContent = sentence(error);
}

input.addEventListener("input", fit);
void start();
