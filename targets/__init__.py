"""qcc.targets: how a device runs a compiled model; one folder a target, its name after --target.

  spec.py   TargetSpec, the questions that the compiler asks of every target
  cpu/      LLVM CPU: x86-64 and aarch64
"""
