"""GPU kernels as TIR, parametrized by formats, shapes and a device's limits, never by its name.

  weights.py  a few columns of a stored weight, as numbers
  gemv.py     one row of x times a weight
  gemm.py     many rows
"""
