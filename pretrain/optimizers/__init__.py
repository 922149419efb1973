"""Optimizers that know which stretch of a flat tensor belongs to which parameter.

ZeRO hands an optimizer one flat tensor, this rank's share of all parameters of a group. AdamW and Lion work on single
elements and do not care; LAMB needs each parameter's norm and Muon whole matrices: slices.py tells them what is where.
May import torch only. Start at lion.py (the shortest), then slices.py, lamb.py, muon.py; average.py is the EMA.
"""
