"""qcc.targets.cpu.kernels: TIR kernels of the CPU, parametrized by WeightFormat and Isa.

tir.py       small helpers around TVM's IR builder
layout.py    the weight layout that the kernels read, and the repack functions that make it
decode.py    codes in registers -> f32 numbers
steps.py     how a kernel walks a row: columns that are unrolled, columns under one scale
gemv.py      a linear layer of one row;  gemm.py  of many rows
table_rows.py  rows of an embedding table
delta_rule.py  what recurrent layers carry from token to token
attention*   attention over the paged KV cache
"""
