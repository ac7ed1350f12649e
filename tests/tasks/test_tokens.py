"""Which tokens a span of characters holds, against each token's own offsets, for tokenizers of every kind."""

from itertools import chain

import numpy as np
import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from launcher.tasks import tokens

TEXTS = [
    "",
    " ",
    "Hello there, river bank. ",
    "  two  spaces\n\n\tand more \n",
    "👩‍👩‍👧 family 🇩🇪 flag — naïve café, \uff21 \ufb01ne ½ día",
    "日本語のテキスト、中文字符。العربية עברית",
    "e\u0301\u0301 x\u200b\u200dy\u00a0z\ufeff \x00 \ufffd",
    "<s>Hello</s>\n<s> 👍🏽👍 </s>",
]
KINDS = ["bpe", "bpe-trimmed", "bpe-prefixed", "bpe-fallback", "unigram", "wordpiece"]


def trained(kind):
    raw = {
        "bpe": lambda: Tokenizer(models.BPE()),
        "bpe-trimmed": lambda: Tokenizer(models.BPE()),
        "bpe-prefixed": lambda: Tokenizer(models.BPE()),
        "bpe-fallback": lambda: Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)),
        "unigram": lambda: Tokenizer(models.Unigram()),
        "wordpiece": lambda: Tokenizer(models.WordPiece(unk_token="<unk>")),
    }[kind]()
    special = ["<s>", "</s>", "<unk>"]
    options = {"vocab_size": 400, "special_tokens": special, "show_progress": False}
    if kind == "unigram":
        raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
        raw.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
    elif kind == "wordpiece":
        raw.normalizer = normalizers.BertNormalizer(lowercase=True)
        raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(**options)
    elif kind == "bpe-fallback":
        options["special_tokens"] = special + [f"<0x{i:02X}>" for i in range(256)]
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(**options)
    else:
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "bpe-prefixed")
        raw.decoder = decoders.ByteLevel()
        if kind == "bpe-trimmed":
            raw.post_processor = processors.ByteLevel(trim_offsets=True)
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    raw.train_from_iterator(["Hello there river bank family flag and more two spaces"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def reference(encoding, edges):
    """One token after the other: 1 if the first of its characters lies inside a span."""
    spans = list(zip(edges[0::2], edges[1::2], strict=True))
    return [int(any(begin <= start < end for begin, end in spans)) for start, _ in encoding.offsets]


@pytest.mark.parametrize("kind", KINDS)
def test_span_mask_is_that_of_the_offsets(kind):
    tokenizer = trained(kind)
    draw = np.random.default_rng(0)
    texts, edges = [], []
    for text in TEXTS * 20:
        num_spans = int(draw.integers(0, 4))
        texts.append(text)
        edges.append(sorted(draw.integers(0, len(text) + 1, 2 * num_spans).tolist()))
    for text in TEXTS:  # every edge there is
        texts += [text] * (len(text) + 1)
        edges += [(character, len(text)) for character in range(len(text) + 1)]
    (ids, lengths), mask = tokens.encode_spans(tokenizer, texts, edges, add_special_tokens=False)
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    assert mask.dtype == np.uint8 and len(mask) == len(ids)
    expected = [reference(encoding, own) for encoding, own in zip(encodings, edges, strict=True)]
    assert mask.tolist() == list(chain.from_iterable(expected))
    fast = tokens.encode(tokenizer, texts, add_special_tokens=False)
    assert all((one == other).all() for one, other in zip(fast, (ids, lengths), strict=True))
    plain = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert ids.tolist() == list(chain.from_iterable(plain)) and lengths.tolist() == list(map(len, plain))


def old_windows(ids, length):
    cuts = list(range(0, len(ids), length))
    if len(cuts) > 1 and len(ids) - cuts[-1] == 1 and length > 2:
        cuts[-1] -= 1
    return [ids[a:b] for a, b in zip(cuts, [*cuts[1:], len(ids)], strict=True)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 50])
def test_windows(size):
    lengths = np.random.default_rng(size).integers(1, 30, 60)
    cut, owners = tokens.windows(lengths, size)
    expected = [[len(w) for w in old_windows(list(range(n)), size)] for n in lengths]
    assert cut.tolist() == list(chain.from_iterable(expected))
    assert owners.tolist() == [i for i, own in enumerate(expected) for _ in own]
    assert tokens.windows(np.array([0, 1, 0]), size)[1].tolist() == [1]  # nothing has no window
    firsts = np.concatenate([np.arange(n) for n in lengths])
    assert (tokens.heads(lengths, size) == (firsts < size)).all()


def test_with_end():
    values, lengths = tokens.with_end((np.array([1, 2, 9, 9, 3]), np.array([0, 2, 2, 1, 0, 0])), 9)
    parts = np.split(values, np.cumsum(lengths)[:-1])
    assert [part.tolist() for part in parts] == [[9], [1, 2, 9], [9, 9], [3, 9], [9], [9]]
    values, lengths = tokens.with_end((np.array([], np.uint16), np.array([0])), 9)
    assert values.tolist() == [9] and values.dtype == np.uint16


def test_what_was_switched_on_is_off():
    tokenizer = trained("bpe")
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokens.settle(tokenizer)
    assert tokenizer.backend_tokenizer.truncation is None and tokenizer.backend_tokenizer.padding is None
