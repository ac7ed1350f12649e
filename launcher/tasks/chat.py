"""Conversations as text: named templates, rendering, and which characters the assistant wrote."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from launcher.errors import DataError, nearest
from launcher.tasks.base import text_fault

Message = dict[str, Any]
Render = Callable[[list[Message], bool], str]
Span = tuple[int, int]

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "plain": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}"
        "{{ message['content'] + (eos_token or '') + '\\n' }}"
        "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}"
        "{% endfor %}"
    ),
}


def template(name: str | None, own: str | None) -> str:
    """Return the Jinja text of a chat template.

    Args:
        name: what the recipe says: a named template, a Jinja file, or nothing.
        own: the tokenizer's template, if it has one.

    Raises:
        DataError: `name` is neither a named template nor a readable file.
    """
    if name is None:
        return own or TEMPLATES["chatml"]
    if name in TEMPLATES:
        return TEMPLATES[name]
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise DataError(
            f'chat_template: "{name}" is neither a readable file nor a named template'
            f" ({', '.join(TEMPLATES)}){nearest(name, TEMPLATES)}"
        ) from None


def renderer(tokenizer: Any) -> Render:
    """Return the function that renders messages with the tokenizer's template.

    The same as `tokenizer.apply_chat_template`, without what that does anew for each conversation.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    source, special_tokens = tokenizer.get_chat_template(), tokenizer.special_tokens_map

    def render(messages: list[Message], generation_prompt: bool) -> str:
        texts, _ = render_jinja_template(
            conversations=[messages],
            chat_template=source,
            add_generation_prompt=generation_prompt,
            **special_tokens,
        )
        text: str = texts[0]
        return text

    return render


def rendered(render: Render, messages: list[Message], generation_prompt: bool) -> str:
    """Render, or say why the template failed.

    Raises:
        DataError: the template refuses these messages; without the place, which the caller knows.
    """
    try:
        text = render(messages, generation_prompt)
        text.encode()
    except (TemplateError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"the chat template refuses these messages: {reason}") from None
    return text


def assistant_spans(render: Render, messages: list[Message], whole: str) -> list[Span]:
    """Find the characters of the rendered conversation that the assistant has to produce.

    Args:
        render: the template.
        messages: the conversation.
        whole: the conversation, rendered.

    Returns:
        One (start, end) for each assistant turn: its content and its end mark, without white space
        that follows an end mark.

    Raises:
        DataError: the template renders the beginning of a conversation otherwise than the whole;
            without the place, which the caller knows.
    """
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        is_last = i + 1 == len(messages)
        until = whole if is_last else rendered(render, messages[: i + 1], False)
        if i:
            before = rendered(render, messages[:i], True)
        else:
            # Many templates cannot render no messages at all: a first turn starts at its text.
            before = until.partition(message["content"].strip() or until)[0]
        if not (until.startswith(before) and whole.startswith(until)):
            raise DataError(
                f"the chat template renders message {i + 1} otherwise at the end than amid"
                " the conversation, so the assistant's part cannot be told; set loss_on: all, or"
                " give another chat_template"
            )
        start, end = len(before), len(until)
        turn, content = until[start:].rstrip(), message["content"].rstrip()
        # White space right after the content is itself the end mark.
        if not content or not turn.endswith(content):
            end = start + len(turn)
        spans.append((start, end))
    return spans


def check_messages(value: Any) -> list[Message]:
    """Return a row's messages without the nulls that Arrow adds for absent keys.

    Raises:
        DataError: it is not a list of {role, content}; without the place, which the caller knows.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"messages must be a list of {{role, content}}, not {_kind(value)}")
    messages = []
    for i, message in enumerate(value):
        for key in ("role", "content"):
            text = message.get(key) if isinstance(message, dict) else None
            if not isinstance(text, str):
                raise DataError(
                    f'message {i + 1} has no text under "{key}": messages must be a list of {{role, content}}'
                )
            if fault := text_fault(text):
                raise DataError(f'message {i + 1}: its text under "{key}" is {fault}')
        messages.append({key: item for key, item in message.items() if item is not None})
    return messages


def end_mark(render: Render) -> str:
    """Return what the template puts after an assistant's content, e.g. `<|im_end|>`."""
    probe = "assistant content"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": probe}]
    return render(turns, False).rpartition(probe)[2].strip()


def _kind(value: Any) -> str:
    if value is None:
        return "empty (null)"
    return "an empty list" if value == [] else f"a {type(value).__name__}"
