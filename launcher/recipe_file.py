"""A recipe's file: YAML and `--set` read into a frozen recipe, every mistake told in one line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from launcher import processes
from launcher.errors import RecipeError, nearest
from launcher.recipe import (
    Answers,
    Checkpoint,
    Data,
    DataSet,
    Generation,
    Head,
    Lora,
    MLflow,
    Model,
    Recipe,
    Section,
    Selection,
    Stage,
    TensorBoard,
    Trainable,
    WandB,
)


def load(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: the YAML file. Relative paths inside it are relative to its folder.
        settings: `a.b=c` each, put over the file's values; `c` is YAML. Relative paths in them are
            relative to the current directory.

    Raises:
        RecipeError: the file is missing or is no YAML, or a key or value is wrong; names the line.
    """
    text = _read(path)
    try:
        tree, node = yaml.safe_load(text), yaml.compose(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with the keys model and stages")
    tree = _with_absolute_paths("", tree, path.parent.absolute())
    for setting in settings:
        _apply(tree, setting)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(_explain(error, path, node)) from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        in_job = processes.is_of_a_job()
        hint = "; .rayignore and .gitignore say what a job does not take along" if in_job else ""
        raise RecipeError(f"{path}: no such recipe{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as text: {error}") from None


def _apply(tree: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals:
        raise RecipeError(f'--set {setting}: write it as key=value, e.g. --set "stages.0.epochs=2"')
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"--set {setting}: the value is not valid YAML") from None
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        node = _descend(node, part, setting)
    if isinstance(node, list):
        node[_index(node, last, setting)] = value
    else:
        of_data_set = next((part for part in parents if part in ("train", "eval")), None)
        kind = of_data_set if of_data_set and last == "path" else "" if of_data_set else last
        node[last] = _with_absolute_paths(kind, value, Path.cwd())


def _descend(node: Any, part: str, setting: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, setting)]
    if not isinstance(node.get(part), dict | list):
        node[part] = {}
    return node[part]


def _index(node: list[Any], part: str, setting: str) -> int:
    names = [item.get("name") for item in node if isinstance(item, dict)]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(node):
        return int(part)
    known = [str(name) for name in names] or [str(i) for i in range(len(node))]
    raise RecipeError(
        f'--set {setting}: there is no "{part}" in this list of {len(node)}{nearest(part, known)}'
    )


_FILE_KEYS = {"train", "eval", "config", "folder"}
_FILE_OR_HUB_KEYS = {"path", "tokenizer", "trust_remote_code"}


def _with_absolute_paths(key: str, value: Any, folder: Path) -> Any:
    """Make local paths absolute: what runs elsewhere does not share our current directory."""
    if isinstance(value, dict):
        if key in ("train", "eval"):
            # A data set: its path is a file like `train` itself, and nothing else in it is.
            return {k: _with_absolute_paths(key, v, folder) if k == "path" else v for k, v in value.items()}
        free = key in ("config", "columns")
        return value if free else {k: _with_absolute_paths(k, v, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_absolute_paths(key, item, folder) for item in value]
    if not isinstance(value, str) or "://" in value or value.startswith("hub:"):
        return value
    local = (folder / Path(value).expanduser()).absolute()
    is_file = key in _FILE_KEYS or (key == "chat_template" and value.endswith((".jinja", ".j2")))
    may_be_hub_id = key in _FILE_OR_HUB_KEYS and not value.startswith((".", "/", "~"))
    if is_file or (key in _FILE_OR_HUB_KEYS and (not may_be_hub_id or local.exists())):
        return str(local)
    return value


def _explain(error: ValidationError, path: Path, node: Any) -> str:
    """Turn pydantic's first complaint into one line with the file's line and the nearest right key."""
    # A misspelt key is told before the one that is missing because of it.
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    location = [part for part in first["loc"] if not _is_union_branch(part)]
    # A tracker's kind stands in the path, as the name of what it was read as.
    written = [part for part in location if part not in _KINDS]
    key = ".".join(str(part) for part in written)
    where = f"{path}, line {line}" if (line := _line(node, written)) else str(path)
    if first["type"] == "extra_forbidden":
        hint = nearest(str(location[-1]), _known_keys(location[:-1]))
        return f"{where}: {key} is not a key of the recipe{hint}"
    if first["type"] == "missing":
        return f"{where}: {key} is missing"
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if first["type"] == "value_error":
        return f"{where}: {key}: {message}" if key else f"{where}: {message}"
    return f"{where}: {key} is {first['input']!r}: {message}"


def _is_union_branch(part: int | str) -> bool:
    return isinstance(part, str) and (part.startswith(("literal[", "list[", "dict[")) or part in _TYPE_NAMES)


_TYPE_NAMES = {"str", "int", "float", "bool", "constrained-str", "constrained-int"}
_KINDS = {"tensorboard", "mlflow", "wandb"}
_SECTIONS: dict[str, type[Section]] = {
    "model": Model,
    "stages": Stage,
    "data": Data,
    "train": DataSet,
    "eval": DataSet,
    "checkpoint": Checkpoint,
    "head": Head,
    "trainable": Trainable,
    "lora": Lora,
    "select": Selection,
    "generation": Generation,
    "answers": Answers,
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
}


def _known_keys(location: Sequence[int | str]) -> list[str]:
    names = [part for part in location if isinstance(part, str)]
    section = _SECTIONS.get(names[-1], Recipe) if names else Recipe
    return list(section.model_fields)


def _line(node: Any, location: Sequence[int | str]) -> int | None:
    """The line of the deepest key of `location` that the YAML file itself holds."""
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if k.value == part]
            if not found:
                return line
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line
