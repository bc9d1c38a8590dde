"""qcc.targets.cpu.kernels: TIR kernels of the CPU, parametrized by WeightFormat and Isa.

tir.py       small helpers around TVM's IR builder
layout.py    the weight layout that the kernels read, and the repack functions that make it
decode.py    codes in registers -> f32 numbers
linear.py    GEMV (one row) and GEMM (many rows) over that layout; rows of an embedding table
attention*   attention over the paged KV cache
"""
