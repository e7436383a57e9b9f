from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lightning_peft.data.labels import IGNORED
from lightning_peft.data.packing import collate_packed, collate_padded, first_fit, pack
from tests.data.decoders import save_tokenizer

Write = Callable[..., str]
CAPACITY = 16
DOCUMENTS = st.lists(st.lists(st.integers(5, 60), min_size=1, max_size=CAPACITY), min_size=1, max_size=40)


@given(DOCUMENTS)
def test_packing_keeps_every_document_whole_and_once(documents: list[list[int]]) -> None:
    # each token is made unlike any other, so that documents can be told apart
    unlike = [[1000 * number + place for place in range(len(ids))] for number, ids in enumerate(documents)]
    rows = pack({"input_ids": unlike, "labels": unlike}, CAPACITY)
    found = []
    for ids, labels, positions in zip(rows["input_ids"], rows["labels"], rows["position_ids"], strict=True):
        assert len(ids) == len(labels) == len(positions) <= CAPACITY
        starts = [place for place, position in enumerate(positions) if position == 0]
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            assert positions[start:stop] == list(range(stop - start))
            assert labels[start:stop] == [IGNORED, *ids[start + 1 : stop]]
            found.append(ids[start:stop])
    assert sorted(found) == unlike


@given(st.lists(st.integers(1, 20), max_size=60))
def test_first_fit_decreasing_is_within_its_bound(sizes: list[int]) -> None:
    bins = first_fit(sizes, 20)
    assert sorted(item for items in bins for item in items) == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in items) <= 20 for items in bins)
    assert bins == sorted(bins)
    # no two bins fit into one, and Dosa's bound 11/9 of the best + 6/9, which is at least the sum
    fills = sorted(sum(sizes[item] for item in items) for items in bins)
    assert len(fills) < 2 or fills[0] + fills[1] > 20
    small = [size for size in sizes if size <= 5]
    assert small != sizes or len(bins) <= sum(sizes) / 15 + 1


def test_a_packed_batch_is_padded_with_a_text_of_its_own() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7], "position_ids": [0, 1, 0]},
        {"input_ids": [8], "labels": [IGNORED], "position_ids": [0]},
    ]
    batch = collate_packed(rows, pad=0)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "position_ids": [[0, 1, 0], [0, 0, 1]],
        "labels": [[IGNORED, 6, 7], [IGNORED] * 3],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def decoder(kind: str, attention: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": attention}
    if kind == "gpt2":
        sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    else:
        sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"intermediate_size": 64, "head_dim": 8, "max_position_embeddings": 64}
    config = AutoConfig.for_model(kind, initializer_range=0.3, **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    shifted = labels[:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), shifted, ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@torch.no_grad()
def test_packed_texts_have_the_logits_and_losses_that_they_have_alone(kind: str, attention: str) -> None:
    model = decoder(kind, attention)
    generator = torch.Generator().manual_seed(0)
    sizes = [9, 1, 7, 16, 3, 2, 5]
    texts = [torch.randint(3, 64, (size,), generator=generator).tolist() for size in sizes]
    labels = [[label if place % 3 else IGNORED for place, label in enumerate(text)] for text in texts]
    batch = {"input_ids": texts, "labels": labels}
    rows = pack(batch, CAPACITY)
    packed = collate_packed(
        [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)], pad=0
    )
    assert packed["input_ids"].shape == (3, CAPACITY)
    logits = model(packed["input_ids"], position_ids=packed["position_ids"], use_cache=False).logits
    alone = [model(torch.tensor([text]), use_cache=False).logits for text in texts]
    for row, members in enumerate(first_fit(sizes, CAPACITY)):
        expected = torch.cat([alone[member][0] for member in members])
        torch.testing.assert_close(logits[row, : len(expected)], expected, rtol=0, atol=1e-5)
    total = sum(loss_sum(one, torch.tensor([label])) for one, label in zip(alone, labels, strict=True))
    torch.testing.assert_close(loss_sum(logits, packed["labels"]), total, rtol=1e-5, atol=1e-5)
    # and padded, with a mask
    encoded = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    padded = collate_padded(encoded, pad=0)
    masked = model(padded["input_ids"], attention_mask=padded["attention_mask"], use_cache=False).logits
    torch.testing.assert_close(loss_sum(masked, padded["labels"]), total, rtol=1e-5, atol=1e-5)


def test_rows_are_packed_in_evaluation_too_and_how_full_they_are_is_logged(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from lightning_peft.data.language_modeling import LanguageModelingData

    path = write("a.jsonl", [{"text": "seven wise owls"}] * 10)
    folder = save_tokenizer(tmp_path / "tokenizer")
    data = LanguageModelingData(path, validation_path=path, tokenizer=folder, max_length=12, batch_size=3)
    with caplog.at_level("INFO"):
        data.setup()
    size = len(data.tokenizer("seven wise owls")["input_ids"]) + 1
    assert size == 5
    told = "10 texts are packed into 5 rows of max_length=12 tokens, which are 83.3% full"
    assert [record.getMessage() for record in caplog.records if "packed" in record.getMessage()] == [
        f"train: {told}",
        f"validation: {told}",
    ]
    batches = [batch for loader in (data.train_dataloader(), data.val_dataloader()) for batch in loader]
    assert [sorted(batch) for batch in batches] == [["input_ids", "labels", "position_ids"]] * 4
    assert batches[0]["position_ids"].tolist() == [[0, 1, 2, 3, 4] * 2] * 3
    row = data._encoded["validation"][0]
    assert collate_packed([data.filler(row)], pad=0)["labels"].unique().tolist() == [IGNORED]
    # what makes batches goes to worker processes
    assert isinstance(data.collate(), partial)
