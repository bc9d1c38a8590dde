"""GPU kernels as TIR, parametrized by formats, shapes and a device's limits, never by its name.

weights.py  a few columns of a stored weight, as numbers
gemv.py     one row of x times a weight
gemm.py     many rows
softmax.py  logits to probabilities
sort.py     rows of probabilities in falling order
top_p.py    a token from such a row
logits.py   biases, penalties and masks, in place

and of TVM's paged KV cache, attention_<name>.py:

func        the frame of a kernel, and what those of a cache have in common
pages       tokens into pages and out of them
rope        the table of cosines and sines; q and k rotated by it, or by their places
score       from products to scores, weights and log-sum-exps
keys        where a sequence's keys and values lie
mask        which keys a query sees
decode      one query a sequence
block       a tile of queries and keys in a workgroup's memory
prefill     many queries
state       the merge of two parts
"""
