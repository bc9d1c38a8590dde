"""qcc.runtime.bench: benchmarks, and what they measured (RESULTS.md).

bandwidth.py          how fast this machine reads memory, the bound of every decode
speed.py              load, prefill and decode of an artifact; a peer beside it in the same run
quality.py             what formats and methods lose on one model, row by row
peer_transformers.py  the same model in transformers, in bf16
"""
