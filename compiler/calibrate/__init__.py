"""qcc.compiler.calibrate: runs a checkpoint on text, layer by layer, and quantizes it on the way.

  libraries.py  torch and transformers, which only this package and its tests import
  text.py       the calibration text as windows of tokens: a file's, or what the model samples
  sample.py     text that the model samples itself
  states.py     hidden states of all windows, in batches
  layers.py     the model with one layer in memory at a time; logits of windows
  inputs.py     which weights share an input, and the moments of the inputs
  parts.py      what is finished, on disk
  run.py        quantizes layer after layer; the inputs are those of the quantized model

Importing all but text.py without torch and transformers is a QccError that says what to install.
"""
