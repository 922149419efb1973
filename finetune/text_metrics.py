"""How like the targets generated texts are: exact match, ROUGE, BLEU and chrF, all in percent.

ROUGE is computed by rouge-score, BLEU and chrF by sacrebleu, the packages whose numbers are published; they belong to
the optional extra `generation`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from configs.load import ConfigError

PACKAGES = {"rouge": "rouge_score", "bleu": "sacrebleu", "chrf": "sacrebleu"}
ROUGE_TYPES = ["rouge1", "rouge2", "rougeL", "rougeLsum"]


def check_installed(metrics: Sequence[str]) -> None:
    """Raise ConfigError unless what the metrics need is installed."""
    for name in metrics:
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                f"generation.metrics: {name} needs the package {PACKAGES[name]}, which is not installed; "
                f"pip install 'millstream[generation]'"
            )


def generation_metrics(
    metrics: Sequence[str], targets: list[str], predictions: list[str], bleu_tokenizer: str = "13a"
) -> dict[str, float]:
    """The scores of `predictions` against one target each, in percent."""
    scores: dict[str, float] = {}
    if "exact_match" in metrics:
        same = sum(one.strip() == other.strip() for one, other in zip(targets, predictions, strict=True))
        scores["exact_match"] = 100 * same / len(targets)
    if "rouge" in metrics:
        scores |= rouge(targets, predictions)
    if "bleu" in metrics:
        from sacrebleu.metrics import BLEU

        scores["bleu"] = BLEU(tokenize=bleu_tokenizer).corpus_score(predictions, [targets]).score
    if "chrf" in metrics:
        from sacrebleu.metrics import CHRF

        scores["chrf"] = CHRF().corpus_score(predictions, [targets]).score
    return scores


def rouge(targets: list[str], predictions: list[str]) -> dict[str, float]:
    """The mean over the texts of ROUGE's F1 (Lin 2004), of words stemmed by Porter's algorithm.

    rougeLsum compares line by line, the others a text as a whole. Only a-z and 0-9 make words: it is for English.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE_TYPES, use_stemmer=True)
    of_texts = [scorer.score(one, other) for one, other in zip(targets, predictions, strict=True)]
    return {name: 100 * sum(one[name].fmeasure for one in of_texts) / len(of_texts) for name in ROUGE_TYPES}
