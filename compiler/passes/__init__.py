"""qcc.compiler.passes: one file a pass; pipeline.py is the list, in order."""
