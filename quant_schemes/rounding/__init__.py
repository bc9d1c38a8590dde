"""qcc.quant_schemes.rounding: how codes are chosen, one file a method.

  method.py  Method, what it may know of a layer's inputs, and finding a method by name
  grid.py    groups, ranges, grids and nearest codes, which all methods share
  rtn.py     round to nearest: the contract's formula, else the range of each group
  groups.py  how well scales and biases serve groups of rows: the inner loop of mse, which
             group_kernels.py compiles
  mse.py     scale and clip of each group searched for the least (weighted) squared error
  mxfp4.py   the codes of that grid, for all methods

A method takes plain arrays (weights, and what calibration gives) and returns packing.Quantized; it
knows no model. Each file defines METHOD; its name is the name after --method.
"""
