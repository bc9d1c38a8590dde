"""qcc.runtime.eval: two streams of logits into figures; knows no weights, no compiler, no torch.

In the order in which data passes:
  protocol.py   a text into windows of token ids, always in the same way, and the words for it
  figures.py    logits of a reference and of ours into KL divergence, perplexity, same top-1
  activations.py  the figures of low precision against high
  saved.py      both sides into an .npz file
  report.py     the figures of one or several artifacts, as text and as JSON
  plots.py      SVG pictures of them      style.py  the look of a page
  html.py       parts of a page           page.py   one self-contained HTML page
"""
