"""qcc.targets.gpu: what all GPU targets share. It defines no TARGET.

limits.py   what a kernel may take of a device
kernels/    the TIR kernels, which read weights as they are stored
kv_cache.py the kernels that TVM's paged KV cache calls
passes/     linear layers and rows of logits to kernels, the rest scheduled
"""
