"""Exported directories: what HF peft itself would write, and the same outputs when it loads them."""

from __future__ import annotations

import os
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from lightning_peft import DoRA, LoRA, Method, PEFTError, export_adapter, inject, merge
from lightning_peft.interchange.hf_peft import PEFT_VERSION
from lightning_peft.methods._host import Adapter
from lightning_peft.methods.base import Attachment
from tests.interchange.peft_oracle import (
    TOLERANCE,
    base_of,
    config_in,
    config_of,
    copied,
    keys_and_shapes,
    loaded_by_peft,
    moved,
    output_of,
    peft_model,
    saved_by_peft,
)
from tests.methods.models import TINY, inputs_of
from tests.methods.test_peft_parity import CASES

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:Model has `tie_word_embeddings")
CASES_HERE: dict[str, tuple[str, LoRA, dict[str, Any]]] = {
    **CASES,
    "attention": ("attention", LoRA(r=4, target_modules=["attn", "one"]), {}),
    "attention without its output layer": (
        "attention",
        LoRA(r=4, target_modules=["attn"], exclude_modules=["out_proj"]),
        {},
    ),
}


@pytest.mark.parametrize("case", CASES_HERE)
def test_keys_are_pefts_and_outputs_the_same(case: str, tmp_path: Path) -> None:
    name, method, more = CASES_HERE[case]
    base = base_of(name)
    ours = moved(inject(copied(base), method, modules_to_save=more.get("modules_to_save", []))).eval()
    folder = export_adapter(ours, tmp_path / "ours")
    config = config_of(method, **more)
    if "without its output" in case:
        config.exclude_modules = None
    written = saved_by_peft(peft_model(copied(base), config), tmp_path / "theirs")
    assert keys_and_shapes(folder) == keys_and_shapes(written)
    inputs = inputs_of(name)
    theirs = loaded_by_peft(copied(base), folder)
    torch.testing.assert_close(output_of(theirs, inputs), output_of(ours, inputs), rtol=TOLERANCE, atol=TOLERANCE)
    assert (output_of(ours, inputs) - output_of(base, inputs)).abs().max() > 1e-3


STARTS: dict[str, tuple[str, LoRA, dict[str, Any]]] = {
    "pissa": ("linear", LoRA(r=3, alpha=5, init="pissa", target_modules=["up", "gate"]), {}),
    "pissa, rslora": ("linear", LoRA(r=3, alpha=5, rslora=True, init="pissa", target_modules=["up", "gate"]), {}),
    "olora, patterns": (
        "linear",
        LoRA(
            r=3, init="olora", target_modules=["up", "gate"], rank_pattern={"up": 2}, alpha_pattern={"layers.gate": 7}
        ),
        {"modules_to_save": ["head"]},
    ),
    "pissa, rslora, patterns": (
        "linear",
        LoRA(
            r=3,
            init="pissa",
            rslora=True,
            target_modules=["up", "gate"],
            rank_pattern={"up": 2},
            alpha_pattern={"gate": 7},
        ),
        {},
    ),
    "pissa dora": ("linear", DoRA(r=3, init="pissa", target_modules=["up", "gate"]), {}),
    "olora on Conv1D": ("conv1D", LoRA(r=3, init="olora", target_modules=["up", "down"]), {}),
    "pissa on convolutions": ("conv2d", LoRA(r=3, init="pissa", target_modules=["one", "two"]), {}),
    "pissa on an embedding": ("embedding", LoRA(r=3, init="pissa", target_modules=["embed", "out"]), {}),
    "pissa on experts": (
        "mixtral",
        LoRA(r=3, init="pissa", target_modules=["q_proj"], target_parameters=["experts.down_proj"]),
        {},
    ),
    "llama": ("llama", LoRA(r=3, init="pissa_niter_4"), {}),
    "gpt2": ("gpt2", LoRA(r=3, init="olora", target_modules=["c_attn"]), {}),
}


@pytest.mark.parametrize("case", STARTS)
def test_a_start_from_the_weight_is_a_lora_of_twice_the_rank_over_the_original_base(case: str, tmp_path: Path) -> None:
    name, method, more = STARTS[case]
    base = base_of(name)
    ours = moved(inject(copied(base), method, **more), 0.03).eval()
    config = config_in(export_adapter(ours, tmp_path))
    assert config["init_lora_weights"] is True
    assert config["r"] == 6
    assert config["rank_pattern"] == {key: 2 * r for key, r in method.rank_pattern.items()}
    factor = 2**0.5 if method.rslora else 2
    assert config["lora_alpha"] == pytest.approx(factor * method.alpha, rel=1e-9)
    assert config["alpha_pattern"] == pytest.approx({key: factor * a for key, a in method.alpha_pattern.items()})
    inputs = inputs_of(name)
    theirs = loaded_by_peft(copied(base), tmp_path)
    torch.testing.assert_close(output_of(theirs, inputs), output_of(ours, inputs), rtol=TOLERANCE, atol=TOLERANCE)
    assert (output_of(ours, inputs) - output_of(base, inputs)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "method", "more"),
    [
        ("linear", LoRA(r=4, alpha=3, dropout=0.1, target_modules=["up", "gate"]), {"modules_to_save": ["head"]}),
        ("linear", DoRA(r=4, alpha=3, rslora=True, init="gaussian", target_modules=r".*\.(up|gate)"), {}),
        (
            "llama",
            LoRA(
                r=4,
                target_modules=["q_proj", "v_proj"],
                exclude_modules=["layers.0.self_attn.q_proj"],
                rank_pattern={"v_proj": 2},
                alpha_pattern={"model.layers.1.self_attn.v_proj": 3.5},
            ),
            {"task_type": "CAUSAL_LM"},
        ),
        ("gpt2", LoRA(target_modules=["c_attn"]), {"task_type": "CAUSAL_LM", "fan_in_fan_out": True}),
        (
            "bert",
            LoRA(target_modules=["query"]),
            {"task_type": "TOKEN_CLS", "modules_to_save": ["classifier"]},
        ),
        ("mixtral", LoRA(target_modules=["q_proj"], target_parameters=["experts.down_proj"]), {}),
    ],
)
def test_the_configuration_is_the_one_that_peft_writes(
    name: str, method: LoRA, more: dict[str, Any], tmp_path: Path
) -> None:
    model = inject(base_of(name), method, modules_to_save=more.get("modules_to_save", []))
    ours = config_in(export_adapter(model, tmp_path / "ours"))
    written = config_in(saved_by_peft(peft_model(base_of(name), config_of(method, **more)), tmp_path / "theirs"))
    # every field that the installed peft writes, and none that it does not know
    assert list(ours) == sorted(ours) == sorted(written)
    for field in ("target_modules", "target_parameters", "exclude_modules"):
        if isinstance(written[field], list):
            written[field].sort()
    if name == "bert":
        # asked for a TOKEN_CLS, peft adds what that may have; ours is told by the model, and is as good without
        assert (ours.pop("task_type"), written.pop("task_type")) == ("SEQ_CLS", "TOKEN_CLS")
        assert (ours.pop("modules_to_save"), set(written.pop("modules_to_save"))) == (
            ["classifier"],
            {"classifier", "score"},
        )
    if name == "mixtral":
        assert (ours.pop("task_type"), written.pop("task_type")) == ("CAUSAL_LM", None)
        assert ours.pop("auto_mapping") is None
        assert written.pop("auto_mapping")["base_model_class"] == "MixtralForCausalLM"
    written.pop("peft_version")
    assert ours.pop("peft_version") == PEFT_VERSION
    assert ours == written


class Grouped(nn.Module):
    """Convolutions in 1, 2 and 3 dimensions with groups."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 8, 3, padding=1, groups=2, **options)
        self.two = nn.Conv2d(8, 8, 1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.two(torch.tanh(self.one(x)))
        return output


def test_groups_of_a_convolution_become_blocks_of_one_without(tmp_path: Path) -> None:
    base = Grouped().eval()
    method = LoRA(r=4, target_modules=["one", "two"])
    ours = moved(inject(copied(base), method)).eval()
    written = saved_by_peft(peft_model(copied(base), config_of(method)), tmp_path / "theirs")
    assert keys_and_shapes(export_adapter(ours, tmp_path / "ours")) == keys_and_shapes(written)
    inputs = {"x": torch.randn(2, 4, 6, 6)}
    theirs = loaded_by_peft(copied(base), tmp_path / "ours")
    torch.testing.assert_close(output_of(theirs, inputs), output_of(ours, inputs), rtol=TOLERANCE, atol=TOLERANCE)


def test_every_reason_is_told_and_nothing_is_written(tmp_path: Path) -> None:
    model = nn.ModuleDict(
        {
            "dilated": nn.Conv2d(4, 4, 3, dilation=2),
            "circular": nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "attn": nn.MultiheadAttention(8, 2),
            "bounded": nn.Embedding(5, 8, max_norm=1.0),
            "twice": (linear := nn.Linear(4, 4)),
            "again": linear,
        }
    )
    names = ["dilated", "circular", "grouped", "attn", "bounded", "twice"]
    moved(inject(model, DoRA(r=2, target_modules=names)))
    for parameter in model["attn"].out_proj.adapters.parameters():
        nn.init.normal_(parameter)
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "thesis.tex").touch()
    with pytest.raises(PEFTError) as caught:
        export_adapter(model, folder)
    twice = "HF peft 0.21 applies an update of an attention's output layer twice"
    assert list(caught.value.faults) == [
        f"export_adapter: {fault}"
        for fault in [
            f"folder: {folder} holds other things than an adapter; give another one",
            "dilated: HF peft ignores its dilation (2, 2)",
            "circular: HF peft ignores its padding_mode 'circular'",
            "grouped: HF peft mixes its 2 groups in the norm of DoRA",
            "attn: HF peft has no DoRA for attention's and for single weights",
            "attn.out_proj: HF peft has no DoRA for attention's and for single weights",
            f"attn.out_proj: {twice}; leave it out (exclude_modules: [out_proj]), or merge(model)",
            "bounded: HF peft bounds rows and update apart by its max_norm 1.0",
            "twice: is the same module as again, and HF peft would adapt it under one of the names",
        ]
    ]
    assert [file.name for file in folder.iterdir()] == ["thesis.tex"]


def test_attention_with_weights_of_its_own_for_keys_is_refused(tmp_path: Path) -> None:
    model = inject(nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=6, vdim=6)}), LoRA(target_modules=["attn"]))
    with pytest.raises(PEFTError) as caught:
        export_adapter(model, tmp_path)
    assert str(caught.value) == (
        "export_adapter: attn: HF peft adapts an attention only where query, key and value have one size"
    )


def test_the_folder_holds_the_adapter_that_was_named_and_is_written_again(tmp_path: Path) -> None:
    base = base_of("linear")
    model = inject(copied(base), LoRA(r=2, target_modules=["up"]))
    inject(model, LoRA(r=3, target_modules=["gate"]), adapter_name="other")
    assert config_in(export_adapter(model, tmp_path))["r"] == 2
    assert config_in(export_adapter(model, tmp_path, adapter_name="other"))["r"] == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert set(keys_and_shapes(tmp_path)) == {f"base_model.model.layers.gate.lora_{x}.weight" for x in "AB"}
    with pytest.raises(PEFTError, match=r"adapter 'othr': the model has default, other; did you mean 'other'\?"):
        export_adapter(model, tmp_path, adapter_name="othr")
    with pytest.raises(PEFTError, match="adapter 'default': the model has none"):
        export_adapter(base, tmp_path)
    merge(model)
    with pytest.raises(PEFTError, match=r"export_adapter: the adapter is merged into the weights; call unmerge"):
        export_adapter(model, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(PEFTError, match="file is a file"):
        export_adapter(inject(copied(base), LoRA(target_modules=["up"])), tmp_path / "file")


def test_an_adapter_of_a_module_inside_is_exported_with_its_method(tmp_path: Path) -> None:
    model = base_of("bert")
    inject(model.bert, LoRA(r=2, target_modules=["query"]))
    config = config_in(export_adapter(model, tmp_path))
    assert config["auto_mapping"]["base_model_class"] == "BertForSequenceClassification"
    assert "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight" in keys_and_shapes(tmp_path)
    with pytest.raises(PEFTError, match="into a module around this one; export that"):
        export_adapter(model.bert.encoder, tmp_path)


def test_tensors_are_fp32_contiguous_and_apart_and_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    tied = transformers.LlamaConfig(**TINY, num_key_value_heads=2, tie_word_embeddings=True)
    base = transformers.LlamaForCausalLM(tied).to(torch.bfloat16)
    model = inject(base, LoRA(r=2, target_modules=["q_proj"]), modules_to_save=["embed_tokens", "lm_head"])
    file = export_adapter(model, tmp_path) / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert {opened.get_tensor(key).dtype for key in opened.keys()} == {torch.float32}  # noqa: SIM118
        assert {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"} <= set(opened.keys())
    before = file.read_bytes()

    def interrupted(descriptor: int) -> None:
        os.ftruncate(descriptor, 4)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            export_adapter(model, folder)
    assert file.read_bytes() == before
    monkeypatch.undo()
    assert keys_and_shapes(export_adapter(model, tmp_path / "new")) == keys_and_shapes(tmp_path)


def test_a_method_without_a_form_in_peft_says_so(tmp_path: Path) -> None:
    @dataclass(kw_only=True)
    class Homemade(Method):
        def attachments(self, model: nn.Module, skip: Container[str]) -> list[Attachment]:
            module = model.get_submodule("layers.up")
            return [Attachment("layers.up", module, Adapter())]

    with pytest.raises(PEFTError) as caught:
        export_adapter(inject(base_of("linear"), Homemade()), tmp_path)
    assert str(caught.value) == (
        "export_adapter: Homemade has no form in HF peft; load its checkpoint by load_from_checkpoint, or save the "
        "whole model by save_merged if it can be folded into the weights"
    )
