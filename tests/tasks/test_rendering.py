"""Joined conversations against the chat templates themselves: texts, spans and the tokens that bear loss."""

import json
import random
from itertools import chain

import pytest

from launcher.errors import DataError
from launcher.tasks import chat, rendering, talks
from tests.conftest import SHARED_DATA
from tests.tasks.test_tokens import KINDS, trained

GENERATION = "{% if add_generation_prompt %}<a>{% endif %}"
TURN = "{{ '<' + m.role[0] + '>' }}{{ m.content }}{{ '</s>\\n' }}"
TEMPLATES = {
    **chat.TEMPLATES,
    "percent": "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }} 100%s {% endfor %}" + GENERATION,
    "default system": (
        "{% if messages[0].role != 'system' %}{{ '<s>You help.</s>\\n' }}{% endif %}"
        "{% for m in messages %}" + TURN + "{% endfor %}" + GENERATION
    ),
    "numbered": (
        "{% for m in messages %}{{ loop.index }}<{{ m.role[0] }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}{{ messages|length + 1 }}<a>{% endif %}"
    ),
    "trimming": "{% for m in messages %}<{{ m.role[0] }}>{{ m.content | trim }}</s>\n{% endfor %}"
    + GENERATION,
    "no mark": "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}\n\n{% endfor %}" + GENERATION,
    "system in user": (
        "{% if messages[0].role == 'system' %}{% set first = messages[0].content %}{% set rest = messages[1:] %}"
        "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}{% endif %}"
        "<{{ m.role[0] }}>{% if loop.first and first %}{{ first + '\\n' }}{% endif %}{{ m.content }}</s>"
        "{% endfor %}" + GENERATION
    ),
    "thoughts": (
        "{% for m in messages %}{% set content = m.content %}"
        "{% if m.role == 'assistant' and '</think>' in content %}"
        "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "<{{ m.role[0] }}>{{ content }}</s>\n{% endfor %}" + GENERATION
    ),
    "commands": (
        "{% for m in messages %}{% if m.content.startswith('/no') %}<n>{% endif %}"
        "{% if m.content == 'Stop' %}<x>{% endif %}" + TURN + "{% endfor %}" + GENERATION
    ),
    "lengths": (
        "{% for m in messages %}{% if m.content | length > 90 %}<long>{% endif %}" + TURN + "{% endfor %}"
        "" + GENERATION
    ),
    "last": (
        "{% for m in messages %}<{{ m.role[0] }}>"
        "{{ m.content if loop.last else m.content[:1] }}{% endfor %}" + GENERATION
    ),
    "names": "{% for m in messages %}<{{ m.name or m.role[0] }}>{{ m.content }}</s>{% endfor %}" + GENERATION,
}
JOINED = {"chatml", "plain", "percent", "default system", "numbered", "trimming", "no mark", "thoughts"}
WORDS = ["river", "bank", "naïve", "👩‍👩‍👧", "日本", "%s", "{}", "\n", "\n\n", " ", "</s>", "<a>"]
WORDS += ["</think>", "/no", "Stop", ">", "|>", "<|im_end|>", "e\u0301", "\u00a0", "\t", "100%"]


class Rows:
    def __init__(self, **columns):
        self.columns = columns

    def where(self, i):
        return str(i)


def fail(where, reason):
    raise DataError(f"{where}: {reason}")


def conversation(draw):
    def text():
        return draw.choice(["", " "]).join(draw.choice(WORDS) for _ in range(draw.randint(0, 7)))

    roles = ["user", "assistant"] * draw.randint(1, 3)
    roles = draw.choice([roles, roles, ["system", *roles], roles[:-1], roles[1:], ["user", *roles]])
    messages = [{"role": role, "content": text()} for role in roles]
    if draw.random() < 0.1:
        messages[-1]["name"] = draw.choice(["bo", None])
    return messages


def strange(count, seed=0):
    draw = random.Random(seed)
    return [conversation(draw) for _ in range(count)]


def real(name, count):
    path = SHARED_DATA / name / "train.jsonl"
    if not path.exists():
        pytest.skip(f"no data set {name}")
    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(count), lines, strict=False)]
    if "messages" in rows[0]:
        return [row["messages"] for row in rows]
    return [
        [
            {"role": "user", "content": "\n\n".join(filter(None, [row["instruction"], row["input"]]))},
            {"role": "assistant", "content": row["output"]},
        ]
        for row in rows
    ]


