"""qcc.compiler: from a checkpoint to a library, in the order in which data passes.

  cli/        one file a verb
  driver.py   the steps, in order, on one page
  source.py   MODEL on the command line -> a local checkpoint folder
  config.py   config.json -> ModelConfig
  models/     one file an architecture, over shared blocks: ModelConfig -> Relax IRModule
  passes/     one file a pass; pipeline.py is the list
  build.py    IRModule + target -> library
  weights/    read, map, quantize, write shards
  chat_config.py  mlc-chat-config.json and the tokenizer files
"""
