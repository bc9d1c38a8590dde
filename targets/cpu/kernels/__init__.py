"""qcc.targets.cpu.kernels: TIR kernels of the CPU, parametrized by WeightFormat and Isa.

tir.py       small helpers around TVM's IR builder
layout.py    the weight layout that the kernels read, and the repack functions that make it
quads.py     where codes lie in words;  decode.py  codes in registers -> f32 numbers
steps.py     how a kernel walks a row: columns that are unrolled, columns under one scale
linear.py    a linear layer, by the precision and the rows of x: rows of floats (gemv.py), many of
             them (gemm.py), of int8 (dot.py, integer.py), of bf16 in AMX tiles (amx.py, tiles.py)
activations.py  x as these take it, rounded while row_sources.py computes it
setting.py   small tensors that the runtime fills
experts.py   layers of experts;  table_rows.py  rows of an embedding table
delta_rule.py  what recurrent layers carry from token to token
attention*   attention over the paged KV cache
"""
