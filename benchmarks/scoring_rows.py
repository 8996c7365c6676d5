"""Predictions and references of real length for the benchmark of scoring, with as many distinct sentences as real reports.

Sentences of real reports are drawn anew for each report. Most of them get another number, side, lobe or word, some a
typing error: 200 real reports have 60 % distinct sentences, a share that falls slowly as reports are added, so that sentences
that are only drawn again would let caches win.
"""

import random
import re
import string
from collections.abc import Sequence

from samf.evaluation.schema import PredictionRow

COUNT = 3039  # volumes of CT-RATE's validation part
_VARIED, _TYPING_ERRORS = 0.9, 0.05  # shares of the sentences
_SENTENCE = re.compile(r"(?<=\.)\s+")
_NUMBER = re.compile(r"\d+")
_GROUPS = (
    ("right", "left", "bilateral"),
    ("upper", "lower", "middle"),
    ("observed", "seen", "detected", "noted", "present", "identified"),
    ("mild", "minimal", "moderate", "slight", "marked", "prominent", "diffuse"),
    ("normal", "natural", "unremarkable"),
    ("anterior", "posterior", "lateral", "medial", "basal", "apical"),
    ("nodule", "nodules", "lesion", "density", "opacity"),
    ("current", "previous", "present", "prior"),
    ("several", "a few", "multiple", "some", "numerous"),
    ("increase", "decrease", "change", "difference"),
    ("is", "was", "appears"),
    ("are", "were", "appear"),
    ("not", "no longer"),
    ("lobe", "segment", "zone"),
    ("consistent", "compatible"),
    ("both", "the two"),
    ("millimetric", "small", "tiny", "large", "nonspecific", "subcentimetric"),
)
_GROUP_OF = {word: group for group in _GROUPS for word in group}
_WORD = re.compile(r"[A-Za-z]+")


def write_rows(reports: Sequence[str], count: int, seed: int = 0) -> list[PredictionRow]:
    """Return rows of a predictions file; a prediction repeats half of its reference's sentences, a third of them changed.

    Args:
        reports: give the sentences, and the distribution of lengths.
        count: number of rows; one to three per patient.
        seed: of everything drawn.
    """
    rng = random.Random(seed)
    texts = [_SENTENCE.split(report.strip()) for report in reports]
    pool = [sentence for text in texts for sentence in text]
    lengths = [len(text) for text in texts]
    rows: list[PredictionRow] = []
    patient, volumes = 0, 0
    for _ in range(count):
        if not volumes:
            patient, volumes = patient + 1, rng.randint(1, 3)
        name = f"valid_{patient}_a_{volumes}"
        volumes -= 1
        length = rng.choice(lengths)
        reference = [_vary(sentence, rng) for sentence in rng.choices(pool, k=length)]
        kept = [_vary(s, rng) if rng.random() < 1 / 3 else s for s in reference[: length // 2]]
        prediction = kept + [_vary(sentence, rng) for sentence in rng.choices(pool, k=length - length // 2)]
        rows.append(
            {
                "id": name,
                "scan_id": name.rpartition("_")[0],
                "task": "report",
                "volume": f"{name}.nii.gz",
                "reference": " ".join(reference),
                "prediction": " ".join(prediction),
            }
        )
    return rows


def _vary(sentence: str, rng: random.Random) -> str:
    """Return a sentence with, in most cases, other numbers and words, and in some a typing error."""
    if rng.random() < _VARIED:
        sentence = _NUMBER.sub(lambda match: str(rng.randint(1, 10 ** len(match[0]) - 1)), sentence)
        sentence = _WORD.sub(lambda match: _other_word(match[0], rng), sentence)
    if rng.random() < _TYPING_ERRORS and len(sentence) > 1:
        place = rng.randrange(len(sentence))
        sentence = sentence[:place] + rng.choice(string.ascii_lowercase) + sentence[place + rng.randint(0, 1) :]
    return sentence


def _other_word(word: str, rng: random.Random) -> str:
    group = _GROUP_OF.get(word)
    return rng.choice(group) if group and rng.random() < 0.5 else word


def count_distinct(texts: Sequence[str]) -> dict[str, int]:
    """Return the numbers of texts, words, sentences, distinct sentences and distinct words."""
    sentences = [sentence for text in texts for sentence in _SENTENCE.split(text)]
    words = [word for text in texts for word in text.lower().split()]
    return {
        "texts": len(set(texts)),
        "words": len(words),
        "sentences": len(sentences),
        "distinct sentences": len(set(sentences)),
        "distinct words": len(set(words)),
    }
