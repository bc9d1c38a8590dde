/**
 * A model's own chat template (jinja), given the variables that qcc's Python runtime gives it.
 *
 * It is interpreted, never evaluated as JavaScript. Its time is not bounded: a template that never
 * ends holds the page, as any script of the site could.
 */

import { Template } from "@huggingface/jinja";
import type { Message, TemplateOptions } from "./qcc";
import { QccError, messageOf } from "./errors";
import type { Json } from "./tokenizer";

// Under which a message may hold its reasoning; templates read the first, gpt-oss' the second.
const REASONING = ["reasoning_content", "thinking", "reasoning"] as const;

/** Source of a model's template: chat_template.jinja, else tokenizer_config.json's. */
export function findTemplate(
  file: string | undefined, config: Json, tools: boolean,
): string | undefined {
  if (file !== undefined) return file;
  const found = config.chat_template;
  if (typeof found === "string") return found;
  if (!Array.isArray(found)) return undefined;
  const named = new Map(found.map((item: Json) => [String(item.name), item.template]));
  const wanted = [...(tools ? ["tool_use"] : []), "default", ...named.keys()];
  const source = named.get(wanted.find((name) => named.has(name)) ?? "");
  return typeof source === "string" ? source : undefined;
}

/** A parsed chat template with the special tokens that it may name. */
export class ChatTemplate {
  private readonly template: Template;

  constructor(source: string, private readonly specialTexts: Record<string, string>) {
    try {
      this.template = new Template(source);
    } catch (error) {
      throw new QccError(`the chat template is not valid: ${messageOf(error)}`);
    }
  }

  /** The prompt of a conversation, up to where the assistant's answer begins. */
  render(messages: Message[], options: TemplateOptions = {}): string {
    const { tools, variables, add_generation_prompt = true } = options;
    try {
      return this.template.render({
        ...this.specialTexts,
        documents: null,
        ...variables,
        messages: messages.map(withReasoning),
        tools: tools ?? null,
        add_generation_prompt,
      });
    } catch (error) {
      throw new QccError(`the chat template refuses: ${messageOf(error)}`);
    }
  }
}

/** A message whose reasoning has all the names that templates know it by. */
function withReasoning(message: Message): Message {
  const found = REASONING.map((name) => message[name]).find((text) => text != null);
  if (found == null) return { ...message };
  return { [REASONING[1]]: found, ...message, [REASONING[0]]: found };
}
