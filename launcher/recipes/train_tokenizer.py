"""Train a tokenizer from data files, for a model that begins from nothing.

    python launcher/recipes/train_tokenizer.py --column source --column target --vocabulary 8000 \\
        --out DIR FILE...

FILE is what a recipe's `data.train` may be: Parquet, Arrow, JSON lines or CSV files, directories, globs. DIR
is then a recipe's `model.tokenizer`, beside a `model.config` such as

    {model_type: t5, pad_token_id: 0, eos_token_id: 1, decoder_start_token_id: 0, ...}

A column may hold texts, or conversations (`messages`). For a model without an encoder take `--kind bpe`, and
`{model_type: llama, pad_token_id: 0, eos_token_id: 1, bos_token_id: null, ...}`.

The first ids are <pad> 0, </s> 1 and <unk> 2, and every text gets </s> at its end, as T5 has it. A character
that the files do not have becomes bytes, so decoding gives back any text, but for white space before it.
Two trainings of a unigram tokenizer may differ a little: keep DIR.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from launcher.data import source
from launcher.errors import BadInput, LauncherError

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
SPECIAL = [PAD, END, UNKNOWN]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SMALLEST = len(SPECIAL) + len(BYTES) + 1


def main(argv: Sequence[str] | None = None) -> int:
    """Train a tokenizer and save it; return the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.vocabulary < SMALLEST:
            raise BadInput(
                f"--vocabulary {arguments.vocabulary}: give at least {SMALLEST}: 256 are for bytes"
            )
        texts = read(arguments.files, arguments.column)
        tokenizer = train(texts, kind=arguments.kind, vocabulary=arguments.vocabulary)
        save(tokenizer, arguments.out)
    except LauncherError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{arguments.out}: {tokenizer.get_vocab_size()} tokens")
    return 0


def read(files: Sequence[str], columns: Sequence[str]) -> Iterator[list[str]]:
    """Yield the texts of columns, some rows at a time; what is no text is passed over.

    Raises:
        DataError: a file cannot be read.
        BadInput: a column is not there, or holds no text.
    """
    wanted = list(dict.fromkeys(columns))
    found = source.list_files(
        [path if "://" in path or ":" in path else os.path.abspath(path) for path in files]
    )
    present = source.column_names(found, wanted)
    for name in wanted:
        if name not in present:
            raise BadInput(f"--column {name}: the files have no such column; they have: {', '.join(present)}")
    num_texts = 0
    for chunk in source.chunks(found):
        for rows in source.read(chunk, wanted, reject=source.refuse):
            texts = [text for name in wanted for value in rows.columns[name] for text in _texts(value)]
            num_texts += len(texts)
            yield texts
    if not num_texts:
        raise BadInput(f"--column {', '.join(wanted)}: there is no text in it")


def _texts(value: Any) -> list[str]:
    """Return the texts in a row's value: itself, or what the messages of a conversation say."""
    said = (
        [each.get("content") for each in value if isinstance(each, dict)]
        if isinstance(value, list)
        else [value]
    )
    return [text for text in said if isinstance(text, str) and text]


def train(texts: Iterator[list[str]], *, kind: str, vocabulary: int) -> Tokenizer:
    """Train a tokenizer.

    Args:
        texts: some at a time.
        kind: `unigram` (as T5, Marian) or `bpe` (of bytes, as GPT-2, BART).
        vocabulary: tokens, at most.
    """
    tokenizer = _unigram(texts, vocabulary) if kind == "unigram" else _bpe(texts, vocabulary)
    ids = [(END, SPECIAL.index(END))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B:0 {END}", special_tokens=ids
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer as a directory that `AutoTokenizer.from_pretrained` takes.

    Raises:
        BadInput: it cannot be written.
    """
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "unk_token": UNKNOWN,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--out {folder}: cannot be written: {error.strerror}") from None


def _unigram(texts: Iterator[list[str]], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary - len(BYTES), special_tokens=SPECIAL, unk_token=UNKNOWN, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer knows nothing of bytes. Nor may they be special tokens, which decoding leaves out.
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    pieces = described["model"]["vocab"]
    least = min(score for _, score in pieces) - 10.0
    pieces += [[byte, least] for byte in BYTES]
    described["model"]["byte_fallback"] = True
    whole = Tokenizer.from_str(json.dumps(described))
    whole.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return whole


def _bpe(texts: Iterator[list[str]], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python launcher/recipes/train_tokenizer.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--column", action="append", required=True, help="a column of texts or messages; may be repeated"
    )
    parser.add_argument("--vocabulary", type=int, default=8000, help="tokens, at most (default: 8000)")
    parser.add_argument("--kind", choices=("unigram", "bpe"), default="unigram", help="default: unigram")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    parser.add_argument("files", nargs="+", metavar="FILE", help="the data files")
    return parser


if __name__ == "__main__":
    sys.exit(main())
