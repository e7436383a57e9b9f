"""What a pruned diff is in a state dict, and that a few lines apply it to the base bit for bit."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import DiffPruning, PEFTError, disable_adapters, inject, merge, trainable_parameters, unmerge
from lightning_peft.state import adapter_tensors
from tests.invariants.cases import Tied
from tests.invariants.checks import assert_same_bits, bits
from tests.methods.test_diff_pruning import attached, diffs, moved, seen, small


def pruned(model: nn.Module, **fields: object) -> nn.Module:
    method = DiffPruning(**{"target": 0.3, "alpha_init": 0.5, **fields})  # type: ignore[arg-type]
    moved(inject(model, method))
    method.after_step(attached(model), 70, 100)
    return model.eval()


def apply_by_hand(base: dict[str, Tensor], state: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """A pruned adapter's state on a bare model's: of each module the parameters `names`, one after the other."""
    result = {key: tensor.clone() for key, tensor in base.items()}
    for key in [key for key in state if key.endswith(".indices")]:
        path = key.partition(".adapters.")[0]
        values = state[key.replace("indices", "values")]
        start = 0
        for name in names:
            if (weight := result.get(f"{path}.{name}")) is None:
                continue
            flat = weight.view(-1)
            for place, value in zip(state[key].tolist(), values, strict=True):
                if start <= place < start + flat.numel():
                    flat[place - start] = (flat[place - start].to(values.dtype) + value).to(flat.dtype)
            start += flat.numel()
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_state_is_sparse_and_gives_the_model_bit_for_bit(dtype: torch.dtype) -> None:
    bare = small().to(dtype)
    model = pruned(copy.deepcopy(bare))
    x = torch.randn(5, 6).to(dtype)
    state = adapter_tensors(model, "default")
    assert list(state) == [f"{path}.adapters.default.{name}" for path in (0, 1, 3) for name in ("indices", "values")]
    kept = [tensor for key, tensor in state.items() if key.endswith("values")]
    assert sum(map(len, kept)) == round(0.3 * 134)
    assert {tensor.dtype for tensor in state.values()} == {
        torch.int32,
        torch.float64 if dtype == torch.float64 else torch.float32,
    }
    own = {name: seen(model, name).detach() for name, _ in bare.named_parameters()}
    by_hand = apply_by_hand(bare.state_dict(), state, ["weight", "bias"])
    assert_same_bits(own, by_hand)
    assert any(not torch.equal(by_hand[name], tensor) for name, tensor in bare.state_dict().items())
    copied = copy.deepcopy(bare)
    copied.load_state_dict(by_hand)
    assert torch.equal(copied(x), model(x))
    with disable_adapters(model):
        assert torch.equal(model(x), bare(x))
    merge(model)
    assert_same_bits({name: tensor for name, tensor in bits(model).items() if "adapters" not in name}, by_hand)
    unmerge(model)
    assert torch.equal(copied(x), model(x))


@pytest.mark.parametrize("held_by_an_optimizer", [False, True])
def test_a_model_takes_the_form_of_what_it_loads(held_by_an_optimizer: bool) -> None:
    x = torch.randn(5, 6)
    gated = moved(inject(small(), DiffPruning(target=0.3, alpha_init=0.5))).eval()
    cut = pruned(small())
    other = inject(small(), DiffPruning(target=0.3)).eval()
    if held_by_an_optimizer:
        for adapter in attached(other).values():
            adapter.before_training()
    places = {name: id(parameter) for name, parameter in other.named_parameters()}
    for source in (cut, gated, gated, cut, cut):
        other.load_state_dict(adapter_tensors(source, "default"), strict=False)
        assert torch.equal(other(x), source(x))
        assert_same_bits(adapter_tensors(other, "default"), adapter_tensors(source, "default"))
        trained = trainable_parameters(other)
        assert all(".adapters." in name for name in trained)
        if held_by_an_optimizer:
            assert {name: id(parameter) for name, parameter in other.named_parameters()} == places
        else:
            entries = round(0.3 * 134) if source is cut else 2 * 134 + 6
            assert sum(parameter.numel() for parameter in trained.values()) == entries


def test_a_loaded_diff_trains_its_kept_entries_alone_and_can_be_held_by_an_optimizer() -> None:
    model, loaded = pruned(small()), inject(small(), DiffPruning(target=0.3)).eval()
    loaded.load_state_dict(adapter_tensors(model, "default"), strict=False)
    x = torch.randn(5, 6)
    for each in (model, loaded):
        each(x).square().sum().backward()
    for diff, sparse in zip(diffs(model), diffs(loaded), strict=True):
        assert torch.equal(sparse.values.grad, diff.w.grad[diff.mask])
        assert not diff.w.grad[~diff.mask].any()
    for adapter in attached(loaded).values():
        adapter.before_training()
    shapes = [[p.shape for p in trainable_parameters(each).values()] for each in (model, loaded)]
    assert shapes[0] == shapes[1]
    assert torch.equal(loaded(x), model(x))


def test_tied_parameters_share_a_diff_that_is_stored_once() -> None:
    for names in (["embedding", "head", "layer"], ["head", "layer", "embedding"]):
        torch.manual_seed(0)
        model = pruned(Tied(), target_modules=names, target=0.5)
        assert attached(model)["embedding"].diffs()["weight"] is attached(model)["head"].diffs()["weight"]
        assert torch.equal(model.embedding.weight, model.head.weight)
        state = adapter_tensors(model, "default")
        assert sorted({key.partition(".")[0] for key in state}) == ["embedding", "layer"]
        torch.manual_seed(0)
        other = inject(Tied(), DiffPruning(target_modules=names, target=0.5)).eval()
        other.load_state_dict(state, strict=False)
        x = torch.arange(10).view(2, 5)
        assert torch.equal(other(x), model(x))
        other.load_state_dict({**model.state_dict()})
        assert torch.equal(copy.deepcopy(other)(x), model(x))
    gated = inject(Tied(), DiffPruning(target=0.5, structured=False))
    file = io.BytesIO()
    torch.save(adapter_tensors(gated, "default"), file)
    assert file.tell() < 1.3 * 4 * 2 * (24 * 8 + 8 * 8 + 8) + 3000


def test_pruned_and_loaded_models_can_be_copied() -> None:
    model = pruned(small())
    loaded = inject(small(), DiffPruning(target=0.3)).eval()
    loaded.load_state_dict(adapter_tensors(model, "default"), strict=False)
    x = torch.randn(5, 6)
    for each in (model, loaded):
        for copied in (copy.deepcopy(each), pickle.loads(pickle.dumps(each))):
            assert torch.equal(copied(x), model(x))
            assert_same_bits(bits(copied), bits(each))
    assert_same_bits(adapter_tensors(model, "default"), adapter_tensors(loaded, "default"))


PLACES = "indices is no ascending list of places among 44 entries"
TYPES = "indices is torch.float32 of shape (2,); it must be a list of int32 or int64"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"indices": torch.tensor([3, 2], dtype=torch.int32)}, PLACES),
        ({"indices": torch.tensor([3, 44])}, PLACES),
        ({"indices": torch.tensor([-1, 4])}, PLACES),
        ({"indices": torch.tensor([1.0, 2.0])}, TYPES),
        ({"values": torch.ones(3)}, "values is (3,); it must have a value for each of the 2 indices"),
    ],
)  # fmt: skip
def test_indices_that_can_not_be_are_refused(wrong: dict[str, Tensor], message: str) -> None:
    model = inject(small(), DiffPruning(target_modules=["3"], target=0.1))
    before = bits(model)
    given = {"indices": torch.tensor([3, 5]), "values": torch.ones(2), **wrong}
    with pytest.raises(PEFTError) as error:
        attached(model)["3"].awaits(given)
    assert error.value.faults == (message,)
    with pytest.raises(RuntimeError, match=r"3\.adapters\.default\." + message.split("(")[0].replace(".", r"\.")):
        model.load_state_dict({f"3.adapters.default.{name}": tensor for name, tensor in given.items()}, strict=False)
    assert_same_bits(bits(model), before)
