"""GPU kernels as TIR, parametrized by formats, shapes and a device's limits, never by its name.

  weights.py  a few columns of a stored weight, as numbers
  gemv.py     one row of x times a weight
  gemm.py     many rows
  softmax.py  logits to probabilities
  sort.py     rows of probabilities in falling order
  top_p.py    a token from such a row
  logits.py   biases, penalties and masks, in place
"""
