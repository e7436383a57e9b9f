"""Sounds with what is said in them, as batches for a model that spells it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lightning_peft.data.characters import character_tokenizer, count_characters, unknown_characters, vocabulary_of
from lightning_peft.data.file_rows import absolute, listed, read_files
from lightning_peft.data.files import FORMATS, SPLITS, load_file
from lightning_peft.data.folders import files_in, subfolders
from lightning_peft.data.labels import IGNORED
from lightning_peft.data.module import Collate
from lightning_peft.data.sounds import SoundData, features, read_sound
from lightning_peft.data.tokenizing import load_tokenizer, padded, text_faults
from lightning_peft.interchange.locations import resolve
from lightning_peft.methods.errors import PEFTError

if TYPE_CHECKING:
    from datasets import Dataset

CHARACTERS = "characters"
"""In place of a tokenizer's name: one of the characters of the training transcripts."""
METADATA, FILE_NAME = "metadata", "file_name"
"""A folder's table of transcripts, and its column of files, as `datasets` has them for folders of sounds."""


class SpeechRecognitionData(SoundData):
    """Sounds with their transcripts, mixed down to one channel and resampled to the rate of the model.

    A batch holds what the model's feature extractor makes, `input_values` or `input_features` in float32 and for some
    models `attention_mask`, and `labels`, int64 of shape (batch, tokens), filled up with -100. Sounds are read when
    they are needed and in the loaders' processes; every file's header is checked before.

    Space in a transcript counts as one space between words. Where the tokenizer has letters of one case only, as many
    have, transcripts are put into it. Characters that it doesn't know are counted and logged.

    Args:
        path: a table with a column of files, relative to where it lies, and one of transcripts; a folder with such a
            table in `metadata.csv` or `metadata.jsonl`, whose files may be in the column `file_name`, and whose rows
            are each of the split in whose folder (`train`, `validation` or `test`) its file lies, where there are any;
            or a folder with such folders, each with a table. Test sounds without transcripts serve for prediction.
        text_column: the column of transcripts.
        tokenizer: a hub id, a folder or `package:NAME/folder`; or `characters`, those of the training transcripts; by
            default the processor's, and the characters where it has none.
        max_seconds: longer sounds are left out of training, since what is said after a cut is unknown.
        **options: see `SoundData`.

    Attributes:
        tokenizer: known after `setup`, as is the next.
        vocabulary: its tokens, by id.

    Raises:
        PEFTError: by the constructor, a number is out of its range; by `setup`, data that can't be trained on: a
            missing column, an empty transcript, characters of which most are unknown, a sound that can't be read, a
            tokenizer whose tokens don't show where words begin.
    """

    def __init__(
        self,
        path: str,
        *,
        text_column: str = "text",
        tokenizer: str | None = None,
        max_seconds: float = 20.0,
        **options: Any,
    ) -> None:
        self.text_column, self.tokenizer_name = text_column, tokenizer
        super().__init__(path, max_seconds=max_seconds, **options)
        self.tokenizer: Any = None
        self.vocabulary: list[str] = []
        self._characters: Counter[str] = Counter()
        self._cased: Callable[[str], str] = str
        self._transcribed: set[str] = set()

    def folder_tables(self, folder: Path, field: str, split: str) -> dict[str, Dataset]:
        """The tables of transcripts in the folder or in its splits' folders; for tests, sounds without any."""
        from datasets import Dataset

        places = {SPLITS[place.name.lower()]: place for place in subfolders(folder) if place.name.lower() in SPLITS}
        if file := _metadata(folder):
            return self._by_folder(self._relative(load_file(str(file), field), folder), places, file, field, split)
        if "train" not in places:
            places = {split: folder}
        tables: dict[str, Dataset] = {}
        for name, place in places.items():
            if file := _metadata(place):
                tables[name] = self._relative(load_file(str(file), field), place)
            elif name == "test" and (sounds := [f for f in files_in(place, "*") if f.suffix.lower() in self.suffixes]):
                tables[name] = Dataset.from_dict({self.file_column: [str(sound) for sound in sounds]})
            else:
                raise PEFTError(f"{field}: {place} has no {METADATA}.csv or {METADATA}.jsonl with the transcripts")
        return tables

    def needed(self, split: str) -> dict[str, list[str]]:
        """The sounds, and their transcripts where they have to have them."""
        return {**super().needed(split), "text_column": [] if split == "test" else [self.text_column]}

    def column_faults(self, table: Dataset, split: str) -> list[str]:
        """Columns that are missing, files that are none, and transcripts that are no texts."""
        faults = super().column_faults(table, split)
        if self.text_column in table.column_names:
            faults += text_faults(table, self.text_column, split, "text_column")
        return faults

    def row_faults(self, tables: Mapping[str, Dataset]) -> list[str]:
        """Empty transcripts, files that can't be read, and training sounds that are all too long."""
        faults = []
        self._transcribed = {split for split in tables if self.text_column in tables[split].column_names}
        for split in sorted(self._transcribed):
            texts = tables[split][self.text_column][:]
            if empty := [row for row, text in enumerate(texts, 1) if not text.strip()]:
                faults.append(f"{split}: {len(empty):,} of {len(texts):,} transcripts are empty: rows {listed(empty)}")
        faults += super().row_faults(tables)
        self._characters = count_characters(tables["train"][self.text_column][:])
        if self.long_rows["train"]:
            told = self.long_rows_told("train", len(tables["train"]))
            if len(self.long_rows["train"]) == len(tables["train"]):
                return [*faults, f"{told}; raise it"]
            rank_zero_info(f"{told} and are left out")
        return faults

    def load_processor(self, source: str) -> None:
        """Load the feature extractor and the tokenizer.

        Raises:
            PEFTError: there is none, or the tokenizer doesn't know most of the characters.
        """
        super().load_processor(source)
        self.tokenizer = self._load_tokenizer(source)
        self.vocabulary, self._cased = vocabulary_of(self.tokenizer), str
        if not hasattr(self.tokenizer, "word_delimiter_token"):
            if " " not in self.vocabulary and not any(token.startswith("▁") for token in self.vocabulary):
                raise PEFTError(
                    "tokenizer: its tokens don't show where words begin, by `|`, a space or `▁`; use "
                    f"tokenizer={CHARACTERS} for one whose tokens do"
                )
            return  # its tokens are parts of words
        unknown = unknown_characters(self.tokenizer, self._characters)
        for cased in (str.lower, str.upper):
            other = unknown_characters(self.tokenizer, self._characters, cased)
            if other.total() < unknown.total():
                self._cased, unknown = cased, other
        told = listed([f"{character!r} {count:,} times" for character, count in unknown.most_common()])
        if 2 * unknown.total() > self._characters.total():
            raise PEFTError(
                f"tokenizer: it doesn't know most characters of the transcripts ({told}); use "
                f"tokenizer={CHARACTERS} for one that does"
            )
        if unknown:
            rank_zero_info(f"train: the tokenizer doesn't know {len(unknown):,} characters: {told}")

    def reader(self) -> Callable[[str | io.BytesIO], Any]:
        """Reads a whole sound at the extractor's rate."""
        return partial(read_sound, rate=self.processor.sampling_rate, seconds=None)

    def encode(self, table: Dataset, split: str) -> Any:
        """The table, whose files are read when its rows are; in training without sounds that are too long."""
        if split == "train" and self.long_rows[split]:
            table = table.select(sorted(set(range(len(table))) - set(self.long_rows[split])))
        columns = [self.file_column, *([self.text_column] if split in self._transcribed else [])]
        arguments = {"columns": columns, "read": self.reader(), "tokenizer": self.tokenizer, "cased": self._cased}
        return table.with_transform(partial(_rows, **arguments), columns=columns)

    def collate(self) -> Collate:
        """The features and labels of a batch."""
        return partial(_collate, extractor=self.processor)

    def filler(self, row: dict[str, Any]) -> dict[str, Any]:
        """The same sound without a transcript."""
        return {**row, "labels": []}

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test sounds in order.

        Raises:
            PEFTError: there are none, or they have no transcripts.
        """
        if "test" not in self._transcribed:
            raise PEFTError("test_path: there are no test sounds with transcripts; give some")
        return super().test_dataloader()

    def _relative(self, table: Dataset, folder: Path) -> Dataset:
        """A folder's table with the paths of its files, in the column that has them everywhere."""
        if self.file_column not in table.column_names and FILE_NAME in table.column_names:
            table = table.rename_column(FILE_NAME, self.file_column)
        return absolute(table, self.file_column, str(folder.absolute()))

    def _by_folder(
        self, table: Dataset, places: Mapping[str, Path], file: Path, field: str, split: str
    ) -> dict[str, Dataset]:
        """The rows of a folder's table by the split in whose folder their files lie; all in `split` if none does."""
        rows: dict[str, list[int]] = {}
        loose = []
        for row, sound in enumerate(table[self.file_column][:] if self.file_column in table.column_names else []):
            name = next((name for name, place in places.items() if _lies_in(sound, place)), None)
            if name is None:
                loose.append(sound)
            else:
                rows.setdefault(name, []).append(row)
        if not rows:
            return {split: table}
        if loose:
            raise PEFTError(
                f"{field}: {len(loose):,} of the {len(table):,} sounds in {file} lie in no folder of a split, as the "
                f"others do: {listed(loose)}"
            )
        if split == "train" and "train" not in rows:
            raise PEFTError(f"{field}: the sounds in {file} lie in folders of splits, but none of them in `train`")
        return {name: table.select(numbers) for name, numbers in rows.items()}

    def _load_tokenizer(self, source: str) -> Any:
        if self.tokenizer_name not in (None, CHARACTERS):
            return load_tokenizer(str(self.tokenizer_name), 0)
        found = None if self.tokenizer_name == CHARACTERS else processor_tokenizer(source)
        return character_tokenizer(self._characters) if found is None else found


