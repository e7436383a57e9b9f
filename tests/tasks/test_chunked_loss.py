"""The loss in parts: the same as over whole logits, in value and gradient, or refused with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_peft import PEFT, DoRA, LoRA, PromptTuning, inject
from lightning_peft.tasks import chunked_loss
from lightning_peft.tasks.causal_lm import CausalLM
from lightning_peft.tasks.chunked_loss import chunked_scores, refusal
from tests.tasks.test_packed import GPT, TEXT
from tests.tasks.test_packed import build as built
from tests.tasks.writers import PAIRS, Pairs, build, save, trainer

PLAIN: dict[str, dict[str, Any]] = {
    "Llama": TEXT,
    "GPT2": GPT,
    "Qwen2": {**TEXT, "num_key_value_heads": 1},
    "Qwen3": {**TEXT, "head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "OPT": {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPTNeoX": TEXT,
    "Gemma": {**TEXT, "head_dim": 16, "num_key_value_heads": 1},
    # the scale stands before its output layer
    "MiniCPM3": {
        **TEXT,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
}


def rows(packed: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 64, (3, 11), generator=generator)
    labels = ids.clone()
    labels[0, :4], labels[1, 7:], labels[2, ::2] = -100, -100, -100
    if packed:
        return {"input_ids": ids, "labels": labels, "position_ids": torch.tensor([[*range(5), *range(6)]] * 3)}
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def scores_of(module: CausalLM, batch: dict[str, Tensor], chunked: bool, **context: Any) -> dict[str, Tensor]:
    """The loss, and the gradients that it gives."""
    module.zero_grad()
    module._is_chunked = chunked
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, **({"enabled": False} | context)):
        outcome = module.outcome(batch)
    assert outcome.output is None
    outcome.loss.backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {**found, "loss": outcome.loss.detach()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    # the biases of keys have none but what rounding gives them
    least = 1e-4 * max(float(value.float().norm()) for value in expected.values())
    for name, value in expected.items():
        difference = (found[name].float() - value.float()).norm() / value.float().norm().clamp(min=least)
        assert difference < tolerance, (name, float(difference))


@pytest.fixture(autouse=True)
def _few_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "LOGITS", 64 * 4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", PLAIN)
def test_loss_and_gradients_are_those_of_whole_logits(kind: str, packed: bool) -> None:
    if packed and kind == "OPT":
        pytest.skip("OPT packs no rows")
    model, batch = built(kind, PLAIN[kind]).train(), rows(packed)
    assert refusal(model) is None
    module = CausalLM(model)
    expected = scores_of(module, batch, False)
    assert_close(scores_of(module, batch, True), expected, 1e-5)
    if not packed:
        torch.manual_seed(3)
        assert float(expected["loss"]) == pytest.approx(float(model(**batch).loss.detach()), rel=1e-5)


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Qwen3"])
def test_bfloat16(kind: str) -> None:
    module, batch = CausalLM(built(kind, PLAIN[kind], dtype=torch.bfloat16).train()), rows()
    assert refusal(module.model) is None
    whole, found = scores_of(module, batch, False), scores_of(module, batch, True)
    assert found["loss"].dtype == torch.float32
    assert float(found["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-6)
    assert_close(found, whole, 0.02)
    exact = scores_of(CausalLM(module.model.float()), batch, False)
    errors = [
        sum(float((one[name].float() - value).square().sum()) for name, value in exact.items()) ** 0.5
        for one in (found, whole)
    ]
    assert errors[0] < 1.2 * errors[1]  # no farther from the truth than over whole logits


HEADS: dict[str, Callable[[Any], Any]] = {
    "frozen": lambda model: inject(model, LoRA(r=2, dropout=0.0, target_modules="all-linear")),
    "LoRA": lambda model: inject(model, LoRA(r=2, target_modules=["lm_head", "q_proj"])),
    "DoRA": lambda model: inject(model, DoRA(r=2, target_modules=["lm_head", "q_proj"])),
    "saved": lambda model: inject(model, LoRA(r=2, target_modules=["q_proj"]), modules_to_save=["lm_head"]),
    "alone": lambda model: inject(model, LoRA(r=2, target_modules=["lm_head"])),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_adapted_output_layers(head: str, autocast: bool) -> None:
    model = HEADS[head](built("Llama", TEXT).train())
    for name, parameter in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.1)
    assert refusal(model) is None
    module, batch = CausalLM(model), rows()
    whole, found = (scores_of(module, batch, chunked, enabled=autocast) for chunked in (False, True))
    assert any("lm_head" in name for name in found) == (head != "frozen")
    assert_close(found, whole, 0.05 if autocast else 1e-5)


def test_dropout_in_the_output_layer_is_drawn_for_each_part() -> None:
    model = inject(built("Llama", TEXT), LoRA(r=2, dropout=0.5, target_modules=["lm_head"]))
    nn.init.normal_(model.lm_head.adapters["default"].lora_B)
    module = CausalLM(model).train()
    assert refusal(model) is None
    gradient = scores_of(module, rows(), True)
    name, step = "model.lm_head.adapters.default.lora_B", 1e-2
    B = module.get_parameter(name)
    # along its own direction, by differences of losses with the same random numbers
    direction = gradient[name] / gradient[name].norm()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            B.add_(sign * step * direction)
        losses.append(float(scores_of(module, rows(), True)["loss"]))
        with torch.no_grad():
            B.sub_(sign * step * direction)
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(gradient[name].norm()), rel=1e-2)


def test_prompt_tuning() -> None:
    """Its virtual tokens are taken out again before the output layer."""
    model = inject(built("Llama", TEXT).train(), PromptTuning(num_virtual_tokens=3))
    assert refusal(model) is None
    module = CausalLM(model)
    assert_close(*(scores_of(module, rows(), chunked) for chunked in (True, False)), 1e-5)


def test_loss_scaled_beyond_float16() -> None:
    head = nn.Linear(16, 64).half()
    hidden, labels = torch.randn(2, 5, 16).half().requires_grad_(), torch.randint(0, 64, (2, 5))
    total, _ = chunked_scores(lambda: head(hidden), head, labels, False)
    (total / 10 * 2.0**17).backward()
    exact = hidden.detach().float().requires_grad_()
    loss = F.cross_entropy(F.linear(exact, head.weight.float(), head.bias.float()).flatten(0, 1), labels.flatten())
    (loss * 2.0**17).backward()
    assert torch.isfinite(hidden.grad).all()
    assert torch.allclose(hidden.grad.float(), exact.grad, rtol=0.02, atol=2.0**17 * 1e-4)


def test_no_labels_give_no_loss_and_a_gradient_of_zero() -> None:
    module = CausalLM(built("Llama", TEXT).train())
    found = scores_of(module, rows() | {"labels": torch.full((3, 11), -100)}, True)
    assert all(bool((value == 0).all()) for value in found.values())
    assert "model.lm_head.weight" in found


def test_only_labelled_tokens_reach_the_output_layer() -> None:
    model, batch, seen = built("Llama", TEXT), rows(), []
    own = model.lm_head.forward

    def forward(hidden: Tensor) -> Tensor:
        seen.append(tuple(hidden.shape))
        return own(hidden)

    model.lm_head.forward = forward
    scores_of(CausalLM(model).train(), batch, True)
    labelled = int((batch["labels"][:, 1:] != -100).sum())
    # parts of four tokens, and one token for the model itself
    assert seen == [(4, 32)] * (labelled // 4) + [(labelled % 4, 32)] * (labelled % 4 > 0) + [(1, 1, 32)]


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside of the `with` hold at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {key: value for key, value in self.storages.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return output


@pytest.mark.parametrize("trained", [False, True])
def test_logits_never_exist_whole(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocabulary = 1024, 4096
    monkeypatch.setattr(chunked_loss, "LOGITS", 32 * vocabulary)
    model = built("Llama", {**TEXT, "vocab_size": vocabulary, "num_hidden_layers": 1})
    inject(model, LoRA(r=2, target_modules=["lm_head"] if trained else ["q_proj"]))
    module = CausalLM(model).train()
    ids = torch.randint(0, vocabulary, (4, tokens // 4))
    peaks = []
    for chunked in (False, True):
        module._is_chunked = chunked
        with LiveBytes() as live:
            module.outcome({"input_ids": ids, "labels": ids}).loss.backward()
        peaks.append(live.peak / (4 * tokens * vocabulary))
    # of the size of the logits in fp32: measured are 3.1, and 0.28 or, where only the output layer trains, 0.18
    assert peaks[0] > 2
    assert peaks[1] < 0.35


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Gemma2": (
        {**TEXT, "head_dim": 16, "num_key_value_heads": 1},
        "the logits of Gemma2ForCausalLM are not what its output layer gives (final_logit_softcapping=30.0)",
    ),
    "Cohere": (
        {**TEXT},
        "the logits of CohereForCausalLM are not what its output layer gives (logit_scale=0.0625)",
    ),
    "Granite": (
        {**TEXT, "logits_scaling": 4.0},
        "the logits of GraniteForCausalLM are not what its output layer gives (logits_scaling=4.0)",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_logits_that_are_changed_are_refused(kind: str) -> None:
    config, reason = REFUSED[kind]
    assert refusal(built(kind, config)) == reason


def test_other_reasons() -> None:
    model = built("Llama", TEXT)
    assert refusal(nn.Embedding(3, 3)) == "Embedding names no output layer"
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    assert refusal(model) == "hooks stand on the output layer of LlamaForCausalLM"
    handle.remove()
    scale = nn.Parameter(torch.ones(()))
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: own(hidden) * scale
    assert refusal(model) == "the output layer of LlamaForCausalLM is trained through tensors outside of it"
    model.lm_head.forward = own
    assert refusal(model) is None
    model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "input_ids": kwargs["input_ids"].tile(2)}), with_kwargs=True
    )
    assert refusal(model) == "the output layer of LlamaForCausalLM is given (1, 16) tokens for (1, 8)"
    model = built("Llama", TEXT)
    model.lm_head = nn.Sequential(model.lm_head)
    assert refusal(model) == "LlamaForCausalLM has a Sequential as output layer"
    model = built("Llama", TEXT)
    model.model.compile(backend="eager")
    assert refusal(model) == "LlamaForCausalLM is compiled"


def test_the_trial_leaves_no_trace() -> None:
    model = inject(built("Llama", TEXT), LoRA(r=2, dropout=0.5, target_modules=["lm_head"])).train()
    before = torch.get_rng_state()
    assert refusal(model) is None
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert not model.lm_head._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fit_and_validation_are_the_same(precision: str, tmp_path: Path) -> None:
    folder = save("Llama", tmp_path / "model", initializer_range=0.3)

    def fit(chunked: bool) -> tuple[dict[str, float], dict[str, Tensor]]:
        torch.manual_seed(1)
        module = CausalLM(folder, chunked_loss=chunked, learning_rate=1e-2)
        peft = PEFT(LoRA(r=4, target_modules=["lm_head", "q_proj"]))
        loops = trainer(tmp_path, max_epochs=2, callbacks=[peft], precision=precision)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="chunked_loss")
            loops.fit(module, Pairs(decoder=True, repeat=2, unlabelled=1))
        assert module._is_chunked is chunked
        (tested,) = trainer(tmp_path, precision=precision).test(module, Pairs(decoder=True), verbose=False)
        metrics = {name: float(value) for name, value in {**loops.callback_metrics, **tested}.items()}
        return metrics, module.state_dict()

    (metrics, state), (expected, whole) = fit(True), fit(False)
    assert {"val_accuracy", "val_perplexity", "test_accuracy"} <= metrics.keys() == expected.keys()
    tolerance = 1e-4 if precision == "32-true" else 0.05
    assert metrics == pytest.approx(expected, rel=tolerance)
    if precision == "32-true":
        for name, value in whole.items():
            assert torch.allclose(state[name], value, atol=1e-4), name


def test_whole_logits_with_one_warning(tmp_path: Path) -> None:
    config = {**TEXT, "head_dim": 16, "num_key_value_heads": 1, "vocab_size": 15}
    module = CausalLM(built("Gemma2", config).train())
    with pytest.warns(UserWarning, match="chunked_loss") as caught:
        trainer(tmp_path, max_epochs=2).fit(module, Pairs(decoder=True))
    assert [str(warning.message) for warning in caught if "chunked_loss" in str(warning.message)] == [
        "chunked_loss: the logits of all tokens are kept at once, since the logits of Gemma2ForCausalLM are not what "
        "its output layer gives (final_logit_softcapping=30.0); chunked_loss=False asks for that"
    ]


def test_without_a_trainer_logits_are_whole() -> None:
    model, shapes = build("Llama"), []
    model.register_forward_hook(lambda *call: shapes.append(call[-1].logits.shape[:2]))
    batch = Pairs(decoder=True).batch(Pairs(decoder=True).rows)
    CausalLM(model).outcome(batch)
    assert shapes == [batch["labels"].shape]
    assert len(PAIRS) == shapes[0][0]
