"""From tokens alone to the rows of `pack.gpt_rows`, on the device that has the tokens.

Where an id ends every document and occurs nowhere else, tokens say by themselves where documents are. A batch is then
2 bytes a token on its way to a GPU (4 with a vocabulary over 65,536) in place of 28, and the rest of it costs the host
a few kernel launches and waits for nothing.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from data_pipeline.pack import IGNORE_INDEX


def expand_tokens(tokens: torch.Tensor, document_end_id: int) -> dict[str, torch.Tensor]:
    """What `pack.gpt_rows` makes of the same rows: the same names, values, shapes and types.

    tokens: (n, seq_len + 1), of any integer type. A document ends with each `document_end_id`, and nowhere else.
    """
    ids = tokens.to(torch.int64)  # the only thing that torch can do with uint16 on every device
    input_ids = ids[:, :-1].contiguous()  # (n, seq_len), as all that follows
    is_end = input_ids == document_end_id
    is_start = F.pad(is_end[:, :-1], (1, 0), value=True)
    columns = torch.arange(input_ids.shape[1], device=ids.device)
    first_columns = (columns * is_start).cummax(dim=1).values  # of each token's document, in its row
    return {
        "input_ids": input_ids,
        "labels": ids[:, 1:].masked_fill(is_end, IGNORE_INDEX),
        "segment_ids": is_start.cumsum(dim=1, dtype=torch.int32),
        "position_ids": columns - first_columns,
    }
