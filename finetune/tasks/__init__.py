"""One file per task, all of the same shape: the functions that the loop in `finetune/run.py` calls, in this order.

load(config)                           -> examples, with the splits `train` and `dev`; checks the files
encode(config, tokenizer, split)       -> rows: token ids, and `labels` (one number, or one for each token)
build_model(config, examples, tokenizer) -> a transformers model with the task's head
loss(model, batch)                     -> sum of the losses of the batch's targets
predict(model, batch)                  -> one array for each row
evaluate(split, outputs)               -> metrics
records(examples, split, outputs)      -> one object for each example, for predictions.jsonl
"""

from __future__ import annotations

from typing import Any

IGNORE_INDEX = -100  # a label that is no target

# One encoded example: input_ids, attention_mask (and token_type_ids), each a list of numbers; labels.
Row = dict[str, Any]
