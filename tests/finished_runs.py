"""Run directories of finished stages, one for each task, with random models: for what is asked of them afterwards."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from launcher import recipe as recipes
from launcher import storage, tasks
from launcher.recipes import train_tokenizer
from tests.conftest import write_jsonl
from tests.tasks.texts import Rows

NAMES = {
    "text-classification": "reviews",
    "token-classification": "entities-seeds/seed-0",
    "question-answering": "answers",
    "translation": "translate",
    "causal-lm": "chat",
}
CONTEXT = "The book was written by Ada in London ."
ROWS: dict[str, list[dict[str, Any]]] = {
    "text-classification": [
        {"text": "a good film", "label": "praise"},
        {"text": "a very bad film", "label": "blame"},
    ],
    "token-classification": [
        {"tokens": ["Ada", "lives", "in", "London"], "tags": ["B-PER", "O", "O", "B-LOC"]}
    ],
    "question-answering": [
        {
            "id": "a",
            "question": "Who wrote it ?",
            "context": CONTEXT,
            "answers": {"text": ["Ada"], "answer_start": [CONTEXT.index("Ada")]},
        }
    ],
    "translation": [{"source": "the house", "target": "das Haus"}],
    "causal-lm": [
        {"messages": [{"role": "user", "content": "two and two ?"}, {"role": "assistant", "content": "four"}]}
    ],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "token-classification": {"head": "crf"},
    "translation": {"generation": {"max_new_tokens": 4}},
    "causal-lm": {"generation": {"max_new_tokens": 4}},
}
BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
T5 = {
    "model_type": "t5",
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
MODELS = {"causal-lm": LLAMA, "translation": T5}


def make_runs(folder: Path) -> dict[str, str]:
    """Make `runs/NAME` for each task, and beside them what the documents' commands read.

    Returns:
        The runs' names by task.
    """
    texts = write_jsonl(
        folder / "texts.jsonl", [{"text": str(row)} for rows in ROWS.values() for row in rows]
    )
    tokenizer = folder / "tokenizer"
    arguments = [
        "--column",
        "text",
        "--kind",
        "bpe",
        "--vocabulary",
        "400",
        "--out",
        str(tokenizer),
        str(texts),
    ]
    assert train_tokenizer.main(arguments) == 0
    for task, name in NAMES.items():
        _make_run(folder / "runs" / name, task, tokenizer)
    (folder / "lines.txt").write_text("a good film\na bad film\n", encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(ROWS["text-classification"]), folder / "new.parquet")
    return NAMES


def _make_run(run_dir: Path, name: str, tokenizer_path: Path) -> None:
    import transformers

    rows = ROWS[name]
    run_dir.mkdir(parents=True)
    data = write_jsonl(run_dir.parent / f"{run_dir.name}.jsonl", rows)
    stage = {"name": "it", "task": name, "data": {"train": str(data), "eval": str(data)}, "max_length": 64}
    asked = recipes.parse({"model": {"path": "nowhere"}, "stages": [stage | SETTINGS.get(name, {})]})
    storage.write_text(run_dir / "recipe.yaml", recipes.to_yaml(asked))
    storage.write_json(run_dir / "ds.json", {"train_micro_batch_size_per_gpu": "auto"})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_path)
    task = tasks.create(asked.stages[0])
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    task.columns(list(columns))
    task.set_tokenizer(tokenizer, 64)
    labels = task.labels([Rows(columns)])  # type: ignore[list-item]
    settings = MODELS.get(name, BERT) | task.model_options(labels)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = transformers.AutoConfig.for_model(**settings, **ids)
    export = run_dir / "stages" / "it" / "export"
    getattr(transformers, task.auto_model).from_config(config).save_pretrained(export)
    tokenizer.save_pretrained(export)
    if (extra := task.extra(labels)) is not None:
        task.save_extra(extra, export)
