"""Make the quickstart's data and model: `python -m launcher.recipes.quickstart.make`.

All of it is made up from the lists in `words`, from a fixed seed: many film reviews for the source
stage, a few reviews of kitchen appliances for the target stage, and the tokenizer and the config of
a BERT small enough for two cores.

A review's label is what it says of the thing as a whole: in "the handle is awful, but the kettle
won me over" that is the second half, and "anything but awful" is praise.

Both domains share the words of praise and blame, but the target's train split shows only a part of
them, while its eval split takes any. The rest can be learned from the source stage only.
"""

import json
import string
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from launcher.recipes.quickstart import words
from launcher.recipes.quickstart.words import Domain, Lexicon

SEED = 7
SOURCE_TRAIN, TARGET_TRAIN, EVAL = 3000, 160, 400
TARGET_TRAIN_WORDS = 0.4
CONTRASTS = 0.06
NEGATIONS = 0.06
POSITIONS = 128

AGREEMENTS = [
    "{whole}.",
    "{whole}, mostly because {part}.",
    "{part}, and {whole}.",
    "{part}, and {other_part}.",
    "{part}. {whole}.",
]
# The half that disagrees is always about a part, so that a reader can tell the label.
CONTRAST_FORMS = [
    "{against}, but {whole}.",
    "Although {against}, {whole}.",
    "{whole}, even though {against}.",
    "{against}. Even so, {whole}.",
    "It is true that {against}, but all in all {whole}.",
]
NEGATION_FORMS = ["anything but {}", "far from {}", "not {} at all"]
DEGREES = ["", "", "", "really ", "truly ", "simply "]

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


class Row(NamedTuple):
    """One review and whether it is favourable."""

    text: str
    positive: bool


class Writer:
    """Writes the clauses of one review: one thing, one tense, no part and no judgement twice."""

    def __init__(self, rng: Random, domain: Domain, sides: tuple[Lexicon, Lexicon]) -> None:
        self._rng = rng
        self._sides = sides
        self._item = rng.choice(domain.items)
        self._be = rng.choice(["is", "was"])
        self._parts = rng.sample(domain.parts, len(domain.parts))
        self._used: set[str] = set()

    def part(self, positive: bool) -> str:
        """Say something about a part."""
        part = f"the {self._parts.pop()}"
        if self._rng.random() < 0.2:
            return self._feeling(part, positive)
        return f"{part} {self._be} {self._adjective(positive)}"

    def whole(self, positive: bool) -> str:
        """Say something about the thing as a whole."""
        item = f"{self._rng.choice(['the', 'this'])} {self._item}"
        kind = self._rng.random()
        if kind < 0.35:
            return f"{item} {self._pick(self._sides[positive].phrases)}"
        if kind < 0.5:
            return self._feeling(item, positive)
        if kind < 0.7:
            adjective = self._pick(self._sides[positive].adjectives)
            return f"it {self._be} {_with_article(adjective)} {self._item}"
        return f"{item} {self._be} {self._adjective(positive)}"

    def _feeling(self, thing: str, positive: bool) -> str:
        return f"I {self._pick(self._sides[positive].feelings)} {thing}"

    def _adjective(self, positive: bool) -> str:
        if self._rng.random() < NEGATIONS:
            adjective = self._pick(self._sides[not positive].adjectives)
            return self._rng.choice(NEGATION_FORMS).format(adjective)
        return self._rng.choice(DEGREES) + self._pick(self._sides[positive].adjectives)

    def _pick(self, choices: list[str]) -> str:
        unused = [choice for choice in choices if choice not in self._used]
        choice = self._rng.choice(unused or choices)
        self._used.add(choice)
        return choice


def main() -> None:
    """Write the data and the model beside this file."""
    folder = Path(__file__).parent
    all_words = (words.NEGATIVE, words.POSITIVE)
    few_words = _some_words(Random(f"{SEED} words"), TARGET_TRAIN_WORDS)
    source = _reviews(Random(f"{SEED} source"), words.FILMS, all_words)
    source_train, source_eval = _take(source, SOURCE_TRAIN), _take(source, EVAL)
    few = _reviews(Random(f"{SEED} target train"), words.APPLIANCES, few_words)
    target = _reviews(Random(f"{SEED} target eval"), words.APPLIANCES, all_words)
    target_train = _take(few, TARGET_TRAIN)
    target_eval = _take((row for row in target if row not in target_train), EVAL)
    _write_parquet(folder / "source.train.parquet", source_train)
    _write_parquet(folder / "source.eval.parquet", source_eval)
    _write_jsonl(folder / "target.train.jsonl", target_train)
    _write_jsonl(folder / "target.eval.jsonl", target_eval)
    _write_model(folder / "model", [row.text for row in source_train + target_train])


