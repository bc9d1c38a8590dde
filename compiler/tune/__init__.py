"""qcc.compiler.tune: a format for each weight, so that the model loses least at a given size.

effects.py   what each format does to each weight, measured on the logits
allocate.py  formats of least total effect within a number of bits
search.py    allocations at many sizes, measured whole; the best for a target
output.py    the scheme file, the table and the page
"""
