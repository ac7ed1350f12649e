"""BLEU, chrF and ROUGE of parts, against sacrebleu and rouge_score on the whole."""

import math
import random

import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer

from launcher.tasks import text_metrics

TRUE = [
    "The cat sat on the mat.",
    "It's raining, isn't it?",
    'She said: "No, 3.5 % of 1,000 is 35."',
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "short",
    "日本語の文です。",
    "a b c d e f g h",
    "The cat sat on the mat , tokenized .",
]
SAID = [
    "The cat is on the mat.",
    "It rains, doesn't it?",
    'She said: "No, 3.5 % of 1,000 is 35."',
    "Der braune Fuchs springt schnell über einen Hund. ",
    "",
    "日本の文です。",
    "h g f e d c b a",
    "The cat sat on the mat, tokenized.",
]


def added(parts, rouge=False):
    """The sums of parts, in any order, as ranks add them."""
    return sum(
        torch.tensor(
            text_metrics.sums([SAID[i] for i in part], [TRUE[i] for i in part], rouge=rouge),
            dtype=torch.float64,
        )
        for part in parts
    ).tolist()


def splits():
    everything = list(range(len(TRUE)))
    yield [everything]
    yield [[i] for i in reversed(everything)]
    draw = random.Random(0)
    for _ in range(8):
        draw.shuffle(everything)
        cuts = sorted(draw.randrange(len(TRUE) + 1) for _ in range(3))
        yield [everything[a:b] for a, b in zip([0, *cuts], [*cuts, len(TRUE)], strict=True)]


def test_any_split_gives_what_sacrebleu_gives_of_the_whole():
    bleu, chrf = sacrebleu.corpus_bleu(SAID, [TRUE]).score, sacrebleu.corpus_chrf(SAID, [TRUE]).score
    assert 10 < bleu < 90 and 10 < chrf < 90
    for parts in splits():
        assert text_metrics.scores(added(parts), rouge=False) == {"bleu": bleu, "chrf": chrf}


def test_a_mean_of_parts_would_be_another_number():
    half = len(TRUE) // 2
    parts = [sacrebleu.corpus_bleu(SAID[p], [TRUE[p]]).score for p in (slice(half), slice(half, None))]
    assert abs(sum(parts) / 2 - sacrebleu.corpus_bleu(SAID, [TRUE]).score) > 0.1


def test_rouge_is_the_mean_of_the_f_measures():
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names)
    each = [scorer.score(t, s) for t, s in zip(TRUE, SAID, strict=True)]
    for parts in splits():
        scores = text_metrics.scores(added(parts, rouge=True), rouge=True)
        assert list(scores) == ["bleu", "chrf", *names]
        for name in names:
            assert scores[name] == pytest.approx(sum(s[name].fmeasure for s in each) / len(each), rel=1e-12)
    assert text_metrics.scores(added([range(3)], rouge=True), rouge=True)["rouge1"] > 0.5


@pytest.mark.parametrize("rouge", [False, True])
def test_no_text_adds_nothing(rouge):
    none = text_metrics.sums([], [], rouge=rouge)
    assert none == [0.0] * text_metrics.num_sums(rouge=rouge)
    assert len(none) == len(text_metrics.sums(SAID, TRUE, rouge=rouge))
    assert all(math.isnan(value) for value in text_metrics.scores(none, rouge=rouge).values())


@pytest.mark.parametrize(("said", "true"), [("", "a b c d"), ("x", "y"), ("a b c d e", "a b c d e")])
def test_extremes(said, true):
    scores = text_metrics.scores(text_metrics.sums([said], [true], rouge=False), rouge=False)
    assert scores["bleu"] == sacrebleu.corpus_bleu([said], [[true]]).score
    assert scores["chrf"] == sacrebleu.corpus_chrf([said], [[true]]).score


def test_signatures_are_those_of_sacrebleu():
    from sacrebleu.metrics import BLEU, CHRF

    expected = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        metric.corpus_score(SAID, [TRUE])
        expected[name] = str(metric.get_signature())
    assert text_metrics.signatures() == expected
    version = sacrebleu.__version__
    assert expected["bleu"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{version}"
