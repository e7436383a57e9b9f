"""Compacter: its matrices against sums of torch.kron, and the factor that all layers share."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import transformers
from safetensors.torch import save
from torch import Tensor, nn

from lightning_peft import PEFTError, adapter_per_row, disable_adapters, inject, remove, set_adapter
from lightning_peft import trainable_parameters as trained
from lightning_peft.injection import adapters
from lightning_peft.methods.compacter import Compacter
from lightning_peft.state import adapter_tensors, base_keys, tensor_faults

from .models import MODELS, inputs_of

FIRST = "bert.encoder.layer.0.attention.output.dense"
SHARED = f"{FIRST}.adapters.default.shared_factor.A"


@torch.no_grad()
def move(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained(model).values():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def bert(name: str = "default", seed: int = 1) -> nn.Module:
    torch.manual_seed(3)
    return move(inject(MODELS["bert"](), Compacter(reduction=4, n=2), adapter_name=name), seed)


def run(model: nn.Module) -> Tensor:
    torch.manual_seed(5)
    with torch.no_grad():
        return model.eval()(**inputs_of("bert")).logits


def kron_sum(A: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return sum((torch.kron(A[i], torch.outer(s[i], t[i])) for i in range(len(A))), torch.zeros(()))


@pytest.mark.parametrize(("n", "width", "r"), [(1, 6, 3), (2, 8, 4), (3, 6, 3), (4, 12, 8)])
def test_the_adapter_is_the_equation_with_sums_of_kronecker_products(n: int, width: int, r: int) -> None:
    base = nn.Linear(5, width).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    model = inject(nn.Sequential(copy.deepcopy(base)), Compacter(r=r, n=n, activation="tanh", target_modules=["0"]))
    move(model)
    own = {name.removeprefix("0.adapters.default."): p for name, p in trained(model).items()}
    assert {name: tuple(p.shape) for name, p in own.items()} == {
        "shared_factor.A": (n, n, n),
        "down.s": (n, r // n),
        "down.t": (n, width // n),
        "down.bias": (r,),
        "up.s": (n, width // n),
        "up.t": (n, r // n),
        "up.bias": (width,),
    }
    A = own["shared_factor.A"]
    D, U = kron_sum(A, own["down.s"], own["down.t"]), kron_sum(A, own["up.s"], own["up.t"])
    assert (tuple(D.shape), tuple(U.shape)) == ((r, width), (width, r))
    h = base(x)
    expected = h + (h @ D.T + own["down.bias"]).tanh() @ U.T + own["up.bias"]
    output = model(x)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    wanted, grad = list(own.values()), torch.randn_like(output)
    for one, other in zip(
        torch.autograd.grad(output, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def test_at_the_start_up_is_zero_and_down_has_the_size_of_a_kaiming_matrix() -> None:
    model = nn.Sequential(nn.Linear(4, 512), *[nn.Linear(512, 512) for _ in range(40)])
    inject(model, Compacter(r=64, target_modules=r"\d+"))
    own = list(adapters(model, "default").values())
    assert all(not each.up.matrix().any() for each in own)
    deviation = torch.stack([each.down.matrix().detach() for each in own]).std().item()
    # A is one draw for all, and varies the size that all share
    assert 0.6 < deviation * (3 * 512) ** 0.5 < 1.5


def test_counts() -> None:
    config = transformers.T5Config(d_model=768, d_ff=3072, d_kv=64, num_layers=12, num_heads=12)
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
        llama = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=32000,
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=32,
            )
        )
    # 2·(k + d) of vectors and k + d of biases for each adapter; d 768, k 24; 12 layers with two, 12 with three
    inject(model, Compacter())
    assert sum(p.numel() for p in trained(model).values()) == 12 * 5 * 3 * (24 + 768) + 4**3
    # as the paper counts T5-base: two adapters in each of 24 layers, with 47,616 of layer norms, are 0.073 % of 222.9M
    inject(remove(model), Compacter(exclude_modules=r".*EncDecAttention\.o"))
    count = sum(p.numel() for p in trained(model).values())
    assert count == 24 * 2 * 3 * (24 + 768) + 4**3 == 114_112
    assert round(100 * (count + 47_616) / 222.9e6, 3) == 0.073
    inject(llama, Compacter())
    assert sum(p.numel() for p in trained(llama).values()) == 32 * 2 * 3 * (128 + 4096) + 4**3
    assert all(p.is_meta for p in trained(llama).values())


def test_the_shared_factor_is_one_parameter_under_one_key() -> None:
    model = bert()
    places = [f"bert.encoder.layer.{i}.{end}.dense" for i in range(2) for end in ("attention.output", "output")]
    assert [*adapters(model, "default")] == places
    assert [name for name in trained(model) if name.endswith(".A")] == [SHARED]
    assert [key for key in model.state_dict() if key.endswith(".A")] == [SHARED]
    assert [key for key in adapter_tensors(model, "default") if key.endswith(".A")] == [SHARED]
    # every layer reads it
    one = dict(model.named_parameters())[SHARED]
    for adapter in adapters(model, "default").values():
        for end in (adapter.down, adapter.up):
            (grad,) = torch.autograd.grad(end.matrix().square().sum(), one)
            assert grad.abs().max() > 0


def test_its_bytes_are_written_once() -> None:
    few = bert()
    many = MODELS["bert"]()
    many.bert.encoder.layer = nn.ModuleList([copy.deepcopy(many.bert.encoder.layer[0]) for _ in range(6)])
    n, width, r = 8, 32, 8
    sizes = []
    for model in (few, many):
        inject(remove(model), Compacter(r=r, n=n))
        tensors = {key: tensor.detach().clone() for key, tensor in adapter_tensors(model, "default").items()}
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
        assert len(save(tensors)) - sizes[-1] < 200 * len(tensors)
    per_adapter = 3 * (width + r) * 4
    assert sizes == [4 * n**3 + 4 * per_adapter, 4 * n**3 + 12 * per_adapter]


def assert_shared(model: nn.Module, name: str = "default") -> None:
    """All adapters use the one that is registered: a change of it changes every matrix."""
    own = list(adapters(model, name).values())
    shared = own[0].shared_factor
    assert {id(end.shared_factor[0]) for each in own for end in (each.down, each.up)} == {id(shared)}
    before = [each.down.matrix().detach().clone() for each in own]
    with torch.no_grad():
        shared.A.add_(1)
        after = [each.down.matrix().detach().clone() for each in own]
        shared.A.sub_(1)
    assert all((one - other).abs().max() > 0 for one, other in zip(before, after, strict=True))


def test_copies_pickles_and_saved_models_keep_the_sharing_among_themselves() -> None:
    model = bert()
    expected = run(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert torch.equal(run(copied), expected)
        assert_shared(copied)
        assert dict(copied.named_parameters())[SHARED] is not dict(model.named_parameters())[SHARED]
        with torch.no_grad():
            dict(copied.named_parameters())[SHARED].add_(1)
        assert not torch.equal(run(copied), expected)
    assert torch.equal(run(model), expected)


def test_a_move_to_another_dtype_or_device_keeps_it() -> None:
    model = bert().double()
    assert_shared(model)
    assert run(bert().double()).dtype == torch.float64
    with torch.device("meta"):
        moved = bert().to("meta")
    assert {p.device.type for p in moved.parameters()} == {"meta"}
    own = adapters(moved, "default")[FIRST]
    assert own.down.matrix().is_meta


def test_it_loads_into_another_model() -> None:
    model, other = bert(), bert(seed=2)
    tensors = {key: tensor.clone() for key, tensor in adapter_tensors(model, "default").items()}
    assert tensor_faults(adapter_tensors(other, "default"), tensors, base_keys(other)) == []
    other.load_state_dict(tensors, strict=False)
    assert torch.equal(run(other), run(model))
    assert_shared(other)


def test_two_adapters_have_a_factor_each() -> None:
    model = bert("first", seed=1)
    move(inject(model, Compacter(reduction=4, n=2), adapter_name="second"), seed=2)
    alone = {}
    for name in ("first", "second"):
        set_adapter(model, name)
        alone[name] = run(model)
        assert_shared(model, name)
        assert [key for key in trained(model) if key.endswith(".A")] == [SHARED.replace("default", name)]
    with disable_adapters(model):
        base = run(model)
    with adapter_per_row(model, ["second", None, "first"]):
        together = run(model)
    expected = torch.stack([alone["second"][0], base[1], alone["first"][2]])
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-6)
    remove(model)
    assert not any("adapters" in key for key in model.state_dict())
    assert torch.equal(run(model), base)


def test_all_of_it_trains_over_a_bf16_base_and_in_checkpointed_layers() -> None:
    model = bert().train()

    def grads() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(5)
        model(**inputs_of("bert")).logits.float().square().sum().backward()
        return {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}

    expected = grads()
    assert expected.keys() == trained(model).keys()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, grad in grads().items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6)
    torch.manual_seed(3)
    model = move(inject(MODELS["bert"]().bfloat16(), Compacter(reduction=4, n=2)))
    found = grads()
    assert found.keys() == expected.keys()
    assert {grad.dtype for grad in found.values()} == {torch.float32}
    assert torch.cosine_similarity(found[SHARED].flatten(), expected[SHARED].flatten(), dim=0) > 0.95


@pytest.mark.parametrize(
    ("fields", "faults"),
    [
        ({"n": 0}, ["n: 0 is no number of products; it must be 1 or more"]),
        ({"n": 2.5}, ["n: 2.5 is no number of products; it must be 1 or more"]),
        (
            {"n": 0, "reduction": 0},
            [
                "reduction: 0 is no divisor; it must be 1 or more",
                "n: 0 is no number of products; it must be 1 or more",
            ],
        ),
    ],
)
def test_wrong_fields(fields: dict[str, int], faults: list[str]) -> None:
    with pytest.raises(PEFTError) as error:
        Compacter(**fields)
    assert list(error.value.faults) == [f"Compacter.{fault}" for fault in faults]


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        (
            {"reduction": 8, "n": 5},
            "n: 5 does not divide 32 and 4; it must divide the width, 32, and the bottleneck, 4",
        ),
        ({"n": 4}, "n: 4 does not divide 1; it must divide the width, 32, and the bottleneck, 1"),
        ({"r": 6, "n": 4}, "n: 4 does not divide 6; it must divide the width, 32, and the bottleneck, 6"),
        ({"r": 6, "n": 6}, "n: 6 does not divide 32; it must divide the width, 32, and the bottleneck, 6"),
        ({"reduction": 12}, "reduction: 12 does not divide 32 features; 1, 2, 4, 8, 16, 32 do, or give r"),
    ],
)
def test_sizes_that_do_not_fit(fields: dict[str, int], fault: str) -> None:
    model = MODELS["bert"]()
    with pytest.raises(PEFTError) as error:
        inject(model, Compacter(**fields))
    assert error.value.faults == (f"Compacter.{fault} ({FIRST} and 3 more)",)
    assert not any("adapters" in key for key in model.state_dict())
