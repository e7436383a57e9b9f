"""Exported directories: names and patterns that mean in HF peft just what is adapted here, and the task."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_peft import LoRA, PEFTError, export_adapter, inject
from tests.interchange.peft_oracle import (
    TOLERANCE,
    base_of,
    config_in,
    copied,
    loaded_by_peft,
    moved,
    output_of,
)
from tests.methods.models import TINY, inputs_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:Model has `tie_word_embeddings")


class Tangled(nn.Module):
    """Names that end in one another, and a layer with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"proj": nn.Linear(6, 6), "subhead": nn.Linear(6, 6), "head": nn.Linear(6, 6)})
        self.twice = nn.Linear(6, 6)
        self.again = self.twice
        self.head = nn.Linear(6, 6)
        self.bounded = nn.Embedding(5, 6, max_norm=1.0)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.proj, *self.inner.values(), self.twice, self.head):
            x = torch.tanh(layer(x)) + x
        return x


@pytest.mark.parametrize(
    ("targets", "written"),
    [
        (["inner.proj"], ["inner.proj"]),
        (["proj"], ["proj"]),
        (r"inner\.(proj|subhead)", r"inner\.(proj|subhead)"),
        (r"proj", "proj"),  # a list's 'proj' would mean 'inner.proj' too; an expression means the whole path
        ("all-linear", ["head", "proj", "subhead"]),
    ],
)
def test_names_select_just_the_adapted_modules(targets: Any, written: Any, tmp_path: Path) -> None:
    base = Tangled().eval()
    base.again = nn.Identity()
    exclude = ["twice"] if targets == "all-linear" else []
    ours = moved(inject(copied(base), LoRA(r=2, target_modules=targets, exclude_modules=exclude))).eval()
    assert config_in(export_adapter(ours, tmp_path))["target_modules"] == written
    inputs = {"x": torch.randn(3, 6)}
    theirs = loaded_by_peft(copied(base), tmp_path)
    torch.testing.assert_close(output_of(theirs, inputs), output_of(ours, inputs), rtol=TOLERANCE, atol=TOLERANCE)


def test_names_of_modules_to_save_end_in_the_middle_of_a_word_in_peft(tmp_path: Path) -> None:
    base = Tangled().eval()
    method = LoRA(r=2, target_modules=["inner.proj"])
    ours = moved(inject(copied(base), method, modules_to_save=["inner.subhead", "inner.head"])).eval()
    assert config_in(export_adapter(ours, tmp_path))["modules_to_save"] == ["inner.head", "inner.subhead"]
    inputs = {"x": torch.randn(3, 6)}
    theirs = loaded_by_peft(copied(base), tmp_path)
    torch.testing.assert_close(output_of(theirs, inputs), output_of(ours, inputs), rtol=TOLERANCE, atol=TOLERANCE)
    # 'head' alone would be inner.head and inner.subhead too
    alone = inject(copied(base), method, modules_to_save=["head", "inner.head"])
    with pytest.raises(PEFTError) as caught:
        export_adapter(alone, tmp_path / "other")
    assert str(caught.value) == (
        "export_adapter: modules_to_save: HF peft would train others whole beside head, inner.head"
    )


def test_reasons_of_names_and_of_layers_are_told_together(tmp_path: Path) -> None:
    base = Tangled()
    model = inject(base, LoRA(r=2, target_modules=["twice", "inner.proj"]), modules_to_save=["head", "inner.head"])
    with pytest.raises(PEFTError) as caught:
        export_adapter(model, tmp_path)
    assert [fault.split(":")[1].strip() for fault in caught.value.faults] == ["modules_to_save", "twice"]


def test_layers_that_peft_takes_for_fused_experts_are_refused(tmp_path: Path) -> None:
    """peft reads `gate_proj` in such a model as it was in transformers 4; it can't adapt the layer of that name."""
    torch.manual_seed(1)
    config = transformers.Qwen3MoeConfig(
        **TINY, num_key_value_heads=2, head_dim=8, num_experts=2, num_experts_per_tok=1, mlp_only_layers=[0]
    )
    base = transformers.Qwen3MoeForCausalLM(config).eval()
    method = LoRA(r=2, target_modules=["mlp.down_proj", "q_proj"])
    with pytest.raises(PEFTError) as caught:
        export_adapter(inject(copied(base), method), tmp_path)
    assert str(caught.value) == (
        "export_adapter: model.layers.0.mlp.down_proj: HF peft takes a layer of this name in this model for one of its "
        "fused experts"
    )
    # and of an expression it reads the last names only, so that paths are written
    ours = moved(inject(copied(base), LoRA(r=2, target_modules=r".*\.0\..*\.q_proj|.*\.1\..*\.k_proj"))).eval()
    assert config_in(export_adapter(ours, tmp_path))["target_modules"] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
    ]
    inputs = inputs_of("llama")
    theirs = loaded_by_peft(copied(base), tmp_path)
    torch.testing.assert_close(output_of(theirs, inputs), output_of(ours, inputs), rtol=TOLERANCE, atol=TOLERANCE)


