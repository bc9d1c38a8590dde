"""qcc.compiler.calibrate: runs a checkpoint on text, layer by layer, and quantizes it on the way.

  libraries.py  torch and transformers, and what to say where they are missing
  text.py       the calibration text as windows of tokens: a file's, or what the model samples
  sample.py     text that the model samples itself
  skeleton.py   transformers' model of a config.json, without numbers
  states.py     hidden states of all windows, in batches
  layers.py     the model with one layer in memory at a time; logits of windows
  inputs.py     which weights share an input, and the moments of the inputs
  streams.py    the text on its way through one layer, quantized and original
  folds.py      factors on columns, and what takes them back
  matrices.py   a weight as a matrix, and back into its sources
  parts.py      what is finished, on disk
  run.py        quantizes layer after layer; the inputs are those of the quantized model

Only text.py can be imported without torch and transformers; the others are then a QccError that
says what to install.
"""
