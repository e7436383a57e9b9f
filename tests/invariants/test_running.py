"""Ways of running a model with adapters: compiled, checkpointed, in other precisions, twice in one graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import LoRA, trainable_parameters
from lightning_peft.injection import adapters
from lightning_peft.methods._host import hosts

from .cases import Subject, each
from .checks import assert_aligned, assert_same, gradients, merged_result


@each()
def test_without_gradients_no_path_passes_over_the_adapter(subject: Subject):
    # in inference torch's attention and encoder may take fused paths that read the weights by themselves
    model = subject.adapted()
    expected = subject.run(model).detach()
    torch.testing.assert_close(subject.values(model), expected, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(subject.run(model).clone(), expected, atol=1e-5, rtol=1e-5)


# torch.compile takes seconds for each: all but LoRA, on which most rest, are traced on one layer and one model
TRACED = ("linear", "llama")


@each(where=lambda method, case: case.compiles and (method is LoRA or case.name in TRACED))
def test_compiled_it_computes_the_same_forward_and_backward(subject: Subject):
    model, compiled = subject.adapted(), subject.adapted()
    expected = gradients(model, lambda: subject.run(model))
    torch._dynamo.reset()
    # recurrent layers are the ones that torch takes into no graph
    compiled.compile(
        backend="aot_eager", fullgraph=not any(isinstance(module, nn.RNNBase) for module in model.modules())
    )
    assert_same(gradients(compiled, lambda: subject.run(compiled)), expected, 1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@each()
def test_checkpointed_it_computes_the_same_gradients(subject: Subject, dropout: float):
    model = subject.adapted(dropout=dropout).train()

    def run(seed: int, *, checkpointed: bool = False) -> Tensor:
        torch.manual_seed(seed)
        return checkpoint(subject.run, model, use_reentrant=False) if checkpointed else subject.run(model)

    run(5)  # some of transformers' models draw random numbers in their first run of a process
    expected = gradients(model, lambda: run(5))
    assert_same(gradients(model, lambda: run(5, checkpointed=True)), expected, 1e-6)
    if dropout and not all(
        isinstance(host, nn.Embedding) for _, host in hosts(model)
    ):  # whose input has nothing to drop
        assert (run(5) - run(6)).abs().max() > 1e-4


@each()
def test_used_twice_in_one_graph_the_gradients_add(subject: Subject):
    model = subject.adapted(subject.widest())
    _, first = gradients(model, lambda: subject.run(model, 0))
    _, second = gradients(model, lambda: subject.run(model, 1))
    y, both = gradients(model, lambda: subject.run(model, 0) + subject.run(model, 1))
    summed = {name: first[name] + second[name] for name in first}
    assert_same((y, both), (y, summed), 1e-9 if subject.widest() == torch.float64 else 1e-5)


@each()
def test_outputs_and_gradients_are_those_of_the_merged_weights(subject: Subject):
    model, base = subject.adapted(subject.widest()), subject.base(subject.widest())
    expected = merged_result(model, base, subject.run)
    found = gradients(model, lambda: subject.run(model))
    tolerance = 1e-9 if subject.widest() == torch.float64 else 1e-5
    if any(_has_a_gradient_of_its_own(host) for _, host in hosts(model)):
        torch.testing.assert_close(found[0], expected[0], atol=tolerance, rtol=tolerance)
    else:
        assert_same(found, expected, tolerance)


@each()
def test_over_a_bf16_base_adapters_are_fp32_and_outputs_bf16(subject: Subject):
    base = subject.base(torch.bfloat16).requires_grad_(False)
    before = subject.values(base)
    model = subject.put(base, moved=False)
    if subject.method.identity_at_start:
        torch.testing.assert_close(subject.values(model), before, atol=0.02, rtol=0.02)
    model = subject.adapted(torch.bfloat16)
    own = list(adapters(model, "default").values())
    assert {parameter.dtype for adapter in own for parameter in adapter.parameters()} == {torch.float32}
    found = gradients(model, lambda: subject.run(model))
    assert found[0].dtype == torch.bfloat16
    assert {name: g.dtype for name, g in found[1].items()} == {
        name: p.dtype for name, p in trainable_parameters(model).items()
    }
    full = subject.adapted()
    assert_aligned(found, gradients(full, lambda: subject.run(full)))


@each()
def test_under_autocast_it_works_and_gradients_are_fp32(subject: Subject):
    model = subject.adapted()
    expected = gradients(model, lambda: subject.run(model))

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return subject.run(model)

    found = gradients(model, run)
    assert {gradient.dtype for gradient in found[1].values()} == {torch.float32}
    assert_aligned(found, expected)


@each()
def test_over_a_float64_base_adapters_are_float64(subject: Subject):
    base = subject.base(torch.float64)
    model = subject.put(base, moved=False)
    assert {parameter.dtype for parameter in trainable_parameters(model).values()} == {torch.float64}
    if subject.widest() == torch.float64 and subject.method.identity_at_start:
        expected = subject.values(subject.base(torch.float64))
        torch.testing.assert_close(subject.values(model), expected, atol=1e-12, rtol=0)


def _has_a_gradient_of_its_own(module: nn.Module) -> bool:
    """An embedding's padding row gets no gradient, frequent rows get less, and a bound norm counts as a constant."""
    own = ("padding_idx", "max_norm")
    return getattr(module, "scale_grad_by_freq", False) or any(getattr(module, name, None) is not None for name in own)
