"""Virtual tokens against HF peft's prompt tuning and P-tuning: outputs, gradients and training from the same start, and
files both ways.

Left out, because peft is known to be wrong there: padding on the left, whose positions it ignores, and the labels of
token classification, which it does not shift.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft import PEFTError, PromptTuning, PTuning, export_adapter, import_adapter, inject
from lightning_peft.injection import adapters
from lightning_peft.methods._prompts import PromptEmbedding
from tests.methods.models import MODELS, NO_DROPOUT, TINY, inputs_of
from tests.methods.prefix_models import SEQ2SEQ

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:.*(Position|Token type) ids"),
]
TOLERANCE = 1e-5
N = 5
TASKS = {
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "bert": "SEQ_CLS",
    "roberta": "SEQ_CLS",
    "roberta tokens": "TOKEN_CLS",
    "llama answers": "QUESTION_ANS",
    "t5": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM",
}
ROBERTA = {**TINY, **NO_DROPOUT, "max_position_embeddings": 16, "pad_token_id": 0, "num_labels": 3}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**ROBERTA)),
    "roberta tokens": lambda: transformers.RobertaForTokenClassification(transformers.RobertaConfig(**ROBERTA)),
    "llama answers": lambda: transformers.LlamaForQuestionAnswering(transformers.LlamaConfig(**TINY)),
    "bart": SEQ2SEQ["bart"],
}
HEADS = {"bert": "classifier", "roberta": "classifier", "roberta tokens": "classifier", "llama answers": "qa_outputs"}
METHODS = {
    "prompt": (PromptTuning(num_virtual_tokens=N), peft.PromptTuningConfig, {}),
    "mlp": (
        PTuning(num_virtual_tokens=N, hidden_size=12),
        peft.PromptEncoderConfig,
        {"encoder_hidden_size": 12},
    ),
    "lstm": (
        PTuning(num_virtual_tokens=N, encoder="lstm", hidden_size=12),
        peft.PromptEncoderConfig,
        {"encoder_hidden_size": 12, "encoder_reparameterization_type": "LSTM"},
    ),
}
each_method = pytest.mark.parametrize("kind", METHODS)


def base_of(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = {**MODELS, **OTHERS}[name]()
    if name == "t5":
        model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 0
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def given_to(name: str, padded: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(4)
    inputs = inputs_of("t5" if name in ("t5", "bart") else "llama")
    if padded:
        inputs["attention_mask"] = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4])
    return inputs


def ours_of(name: str, kind: str, with_head: bool = True) -> nn.Module:
    saved = [HEADS[name]] if with_head and name in HEADS else []
    return inject(base_of(name), METHODS[kind][0], modules_to_save=saved)


def theirs_of(name: str, kind: str, **more: Any) -> nn.Module:
    _, config, fields = METHODS[kind]
    return peft.get_peft_model(base_of(name), config(task_type=TASKS[name], num_virtual_tokens=N, **fields, **more))


def prompt_of(model: nn.Module) -> PromptEmbedding:
    (found,) = (adapter for adapter in adapters(model, "default").values() if isinstance(adapter, PromptEmbedding))
    return found


def pairs(ours: nn.Module, theirs: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Our tensors and theirs; of peft's embeddings for an encoder-decoder the first half is used."""
    encoder = theirs.prompt_encoder["default"]
    own = dict(prompt_of(ours).named_parameters())
    found = [(own.pop("prompt"), encoder.embedding.weight)]
    for name, parameter in own.items():
        part, _, rest = name.partition(".")
        found.append((parameter, getattr(encoder, f"{part}_head").get_parameter(rest)))
    return found


def output(model: nn.Module, name: str, inputs: dict[str, Tensor]) -> Tensor:
    """The logits at the tokens that are no padding."""
    found = model(**inputs)
    logits = torch.stack([found.start_logits, found.end_logits], dim=-1) if name == "llama answers" else found.logits
    if name in ("bert", "roberta", "t5", "bart"):
        return logits
    seen = inputs.get("attention_mask", torch.ones(3, 7)).bool()
    return logits[:, -7:][seen]


