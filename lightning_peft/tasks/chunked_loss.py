"""The cross-entropy of a language model without the logits of all its tokens at once: (tokens x vocabulary) numbers can
be most of a step's memory, and no more than a few of them are needed at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lightning_peft.quantization.casting import CastInputs
from lightning_peft.tasks.decoding import text_config, without_cache
from lightning_peft.tasks.packed import undisturbed
from lightning_peft.tasks.task import IGNORED

LOGITS = 2**25
"""Logits that are computed at a time: 128 MiB in fp32, and a few times that with their gradient."""
PROBED = 8
"""Tokens that a model is tried with."""
SCALINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""What a model's configuration calls that which it does to its output layer's logits; checked on transformers 5.23."""


class Scores(NamedTuple):
    """What a model makes of the labels that count."""

    total: Tensor
    """The sum of the cross-entropy over them, a float32 scalar."""
    right: Tensor | None
    """How many of them it holds for most likely, an int64 scalar, where that was asked for."""


def chunked_scores(run: Callable[[], Any], head: nn.Module, labels: Tensor, count_right: bool) -> Scores:
    """The scores of `labels`, with logits of `LOGITS` numbers at most at a time, and none of ignored labels.

    Args:
        run: runs the model, which calls `head` once with hidden states of shape (batch, length, features).
        head: its output layer; whatever stands on it takes part, and is trained.
        labels: what each place is to foresee, int64 of shape (batch, length), and IGNORED where nothing.
        count_right: whether to count the labels that it holds for most likely.
    """
    found: list[Scores] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *more = args
        kept = labels != IGNORED
        found.append(_scores(head, hidden[kept], labels[kept], count_right))
        # the model goes on with the logits of one token, of which nobody makes use
        return (hidden[:1, :1], *more)

    handle = head.register_forward_pre_hook(before)
    try:
        run()
    finally:
        handle.remove()
    (scores,) = found
    return scores


