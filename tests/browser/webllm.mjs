// Stock WebLLM and what test_webllm.py asks of it. web-llm.js is the npm package's lib/index.js.
import { CreateMLCEngine } from "./web-llm.js";

let engine, record, watched;

/** Load the site at `url`, as its README says; `options`: overrides, watch (keep all logits). */
window.loadEngine = async (url, { overrides, watch } = {}) => {
  record = await (await fetch(new URL("model-record.json", url))).json();
  for (const key of ["model", "model_lib"]) record[key] = new URL(record[key], url).href;
  watched = [];
  const processor = {
    processLogits: (logits) => (watched.push([...logits]), logits),
    processSampledToken: () => {},
    resetState: () => {},
  };
  const progress = [];
  await engine?.unload();
  engine = await CreateMLCEngine(
    record.model_id,
    {
      appConfig: { model_list: [record] },
      initProgressCallback: ({ text }) => progress.push([performance.now() / 1e3, text]),
      ...(watch && { logitProcessorRegistry: new Map([[record.model_id, processor]]) }),
    },
    overrides,
  );
  return progress;
};

/** A chat completion: text, its pieces, tokens, how it ended, usage, where watched the logits. */
window.ask = async ({ fresh = true, ...request }) => {
  if (fresh) await engine.resetChat();
  watched.length = 0;
  const create = "messages" in request ? engine.chat.completions : engine.completions;
  const answer = await create.create(request);
  const pipeline = engine.loadedModelIdToPipeline.get(record.model_id);
  const told = { pieces: [], tokens: pipeline.outputIds, logits: watched };
  const chunks = request.stream ? answer : [answer];
  for await (const { choices, usage } of chunks) {
    const choice = choices[0] ?? {};
    told.usage = usage ?? told.usage;
    told.finish = choice.finish_reason ?? told.finish;
    told.logprobs = choice.logprobs?.content ?? told.logprobs;
    const part = choice.delta ?? choice.message ?? { content: choice.text };
    if (part.content) told.pieces.push(part.content);
  }
  return { ...told, tokens: [...pipeline.outputIds], text: told.pieces.join("") };
};

/** What `ask` throws. */
window.refused = (request) => window.ask(request).catch((error) => `${error.name}: ${error.message}`);
