"""Conversations: read from a table's row, checked, and made into tokens of which the assistant's are learned."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from string import Formatter
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_peft.methods.errors import suggestion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Tokens = tuple[list[int], list[bool]]
"""The tokens of a text, and which of them are learned."""

_ROLES = ("system", "user", "assistant", "tool")
_ALIASES = {"human": "user", "gpt": "assistant"}
"""What ShareGPT calls the roles."""
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class RowError(Exception):
    """What a row has that it should not have.

    Args:
        field: the name of the field that it is about.
        what: a noun phrase.
    """

    def __init__(self, field: str, what: str) -> None:
        super().__init__(field, what)
        self.field, self.what = field, what


@dataclass(frozen=True)
class Form:
    """Where a table's rows hold their conversations.

    Attributes:
        messages: the column of a chat's turns; None for prompts and responses.
        prompt: the column of the prompt.
        template: the prompt with slots for columns, in place of `prompt`.
        response: the column of the response; None where there is none.
        system: the system's turn for conversations that have none.
    """

    messages: str | None
    prompt: str
    template: str | None
    response: str | None
    system: str | None

    @property
    def prompt_columns(self) -> list[str]:
        """The columns that a prompt is made of; none in a chat."""
        if self.messages is not None:
            return []
        return [self.prompt] if self.template is None else slots_of(self.template)

    @property
    def columns(self) -> list[str]:
        """All columns that a conversation is made of."""
        return [*self.prompt_columns, *(column for column in (self.messages, self.response) if column is not None)]


def slots_of(template: str) -> list[str]:
    """The names of a format string's slots, each once.

    Raises:
        ValueError: it is no format string.
    """
    return list(dict.fromkeys(slot for _, slot, _, _ in Formatter().parse(template) if slot is not None))


def rows_of(batch: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a batch of columns."""
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def conversation(row: dict[str, Any], form: Form) -> list[Message]:
    """The turns of a row; the user's alone where the table has prompts without responses.

    Raises:
        RowError: it is none.
    """
    turns = _prompt_and_response(row, form) if form.messages is None else _chat(row[form.messages], form.messages)
    if form.system is None or turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": form.system}, *turns]


def _prompt_and_response(row: dict[str, Any], form: Form) -> list[Message]:
    turns = [{"role": "user", "content": _prompt(row, form)}]
    if form.response is None:
        return turns
    return [*turns, {"role": "assistant", "content": _text(row[form.response], "response_column", form.response)}]


def _prompt(row: dict[str, Any], form: Form) -> str:
    if form.template is None:
        return _text(row[form.prompt], "prompt_column", form.prompt)
    values = {column: row[column] for column in form.prompt_columns}
    nothing = [column for column, value in values.items() if value is None]
    if nothing or not any(str(value).strip() for value in values.values()):
        raise RowError("template", f"nothing in {' and '.join(map(repr, nothing or values))}")
    return form.template.format_map(values)


