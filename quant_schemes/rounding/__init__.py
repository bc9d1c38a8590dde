"""qcc.quant_schemes.rounding: how codes are chosen, one file a method.

  rtn.py   round to nearest, the contract's formula; the reference of the compiled converter

A method takes plain arrays (weights, and what calibration gives) and returns codes uint8[n, k] and
scales [n, groups]; it knows no model. packing.py turns these into stored parts.
"""
