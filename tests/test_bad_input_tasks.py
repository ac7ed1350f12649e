"""Bad input of the tasks, through the command line on a real cluster: one clear line, no traceback."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from launcher.run import main
from tests.conftest import make_tokenizer, sentence, write_jsonl
from tests.train.test_transfer import BERT, LLAMA

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


class Case:
    """A small sound recipe, to be spoilt in one place."""

    def __init__(self, folder: Path) -> None:
        self.folder, draw = folder, random.Random(0)
        texts = [sentence(draw, 6) for _ in range(24)]
        make_tokenizer(folder / "tokenizer", texts)
        self.rows = [{"text": text, "label": ("good", "bad")[i % 2]} for i, text in enumerate(texts)]
        self.model = {"config": BERT, "tokenizer": str(folder / "tokenizer")}
        self.stage = {"name": "only", "task": "text-classification", "global_batch": 8, "steps": 1}
        self.eval = self.rows[:6]

    def run(self, cluster: str) -> int:
        train = str(write_jsonl(self.folder / "train.jsonl", self.rows))
        data = {"train": train, "eval": str(write_jsonl(self.folder / "eval.jsonl", self.eval))}
        recipe = {"model": self.model, "stages": [self.stage | {"data": data}]}
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return main(
            [str(path), "--workers", "2", "--run-root", str(self.folder / "runs"), "--address", cluster]
        )


def _no_iob2(case: Case) -> None:
    case.stage["task"] = "token-classification"
    case.rows = [{"tokens": ["Ada", "sees", "Rome"], "tags": ["B-PER", "O", "B-LOC"]} for _ in range(12)]
    case.eval = case.rows[:4]
    case.rows = [*case.rows[:5], {"tokens": ["Ada", "naps"], "tags": ["person", "O"]}, *case.rows[5:]]


def _no_such_answer(case: Case) -> None:
    case.stage["task"] = "question-answering"
    answers = {"text": ["Rome"], "answer_start": [9]}
    row = {"question": "What does Ada see?", "context": "Ada sees Rome", "answers": answers}
    case.rows, case.eval = [row] * 12, [row] * 2
    case.rows = [*case.rows, row | {"answers": {"text": ["Oslo"], "answer_start": [9]}}]


def _other_labels(case: Case) -> None:
    case.eval = [*case.eval[:2], {"text": "a fine river", "label": "excellent"}]


def _decoder_only(case: Case) -> None:
    case.model["config"] = LLAMA
    case.stage["task"] = "translation"
    case.rows = [{"source": row["text"], "target": row["label"]} for row in case.rows]
    case.eval = case.rows[:4]


def _freezes_nothing(case: Case) -> None:
    case.stage["trainable"] = {"freeze": ["encoder.layers.0"]}


def _freezes_all(case: Case) -> None:
    case.stage["trainable"] = {"freeze": ["bert", "classifier"]}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a small cluster of its own, which every command joins."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield started.address
    started.shutdown()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (_no_iob2, ["train.jsonl", "6", "person", "IOB2"]),
        (_no_such_answer, ["train.jsonl", "13", "Oslo", "answer_start 9", "Rome"]),
        (_other_labels, ["eval.jsonl", "3", "excellent", "train split"]),
        (_decoder_only, ["translation", "encoder-decoder", "llama", "model.config"]),
        (_freezes_nothing, ["stages.only.trainable.freeze", "encoder.layers.0", "matches none"]),
        (_freezes_all, ["stages.only.trainable", "nothing is left to train"]),
    ],
)
def test_told_in_one_line(
    tmp_path: Path,
    cluster: str,
    spoil: Callable[[Case], None],
    told: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    case = Case(tmp_path)
    spoil(case)
    code = case.run(cluster)
    out, err = capfd.readouterr()
    assert code == 2, (out, err)
    # The last of what is told; neither it nor what came before is a traceback or a second try.
    (line,) = [each for each in err.splitlines() if each.strip()]
    assert line.startswith("error: ")
    assert all(word in line for word in told), line
    assert "Traceback" not in out and "failure" not in out, out