def refusal(model: Any) -> str | None:
    """Why the logits of `model` can't be computed in parts; None where they can.

    It is run on a few tokens, and left as it was: its output has to be what its output layer makes of each token's
    hidden state, bit for bit.
    """
    name = type(model).__name__
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        what = "names no output layer" if head is None else f"has a {type(head).__name__} as output layer"
        return f"{name} {what}"
    if not all(_gives_way(hook) for hook in (*head._forward_pre_hooks.values(), *head._forward_hooks.values())):
        return f"hooks stand on the output layer of {name}"
    # no public attribute tells; checked on torch 2.11 and 2.13
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return f"{name} is compiled"
    device = head.weight.device
    vocabulary = getattr(text_config(model), "vocab_size", None) or head.out_features
    ids = ((vocabulary // 2 + torch.arange(PROBED, device=device)) % vocabulary)[None]
    given: list[tuple[Tensor, Tensor, bool]] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        # now, for where weights are sharded they are whole only while the model runs
        given.append((args[0], head.forward(args[0]), _trains_elsewhere(head, args[0])))

    handle = head.register_forward_pre_hook(before)
    try:
        with undisturbed(model, device):
            output = model(input_ids=ids, **without_cache(model))
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{name} can't be tried on a few tokens ({' '.join(str(error).split())})"
    finally:
        handle.remove()
    if len(given) != 1:
        return f"{name} calls its output layer {len(given)} times"
    logits: Tensor = getattr(output, "logits", output)
    hidden, direct, elsewhere = given[0]
    if hidden.shape[:-1] != ids.shape:
        return f"the output layer of {name} is given {tuple(hidden.shape[:-1])} tokens for {tuple(ids.shape)}"
    if not torch.equal(direct.to(logits.dtype), logits):
        config = text_config(model)
        scalings = [f"{field}={value}" for field in SCALINGS if (value := getattr(config, field, None)) is not None]
        because = f" ({', '.join(scalings)})" if scalings else ""
        return f"the logits of {name} are not what its output layer gives{because}"
    return f"the output layer of {name} is trained through tensors outside of it" if elsewhere else None


def _gives_way(hook: Any) -> bool:
    """Whether a layer's hook comes before ours, and leaves its forward to compute what the layer does.

    One that casts what the layer is given does; and so do those of FSDP2, which gather its weights.
    """
    # no public class tells; checked on torch 2.13
    of_fsdp = type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp.")
    return of_fsdp or type(hook) is CastInputs


def _trains_elsewhere(head: nn.Module, hidden: Tensor) -> bool:
    # what autocast has cast without a gradient would hide where it comes from
    torch.clear_autocast_cache()
    with torch.inference_mode(False), torch.enable_grad():
        token = torch.zeros(1, hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
        leaves = {id(leaf) for leaf in _leaves(head.forward(token).grad_fn)}
    return not leaves <= {id(parameter) for parameter in head.parameters()}


def _leaves(node: Any) -> Iterator[Tensor]:
    """The tensors that a graph gives a gradient to."""
    seen, waiting = {None}, [node]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                yield node.variable
            waiting += [following for following, _ in node.next_functions]


def _scores(head: nn.Module, hidden: Tensor, labels: Tensor, count_right: bool) -> Scores:
    """Of hidden states (tokens, features), with a label for each token."""
    if torch.is_grad_enabled():
        trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
        return Scores(*_ChunkedLoss.apply(hidden, labels, head, count_right, *trained))  # type: ignore[no-untyped-call]
    scores = _none_yet(hidden, count_right)
    for place in _places(hidden, head):
        logits = head.forward(hidden[place]).float()
        scores = _with(scores, F.cross_entropy(logits, labels[place], reduction="sum"), logits, labels[place])
    return scores


class _ChunkedLoss(torch.autograd.Function):
    """The sum of the cross-entropy, whose gradient is computed along with it, part by part: nothing is run twice, and
    no logits are kept.

    Of the gradient, that of the hidden states is kept in their dtype, and that of the layer's parameters is summed in
    float32 at least.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, head: nn.Module, count_right: bool, *trained: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        scores = _none_yet(hidden, count_right)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained]
        for place in _places(hidden, head):
            part = hidden[place].detach().requires_grad_(of_hidden is not None)
            # hooks around the model, such as those that move activations to the CPU, have nothing to do here
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda kept: kept):
                logits = head.forward(part).float()
                loss = F.cross_entropy(logits, labels[place], reduction="sum")
            scores = _with(scores, loss.detach(), logits.detach(), labels[place])
            sources = [*([part] if of_hidden is not None else []), *trained]
            if not sources:
                continue
            with torch.autocast(hidden.device.type, enabled=False):
                made = list(torch.autograd.grad(loss, sources, allow_unused=True))
            if of_hidden is not None:
                of_hidden[place] = made.pop(0)
            for total, gradient in zip(sums, made, strict=True):
                if gradient is not None:
                    total += gradient
        ctx.save_for_backward(of_hidden, *(total.to(p.dtype) for total, p in zip(sums, trained, strict=True)))
        ctx.set_materialize_grads(False)
        if scores.right is not None:
            ctx.mark_non_differentiable(scores.right)
        return scores.total, scores.right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # in float32, since a loss scaled for 16 bits can be more than float16 holds
        of_hidden, *of_trained = (
            None if gradient is None else (gradient.float() * outer).to(gradient.dtype)
            for gradient in ctx.saved_tensors
        )
        return of_hidden, None, None, None, *of_trained


def _places(hidden: Tensor, head: nn.Module) -> list[slice]:
    size = max(1, LOGITS // cast("nn.Linear", head).out_features)
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def _none_yet(hidden: Tensor, count_right: bool) -> Scores:
    right = torch.zeros((), dtype=torch.int64, device=hidden.device) if count_right else None
    return Scores(torch.zeros((), device=hidden.device), right)


def _with(scores: Scores, loss: Tensor, logits: Tensor, labels: Tensor) -> Scores:
    right = None if scores.right is None else scores.right + (logits.argmax(dim=-1) == labels).sum()
    return Scores(scores.total + loss, right)
