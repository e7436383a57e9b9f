"""The same start in HF peft and here: the same outputs, gradients and ten AdamW steps, for layers and for models.

Left out, because peft is known to be wrong there (`test_lora_closed_form` has the formula instead): convolutions with
dilation or a padding mode, embeddings with max_norm, OLoRA on a Conv1D that is not square, attention once its output
layer's update is not zero; and DoRA on attention and experts, which it does not have.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from lightning_peft import DoRA, LoRA, inject
from tests.methods.models import MODELS, inputs_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
TOLERANCE = 1e-5
STEPS = 10


def config(method: LoRA, **more: Any) -> peft.LoraConfig:
    """peft's words for the same thing."""
    inits = {"default": True}
    return peft.LoraConfig(
        r=method.r,
        lora_alpha=method.alpha,
        target_modules=method.target_modules,
        target_parameters=method.target_parameters or None,
        exclude_modules=method.exclude_modules or None,
        rank_pattern=method.rank_pattern,
        alpha_pattern=method.alpha_pattern,
        use_rslora=method.rslora,
        init_lora_weights=inits.get(method.init, method.init),
        use_dora=isinstance(method, DoRA),
        **more,
    )


def our_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained tensors by the path of what they adapt."""
    return {
        name.replace("adapters.default.lora", "weight.lora").replace("adapters.default.", ""): parameter
        for name, parameter in model.named_parameters()
        if ".adapters." in name
    }


def their_tensors(model: nn.Module) -> dict[str, tuple[nn.Parameter, Callable[[Tensor], Tensor]]]:
    """The same of peft's model, by our names, each with what brings one of ours into its layout."""
    found: dict[str, tuple[nn.Parameter, Callable[[Tensor], Tensor]]] = {}
    for name, module in model.named_modules():
        path = name.removeprefix("base_model.model.").replace("base_layer.", "").replace(".base_layer", "")
        if isinstance(module, peft.utils.ModulesToSaveWrapper):
            for key, parameter in module.modules_to_save["default"].named_parameters():
                found[f"{path}.{key}"] = parameter, lambda t: t
        if not isinstance(module, LoraLayer):
            continue
        if isinstance(module, ParamWrapper):
            # A (r·E, in) expert by expert; B (out, r·E) with the experts innermost
            found[f"{path}.{module.parameter_name}.lora_A"] = module.lora_A["default"].weight, lambda t: t.flatten(0, 1)
            found[f"{path}.{module.parameter_name}.lora_B"] = (
                module.lora_B["default"].weight,
                lambda t: t.permute(1, 2, 0).flatten(1),
            )
            continue
        weight = "in_proj_weight" if isinstance(module, MultiheadAttention) else "weight"
        if "default" in module.lora_embedding_A:
            parts = {"lora_A": module.lora_embedding_A["default"], "lora_B": module.lora_embedding_B["default"]}
        else:
            parts = {"lora_A": module.lora_A["default"].weight, "lora_B": module.lora_B["default"].weight}
        if "default" in module.lora_magnitude_vector:
            parts["lora_magnitude_vector"] = module.lora_magnitude_vector["default"].weight
        for key, parameter in parts.items():
            found[f"{path}.{weight}.{key}"] = parameter, lambda t, shape=parameter.shape: t.reshape(shape)
    return found


def output_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output.logits


def both(name: str, method: LoRA, **more: Any) -> tuple[nn.Module, nn.Module]:
    """Our model and peft's, over the same base, in train mode."""
    torch.manual_seed(1)
    base = MODELS[name]()
    saved = more.get("modules_to_save", [])
    ours = inject(copy.deepcopy(base), method, modules_to_save=saved)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        theirs = peft.get_peft_model(copy.deepcopy(base), config(method, **more))
    ours.train()
    theirs.train()
    for module in theirs.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # ours keeps frozen statistics unmoved; peft would let them drift
    return ours, theirs


def share_tensors(ours: nn.Module, theirs: nn.Module, deviation: float = 0.1) -> None:
    """Move every trained tensor of ours from its start, and give peft's the same."""
    own, other = our_tensors(ours), their_tensors(theirs)
    assert sorted(own) == sorted(other)
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.add_(torch.randn_like(parameter) * deviation)
            target, convert = other[key]
            target.copy_(convert(parameter))


