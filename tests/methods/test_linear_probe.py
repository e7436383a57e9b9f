"""The linear probe: what trains, by name and by what is found, and that nothing else moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_peft import METHODS, PEFTError, inject, load_from_checkpoint, remove, trainable_parameters
from lightning_peft.methods._probe import LinearProbe
from tests.callback.toys import Toy, data, trainer


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=24, num_labels=3, **sizes))


def test_the_output_head_of_a_model_trains_and_nothing_else() -> None:
    model = inject(bert(), LinearProbe())
    assert set(trainable_parameters(model)) == {
        "classifier.adapters.default.weight",
        "classifier.adapters.default.bias",
    }
    assert [id(parameter) for parameter in remove(model).parameters() if not parameter.requires_grad] == []


def test_what_is_named_trains_in_place_of_what_is_found() -> None:
    model = inject(bert(), LinearProbe(), modules_to_save=["pooler"])
    names = {name.partition(".adapters.")[0] for name in trainable_parameters(model)}
    assert names == {"bert.pooler.dense"}


def test_a_model_without_a_known_head_is_told_what_to_name() -> None:
    with pytest.raises(PEFTError) as error:
        inject(Toy(), LinearProbe())
    assert error.value.faults == (
        "LinearProbe: Toy has no output head that can be told from the rest; name it in modules_to_save, such as "
        "[head]",
    )


def test_a_run_trains_the_head_on_the_frozen_body_and_its_checkpoint_brings_it_back(tmp_path: Path) -> None:
    module = Toy()
    running = trainer(tmp_path, method=LinearProbe())
    running.fit(module, data())
    trained = trainable_parameters(module)
    assert set(trained) == {"head.adapters.default.weight", "head.adapters.default.bias"}
    kept = load_from_checkpoint(Toy, running.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
    x = next(iter(data()))[0]
    with torch.no_grad():
        features = Toy().eval().body(x)  # as it was before: statistics of the batch normalization too
        expected = features @ trained["head.adapters.default.weight"].T + trained["head.adapters.default.bias"]
        assert torch.allclose(module.eval()(x), expected, atol=1e-6)
        assert not torch.allclose(Toy().eval()(x), expected, atol=1e-2)
        assert torch.equal(kept.eval()(x), module(x))


def test_it_is_no_method_to_choose_from() -> None:
    assert "LinearProbe" not in METHODS
