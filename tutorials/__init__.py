"""qcc.tutorials: things to run and read; the tests run them too.

tiny/                 the bundled model, and all that made it
random_checkpoint.py  a Hugging Face checkpoint of real size with random weights, for speed tests
"""