def _some_words(rng: Random, share: float) -> tuple[Lexicon, Lexicon]:
    def some(all_of_them: list[str]) -> list[str]:
        return rng.sample(all_of_them, round(share * len(all_of_them)))

    return Lexicon(*map(some, words.NEGATIVE)), Lexicon(*map(some, words.POSITIVE))


def _reviews(rng: Random, domain: Domain, sides: tuple[Lexicon, Lexicon]) -> Iterator[Row]:
    """Yield reviews without end: no text twice, as many of either label."""
    seen = set()
    positive = True
    while True:
        text = _review(rng, domain, sides, positive)
        if text not in seen:
            seen.add(text)
            yield Row(text, positive)
            positive = not positive


def _review(rng: Random, domain: Domain, sides: tuple[Lexicon, Lexicon], positive: bool) -> str:
    writer = Writer(rng, domain, sides)
    form = rng.choice(CONTRAST_FORMS if rng.random() < CONTRASTS else AGREEMENTS)
    opinion = form.format(
        whole=writer.whole(positive),
        part=writer.part(positive),
        other_part=writer.part(positive),
        against=writer.part(not positive),
    )
    before, after = rng.choice([(0, 0), (0, 1), (1, 0), (1, 0)])
    remarks = [_remark(rng, remark) for remark in rng.sample(domain.remarks, before + after)]
    return _capitalised(" ".join([*remarks[:before], opinion, *remarks[before:]]))


def _remark(rng: Random, form: str) -> str:
    return form.format(
        day=rng.choice(words.DAYS),
        month=rng.choice(words.MONTHS),
        number=rng.choice(words.NUMBERS),
        person=rng.choice(words.PERSONS),
    )


def _capitalised(text: str) -> str:
    return ". ".join(sentence[:1].upper() + sentence[1:] for sentence in text.split(". "))


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _take(reviews: Iterator[Row], count: int) -> list[Row]:
    return [next(reviews) for _ in range(count)]


def _write_parquet(path: Path, rows: list[Row]) -> None:
    table = pa.table(
        {
            "text": [row.text for row in rows],
            "label": ["positive" if row.positive else "negative" for row in rows],
        }
    )
    pq.write_table(table, path, compression="zstd")


def _write_jsonl(path: Path, rows: list[Row]) -> None:
    verdicts = ["returned", "recommended"]
    lines = ({"review": row.text, "verdict": verdicts[row.positive]} for row in rows)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _write_model(folder: Path, texts: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    tokenizer = _tokenizer(texts)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": POSITIONS,
            **SPECIAL_TOKENS,
        },
    )
    _write_json(folder / "config.json", _config(tokenizer))


def _tokenizer(texts: list[str]) -> Tokenizer:
    """Make a WordPiece tokenizer that does what BERT's uncased one does."""
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    words_of = (splitter.pre_tokenize_str(normalizer.normalize_str(text)) for text in texts)
    vocabulary = _vocabulary({word for pairs in words_of for word, _ in pairs})
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL_TOKENS["unk_token"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    return tokenizer


def _vocabulary(seen: set[str]) -> dict[str, int]:
    """Number the words seen, and the characters that spell any other word.

    The trainers of tokenizers would find shorter pieces too, but other ones in every process.
    """
    characters = string.ascii_lowercase + string.digits
    spelling = {*characters, *(f"##{character}" for character in characters), *string.punctuation}
    tokens = [*SPECIAL_TOKENS.values(), *sorted(seen | spelling)]
    return {token: id_ for id_, token in enumerate(tokens)}


def _config(tokenizer: Tokenizer) -> dict[str, object]:
    return {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.05,
        "attention_probs_dropout_prob": 0.05,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "pad_token_id": tokenizer.token_to_id(SPECIAL_TOKENS["pad_token"]),
    }


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
