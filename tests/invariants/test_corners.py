"""Models and orders of calls that no kind of layer stands for: what must hold there, or be refused without a trace."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import (
    METHODS,
    LoRA,
    PEFTError,
    adapter_per_row,
    disable_adapters,
    inject,
    merge,
    remove,
    set_adapter,
    unmerge,
)
from lightning_peft.injection import adapters

from .cases import CASES, Case, Subject, batch, each, floats, ids, mixtral, move, stack
from .checks import assert_same_bits, bits, frame

LORA_LIKE = [pytest.param(cls, id=name) for name, cls in METHODS.items() if issubclass(cls, LoRA)]
lora_like = pytest.mark.parametrize("method", LORA_LIKE)


def is_adapted_or_refused(
    model: nn.Module, method: type[LoRA], x: Tensor, *, save: Sequence[str] = (), **fields: object
) -> None:
    """Either `inject` raises PEFTError and leaves the model as it was, or the adapter takes part in the output."""
    own, before, values = frame(model), bits(model), model(x).detach()
    try:
        inject(model, method(r=2, **fields), modules_to_save=save)  # type: ignore[arg-type]
    except PEFTError:
        assert frame(model) == own
        assert_same_bits(bits(model), before)
        return
    torch.testing.assert_close(model(x).detach(), values, atol=1e-6, rtol=0)
    assert (move(model)(x) - values).abs().max() > 1e-4


def merged_or_skipped(model: nn.Module) -> None:
    try:
        merge(model)
    except PEFTError as error:
        pytest.skip(str(error))


class OwnAdapters(nn.Linear):
    """A layer with an attribute of the name that adapters would stand under."""

    adapters: tuple[str, ...] = ()


class TwoNames(nn.Module):
    """A head under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.alias = self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(self.head(self.layer(x)))


@lora_like
def test_a_layer_with_adapters_of_its_own_is_refused_without_a_trace(method):
    is_adapted_or_refused(
        stack(a=nn.Linear(4, 4), b=OwnAdapters(4, 4)), method, torch.ones(2, 4), target_modules=["a", "b"]
    )


@lora_like
def test_a_head_with_two_names_is_saved_by_one_of_them(method):
    is_adapted_or_refused(TwoNames(), method, torch.ones(2, 4), target_modules=["layer"], save=["head"])


@lora_like
def test_a_head_with_two_names_is_saved_by_both(method):
    is_adapted_or_refused(TwoNames(), method, torch.ones(2, 4), target_modules=["layer"], save=["head", "alias"])


@lora_like
def test_a_head_with_two_names_is_targeted_by_one_and_saved_by_the_other(method):
    is_adapted_or_refused(TwoNames(), method, torch.ones(2, 4), target_modules=["alias"], save=["head"])


