"""Instructions and chats for decoders, with the loss on the responses only."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lightning_peft.data.conversations import (
    Form,
    Message,
    RowError,
    conversation,
    prompt_tokens,
    rows_of,
    slots_of,
    tokens,
)
from lightning_peft.data.labels import IGNORED, row_numbers
from lightning_peft.data.module import is_stream
from lightning_peft.data.packing import DecoderData, Encoder
from lightning_peft.data.sampling import lengths
from lightning_peft.data.tokenizing import CUT, missing_columns, padded
from lightning_peft.interchange.locations import resolve
from lightning_peft.methods.errors import PEFTError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

ROW = "__row__"
"""The column that holds a row's number in its file, from 1, which it keeps when validation rows are taken out."""


class InstructionData(DecoderData):
    """Prompts with responses, or chats of several turns; what the assistant says is learned, and nothing else.

    A table with the column `messages` is chat: a row is a list of `{role, content}` with the roles system, user,
    assistant and tool; also ShareGPT's column `conversations` of `{from, value}`. Any other table has a prompt and a
    response. Both go through the tokenizer's chat template. Prompt and response without one, or with `template`, are
    the prompt, the response right behind it, and the tokenizer's end-of-sequence token.

    A token is learned if its first character that is no space is the assistant's. The tokens that end its turns are
    learned too. Where they are is told by the template's `{% generation %}` marks if it has them, else by rendering the
    conversation up to each turn.

    Batches are those of `DecoderData`. Prediction gives prompts, up to the last turn of the assistant, as `input_ids`
    and `attention_mask`, padded on the left and never packed; a prompt of more than `max_length` tokens loses its
    beginning. A test table of prompts without responses serves for prediction only.

    Args:
        path: see `TableData`.
        prompt_column: the column that holds the prompt.
        response_column: the column that holds the response.
        messages_column: the column that holds the turns of a chat.
        system: the system's turn for conversations that have none.
        template: the prompt, with a slot for each column that goes into it, such as `### Question: {question}`; in
            place of `prompt_column` and the chat template.
        chat_template: a Jinja template, or a file with one, in place of the tokenizer's.
        packing: see `DecoderData`.
        drop_long: leave out rows whose prompt alone fills `max_length`, which are otherwise refused.
        **options: see `TextData`. A response that goes beyond `max_length` is cut there.

    Attributes:
        dropped_rows: the number of rows that `drop_long` left out, by split; of a stream, among its first 1,000.

    Raises:
        PEFTError: by the constructor, an argument that can't be; by `setup`, data that can't be trained on: missing
            columns, rows without prompt, response or assistant's turn, unknown roles, prompts that leave no room for a
            response, a chat without a template, or a template that doesn't show where the responses are.
    """

    def __init__(
        self,
        path: str,
        *,
        prompt_column: str = "prompt",
        response_column: str = "response",
        messages_column: str = "messages",
        system: str | None = None,
        template: str | None = None,
        chat_template: str | None = None,
        packing: bool = False,
        drop_long: bool = False,
        **options: Any,
    ) -> None:
        self.prompt_column, self.response_column = prompt_column, response_column
        self.messages_column, self.system = messages_column, system
        self.template, self.chat_template, self.drop_long = template, chat_template, drop_long
        super().__init__(path, packing=packing, **options)
        self.dropped_rows: dict[str, int] = {}
        self._raw: dict[str, Dataset] = {}

    def faults(self) -> list[str]:
        """What is wrong with the arguments."""
        faults = []
        if self.template is not None:
            try:
                slots = slots_of(self.template)
            except ValueError as error:
                faults.append(f"template: {self.template!r} is no format string: {error}")
            else:
                if not slots:
                    faults.append(
                        f"template: {self.template!r} has no slot for a column, as in {{{self.prompt_column}}}"
                    )
                odd = [slot for slot in slots if not slot or set(slot) & set(".[")]
                faults += [f"template: the slot {{{slot}}} is no column's name" for slot in odd]
            faults += [
                f"{field}: a chat template is not used with `template`; give one of them"
                for field in ("system", "chat_template")
                if getattr(self, field) is not None
            ]
        return faults + super().faults()

    def column_faults(self, table: Dataset, split: str) -> list[str]:
        """Columns that are missing, and rows that are no conversation, by their numbers in the file."""
        form = self._form(table)
        if form.messages is not None and self.template is not None:
            return [f"template: the {split} data is chat, with the column {form.messages!r}, and needs none"]
        needed = {
            "messages_column": [],
            "prompt_column" if self.template is None else "template": form.prompt_columns,
            "response_column": [self.response_column] if form.messages is None and split != "test" else [],
        }
        return missing_columns(table, split, needed) or _row_faults(table, form, split)

    def hold_out(self, splits: DatasetDict) -> None:
        """Take validation rows from the training table, each with its number in the file."""
        if not self.streaming:
            splits["train"] = _numbered(splits["train"])
        super().hold_out(splits)

    def load_processor(self, source: str) -> None:
        """Load the tokenizer, with `chat_template` in place of its own."""
        super().load_processor(source)
        if not self.tokenizer.is_fast:
            raise PEFTError(
                f"tokenizer: that of {source!r} doesn't tell where in a text its tokens are; use a fast one"
            )
        if self.chat_template is not None:
            self.tokenizer.chat_template = _template_text(self.chat_template)

    def encode(self, table: Any, split: str) -> Any:
        """Conversations as tokens; the rows stay at hand for their prompts."""
        if split != "train":
            self._raw[split] = table
        if split == "test" and self._form(table).response is None:
            return table
        return super().encode(table if is_stream(table) else _numbered(table), split)

    def encoder(self, table: Any, split: str, streamed: bool) -> tuple[Encoder, dict[str, Any]]:
        """Conversations as tokens; in what is trained on as it comes, too long prompts are dropped or raise at once."""
        unfit = ("drop" if self.drop_long else "refuse") if streamed else "mark"
        return encode_conversations, {**self._arguments(table, split), "long": unfit}

    def kept(self, encoded: Dataset, table: Dataset, split: str) -> Dataset:
        """The rows with something to learn; the others are refused or, with `drop_long`, counted and left out."""
        sizes = lengths(encoded)
        # a response needs a token before it, so what has a single token is marked
        long = [place for place, size in enumerate(sizes) if size == 1]
        self.dropped_rows[split] = len(long)
        if not long:
            return encoded
        count = f"{len(long):,} of {len(sizes):,} rows{self.part(split)}"
        if not self.drop_long:
            numbers = _numbered(table)[ROW][:]
            raise PEFTError(
                f"max_length: in {count} of the {split} data the prompt alone fills {self.max_length} tokens, and "
                f"nothing of the response would be learned: {row_numbers(sorted(numbers[place] for place in long))}; "
                "raise max_length, or leave them out with drop_long=True"
            )
        limit = f"max_length={self.max_length} tokens"
        rank_zero_info(f"{split}: in {count} the prompt alone fills {limit}, and they were left out")
        return encoded.select([place for place, size in enumerate(sizes) if size > 1])

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test rows in order.

        Raises:
            PEFTError: there is no test table, or it has no responses.
        """
        if "test" in self._encoded and self._form(self._raw["test"]).response is None:
            raise PEFTError(
                f"response_column: the test data has no column {self.response_column!r}; only predict on it"
            )
        return super().test_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the prompts of the test rows in order, or of the validation rows where there is no test table."""
        split = self.predict_split()
        table = self._raw[split]
        options: dict[str, Any] = {"batched": True, "remove_columns": table.column_names}
        prompts = table.map(
            encode_prompts, desc=f"Tokenizing prompts of {split}", fn_kwargs=self._arguments(table, split), **options
        )
        if cut := sum(prompts[CUT][:]):
            count, limit = f"{cut:,} of {len(prompts):,} prompts", f"max_length={self.max_length} tokens"
            rank_zero_info(f"{split}: {count} are longer than {limit} and lost their beginning")
        return self.loader(prompts, collate=partial(_collate_prompts, pad=self.tokenizer.pad_token_id))

    def _form(self, table: Any) -> Form:
        names = table.column_names
        # ShareGPT's name for the column is known, unless another was given
        known = [self.messages_column] + ["conversations"] * (self.messages_column == "messages")
        messages = next((name for name in known if name in names), None)
        response = self.response_column if messages is None and self.response_column in names else messages
        return Form(messages, self.prompt_column, self.template, response, self.system)

    def _arguments(self, table: Any, split: str) -> dict[str, Any]:
        form = self._form(table)
        chat = self.template is None and self.tokenizer.chat_template is not None
        if form.messages is not None and not chat:
            raise PEFTError(
                f"chat_template: the {split} data is chat, and the tokenizer has no chat template; give a Jinja "
                "template or a file with one, or use the tokenizer of a model that was made for chat"
            )
        if self.system is not None and not chat:
            raise PEFTError("system: the tokenizer has no chat template to put it into; give one, or use `template`")
        return {"tokenizer": self.tokenizer, "form": form, "chat": chat, "max_length": self.max_length}