def _lies_in(file: Any, folder: Path) -> bool:
    """Whether the column's value is the path of a file in the folder."""
    return isinstance(file, str) and Path(file).is_relative_to(folder.absolute())


def _metadata(folder: Path) -> Path | None:
    """The folder's table of transcripts."""
    return next((file for suffix in FORMATS if (file := folder / f"{METADATA}{suffix}").is_file()), None)


def processor_tokenizer(source: str) -> Any:
    """The tokenizer in the place of a processor; None where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve(source, "processor"))
    except PEFTError:
        raise
    except (OSError, ValueError, TypeError):  # the last where the files of a kind that is known are missing
        return None


def _rows(
    batch: dict[str, list[Any]],
    columns: list[str],
    read: Callable[[Any], Any],
    tokenizer: Any,
    cased: Callable[[str], str],
) -> dict[str, list[Any]]:
    """Rows with `file`, as it was read, and `labels`, the ids of the transcript's tokens."""
    rows = {"file": read_files(batch[columns[0]], read)}
    if len(columns) == 1:
        return rows
    texts = [cased(" ".join(text.split())) for text in batch[columns[1]]]
    return {**rows, "labels": tokenizer(texts, add_special_tokens=False)["input_ids"]}


def _collate(rows: list[dict[str, Any]], extractor: Any) -> dict[str, torch.Tensor]:
    batch = features([row["file"] for row in rows], extractor)
    return {**batch, "labels": padded([row["labels"] for row in rows], IGNORED)} if "labels" in rows[0] else batch
