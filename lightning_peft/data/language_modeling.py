"""Plain text for decoders: each token is predicted from those before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

from lightning_peft.data.packing import DecoderData, Encoder
from lightning_peft.data.tokenizing import CUT, missing_columns, text_faults
from lightning_peft.methods.errors import PEFTError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class LanguageModelingData(DecoderData):
    """Documents for a decoder that goes on learning a language or a field from them.

    A document ends in the tokenizer's end-of-sequence token. One of more than `max_length` tokens is split into
    several, so that nothing is cut. One without text is left out. Batches are those of `DecoderData`; labels are the
    tokens themselves. Prediction gives the same batches without labels.

    Args:
        path: see `TableData`.
        text_column: the column that holds the text.
        packing: see `DecoderData`.
        **options: see `TextData`.

    Raises:
        PEFTError: by the constructor, a number is out of its range; by `setup`, data that can't be trained on, or a
            tokenizer without an end-of-sequence token.
    """

    def __init__(self, path: str, *, text_column: str = "text", packing: bool = True, **options: Any) -> None:
        self.text_column = text_column
        super().__init__(path, packing=packing, **options)

    def column_faults(self, table: Dataset, split: str) -> list[str]:
        """A missing column, and text that is none."""
        if missing := missing_columns(table, split, {"text_column": [self.text_column]}):
            return missing
        return text_faults(table, self.text_column, split, "text_column")

    def encoder(self, table: Any, split: str, streamed: bool) -> tuple[Encoder, dict[str, Any]]:
        """Documents as pieces of at most `max_length` tokens."""
        arguments = {"tokenizer": self.tokenizer, "column": self.text_column, "max_length": self.max_length}
        return encode_documents, arguments

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the test rows, or of the validation rows where there are none, without labels."""
        rows = self._encoded[self.predict_split()].remove_columns("labels")
        return self.loader(rows)


def encode_documents(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, column: str, max_length: int
) -> dict[str, list[Any]]:
    """Documents as tokens that end in EOS, in pieces of at most `max_length`; made for `table.map`."""
    if odd := [text for text in batch[column] if not isinstance(text, str)]:
        raise PEFTError(f"text_column: a row's {column!r} holds {type(odd[0]).__name__}, not text")
    texts = [text for text in batch[column] if text.strip()]
    pieces = []
    for ids in tokenizer(texts, verbose=False)["input_ids"] if texts else []:
        whole = ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
        pieces += [whole[start : start + max_length] for start in range(0, len(whole), max_length)]
    return {"input_ids": pieces, "labels": pieces, CUT: [False] * len(pieces)}
