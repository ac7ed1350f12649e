"""A small WordPiece tokenizer, as BERT's."""

from pathlib import Path
from typing import Any


def word_piece(folder: Path, texts: list[str], vocabulary: int = 120) -> Any:
    """Train one on texts; return it as transformers loads it."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizerFast

    raw = BertWordPieceTokenizer(lowercase=False)
    raw.train_from_iterator(texts, vocab_size=vocabulary, min_frequency=1, show_progress=False)
    raw.save(str(folder / "raw.json"))
    return BertTokenizerFast(tokenizer_file=str(folder / "raw.json"), do_lower_case=False)
