"""qcc.runtime.bench: benchmarks, and what they measured (RESULTS.md).

bandwidth.py          how fast this machine reads memory, the bound of every decode
What `qcc bench` runs, in the order in which data passes:
  cases.py            prompts, answers, depths, batches -> rows to measure
  measure.py          their times
  step.py             which kernels a decode step runs, and which weights each reads
  report.py           times and bytes -> figures
  run.py              all of it, for every number of threads
  table.py            figures -> text
quality.py            what formats and methods lose on one model, row by row
peer_transformers.py  the same model in transformers, in bf16
"""