def _text(value: Any, field: str, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RowError(field, f"no text in {column!r}")
    return value


def _chat(turns: Any, column: str) -> list[Message]:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise RowError("messages_column", f"no list of turns in {column!r}")
    messages = [_message(turn) for turn in turns]
    if all(message["role"] != "assistant" for message in messages):
        raise RowError("messages_column", f"no turn of the assistant in {column!r}")
    return messages


def _message(turn: dict[str, Any]) -> Message:
    """A turn as chat templates read it; a table fills the keys that a turn lacks with null."""
    message = {key: value for key, value in turn.items() if value is not None}
    if "from" in message:
        message = {"role": message["from"], "content": message.get("value")}
    role = _ALIASES.get(message.get("role", ""), message.get("role"))
    if role not in _ROLES:
        near = suggestion(str(role), [*_ROLES, *_ALIASES])
        raise RowError("messages_column", f"a turn of the unknown role {role!r}{near}")
    if not isinstance(message.get("content"), str) or not message["content"].strip():
        raise RowError("messages_column", f"a turn of the {role} without text")
    return {**message, "role": role}


def tokens(turns: list[Message], tokenizer: PreTrainedTokenizerBase, chat: bool) -> Tokens:
    """A conversation's tokens, and which of them are learned: those that begin in a turn of the assistant.

    Args:
        turns: ends with the assistant's, unless `chat`.
        tokenizer: a fast one.
        chat: whether its chat template is used; else the prompt and the response behind it are the text.

    Raises:
        RowError: the template can't render the conversation, or doesn't show where the assistant's turns are.
    """
    if not chat:
        return _plain_tokens(turns[-2]["content"], turns[-1]["content"], tokenizer)
    text, spans = (_marked if _MARKS.search(tokenizer.get_chat_template()) else _spans)(turns, tokenizer)
    fields = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learned = _begin_in(text, fields["offset_mapping"], spans)
    if not any(learned):
        raise RowError("chat_template", "no token that the chat template shows to be the assistant's")
    return fields["input_ids"], learned


def prompt_tokens(turns: list[Message], tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[int]:
    """The tokens of a conversation up to its last turn of the assistant, which is to be generated.

    The arguments and errors are those of `tokens`.
    """
    last = max((place for place, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
    if chat:
        text = _render(turns[:last], tokenizer, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    ids = list(tokenizer(turns[last - 1]["content"], verbose=False)["input_ids"])
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def _plain_tokens(prompt: str, response: str, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    text = prompt + response
    fields = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids, learned = fields["input_ids"], _begin_in(text, fields["offset_mapping"], [(len(prompt), len(text))])
    if ids[-1] == tokenizer.eos_token_id:
        # some tokenizers add it themselves
        return ids, [*learned[:-1], True]
    return [*ids, tokenizer.eos_token_id], [*learned, True]


def _begin_in(text: str, offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Which tokens begin in one of the spans of a text; special tokens that a tokenizer adds stand nowhere in it."""
    starts, stops = np.array(offsets, dtype=np.int64).reshape(-1, 2).T.copy()
    for border in (place for span in spans for place in span):
        for token in np.flatnonzero((starts < border) & (border < stops)):
            # many tokens are a word with the space before it, and belong where the word is
            if not text[starts[token] : border].strip() and text[border : stops[token]].strip():
                starts[token] = border
    inside = np.zeros(len(starts), dtype=bool)
    for first, last in spans:
        inside |= (first <= starts) & (starts < last) & (starts < stops)
    return inside.tolist()  # type: ignore[no-any-return]


def _spans(turns: list[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """A conversation's text, and where in it the assistant's turns are: from behind the text that asks for one.

    Raises:
        RowError: the conversation up to a turn is rendered otherwise than as the beginning of the whole.
    """
    whole = _render(turns, tokenizer, tokenize=False)
    ends = tuple(tokenizer.get_added_vocab())
    spans = []
    for place, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _render(turns[:place], tokenizer, tokenize=False, add_generation_prompt=True)
        after = whole if place == len(turns) - 1 else _render(turns[: place + 1], tokenizer, tokenize=False)
        if not (whole.startswith(after) and after.startswith(before)):
            raise RowError(
                "chat_template",
                f"a beginning, up to turn {place + 1}, that the chat template renders differently once more turns "
                "follow, so where the assistant's are can't be told; give a chat_template that puts them between "
                "{% generation %} and {% endgeneration %}",
            )
        # a line break behind the token that ends the turn is the template's, not the assistant's
        bare = after.rstrip()
        spans.append((len(before), len(bare) if bare.endswith(ends) else len(after)))
    return whole, spans


def _marked(turns: list[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """A conversation's text, and what stands between the template's marks."""
    # apply_chat_template gives the marked tokens only, and loses those behind a mark that it finds no token for;
    # checked with transformers 5.23
    from transformers.utils.chat_template_utils import render_jinja_template

    options: dict[str, Any] = {**tokenizer.special_tokens_map, "chat_template": tokenizer.get_chat_template()}
    texts, spans = _refused(render_jinja_template, [turns], return_assistant_tokens_mask=True, **options)
    return texts[0], spans[0]


def _render(turns: list[Message], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    return _refused(tokenizer.apply_chat_template, turns, **options)


def _refused(render: Callable[..., Any], turns: Any, **options: Any) -> Any:
    """What `render` makes of conversations, its errors as faults of the row."""
    from jinja2 import TemplateError

    try:
        return render(turns, **options)
    except (TemplateError, ValueError, TypeError) as error:
        raise RowError("chat_template", f"a conversation that the chat template refuses ({error})") from error
