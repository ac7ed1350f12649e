"""Exact match and F1, against the official definition written out anew, and on cases by hand."""

import random
import re
import string

import pytest

from launcher.tasks import squad


def words(text):
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def official(prediction, references):
    golds = [r for r in references if words(r)] or [""]
    best_exact, best_f1 = 0, 0.0
    for gold in golds:
        said, true = words(prediction), words(gold)
        best_exact = max(best_exact, int(said == true))
        if not said or not true:
            f1 = float(said == true)
        else:
            left, same = list(true), 0
            for word in said:
                if word in left:
                    left.remove(word)
                    same += 1
            f1 = 0.0
            if same:
                precision, recall = same / len(said), same / len(true)
                f1 = 2 * precision * recall / (precision + recall)
        best_f1 = max(best_f1, f1)
    return bool(best_exact), best_f1


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("The  Broncos!", ["broncos"], True, 1.0),
        ("Denver Broncos", ["Broncos", "the Denver team"], False, 2 / 3),
        ("a b b c", ["b b b"], False, 2 * (2 / 3) * (2 / 3) / (4 / 3)),
        ("", ["x"], False, 0.0),
        ("x", [], False, 0.0),
        ("", [], True, 1.0),
        ("the", [], True, 1.0),  # an article alone normalises to nothing
        ("", ["the"], True, 1.0),
        ("", ["the", "x"], False, 0.0),  # answers that are nothing do not count beside others
        ("U.S.", ["us"], True, 1.0),
        ("Theater", ["ater"], False, 0.0),
        ("„Köln“", ["köln"], False, 0.0),  # only ASCII punctuation is dropped
        ("fünf\nÄpfel", ["Fünf äpfel"], True, 1.0),
    ],
)
def test_by_hand(prediction, references, exact, f1):
    assert squad.scores(prediction, references) == (exact, pytest.approx(f1))
    assert squad.scores(prediction, references) == official(prediction, references)


def test_random_answers_score_as_the_official_script():
    draw = random.Random(0)
    pool = ["the", "a", "an", "Cat", "cat,", "dog", "...", "half-time", "5½", "Ärger", "'s", "The\tcat"]
    seen = set()
    for _ in range(3000):
        one = [" ".join(draw.choices(pool, k=draw.randint(0, 5))) for _ in range(draw.randint(1, 4))]
        assert squad.scores(one[0], one[1:]) == official(one[0], one[1:])
        seen.add(squad.scores(one[0], one[1:])[1])
    assert len(seen) > 10


def test_how_answers_are_written():
    lists = {"text": ["a", "b"], "answer_start": [0, 4]}
    dicts = [{"text": "a", "answer_start": 0}, {"text": "b", "answer_start": 4}]
    assert squad.parsed(lists) == squad.parsed(dicts) == [("a", 0), ("b", 4)]
    for none in (None, {}, [], {"text": [], "answer_start": []}, {"text": None, "answer_start": None}):
        assert squad.parsed(none) == []
    for wrong in ("a", 3, {"text": ["a"]}, {"text": "a", "answer_start": 0}, {"txt": ["a"]}, ["a"],
                  {"text": ["a"], "answer_start": [0, 1]}, [{"text": "a"}], {"text": [3], "answer_start": [0]}):  # fmt: skip
        assert squad.parsed(wrong) is None
