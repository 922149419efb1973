"""Raw text in, batches of token ids out; knows tensors, not models. May import `configs` only.

Start at `build.py` (text to a dataset directory) and `stream.py` (a dataset directory to batches). `order.py`,
`pack.py` and `mask.py` are pure: numbers in, numbers out.
"""
