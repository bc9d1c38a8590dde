"""qcc.quant_schemes: how numbers are stored and how codes are chosen. Knows no model, no device.

In the order in which data passes:
  errors.py     SchemeError, the one-line error of a bad scheme
  format.py     WeightFormat: how the numbers of a weight are stored
  format_text.py  FORMAT, what a user writes for one
  scheme.py     Scheme, and reading schemes/*.yaml
  schemes/      one YAML file a scheme; the file name is the name after --quant
  rounding/     how codes are chosen: one file a method (rtn, mse, hqq, imse, awq, gptq)
  attributes.py  by which PrimFuncs say what they are: qcc.role, qcc.format
  mxfp4.py      the numbers of the grid mxfp4
  packing.py    codes <-> words, each format twice: as numpy and as a TIR expression
"""
