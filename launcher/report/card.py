"""The model card of each exported model: README.md with the Hub's front matter, filled out of the run's files."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from launcher import storage
from launcher.report import measured, words
from launcher.report.past import Past, Tree

FILE = "README.md"
EXPORTS = {"export": "transformers", "adapter": "peft"}
"""In a stage's directory: what loads it."""
BEGIN, END = "<!-- begin of the card that the launcher fills in -->", "<!-- end of that card -->"
PIPELINES = {
    "text-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "translation": "translation",
    "causal-lm": "text-generation",
}
_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "translation": "AutoModelForSeq2SeqLM",
    "causal-lm": "AutoModelForCausalLM",
}
_ON_THE_HUB = re.compile(r"(hub:|hf://datasets/)(?P<name>[\w.-]+(/[\w.-]+)?)")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LANGUAGES = {
    name: code
    for code, name in (
        ("ar", "arabic"), ("cs", "czech"), ("da", "danish"), ("de", "german"), ("el", "greek"), ("en", "english"),
        ("es", "spanish"), ("fi", "finnish"), ("fr", "french"), ("hi", "hindi"), ("hu", "hungarian"),
        ("it", "italian"), ("ja", "japanese"), ("ko", "korean"), ("nl", "dutch"), ("no", "norwegian"),
        ("pl", "polish"), ("pt", "portuguese"), ("ro", "romanian"), ("ru", "russian"), ("sv", "swedish"),
        ("tr", "turkish"), ("uk", "ukrainian"), ("vi", "vietnamese"), ("zh", "chinese"),
    )
}  # fmt: skip
"""Of those that a prefix such as `translate English to German: ` names."""


def write_all(told: Past) -> list[Path]:
    """Write the card of every stage that is exported, beside its model; what a README says already stays below it.

    Returns:
        The cards.

    Raises:
        OSError: a card cannot be written.
    """
    written = []
    for name in told.stages:
        for folder, library in EXPORTS.items():
            directory = told.run_dir / "stages" / name / folder
            if directory.is_dir():
                path = directory / FILE
                storage.write_text(path, text(told, name, library) + _rest(path))
                written.append(path)
    return written


def text(told: Past, stage: str, library: str = "transformers") -> str:
    """Return a stage's card: front matter and body."""
    asked = told.asked(stage)
    return f"{_front(told, stage, asked, library)}{BEGIN}\n{_body(told, stage, asked, library)}\n{END}\n"


def _rest(path: Path) -> str:
    """What a README says besides an earlier card and front matter; with a line between."""
    try:
        old = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    if BEGIN in old and END in old:
        old = old[old.index(END) + len(END) :]
    else:
        old = re.sub(r"\A---\n.*?\n---\n", "", old, count=1, flags=re.S)
    old = old.strip("\n")
    return f"\n{old}\n" if old else ""


def _front(told: Past, stage: str, asked: Tree, library: str) -> str:
    # Imported late: pages need no Hub.
    from huggingface_hub import EvalResult, ModelCardData

    task = PIPELINES.get(asked.get("task", ""))
    names = _names(asked, "eval") or [f"a part of {name}" for name in _names(asked, "train")]
    on_the_hub = _on_the_hub(asked, "eval")
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type=on_the_hub[0] if on_the_hub else "local",
            dataset_name=", ".join(names) or "unknown",
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in told.metrics(stage).items()
    ]
    base = told.recipe.get("model", {}).get("path") or ""
    data = ModelCardData(
        model_name=f"{told.name}, stage {stage}",
        base_model=base if _HUB_NAME.fullmatch(base) else None,
        datasets=_on_the_hub(asked, "train") or None,
        language=_languages(asked) or None,
        library_name=library,
        pipeline_tag=task,
        tags=["fine-tuning", "deepspeed", "ray", *(["lora"] if library == "peft" else [])],
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _body(told: Past, stage: str, asked: Tree, library: str) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, finalize=_in_a_line)
    template = environment.get_template("card.md")
    done = told.stages.get(stage, {})
    summed = told.summary.get("stages", {}).get(stage, {})
    transfer = told.summary.get("transfer", {})
    model = told.recipe.get("model", {})
    names = list(told.stages)
    before = [each for each in names[: names.index(stage)] if each != "baseline"]
    return template.render(
        stage=stage,
        task=asked.get("task", "unknown"),
        library=library,
        loader=_CLASSES.get(asked.get("task", ""), "AutoModel"),
        base=_last_part(model.get("path") or ""),
        start=_last_part(model["config"]) if isinstance(model.get("config"), str) else "",
        before=before,
        is_joint=told.recipe.get("transfer") == "joint",
        train=_data(told, stage, asked, "train"),
        eval=_data(told, stage, asked, "eval"),
        asked=list(_settings(asked, told)),
        done=done,
        measured=measured.figures(told, stage),
        metrics=[(name, words.value(value)) for name, value in told.metrics(stage).items()],
        after=[(name, words.value(value)) for name, value in done.get("after", {}).items()],
        gain=transfer if transfer.get("target") == stage and "gain" in transfer else None,
        seconds=words.duration(told.ledger.whole_s),
        verified=summed.get("verified"),
        notes=summed.get("notes", {}),
        unseen=list(_not_measured(told, stage, asked)),
        workers=told.summary.get("num_workers") or (told.tries[-1].num_workers if told.tries else 1),
        device=told.plan.get("cluster", {}).get("device", ""),
        environment=told.report.get("environment", {}),
    ).strip()


