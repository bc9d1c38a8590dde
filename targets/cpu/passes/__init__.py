"""qcc.targets.cpu.passes: the CPU's own passes.

lower_linear.py    linear layers and embedding rows -> our kernels over repacked weights
schedule.py        what is left: fused loops, parallel and vectorized
"""