def encode_conversations(
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    form: Form,
    chat: bool,
    max_length: int,
    long: Literal["mark", "drop", "refuse"],
) -> dict[str, list[Any]]:
    """Conversations as tokens with labels; made for `table.map`.

    Args:
        batch: columns of rows.
        tokenizer: a fast one.
        form: where the rows hold their conversations.
        chat: whether they go through the tokenizer's chat template.
        max_length: longer ones are cut to this many tokens.
        long: what is done with a row that has nothing to learn in these: it is left with one token, or out, or raises.

    Raises:
        PEFTError: a row is no conversation, or the chat template doesn't serve for it.
    """
    encoded: dict[str, list[Any]] = {"input_ids": [], "labels": [], CUT: []}
    for row, turns in _conversations(batch, form):
        try:
            ids, learned = tokens(turns, tokenizer, chat)
        except RowError as fault:
            raise _refusal(row, fault) from fault
        labels = [token if learn else IGNORED for token, learn in zip(ids, learned, strict=True)]
        # what stands first is predicted from nothing
        fits = any(learned[1:max_length])
        if not fits and long == "drop":
            continue
        if not fits and long == "refuse":
            raise _refusal(row, RowError("max_length", f"a prompt that fills {max_length} tokens alone"))
        encoded["input_ids"].append(ids[: max_length if fits else 1])
        encoded["labels"].append(labels[: max_length if fits else 1])
        encoded[CUT].append(fits and len(ids) > max_length)
    return encoded


