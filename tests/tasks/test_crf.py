"""The CRF against enumeration of all paths, and its export read by the lines that it comes with."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.tasks import crf, tags

IGNORED = -100


def _crf(labels: tuple[str, ...], seed: int, *, constrained: bool = False) -> crf.LinearChainCRF:
    module = crf.LinearChainCRF(labels, tags.allowed(labels) if constrained else None)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return module


def _score(scores: crf.Scores, row: int, places: list[int], path: tuple[int, ...]) -> float:
    emissions, transitions, starts, ends = (each.double() for each in scores)
    total = starts[path[0]] + ends[path[-1]]
    total = total + sum(emissions[row, place, tag] for place, tag in zip(places, path, strict=True))
    return float(total + sum(transitions[a, b] for a, b in itertools.pairwise(path)))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    labels=st.sampled_from(
        [("O",), ("O", "B-X"), ("O", "B-X", "I-X"), ("O", "B-X", "I-X", "B-Y"), ("O", "B-X", "E-X", "S-X")]
    ),
    here=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=3),
    constrained=st.booleans(),
)
def test_likelihood_and_decoding_against_all_paths(
    seed: int, labels: tuple[str, ...], here: list[list[bool]], constrained: bool
) -> None:
    module = _crf(labels, seed, constrained=constrained)
    draw = torch.Generator().manual_seed(seed + 1)
    emissions = torch.randn(len(here), 5, len(labels), generator=draw) * 2
    inside = torch.tensor(here)
    drawn = torch.randint(0, len(labels), inside.shape, generator=draw)
    marked = torch.where(inside, drawn, IGNORED)
    scores = tuple(each.detach() for each in module(emissions))
    expected, best = 0.0, []
    for row in range(len(here)):
        places = [i for i, is_in in enumerate(here[row]) if is_in]
        if not places:
            best.append(None)
            continue
        paths = list(itertools.product(range(len(labels)), repeat=len(places)))
        all_scores = torch.tensor([_score(scores, row, places, path) for path in paths], dtype=torch.float64)
        own = tuple(marked[row, places].tolist())
        expected += _score(scores, row, places, own) - float(all_scores.logsumexp(0))
        best.append((float(all_scores.max()), places))
    found = float(crf.log_likelihood(scores, marked))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-3)
    decoded = crf.viterbi(scores, inside)
    assert ((decoded == IGNORED) == ~inside).all()
    for row, known in enumerate(best):
        if known is not None:
            path = tuple(decoded[row, known[1]].tolist())
            assert _score(scores, row, known[1], path) == pytest.approx(known[0], rel=1e-5, abs=1e-4)


def test_the_gradient_is_that_of_finite_differences() -> None:
    labels = torch.tensor([[0, IGNORED, 2, 1], [IGNORED, 1, IGNORED, IGNORED], [IGNORED] * 4])

    def value(emissions: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return crf.log_likelihood((emissions, *rest), labels)

    draw = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 4, 3), (3, 3), (3,), (3,))
    ]
    assert torch.autograd.gradcheck(value, inputs)


def test_rows_alone_and_padding_change_nothing() -> None:
    module = _crf(("O", "B-X", "I-X"), 3)
    emissions = torch.randn(4, 6, 3)
    labels = torch.randint(0, 3, (4, 6))
    labels[0, 4:], labels[1, ::2], labels[3] = IGNORED, IGNORED, IGNORED
    whole = crf.log_likelihood(module(emissions), labels)
    wider = torch.nn.functional.pad(emissions, (0, 0, 0, 3), value=7.0)
    padded = torch.nn.functional.pad(labels, (0, 3), value=IGNORED)
    torch.testing.assert_close(crf.log_likelihood(module(wider), padded), whole)
    alone = sum(crf.log_likelihood(module(emissions[i : i + 1]), labels[i : i + 1]) for i in range(4))
    torch.testing.assert_close(alone, whole)
    half = crf.log_likelihood(module(emissions.bfloat16()), labels)
    assert half.dtype == torch.float32
    nothing = crf.log_likelihood(module(emissions), torch.full_like(labels, IGNORED))
    assert float(nothing.detach()) == 0
    nothing.backward()
    assert not module.transitions.grad.any()


def test_constrained_decoding_is_always_valid() -> None:
    for labels in (("O", "B-X", "I-X", "B-Y", "I-Y"), ("O", "B-X", "I-X", "E-X", "S-X")):
        module = _crf(labels, 5, constrained=True)
        emissions = torch.randn(200, 7, len(labels)) * 5
        for path in crf.viterbi(module(emissions), torch.ones(200, 7, dtype=torch.bool)).tolist():
            words = [labels[i] for i in path]
            assert tags.first_break(words, iobes=tags.is_iobes(labels)) is None


def test_matching_takes_over_what_has_the_same_name() -> None:
    before, after = _crf(("O", "B-X", "I-X"), 1), crf.LinearChainCRF(("O", "B-Y", "I-X"))
    crf.start(after, before)
    assert after.transitions[0, 2] == before.transitions[0, 2]
    assert after.transitions[2, 2] == before.transitions[2, 2]
    assert not after.transitions[1].any() and after.starts[1] == 0 and after.ends[2] == before.ends[2]


def test_the_lines_in_the_export_decode_as_we_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from launcher import recipe as recipes
    from launcher.tasks import base
    from launcher.tasks.token_classification import TokenClassification
    from tests.tasks.words import tagger, word_piece

    labels = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    words = "Angela Merkel was born in Hamburg".split()
    tokenizer = word_piece(tmp_path, [" ".join(words), "a few more words to learn from"])
    torch.manual_seed(1)
    model = tagger(tokenizer, base.label_options(labels), initializer_range=1.0).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    data = {"train": "x.jsonl"}
    stage = {
        "name": "a",
        "task": "token-classification",
        "data": data,
        "head": {"kind": "crf", "constrained": True},
    }
    task = TokenClassification(recipes.Stage.model_validate(stage))
    task.save_extra(_crf(labels, 7, constrained=True), tmp_path)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL).group(1)
    scope: dict = {}
    exec(code.replace('directory = "."', f"directory = {str(tmp_path)!r}"), scope)
    capsys.readouterr()
    extra = task.load_extra(tmp_path)
    draw = random.Random(0)
    for _ in range(10):
        sentence = draw.sample(words, draw.randint(1, 6))
        assert (
            scope["tag"](sentence) == task.predict(model, extra, tokenizer, [" ".join(sentence)])[0].split()
        )
    assert json.loads(json.dumps(extra.labels)) == list(labels)
