"""LoRA on a small encoder-decoder: from writing English dates in French to writing them in German.

    python examples/translation.py    # 80 seconds of CPU time, no network; extra `examples`

The model, which reads and writes bytes, is first trained on 4,000 dates in English and French. An adapter then learns
German from 1,000 of them. In the end it prints the chrF of 200 unseen dates, from 0 to 1, beside the better of the
model as it was and of leaving the English as it is; and how many are right to the letter.
"""

from __future__ import annotations

import argparse
import json
import random
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import lightning as L
from torchmetrics.text import CHRFScore
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

from lightning_peft import PEFT, LoRA
from lightning_peft.data import TranslationData
from lightning_peft.tasks import Seq2Seq
from lightning_peft.tracking import count

NAMES = {
    "en": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday January February March April May June July August "
    "September October November December",
    "fr": "lundi mardi mercredi jeudi vendredi samedi dimanche janvier février mars avril mai juin juillet août "
    "septembre octobre novembre décembre",
    "de": "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag Januar Februar März April Mai Juni Juli August "
    "September Oktober November Dezember",
}
FORMS = {
    "en": "{weekday}, {month} {day}, {year}",
    "fr": "{weekday} {day} {month} {year}",
    "de": "{weekday}, {day}. {month} {year}",
}


def written(day: date, language: str) -> str:
    """A date in words, such as `Dienstag, 3. März 1998`."""
    names = NAMES[language].split()
    weekday, month = names[day.weekday()], names[6 + day.month]
    return FORMS[language].format(weekday=weekday, month=month, day=day.day, year=day.year)


def write_pairs(folder: Path, train: list[date], held: list[date], language: str) -> list[dict[str, str]]:
    """Files with English and `language`; the rows of the second."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    for split, days in {"train": train, "validation": held}.items():
        rows = [{"source": written(day, "en"), "target": written(day, language)} for day in days]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def main(argv: list[str] | None = None) -> None:
    """Pretrain, adapt, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer dates and epochs")
    given = parser.parse_args(argv)
    L.seed_everything(0)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    folder = Path("runs/translation")
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.save_pretrained(folder / "tokenizer")

    many, some, held = (660, 330, 40) if given.short else (4000, 1000, 200)
    span = 2 if given.short else 200  # years
    numbers = random.sample(range(span * 365), many + held)
    days = [date(1900, 1, 1) + timedelta(number) for number in numbers]
    options: dict[str, Any] = {"tokenizer": str(folder / "tokenizer"), "max_length": 48, "batch_size": 16}
    write_pairs(folder / "french", days[:many], days[many:], "fr")
    rows = write_pairs(folder / "german", days[:some], days[many:], "de")

    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    config = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, tie_word_embeddings=False, **sizes)
    model = T5ForConditionalGeneration(config)
    rate = 1e-2 if given.short else 5e-3
    texts: dict[str, Any] = {"generation": {"max_new_tokens": 40}, "generation_metrics": ["chrf", "exact_match"]}
    trainer = L.Trainer(max_epochs=4 if given.short else 6, **quiet)
    trainer.fit(Seq2Seq(model, learning_rate=rate), TranslationData(str(folder / "french"), **options))

    data = TranslationData(str(folder / "german"), **options)
    (before,) = trainer.validate(Seq2Seq(model, **texts), data, verbose=False)
    task = Seq2Seq(model, learning_rate=rate, **texts)
    peft = PEFT(LoRA(r=8, target_modules=["q", "k", "v", "o", "wi", "wo", "lm_head"]))
    epochs = 6 if given.short else 8
    trainer = L.Trainer(max_epochs=epochs, check_val_every_n_epoch=epochs, callbacks=[peft], **quiet)
    trainer.fit(task, data)
    after = trainer.callback_metrics

    copied = CHRFScore()([row["source"] for row in rows], [[row["target"]] for row in rows]).item()
    baseline, result = max(before["val_chrf"], copied), after["val_chrf"].item()
    parts = count(task)
    print(f"as it was {before['val_chrf']:.3f}, copied {copied:.3f}, exact {after['val_exact_match']:.3f}")
    print(f"baseline {baseline:.3f}, result {result:.3f}, ", end="")
    print(f"trained {parts.trainable:,} ({parts.trainable / parts.frozen:.1%} of {parts.frozen:,})")
    if result <= baseline:
        raise SystemExit(f"the chrF {result:.3f} is not above the baseline's {baseline:.3f}")


if __name__ == "__main__":
    main()
