"""Which language a text is in, by the model inside of the py3langid package: nothing is downloaded.

The model is naive Bayes over byte n-grams for 139 languages (Lui & Baldwin 2011, retrained), and a class for what is no
language: numbers, markup, code. It was chosen by measurement (benchmarks/clean.py): fastText's lid.176.ftz is a little
faster, right less often, and in text in capitals less than half of the time; lingua is nearly as good, knows half as
many languages and takes ten times as long.

Languages that readers tell apart by single words are mixed up: Bosnian, Croatian and Serbian (bs, hr, sr), Indonesian
and Malay (id, ms); Chinese with many foreign names is taken for Wu (of XQuAD's paragraphs 4 %). Name such languages
together: their scores are added. A score near 1 says that no other language of the model is near, not that the text is
good.
"""

from __future__ import annotations

import re
from collections.abc import Container
from functools import cache
from typing import Any

import numpy as np

NO_LANGUAGE = "zxx"  # ISO 639's code for numbers, markup and the like
# Characters that are read of a text: three stretches of a longer one, because a page may begin with a notice in
# another language. 1,000 instead of 200 characters raise the accuracy on 71 languages from 98.3 to 98.7 %.
STRETCH_CHARACTERS = 200

_CAPITALS = re.compile("[A-ZÀ-ÖØ-ÞΑ-ΩЀ-Я]")


def identify(text: str) -> tuple[str, float]:
    """(code, score in 0..1) of the likeliest language of `text`.

    The code is of ISO 639-1 where there is one, else of 639-3; NO_LANGUAGE for what is none. Without letters, the score
    is near 0.
    """
    code, score = _model().classify(_sample(text))
    return code, min(score, 1.0)


def score_together(text: str, languages: Container[str]) -> float:
    """The score, in 0..1, that `text` is in any of `languages`."""
    return min(sum(score for code, score in _model().rank(_sample(text)) if code in languages), 1.0)


def known_languages() -> list[str]:
    """The codes that `identify` can return, without NO_LANGUAGE."""
    return sorted(set(_model().labels) - {NO_LANGUAGE})


def load_model() -> None:
    """Load the model, which otherwise happens when it is first used."""
    _model()


def _sample(text: str) -> str:
    """The start, the middle and the end of a long text; in small letters if it is mostly in capitals."""
    if len(text) > 3 * STRETCH_CHARACTERS:
        middle = (len(text) - STRETCH_CHARACTERS) // 2
        starts = (0, middle, len(text) - STRETCH_CHARACTERS)
        text = "\n".join(text[start : start + STRETCH_CHARACTERS] for start in starts)
    # The model has seen capitals at the start of words only.
    return text.lower() if len(_CAPITALS.findall(text)) > len(text) / 2 else text


@cache
def _model() -> Any:
    """Takes half a second and 130 MB, once a process."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    # Kept in half precision, the table is converted row by row for every text: 0.30 instead of 0.20 ms for 1000
    # characters. The numbers are the same.
    model.nb_ptc = model.nb_ptc.astype(np.float32)
    return model
