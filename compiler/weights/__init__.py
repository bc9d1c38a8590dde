"""qcc.compiler.weights: from a checkpoint's tensors to the shards of an artifact.

In the order in which data passes:
  spec.py              WeightSpec: what a weight is made of and how it is stored
  safetensors_file.py  one .safetensors file, checked before it is read
  torch_file.py        one pytorch_model.bin, only where the user allows it
  checkpoint.py        Checkpoint: the tensors of a folder by name
  kernels.py           quantize and cast blocks of rows, compiled; kernel_tir.py is their TIR
  convert.py           convert_weights: read, map, quantize, write, block by block
  shards.py            ShardWriter: params_shard_N.bin and tensor-cache.json
"""
