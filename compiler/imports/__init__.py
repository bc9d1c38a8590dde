"""qcc.compiler.imports: what other tools made, read as a Hugging Face checkpoint.

In the order in which data passes:
  coded_file.py     CodedFile: quantized tensors under their Hugging Face names
  gptq_config.py    quantization_config of config.json -> Packing
  fp8_file.py       X.weight and X.weight_scale_inv of DeepSeek's 8-bit floats -> X.weight
  mxfp4_file.py     X_blocks, X_scales of gpt-oss's experts -> X
  packed_file.py    X.qweight, X.qzeros, X.scales of GPTQ and AutoAWQ -> X.weight
  gguf_header.py    a .gguf file's metadata and tensor table, checked before anything is allocated
  gguf_types.py     the blocks of ggml's types -> codes and grids
  gguf_names.py     llama.cpp's names and row order -> Hugging Face's
  gguf_file.py      a .gguf file's tensors
  gguf_config.py    metadata -> config.json
  gguf_tokenizer.py metadata -> tokenizer.json, tokenizer_config.json
  gguf_folder.py    a .gguf file -> a checkpoint folder in the cache
  lora.py           a PEFT adapter over a checkpoint
  scheme.py         a checkpoint's own formats as a Scheme
  parts.py          codes kept as they are, and notes on those that are not
"""
