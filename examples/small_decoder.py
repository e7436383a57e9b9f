"""Pretrains a decoder of 0.9M parameters on docstrings of installed libraries, and writes instructions to tune it on.

    python examples/small_decoder.py                        # about a minute on 2 cores, no network; extra `examples`
    lightning-peft fit --config configs/qlora_offline.yaml  # QLoRA on it: from which library is a docstring?

The model, with its tokenizer, is written to runs/small_decoder/model, the rows to runs/small_decoder/rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import lightning as L
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_peft.data import LanguageModelingData
from lightning_peft.data.docstrings import LIBRARIES, DocstringRow, docstring_rows
from lightning_peft.tasks import CausalLM

WORDS_SHOWN = 24
"""Of each docstring; the model is small."""


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-pair encoding of `size` tokens, learned from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(special.values()), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special)


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of three layers, with random weights."""
    tokens = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "num_attention_heads": 4}
    # output weights of 0.02, made for large models, could not tell tokens apart by 128 features
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    return LlamaForCausalLM(LlamaConfig(initializer_range=0.08, **sizes, **tokens))


def instruction(row: DocstringRow) -> dict[str, str]:
    """A prompt and its response."""
    shown = " ".join(row.text.split()[:WORDS_SHOWN])
    return {"prompt": f"Docstring: {shown}\nLibrary: ", "response": row.label}


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Make the model and the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/small_decoder"))
    parser.add_argument("--libraries", nargs="+", default=LIBRARIES, metavar="NAME")
    parser.add_argument("--rows-per-library", type=int, default=400)
    parser.add_argument("--steps", type=int, default=250, help="of pretraining, with 8 rows of 128 tokens each")
    given = parser.parse_args(argv)

    L.seed_everything(0)
    held = given.rows_per_library // 8
    sizes = {"validation": held, "train": given.rows_per_library - held}
    splits = docstring_rows(given.libraries, sizes, seed=0)
    texts = [row.text for row in splits["train"]]
    tokenizer = make_tokenizer(texts, 2048)
    tokenizer.save_pretrained(given.out / "model")
    write(given.out / "texts.jsonl", [{"text": text} for text in texts])
    for split, rows in splits.items():
        write(given.out / "rows" / f"{split}.jsonl", [instruction(row) for row in rows])

    model = make_model(tokenizer)
    data = LanguageModelingData(
        str(given.out / "texts.jsonl"), tokenizer=str(given.out / "model"), max_length=128, batch_size=8
    )
    trainer = L.Trainer(max_steps=given.steps, logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(CausalLM(model, learning_rate=3e-3), data)
    model.save_pretrained(given.out / "model")
    print(f"Base model   {given.out / 'model'}  ({model.num_parameters():,} parameters)")
    print("Then         lightning-peft fit --config configs/qlora_offline.yaml")
    print(f"To beat      val_exact_match {1 / len(given.libraries):.3f}, of always naming the same library")


if __name__ == "__main__":
    main()
