"""qcc.quant_schemes: how numbers are stored and how codes are chosen. Knows no model, no device.

In the order in which data passes:
  errors.py     SchemeError, the one-line error of a bad scheme
  scheme.py     WeightFormat, Scheme, and reading schemes/*.yaml
  schemes/      one YAML file a scheme; the file name is the name after --quant
  rounding/     how codes are chosen: one file a method (rtn)
  attributes.py  by which PrimFuncs say what they are: qcc.role, qcc.format
  packing.py    codes <-> words, each format twice: as numpy and as a TIR expression
"""