def _in_a_line(value: Any) -> Any:
    """What users wrote, so that it breaks no table and is no markup."""
    if not isinstance(value, str):
        return value
    return re.sub(r"([|<>])", r"\\\1", " ".join(words.redacted(value).split()))


def _data(told: Past, stage: str, asked: Tree, split: str) -> Tree:
    """The names of a split's data sets, and what is known of their size."""
    sizes = told.plan.get("data", {}).get(stage, {}).get(split) or {}
    names = _names(asked, split)
    return {"names": names, "fraction": asked.get("data", {}).get("eval_fraction"), **sizes}


def _settings(asked: Tree, told: Past) -> Iterator[tuple[str, str]]:
    """Of the recipe what a reader of a card asks for."""
    for key in ("epochs", "steps", "global_batch", "learning_rate", "schedule", "warmup", "weight_decay"):
        if asked.get(key) is not None:
            yield key.replace("_", " "), str(asked[key])
    for key in ("max_length", "gradient_clipping", "seed", "batching"):
        if asked.get(key) is not None:
            yield key.replace("_", " "), str(asked[key])
    if (lora := (asked.get("trainable") or {}).get("lora")) is not None:
        yield "LoRA", f"rank {lora.get('rank')}, alpha {lora.get('alpha')}"
    if (head := (asked.get("head") or {}).get("kind", "linear")) != "linear":
        yield "head", head
    zero = told.ds.get("zero_optimization", {})
    if isinstance(zero, dict):
        yield "ZeRO stage", str(zero.get("stage", 0))


def _not_measured(told: Past, stage: str, asked: Tree) -> Iterator[str]:
    """What the run did not look at."""
    metrics = told.metrics(stage)
    if not metrics:
        yield "The model was not evaluated: the recipe names no evaluation data."
    else:
        names = ", ".join(_names(asked, "eval")) or "the part of the training data that was set aside"
        yield f"The metrics hold for {names}; on other data they were not measured."
        yield "Nothing was measured about robustness, bias, fairness or safety."
    seeds = told.run_dir.name.startswith("seed-")
    if not seeds:
        yield "One seed was trained: how far the metrics spread over seeds is not known."
    if told.record.stages and "baseline" not in told.stages and len(told.stages) > 1:
        yield "No baseline was trained: what the earlier stages gave is not known."
    yield "Licences of the base model and of the data were not told to the launcher: look them up before you share the model."


def _names(asked: Tree, split: str) -> list[str]:
    return [_last_part(path) for each in asked.get("data", {}).get(split) or [] for path in _paths(each)]


def _on_the_hub(asked: Tree, split: str) -> list[str]:
    paths = [path for each in asked.get("data", {}).get(split) or [] for path in _paths(each)]
    return list(dict.fromkeys(found["name"] for path in paths if (found := _ON_THE_HUB.match(path))))


def _paths(data_set: Any) -> list[str]:
    path = data_set.get("path", "") if isinstance(data_set, dict) else data_set
    return [path] if isinstance(path, str) else list(path)


def _last_part(path: str) -> str:
    """What of a path may be told to everyone: a name on the Hub, or the last part of any other."""
    if found := _ON_THE_HUB.match(path):
        return found["name"]
    if _HUB_NAME.fullmatch(path):
        return path
    # A query may sign what it leads to, and a bucket's address begin with a password.
    bare = path.partition("?")[0] if "://" in path else path
    return words.redacted(bare).rstrip("/").rpartition("/")[2]


def _languages(asked: Tree) -> list[str]:
    """The languages that a translation's prefix names."""
    said = re.findall(r"[a-z]+", (asked.get("data", {}).get("prefix") or "").lower())
    return list(dict.fromkeys(_LANGUAGES[word] for word in said if word in _LANGUAGES))
