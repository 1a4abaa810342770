"""Captions against their references: CIDEr (Vedantam et al. 2015, the -D variant that pycocoevalcap computes), and
METEOR where Java and pycocoevalcap are at hand."""

import importlib
import importlib.util
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

TAG = re.compile(r"<SEG>|</?p>|<\|[^|>]*\|>|</?s>")
WORD = re.compile(r"[a-z0-9]+|'s\b")
LONGEST = 4
"""Words in the longest n-gram."""
SIGMA = 6.0
"""Spread of the length penalty in words."""
WITHOUT_METEOR = (
    "METEOR is left out: it needs {missing}. CIDEr and the mask scores do not. Install a Java runtime (Debian: apt-get "
    "install default-jre-headless) and `pip install xseg[captions]` to have it"
)


def caption(text: str) -> str:
    """The caption of an answer: without the sentence that holds ``<SEG>`` and what follows it, and without markers.

    A ``<p>`` is left open where the answer breaks off; markers need not pair up.
    """
    head, seg, _ = text.partition("<SEG>")
    if seg:
        # the sentence of the <SEG> begins behind the last full stop
        head = head[: max(head.rfind(mark) for mark in ".!?") + 1]
    return " ".join(TAG.sub(" ", head).split())


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; a possessive 's is a word, as in the Penn Treebank."""
    return WORD.findall(text.lower())


def word_f1(a: str, b: str) -> float:
    """Overlap of two texts as bags of words: harmonic mean of precision and recall in 0..1."""
    left, right = Counter(words(a)), Counter(words(b))
    both = sum((left & right).values())
    return 2 * both / (sum(left.values()) + sum(right.values())) if both else 0.0


def cider(found: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return (n,) scores in 0..10 of n captions, each against its one reference.

    N-grams are weighted by how few of the references hold them, so one image alone has no score: at least two.
    """
    cooked = [_ngrams(words(text)) for text in references]
    documents = Counter(gram for grams in cooked for gram in grams)
    total = np.log(len(references))
    scores = np.zeros(len(found))
    for k, (text, reference) in enumerate(zip(found, references, strict=True)):
        mine, other = words(text), words(reference)
        penalty = np.exp(-((len(mine) - len(other)) ** 2) / (2 * SIGMA**2))
        a, b = (_weighted(_ngrams(row), documents, total) for row in (mine, other))
        parts = [_cosine(a[n], b[n]) for n in range(LONGEST)]
        scores[k] = 10 * penalty * np.mean(parts)
    return scores


def _ngrams(row: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(row[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(row) - n + 1))


def _weighted(
    grams: Counter[tuple[str, ...]], documents: Counter[tuple[str, ...]], total: float
) -> list[dict[tuple[str, ...], float]]:
    """Term frequency times inverse document frequency, one table per n."""
    out: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
    for gram, count in grams.items():
        out[len(gram) - 1][gram] = count * (total - np.log(max(1.0, documents[gram])))
    return out


def _cosine(mine: dict[tuple[str, ...], float], other: dict[tuple[str, ...], float]) -> float:
    """Cosine in which no n-gram counts for more than the reference has of it."""
    norms = [np.sqrt(sum(v * v for v in table.values())) for table in (mine, other)]
    if not all(norms):
        return 0.0
    shared = sum(min(value, other[gram]) * other[gram] for gram, value in mine.items() if gram in other)
    return float(shared / (norms[0] * norms[1]))


def missing_for_meteor() -> str:
    """What METEOR needs and this machine lacks, in words; "" = nothing."""
    parts = [] if shutil.which("java") else ["a Java runtime"]
    if importlib.util.find_spec("pycocoevalcap") is None:
        parts.append("the package pycocoevalcap")
    return " and ".join(parts)


def meteor(found: Sequence[str], references: Sequence[str]) -> tuple[float, np.ndarray]:
    """METEOR 1.5 of n captions in 0..1: that of the whole set, and (n,) of each. Needs what ``missing_for_meteor``
    looks for."""
    scorer: Any = importlib.import_module("pycocoevalcap.meteor.meteor").Meteor()
    rows = [{k: [" ".join(words(text))] for k, text in enumerate(texts)} for texts in (references, found)]
    whole, each = scorer.compute_score(*rows)
    return float(whole), np.array(each, float)
