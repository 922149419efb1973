"""From an exported model directory to a downstream task; models come through transformers, not `pretrain.models`.

Start at `run.py`. Each task is one file in `tasks/`, all of the same shape. Of `pretrain` it uses what keeps a run:
engine, runtime, checkpoint, metrics, report.
"""