@pytest.mark.parametrize("padded", [False, True])
@each_method
@pytest.mark.parametrize("name", TASKS)
def test_trains_as_peft_does(name: str, kind: str, padded: bool) -> None:
    # without it peft's LSTM for an encoder-decoder also runs over tokens that it never uses
    more = {"num_transformer_submodules": 1} if kind == "lstm" else {}
    ours, theirs = ours_of(name, kind, with_head=False), theirs_of(name, kind, **more)
    with torch.no_grad():
        for mine, other in pairs(ours, theirs):
            other[: len(mine)].copy_(mine)
    both = pairs(ours, theirs)
    for parameter in theirs.parameters():
        parameter.requires_grad_(any(parameter is other for _, other in both))
    optimizers = [torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0) for parameters in zip(*both, strict=True)]
    inputs = given_to(name, padded)
    goal = torch.randn_like(output(ours, name, inputs))
    for step in range(11):
        outputs = [output(model, name, inputs) for model in (ours, theirs)]
        torch.testing.assert_close(*outputs, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, s=step: f"step {s}: {m}")
        for optimizer, found in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            (found - goal).square().mean().backward()
        for mine, other in both:
            if step == 0:
                torch.testing.assert_close(mine.grad, other.grad[: len(mine)], rtol=1e-4, atol=1e-7)
                assert mine.grad.abs().max() > 0
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in both[:1]:
        torch.testing.assert_close(mine, other[: len(mine)], rtol=1e-4, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_the_loss_is_peft_s(name: str) -> None:
    ours, theirs = ours_of(name, "prompt"), theirs_of(name, "prompt")
    with torch.no_grad():
        ((mine, other),) = pairs(ours, theirs)
        other[:N].copy_(mine)
    inputs = given_to(name, padded=True)
    labels = torch.tensor([0, 2, 1])
    if name != "bert":
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    if name in ("llama", "gpt2"):
        labels[:, 0] = -100  # what peft's prompt also predicts, and no model of which the caller takes the loss itself
    inputs.pop("decoder_input_ids", None)
    losses = [model.eval()(**inputs, labels=labels).loss for model in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=TOLERANCE, atol=TOLERANCE)
    assert losses[0] > 0


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


@each_method
@pytest.mark.parametrize("name", TASKS)
def test_peft_computes_the_same_from_what_is_exported(name: str, kind: str, tmp_path: Path) -> None:
    ours = moved(ours_of(name, kind))
    export_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base_of(name), tmp_path).eval()
    inputs = given_to(name, padded=True)
    found = [output(model, name, inputs) for model in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=TOLERANCE, atol=TOLERANCE)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    rows = 2 * N if name in ("t5", "bart") else N
    assert stored["prompt_embeddings"].shape == (rows, 32)
    rest = [key for key in stored if key != "prompt_embeddings"]
    assert bool(rest) == (name in HEADS)
    assert all(key.startswith(f"base_model.{HEADS[name]}.") for key in rest)


@each_method
@pytest.mark.parametrize("name", ["llama", "roberta", "t5"])
def test_the_configuration_is_the_one_that_peft_writes(name: str, kind: str, tmp_path: Path) -> None:
    theirs_of(name, kind).save_pretrained(tmp_path / "theirs")
    export_adapter(ours_of(name, kind), tmp_path / "ours", base_model="")
    ours, theirs = (json.loads((tmp_path / place / "adapter_config.json").read_text()) for place in ("ours", "theirs"))
    # peft adds both heads that there may be, and its own default is another start
    for config in (ours, theirs):
        for key in ("modules_to_save", "prompt_tuning_init", "base_model_name_or_path", "runtime_config"):
            config.pop(key, None)
    assert ours == theirs


