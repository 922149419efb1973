"""One file per task, all of the same shape: the functions that `finetune/run.py` calls, in this order.

load(config)                           -> examples, with the splits `train` and `dev`; checks the files
encode(config, tokenizer, split)       -> rows: one for each example, or several where it is long
build_model(config, examples, tokenizer) -> a transformers model with the task's head
loss(model, batch)                     -> sum of the losses of the batch's targets
predict(model, batch)                  -> one array for each row
evaluate(config, split, rows, outputs) -> metrics
records(config, examples, split, rows, outputs) -> one object for each example, for predictions.jsonl
about(examples)                        -> what the model's directory must say for predictions of other files (JSON)
read_input(config, about, path)        -> examples whose `dev` are those of a file without labels
fold_keys(split)                       -> of each example what folds.py deals it by
select(split, numbers)                 -> the split of these examples
LABEL                                  the name of the label in what `records` gives
"""

from __future__ import annotations

from typing import Any

IGNORE_INDEX = -100  # a label that is no target

# One encoded row. A list of numbers has one for each token and is padded to the longest row of its batch: input_ids,
# attention_mask, token_type_ids; `labels` may be one too, or a single number (NaN is no target either), or a tuple.
# `example`, the row's place in its split, `offsets`, and `cut`, how many tokens were left out, stay on the host.
Row = dict[str, Any]
ON_HOST = frozenset({"example", "offsets", "cut"})