def assert_train_alike(ours: nn.Module, theirs: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Equal outputs and gradients at first, and equal tensors and outputs after ten steps of AdamW."""
    own, other = our_tensors(ours), their_tensors(theirs)
    trained = {key for key, parameter in own.items() if parameter.requires_grad}
    assert trained == {key for key, (parameter, _) in other.items() if parameter.requires_grad} == set(own)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in (ours, theirs)]
    goal = torch.randn_like(output_of(ours, inputs))
    losses: list[list[float]] = [[], []]
    for step in range(STEPS + 1):
        outputs = [output_of(model, inputs) for model in (ours, theirs)]
        torch.testing.assert_close(*outputs, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, s=step: f"step {s}: {m}")
        for optimizer, output, values in zip(optimizers, outputs, losses, strict=True):
            optimizer.zero_grad()
            loss = (output - goal).square().mean()
            loss.backward()
            values.append(loss.item())
            if step == 0:
                continue
            optimizer.step()
        if step == 0:
            for key, (parameter, convert) in other.items():
                torch.testing.assert_close(convert(own[key].grad), parameter.grad, rtol=TOLERANCE, atol=TOLERANCE)
                assert parameter.grad.abs().max() > 0
    for key, (parameter, convert) in other.items():
        torch.testing.assert_close(convert(own[key]), parameter, rtol=TOLERANCE, atol=TOLERANCE)
    assert losses[0][-1] < losses[0][0]


ALL = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
CASES: dict[str, tuple[str, LoRA, dict[str, Any]]] = {
    "linear stack": ("linear", LoRA(r=4, target_modules=["up", "gate", "head"]), {}),
    "alpha, rslora": ("linear", LoRA(r=4, alpha=3, rslora=True, target_modules=["up", "gate"]), {}),
    "rank and alpha by pattern": (
        "linear",
        LoRA(
            r=4,
            target_modules=["up", "gate", "head"],
            rank_pattern={"up": 2, "layers.ga.e": 3},
            alpha_pattern={"head": 5},
        ),
        {},
    ),
    "exclude": (
        "llama",
        LoRA(r=4, target_modules=["q_proj", "v_proj"], exclude_modules=["layers.0.self_attn.q_proj"]),
        {},
    ),
    "exclude by expression": ("linear", LoRA(r=4, target_modules=r".*\.(up|gate)", exclude_modules=r".*\.gate"), {}),
    "modules_to_save": ("linear", LoRA(r=4, target_modules=["up"]), {"modules_to_save": ["head"]}),
    "dora": ("linear", DoRA(r=4, target_modules=["up", "gate", "head"]), {}),
    "dora, rslora": ("linear", DoRA(r=4, rslora=True, target_modules=["up", "gate"], rank_pattern={"up": 2}), {}),
    "Conv1D": ("conv1D", LoRA(r=4, target_modules=["up", "down"]), {"fan_in_fan_out": True}),
    "Conv1D dora": ("conv1D", DoRA(r=4, target_modules=["up", "down"]), {"fan_in_fan_out": True}),
    **{
        f"{name} {method.__name__}": (name, method(r=4, target_modules=["one", "two"]), {})
        for name in ("conv1d", "conv2d", "conv3d")
        for method in (LoRA, DoRA)
    },
    "embedding": ("embedding", LoRA(r=4, target_modules=["embed", "out"]), {}),
    "embedding dora": ("embedding", DoRA(r=4, target_modules=["embed", "out"]), {}),
    "llama": ("llama", LoRA(r=4, target_modules=["q_proj", "v_proj", "down_proj"]), {}),
    "llama all-linear": ("llama", LoRA(r=4, rslora=True), {}),
    "llama dora": ("llama", DoRA(r=4, target_modules=ALL), {}),
    "llama patterns": (
        "llama",
        LoRA(
            r=4,
            target_modules=ALL,
            rank_pattern={r"layers\.0\.self_attn\.\w+": 2, "up_proj": 6},
            alpha_pattern={r".*mlp.*": 9},
            exclude_modules=["layers.1.self_attn.k_proj", "gate_proj"],
        ),
        {},
    ),
    "llama with embeddings": ("llama", LoRA(r=4, target_modules=["embed_tokens", "q_proj", "lm_head"]), {}),
    "bert with classifier": ("bert", LoRA(r=4, target_modules=["query", "value"]), {"modules_to_save": ["classifier"]}),
    "bert dora": ("bert", DoRA(r=4, target_modules=["query", "dense"]), {"modules_to_save": ["classifier"]}),
    "gpt2": ("gpt2", LoRA(r=4, target_modules=["c_attn", "c_proj", "c_fc"]), {"fan_in_fan_out": True}),
    "gpt2 dora": ("gpt2", DoRA(r=4, target_modules=["c_attn", "c_fc"]), {"fan_in_fan_out": True}),
    "t5": ("t5", LoRA(r=4, target_modules=["q", "v", "wo"]), {}),
    "vit": ("vit", LoRA(r=4, target_modules=["q_proj", "v_proj", "projection"]), {"modules_to_save": ["classifier"]}),
    "resnet": ("resnet", LoRA(r=4, target_modules=["convolution"]), {"modules_to_save": ["classifier"]}),
    "resnet dora": ("resnet", DoRA(r=4, target_modules=r".*encoder.*convolution"), {}),
    "mixtral experts": (
        "mixtral",
        LoRA(r=4, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
        {},
    ),
    "gpt-oss experts": (
        "gpt-oss",
        LoRA(r=4, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_trains_as_peft_does(case: str) -> None:
    name, method, more = CASES[case]
    ours, theirs = both(name, method, **more)
    inputs = inputs_of(name)
    torch.testing.assert_close(output_of(ours, inputs), output_of(theirs, inputs), rtol=TOLERANCE, atol=TOLERANCE)
    share_tensors(ours, theirs)
    assert_train_alike(ours, theirs, inputs)


def test_attention_is_as_peft_has_it_while_its_output_layer_has_no_update() -> None:
    """peft 0.21 merges `out_proj` twice before each forward: its update acts doubled, its gradient does not."""
    ours, theirs = both("attention", LoRA(r=4, target_modules=["attn"]))
    share_tensors(ours, theirs)
    own, other = our_tensors(ours), their_tensors(theirs)
    zero = "layers.attn.out_proj.weight.lora_B"
    with torch.no_grad():
        own[zero].zero_()
        other[zero][0].zero_()
    inputs = inputs_of("attention")
    outputs = [output_of(model, inputs) for model in (ours, theirs)]
    torch.testing.assert_close(*outputs, rtol=TOLERANCE, atol=TOLERANCE)
    for output in outputs:
        output.square().mean().backward()
    for key, (parameter, _) in other.items():
        torch.testing.assert_close(own[key].grad, parameter.grad, rtol=TOLERANCE, atol=TOLERANCE)
        assert key == zero.replace("_B", "_A") or own[key].grad.abs().max() > 0


@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize(
    ("model", "init", "more"),
    [
        ("linear", "pissa", {}),
        ("linear", "olora", {}),
        ("conv1D", "pissa", {"fan_in_fan_out": True}),
        ("conv1D square", "pissa", {"fan_in_fan_out": True}),
        ("llama", "pissa", {}),
        ("llama", "olora", {}),
    ],
)
def test_starts_from_the_weight_as_peft_does(model: str, init: str, more: dict[str, Any], method: type[LoRA]) -> None:
    """Signs of singular vectors are free, and cancel in BA; peft moves the base's weight, ours stays."""
    targets = {"linear": ["up", "gate"], "llama": ["q_proj", "v_proj", "down_proj"]}.get(
        model, r".*layers\.\w+(?<!act)"
    )
    ours, theirs = both(model, method(r=4, alpha=6, init=init, target_modules=targets), **more)
    inputs = inputs_of(model)
    torch.testing.assert_close(output_of(ours, inputs), output_of(theirs, inputs), rtol=TOLERANCE, atol=TOLERANCE)
    own, other = our_tensors(ours), their_tensors(theirs)
    for key in (key.removesuffix(".lora_A") for key in own if key.endswith(".lora_A")):
        product = own[f"{key}.lora_B"] @ own[f"{key}.lora_A"]
        theirs_product = other[f"{key}.lora_B"][0] @ other[f"{key}.lora_A"][0]
        torch.testing.assert_close(product, theirs_product, rtol=TOLERANCE, atol=TOLERANCE)
    share_tensors(ours, theirs, 0.02)
    assert_train_alike(ours, theirs, inputs)