class Lit(LightningModule):
    """A LightningModule around a model, as users write them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model
        self.metric = nn.Linear(2, 2)

    def forward(self, **inputs: Tensor) -> Any:
        return self.net(**inputs)


def test_names_are_relative_to_the_transformers_model(tmp_path: Path) -> None:
    method = LoRA(
        r=3,
        target_modules=r"net\.bert\..*\.(query|value)",
        rank_pattern={r"net\.bert\.encoder\.layer\.0\..*": 2},
        alpha_pattern={r"net.*value": 5},
    )
    lit = Lit(base_of("bert"))
    moved(inject(lit, method, modules_to_save=["net.classifier"])).eval()
    config = config_in(export_adapter(lit, tmp_path, base_model="org/base"))
    assert config["target_modules"] == ["query", "value"]
    assert config["modules_to_save"] == ["classifier"]
    assert config["base_model_name_or_path"] == "org/base"
    assert set(config["alpha_pattern"]) == {
        rf"^bert\.encoder\.layer\.{layer}\.attention\.self\.value$" for layer in (0, 1)
    }
    inputs = inputs_of("bert")
    theirs = loaded_by_peft(base_of("bert"), tmp_path)
    torch.testing.assert_close(output_of(theirs, inputs), output_of(lit, inputs), rtol=TOLERANCE, atol=TOLERANCE)


def test_patterns_that_peft_would_sort_into_another_order_are_written_by_path(tmp_path: Path) -> None:
    """The first pattern that matches counts, and HF peft's file has them sorted."""
    base = base_of("linear")
    method = LoRA(r=4, target_modules=["up", "gate"], rank_pattern={"up": 2, ".*": 3})
    ours = moved(inject(copied(base), method)).eval()
    config = config_in(export_adapter(ours, tmp_path))
    assert config["rank_pattern"] == {r"^layers\.gate$": 3, r"^layers\.up$": 2}
    inputs = inputs_of("linear")
    theirs = loaded_by_peft(copied(base), tmp_path)
    torch.testing.assert_close(output_of(theirs, inputs), output_of(ours, inputs), rtol=TOLERANCE, atol=TOLERANCE)


QA = transformers.BertForQuestionAnswering
TOKENS = transformers.BertForTokenClassification


@pytest.mark.parametrize(
    ("make", "targets", "saved", "task"),
    [
        (lambda: base_of("llama"), ["q_proj"], [], "CAUSAL_LM"),
        (lambda: base_of("gpt2"), ["c_attn"], [], "CAUSAL_LM"),
        (lambda: base_of("t5"), ["q"], [], "SEQ_2_SEQ_LM"),
        (lambda: base_of("bert"), ["query"], ["classifier"], "SEQ_CLS"),
        (lambda: TOKENS(transformers.BertConfig(**TINY)), ["query"], ["classifier"], "TOKEN_CLS"),
        (lambda: QA(transformers.BertConfig(**TINY)), ["query"], ["qa_outputs"], "QUESTION_ANS"),
        # HF peft would train the heads whole, which are frozen or adapted here
        (lambda: base_of("bert"), ["query"], [], None),
        (lambda: base_of("bert"), ["query", "classifier"], [], None),
        (lambda: QA(transformers.BertConfig(**TINY)), ["query"], [], None),
        (lambda: base_of("bert").bert, ["query"], [], None),
        (lambda: base_of("vit"), ["q_proj"], ["classifier"], None),
    ],
)
def test_the_task_is_written_where_it_changes_nothing_and_peft_loads_the_base_by_it(
    make: Callable[[], Any], targets: list[str], saved: list[str], task: str | None, tmp_path: Path
) -> None:
    base = make().eval()
    base.save_pretrained(tmp_path / "base")
    ours = moved(inject(copied(base), LoRA(r=2, target_modules=targets), modules_to_save=saved)).eval()
    folder = export_adapter(ours, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    config = config_in(folder)
    assert config["task_type"] == task
    classes = {
        "CAUSAL_LM": peft.AutoPeftModelForCausalLM,
        "SEQ_2_SEQ_LM": peft.AutoPeftModelForSeq2SeqLM,
        "SEQ_CLS": peft.AutoPeftModelForSequenceClassification,
        "TOKEN_CLS": peft.AutoPeftModelForTokenClassification,
        "QUESTION_ANS": peft.AutoPeftModelForQuestionAnswering,
        None: peft.AutoPeftModel,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        theirs = classes[task].from_pretrained(str(folder)).eval()
    assert type(theirs.get_base_model()) is type(base)
    name = base.config.model_type
    inputs = inputs_of({"llama": "llama", "t5": "t5", "vit": "vit"}.get(name, "bert"))
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs)[0], ours(**inputs)[0], rtol=TOLERANCE, atol=TOLERANCE)
