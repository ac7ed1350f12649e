"""BLEU, chrF and ROUGE as sums over texts, so that the parts of a data set add up to the whole.

What sacrebleu computes of one text are counts. They are added here, and sacrebleu turns the sums into its
scores, so a score is its own to the last digit, however the texts were dealt out.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

ROUGE = ("rouge1", "rouge2", "rougeL")
_NUM_BLEU = 10
_NUM_CHRF = 18


def num_sums(*, rouge: bool) -> int:
    """Return how many numbers `sums` gives."""
    return 1 + _NUM_BLEU + _NUM_CHRF + (len(ROUGE) if rouge else 0)


def sums(predictions: Sequence[str], references: Sequence[str], *, rouge: bool) -> list[float]:
    """Return what adds up over texts: how many there are; the counts of BLEU (10) and of chrF (18), whole
    numbers; if asked for, the F-measures of ROUGE (3)."""
    if not predictions:
        return [0.0] * num_sums(rouge=rouge)
    counts = [
        np.sum(metric._extract_corpus_statistics(predictions, [references]), axis=0).tolist()
        for metric in (_bleu(), _chrf())
    ]
    measures = _rouge_sums(predictions, references) if rouge else []
    return [float(value) for value in (len(predictions), *counts[0], *counts[1], *measures)]


def scores(added: Sequence[float], *, rouge: bool) -> dict[str, float]:
    """Turn added-up sums into bleu and chrf (0 to 100), and rouge1, rouge2, rougeL (0 to 1)."""
    names = ("bleu", "chrf", *(ROUGE if rouge else ()))
    count = added[0]
    if count == 0:
        return dict.fromkeys(names, math.nan)
    counts = [round(value) for value in added[1 : 1 + _NUM_BLEU + _NUM_CHRF]]
    bleu = _bleu()._compute_score_from_stats(counts[:_NUM_BLEU]).score
    chrf = _chrf()._compute_score_from_stats(counts[_NUM_BLEU:]).score
    measures = [value / count for value in added[1 + _NUM_BLEU + _NUM_CHRF :]]
    return dict(zip(names, (float(bleu), float(chrf), *measures), strict=True))


def chrf_of(prediction: str, reference: str) -> float:
    """Return the chrF (0 to 100) of one text."""
    return float(_chrf().sentence_score(prediction, [reference]).score)


def signatures() -> dict[str, str]:
    """Return sacrebleu's own description of how `bleu` and `chrf` are computed, by name."""
    return {"bleu": str(_bleu().get_signature()), "chrf": str(_chrf().get_signature())}


@functools.cache
def _bleu() -> Any:
    from sacrebleu.metrics import BLEU

    # `force` only keeps it from warning of texts that look tokenized.
    metric = BLEU(force=True)
    metric.num_refs = 1  # else the signature is not known before the first text
    return metric


@functools.cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    metric.num_refs = 1
    return metric


@functools.cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE))


def _rouge_sums(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    scorer = _rouge()
    scored = [scorer.score(true, said) for said, true in zip(predictions, references, strict=True)]
    return [math.fsum(one[name].fmeasure for one in scored) for name in ROUGE]
