"""The loss is the mean over the global batch's targets, however it is divided into micro batches."""

from __future__ import annotations

import torch

from pretrain.objective import IGNORE_INDEX, count_targets, global_mean


def batch(targets: list[int], **more) -> dict[str, torch.Tensor]:
    labels = torch.full((len(targets), 8), IGNORE_INDEX)
    for row, number in enumerate(targets):
        labels[row, :number] = 1
    return {"labels": labels, **more}


def test_targets_are_counted_over_all_micro_batches():
    assert count_targets([batch([3, 0]), batch([8, 1])]) == {"clm": 12}


def test_bert_counts_words_and_sentences_and_ignored_sentences_do_not_count():
    more = {"token_type_ids": torch.zeros(2, 8), "next_sentence_label": torch.tensor([1, IGNORE_INDEX])}
    assert count_targets([batch([2, 3], **more)]) == {"mlm": 5, "nsp": 1}


def test_shares_of_unequal_micro_batches_sum_to_the_mean_over_targets():
    losses = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])]
    counts = {"clm": 4}
    total = sum(global_mean({"clm": part.sum()}, counts) for part in losses)
    assert total == torch.cat(losses).mean() != torch.stack([part.mean() for part in losses]).mean()


def test_objective_without_targets_gives_zero_not_nan():
    assert global_mean({"mlm": torch.tensor(0.0), "nsp": torch.tensor(2.0)}, {"mlm": 0, "nsp": 4}) == 0.5