@each_method
@pytest.mark.parametrize("name", TASKS)
def test_what_peft_saved_computes_the_same_here(name: str, kind: str, tmp_path: Path) -> None:
    theirs = moved(theirs_of(name, kind))
    theirs.save_pretrained(tmp_path)
    ours = import_adapter(base_of(name), tmp_path).eval()
    inputs = given_to(name, padded=True)
    found = [output(model, name, inputs) for model in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=TOLERANCE, atol=TOLERANCE)
    assert isinstance(next(iter(vars(ours)["_peft_records"].values())).method, PromptTuning)
    export_adapter(ours, tmp_path / "again")
    stored, again = (
        load_file(place / "adapter_model.safetensors")["prompt_embeddings"] for place in (tmp_path, tmp_path / "again")
    )
    assert torch.equal(stored[:N], again[:N])
    assert stored.shape == again.shape


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_peft_writes_the_same_text(name: str, tmp_path: Path) -> None:
    ours = moved(ours_of(name, "prompt"))
    export_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base_of(name), tmp_path).eval()
    ids = given_to(name)["input_ids"]
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    found = [model.generate(input_ids=ids, attention_mask=mask, **options)[:, -4:] for model in (ours, theirs)]
    assert torch.equal(*found)


def test_a_model_without_a_head_is_exported_too(tmp_path: Path) -> None:
    body = base_of("llama").model
    ours = moved(inject(copy.deepcopy(body), PromptTuning(num_virtual_tokens=N)))
    export_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(body, tmp_path).eval()
    inputs = given_to("llama")
    expected = theirs(**inputs).last_hidden_state[:, N:]
    torch.testing.assert_close(ours(**inputs).last_hidden_state, expected, rtol=TOLERANCE, atol=TOLERANCE)


def refused(action: Callable[[], Any]) -> tuple[str, ...]:
    with pytest.raises(PEFTError) as error:
        action()
    return error.value.faults


def test_what_peft_can_not_express_is_told(tmp_path: Path) -> None:
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**TINY, **NO_DROPOUT))
    inject(masked, PTuning(num_virtual_tokens=N, template="{prompt}{input}{prompt}"))
    assert refused(lambda: export_adapter(masked, tmp_path)) == (
        "export_adapter: template: HF peft has {prompt}{input} alone, not '{prompt}{input}{prompt}'",
        "export_adapter: HF peft has no prompts for the task of a BertForMaskedLM",
    )
    headless = ours_of("bert", "prompt", with_head=False)
    assert refused(lambda: export_adapter(headless, tmp_path)) == (
        "export_adapter: modules_to_save: HF peft trains the head of a BertForSequenceClassification whole; name it "
        "here too",
    )
    two = inject(nn.ModuleDict({"a": base_of("llama"), "b": base_of("gpt2")}), PromptTuning(num_virtual_tokens=N))
    assert refused(lambda: export_adapter(two, tmp_path)) == (
        "export_adapter: HF peft has one prompt in a model, and ModuleDict has 2",
    )
    assert not list(tmp_path.iterdir())


def test_a_directory_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    theirs_of("llama", "prompt").save_pretrained(tmp_path)
    wider = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, "hidden_size": 64}))
    assert refused(lambda: import_adapter(wider, tmp_path)) == (
        f"{tmp_path}: 1 of another shape: prompt_embeddings is (5, 32) in the checkpoint and (5, 64) here",
    )
    assert refused(lambda: import_adapter(base_of("t5"), tmp_path)) == (
        f"{tmp_path}: num_transformer_submodules: 1 in the directory, and 2 here",
    )
    two = nn.ModuleDict({"a": base_of("llama"), "b": base_of("gpt2")})
    assert refused(lambda: import_adapter(two, tmp_path)) == (
        f"{tmp_path}: HF peft has one prompt in a model, and there are 2 text models here: a.model, b.transformer",
    )
    (fault,) = refused(lambda: import_adapter(MODELS["vit"](), tmp_path))
    assert fault.startswith(f"{tmp_path}: ViTForImageClassification has no place for virtual tokens")
    assert adapters(wider, "default") == {}