def with_template(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def by_transformers(tokenizer, conversations):
    """For each: the text and the edges, or why there are none, from apply_chat_template alone."""

    def render(messages, generation_prompt):
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt
        )

    for messages in conversations:
        try:
            text = chat.rendered(render, messages, False)
            yield text, list(chain.from_iterable(chat.assistant_spans(render, messages, text)))
        except DataError as error:
            yield str(error), None


@pytest.fixture(scope="module")
def tokenizer():
    return trained("bpe")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("seed", [0, 1])
def test_joined_is_rendered(tokenizer, name, seed):
    conversations = strange(300, seed)
    renderer = rendering.Renderer(with_template(tokenizer, name), wants_edges=True)
    seen = dict(enumerate(by_transformers(tokenizer, conversations)))
    refused = {}
    given = talks.from_messages(Rows(messages=conversations), "messages", fail)
    made = renderer(given, refused.__setitem__)
    assert refused == {i: text for i, (text, edges) in seen.items() if edges is None}
    assert made.which == [i for i in seen if i not in refused]
    for i, text, edges in zip(made.which, made.texts, made.edges, strict=True):
        assert (text, list(edges)) == seen[i]


@pytest.mark.parametrize("name", TEMPLATES)
def test_which_templates_are_joined(tokenizer, name):
    """Ordinary rows of most templates never meet Jinja: the renderer is made to fail after the sample."""
    roles = ["system", "user", "assistant", "user", "assistant"]
    rows = [[{"role": role, "content": f"text {i}, and more"} for role in roles] for i in range(100)]
    renderer = rendering.Renderer(with_template(tokenizer, name), wants_edges=True)
    calls = []
    exact = renderer.exact

    def counted(messages):
        calls.append(messages)
        return exact(messages)

    renderer.exact = counted
    made = renderer(talks.from_messages(Rows(messages=rows), "messages", fail), lambda i, why: None)
    expected = {} if name == "last" else dict(enumerate(by_transformers(tokenizer, rows)))
    assert dict(zip(made.which, zip(made.texts, made.edges, strict=True), strict=True)) == expected
    is_joined = name in JOINED | {"commands", "lengths", "names", "system in user"}
    assert (len(calls) < 45) == is_joined


def test_the_sample_tells_what_the_probes_did_not(tokenizer):
    renderer = rendering.Renderer(with_template(tokenizer, "lengths"), wants_edges=True)
    rows = [
        [{"role": "user", "content": "x" * size}, {"role": "assistant", "content": "y"}]
        for size in range(128)
    ]
    given = talks.from_messages(Rows(messages=rows), "messages", fail)
    made = renderer(given, fail)
    assert not renderer.is_plain
    assert [(text, list(edges)) for text, edges in zip(made.texts, made.edges, strict=True)] == list(
        by_transformers(tokenizer, rows)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["gsm8k", "alpaca", "strange"])
@pytest.mark.parametrize("name", ["chatml", "plain", "trimming"])
def test_features_bear_loss_where_the_offsets_say(kind, source, name):
    from launcher import recipe, tasks

    conversations = strange(150) if source == "strange" else real(source, 150)
    tokenizer = trained(kind)
    data = {"train": "x", "format": "messages"}
    task = tasks.create(recipe.Stage(name="s", task="causal-lm", data=data))
    task.set_tokenizer(with_template(tokenizer, name), 1 << 20)
    good = [
        (i, *pair) for i, pair in enumerate(by_transformers(tokenizer, conversations)) if pair[1] is not None
    ]
    encoded = tokenizer([text for _, text, _ in good], add_special_tokens=False, return_offsets_mapping=True)
    ids, masks = [], []
    for (_, _, edges), own, offsets in zip(
        good, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        spans = list(zip(edges[0::2], edges[1::2], strict=True))
        mask = [int(any(begin <= start < end for begin, end in spans)) for start, _ in offsets]
        if any(mask[1:]):
            ids += own
            masks += mask
    rows = Rows(messages=[conversations[i] for i, _, _ in good])
    made = task.features(rows, (), fail)
    assert made.ragged["input_ids"][0].tolist() == ids
    assert made.ragged["target_mask"][0].tolist() == masks
    assert made.num_skipped == len(good) - len(made.scalars["num_targets"])
