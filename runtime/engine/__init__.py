"""qcc.runtime.engine: load a compiled library, run it, and make text of its logits.

In the order in which data passes:
  tvm_runtime.py  TVM's runtime without its Python package; threads
  metadata.py     `_metadata()` of a library, checked
  library.py      the compiled functions of one library; its KV cache
  state.py        what sequences keep besides keys and values, of recurrent layers
  weights.py      stored tensors -> slots, repacked once and mapped from then on
  memory.py       does it fit: weights, KV cache and temporaries against what is available
  model.py        library + slots + KV cache: token ids in, logits out
  tokenizer.py    text <-> token ids; BOS and EOS
  sampling.py     SamplingParams; one token of one row of logits
  detokenize.py   token ids -> text, as it grows
  stop.py         stop strings
  request.py      one request on its way: prompt, answer, times; sessions
  scheduler.py    several requests in one batch
  llm.py          LLM: all of it under one roof
  embedder.py     Embedder: the same for models that make a vector of a text
"""