def encode_prompts(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, form: Form, chat: bool, max_length: int
) -> dict[str, list[Any]]:
    """Prompts as tokens, of which the last `max_length` are kept; the arguments are those of `encode_conversations`."""
    encoded: dict[str, list[Any]] = {"input_ids": [], CUT: []}
    for row, turns in _conversations(batch, form):
        try:
            ids = prompt_tokens(turns, tokenizer, chat)
        except RowError as fault:
            raise _refusal(row, fault) from fault
        encoded["input_ids"].append(ids[-max_length:])
        encoded[CUT].append(len(ids) > max_length)
    return encoded


def _conversations(batch: dict[str, list[Any]], form: Form) -> list[tuple[dict[str, Any], list[Message]]]:
    found = []
    for row in rows_of(batch):
        try:
            found.append((row, conversation(row, form)))
        except RowError as fault:
            raise _refusal(row, fault) from fault
    return found


def _refusal(row: dict[str, Any], fault: RowError) -> PEFTError:
    """A fault in a row that is told by its number or, in a stream, by how it begins."""
    told = f"row {row[ROW]}" if ROW in row else f"the row {json.dumps(row, ensure_ascii=False, default=str)[:100]}…"
    return PEFTError(f"{fault.field}: {told} has {fault.what}")


def _row_faults(table: Dataset, form: Form, split: str) -> list[str]:
    found: dict[tuple[str, str], list[int]] = {}
    batches = table.select_columns(form.columns).iter(batch_size=1000)
    for number, row in enumerate((row for batch in batches for row in rows_of(batch)), 1):
        try:
            conversation(row, form)
        except RowError as fault:
            found.setdefault((fault.field, fault.what), []).append(number)
    return [
        f"{field}: {len(rows):,} of {len(table):,} rows of the {split} data have {what}: {row_numbers(rows)}"
        for (field, what), rows in found.items()
    ]


def _numbered(table: Dataset) -> Dataset:
    return table if ROW in table.column_names else table.add_column(ROW, np.arange(1, len(table) + 1))


def _template_text(given: str) -> str:
    """A Jinja template: `given` itself, or what the file of this name holds."""
    if "{{" in given or "{%" in given:
        return given
    path = Path(resolve(given, "chat_template"))
    if not path.is_file():
        raise PEFTError(f"chat_template: {given!r} is neither a file nor a Jinja template, which has {{{{ or {{% in it")
    return path.read_text(encoding="utf-8")


def _collate_prompts(rows: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    return {
        "input_ids": padded([row["input_ids"] for row in rows], pad, left=True),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0, left=True),
    }
