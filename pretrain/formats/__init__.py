"""Models in other programs' files: one file a format, `read` and `write`, or one of the two.

All of them hand over a `Weights` (weights.py): the shape, and each parameter under our name. Nothing here runs code of
a file that is read: no pickle but torch's `weights_only`, no module of a model directory.
"""