@pytest.mark.parametrize("normed", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
@lora_like
def test_a_parametrized_weight_is_adapted_or_refused(method, normed: Callable[[nn.Module], nn.Module]):
    is_adapted_or_refused(
        stack(layer=normed(nn.Linear(4, 4)).eval()), method, torch.ones(2, 4), target_modules=["layer"]
    )


@lora_like
def test_a_forward_that_was_set_on_the_layer_is_adapted_or_refused(method):
    model = stack(layer=nn.Linear(4, 4))
    own = model.layer.forward
    model.layer.forward = lambda x: own(x) + 1
    is_adapted_or_refused(model, method, torch.ones(2, 4), target_modules=["layer"])


class Doubled(nn.Linear):
    """A layer whose forward was replaced on the instance, as accelerate does it: the old one is kept beside it."""

    def wrap(self) -> Doubled:
        self.old_forward = self.forward
        self.forward = self.doubled
        return self

    def doubled(self, x: Tensor) -> Tensor:
        return 2 * self.old_forward(x)


@lora_like
def test_a_forward_that_was_set_on_the_layer_is_copied_and_given_back(method):
    model = stack(layer=Doubled(4, 4).wrap())
    x, own = torch.ones(2, 4), frame(model)
    values = model(x)
    move(inject(model, method(r=2, target_modules=["layer"])))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    for restored in (remove(copied), remove(model)):
        assert torch.equal(restored(x), values)
        assert frame(restored) == own


@pytest.mark.xfail(
    strict=True,
    raises=RecursionError,
    reason="the kept method is pickled by its name, forward, and unpickled as the swapped class's: it calls itself",
)
@lora_like
def test_a_forward_that_was_set_on_the_layer_is_pickled(method):
    model = stack(layer=Doubled(4, 4).wrap())
    x = torch.ones(2, 4)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    move(inject(model, method(r=2, target_modules=["layer"])))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@lora_like
def test_a_lazy_layer_elsewhere_is_left_to_itself_or_refused(method):
    model = stack(layer=nn.Linear(4, 4), lazy=nn.LazyLinear(2))
    with suppress(PEFTError):
        inject(model, method(r=2, target_modules=["layer"]))
    assert model(torch.ones(3, 4)).shape == (3, 2)


@lora_like
def test_an_attribute_of_an_instance_is_no_adapter_name(method):
    model = stack(layer=nn.Linear(4, 4))
    own = frame(model)
    with pytest.raises(PEFTError) as error:
        inject(model, method(target_modules=["layer"]), adapter_name="training")
    message = "adapter_name: 'training' can't be one: it must be without dots, and no attribute of ModuleDict"
    assert error.value.faults == (message,)
    assert frame(model) == own


@lora_like
def test_dropout_on_experts_is_told_beside_the_other_faults(method):
    fields = {"target_modules": ["nope"], "target_parameters": ["experts.down_proj"], "dropout": 0.1}
    with pytest.raises(PEFTError) as error:
        inject(mixtral("eager")(), method(**fields))
    assert len(error.value.faults) >= 2
    assert [fault for fault in error.value.faults if not fault.startswith(f"{method.__name__}.")] == []


@lora_like
def test_every_name_that_is_excluded_has_to_match(method):
    model = stack(layer=nn.Linear(4, 4), head=nn.Linear(4, 4), last=nn.Linear(4, 4))
    with pytest.raises(PEFTError, match=r"exclude_modules: .*'haed'.* matches nothing; did you mean 'head'\?"):
        inject(model, method(exclude_modules=["haed", "last"]))


@lora_like
def test_no_empty_name_is_proposed(method):
    with pytest.raises(PEFTError) as error:
        inject(nn.Linear(4, 4), method(target_modules=".*"))
    assert "''" not in str(error.value)


@lora_like
def test_an_expression_that_is_too_large_is_refused(method):
    with pytest.raises(PEFTError, match=f"^{method.__name__}.target_modules: .* is not a regular expression"):
        method(target_modules="a{99999999999999999999}")


@lora_like
def test_the_rows_of_an_embedding_with_max_norm_are_left_as_they_are(method):
    subject = Subject(method, Case("max-norm", lambda: stack(layer=nn.Embedding(24, 8, max_norm=0.5)), ids))
    model = subject.adapted()
    before, adapted = model.layer.weight.clone(), subject.values(model)
    assert torch.equal(model.layer.weight, before)
    assert (adapted - subject.values(subject.base())).abs().max() > 1e-3


@each("linear")
def test_another_adapter_is_set_on_a_merged_model_or_refused(subject: Subject):
    model = subject.put(subject.adapted(name="first"), "second")
    expected = subject.values(model)
    set_adapter(model, "first")
    merged_or_skipped(model)
    with suppress(PEFTError):
        set_adapter(model, "second")
        torch.testing.assert_close(subject.values(model), expected, atol=1e-5, rtol=1e-5)
    set_adapter(unmerge(model), "second")
    assert torch.equal(subject.values(model), expected)


@each("linear")
def test_rows_of_a_merged_model_are_right_or_refused(subject: Subject):
    model = subject.adapted()
    expected = subject.values(model)
    merged_or_skipped(model)
    with suppress(PEFTError), adapter_per_row(model, ["default"] * len(expected)):
        torch.testing.assert_close(subject.values(model), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(subject.values(unmerge(model)), expected)


@each("linear")
def test_disabling_inside_of_rows_and_rows_inside_of_disabling(subject: Subject):
    model = subject.adapted()
    adapted = subject.values(model)
    base = subject.values(subject.base())
    expected = torch.cat([adapted[:1], base[1:]])
    with disable_adapters(model):
        assert torch.equal(subject.values(model), base)
        with adapter_per_row(model, ["default", None, None, None]):
            torch.testing.assert_close(subject.values(model), expected, atol=1e-6, rtol=0)
        assert torch.equal(subject.values(model), base)
    assert torch.equal(subject.values(model), adapted)


@each("linear")
def test_rows_inside_of_rows(subject: Subject):
    model = subject.adapted()
    expected = torch.cat([subject.values(model)[:1], subject.values(subject.base())[1:]])
    with adapter_per_row(model, ["default", None, None, None]):
        with adapter_per_row(model, [None] * 4):
            torch.testing.assert_close(subject.values(model), subject.values(subject.base()), atol=1e-6, rtol=0)
        torch.testing.assert_close(subject.values(model), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "method",
    [pytest.param(cls, id=name) for name, cls in METHODS.items()],
)
def test_an_adapter_for_a_merged_model_starts_from_its_base_or_is_refused(method):
    subject = Subject(method, next(case for case in CASES if case.name == "linear"))
    model = subject.base()
    expected = subject.values(model)
    subject.put(model, "first")
    try:
        merge(model)
    except PEFTError as error:
        pytest.skip(str(error))
    try:
        subject.inject(model, "second")
    except PEFTError:
        assert [*adapters(model, "second")] == []
        return
    torch.testing.assert_close(subject.values(unmerge(model)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("init", ["gaussian", "pissa", "pissa_niter_4", "olora"])
@lora_like
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(6, 5),
        lambda: nn.Conv2d(4, 6, 3),
        lambda: nn.Embedding(24, 8),
        lambda: nn.MultiheadAttention(8, 2),
    ],
    ids=["linear", "conv2d", "embedding", "attention"],
)
def test_other_starts_compute_the_base_too_and_leave_its_bits(method, init: str, make: Callable[[], nn.Module]):
    layer = make().eval()
    x = {nn.Conv2d: floats(4, 5, 5), nn.Linear: floats(6), nn.Embedding: ids}.get(type(layer), floats(5, 8))()

    def run() -> Tensor:
        with torch.no_grad():
            return layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)

    expected, before = run(), bits(layer)
    model = inject(stack(layer=layer), method(r=3, init=init, target_modules=["layer"]))
    torch.testing.assert_close(run(), expected, atol=1e-5, rtol=0)
    assert_same_bits({key: layer.state_dict()[key] for key in before}, before)
    move(model)
    adapted = run()
    assert (adapted - expected).abs().max() > 1e-3
    merge(model)
    torch.testing.assert_close(run(), adapted, atol=1e-5, rtol=1e-5)


@each("linear", "conv2d-reflect", "embedding")
def test_on_the_meta_device_the_outputs_have_their_shape(subject: Subject):
    model = subject.put(subject.base().to("meta"), moved=False)
    y = subject.case.call(model, batch(subject.case, 0).to("meta"))
    assert (y.shape, y.device.type) == (subject.values(subject.base()).shape, "meta")


@each()
def test_on_the_meta_device_every_adapter_has_its_place(subject: Subject):
    real = subject.put(subject.base(), moved=False)
    model = subject.put(subject.base().to("meta"), moved=False)
    places = [
        {name: (p.shape, p.dtype, p.requires_grad) for name, p in each_model.named_parameters(remove_duplicate=False)}
        for each_model in (model, real)
    ]
    assert places[0] == places[1]
    assert {p.device.type for p in model.parameters()} == {"meta"}
