"""A small WordPiece tokenizer, as BERT's, and a tiny BERT that tags words."""

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


def tagger(tokenizer: Any, options: dict[str, Any], size: int = 16, **settings: Any) -> Any:
    """Build a BERT for token classification.

    Args:
        tokenizer: tells the vocabulary.
        options: what the task gives for the model.
        size: of its layer.
        settings: more for its config.
    """
    from transformers import BertConfig, BertForTokenClassification

    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=size,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=size,
        **settings,
    )
    config.update(options)
    return BertForTokenClassification(config)
