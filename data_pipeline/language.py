"""Which language a text is in, by the model inside of the py3langid package: nothing is downloaded.

The model is naive Bayes over byte n-grams for 139 languages (Lui & Baldwin 2011, retrained), and a class for what is no
language: numbers, markup, code. It was chosen by measurement, docs/data.md has the table: fastText's lid.176.ftz, as
fast as this, is right less often and falls to a third on text in capitals; lingua is as good on 75 languages and
five times slower.

Languages that readers tell apart by single words (Bosnian, Croatian, Serbian; Indonesian, Malay) are mixed up: name
them together. A score near 1 says that no other language of the model is near, not that the text is good.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np

NO_LANGUAGE = "zxx"  # ISO 639's code for numbers, markup and the like
# Characters that are read of a text: three stretches of a longer one, because a page may begin with a notice in
# another language. 900 instead of 200 raise the accuracy on 72 languages from 98.5 to 98.6 %, more adds nothing.
STRETCH_CHARACTERS = 200

_CAPITALS = re.compile("[A-ZÀ-ÖØ-ÞΑ-ΩЀ-Я]")


def identify(text: str) -> tuple[str, float]:
    """(code, score in 0..1) of the likeliest language of `text`.

    The code is of ISO 639-1 where there is one, else of 639-3; NO_LANGUAGE for what is none. Without letters, the score
    is near 0.
    """
    sample = _sample(text)
    if len(_CAPITALS.findall(sample)) > len(sample) / 2:
        sample = sample.lower()  # the model knows capitals at the start of words only
    code, score = _model().classify(sample)
    return code, min(score, 1.0)


def known_languages() -> list[str]:
    """The codes that `identify` can return, without NO_LANGUAGE."""
    return sorted(set(_model().labels) - {NO_LANGUAGE})


def _sample(text: str) -> str:
    """The start, the middle and the end of a long text."""
    if len(text) <= 3 * STRETCH_CHARACTERS:
        return text
    middle = (len(text) - STRETCH_CHARACTERS) // 2
    stretches = (
        text[:STRETCH_CHARACTERS],
        text[middle : middle + STRETCH_CHARACTERS],
        text[-STRETCH_CHARACTERS:],
    )
    return "\n".join(stretches)


@cache
def _model() -> Any:
    """Takes half a second and 170 MB, once a process."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    # Kept in half precision, the table is converted row by row for every text: 0.30 instead of 0.20 ms for 1000
    # characters. The numbers are the same.
    model.nb_ptc = model.nb_ptc.astype(np.float32)
    return model
