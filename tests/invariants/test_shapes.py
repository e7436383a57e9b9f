"""Linear, convolution and embedding layers of any shape: outputs and gradients are those of the merged weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_peft import METHODS, Method

from .cases import Case, Subject, stack
from .checks import assert_same, gradients, merged_result

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
sizes = st.integers(1, 5)


def check(method: type[Method], layer: nn.Module, x: Tensor, r: int) -> None:
    torch.manual_seed(0)
    model = stack(layer=layer, act=nn.Tanh()).double()
    subject = Subject(method, Case("shape", lambda: model, lambda: x))
    adapted = subject.adapted(torch.float64, r=r)
    y, found = gradients(adapted, lambda: subject.run(adapted, x=x))
    base = model(x.double() if x.is_floating_point() else x)
    assert (y.shape, y.dtype) == (base.shape, torch.float64)
    assert_same((y, found), merged_result(adapted, model, lambda bare: subject.run(bare, x=x)), 1e-9)


@every_method
@quick
@given(
    batch=st.lists(st.integers(0, 3), max_size=3),
    features=st.tuples(sizes, sizes),
    bias=st.booleans(),
    r=st.integers(1, 7),
)
def test_linear(method, batch, features, bias, r):
    check(method, nn.Linear(*features, bias=bias), torch.randn(*batch, features[0]), r)


@every_method
@quick
@given(data=st.data())
def test_convolution(method, data):
    dims, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))

    def each_dim(low: int, high: int) -> tuple[int, ...]:
        return data.draw(st.tuples(*[st.integers(low, high)] * dims))

    channels = [groups * data.draw(st.integers(1, 2)) for _ in range(2)]
    kernel, dilation, size = each_dim(1, 3), each_dim(1, 2), each_dim(3, 6)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    named = data.draw(st.sampled_from(["same", "valid", None]))
    padding = named or each_dim(0, 2)
    stride = (1,) * dims if named == "same" else each_dim(1, 3)
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    around = {"same": max(reach) // 2 + 1, "valid": 0}.get(named, 2)
    assume(mode == "zeros" or around < min(size))
    assume(all(s + 2 * (p if named is None else 0) >= n for s, p, n in zip(size, padding, reach, strict=False)))
    assume(named is None or all(s >= n for s, n in zip(size, reach, strict=True)))
    options = {"groups": groups, "bias": data.draw(st.booleans()), "padding_mode": mode}
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        *channels, kernel, stride=stride, padding=padding, dilation=dilation, **options
    )
    rows = data.draw(st.sampled_from([(), (1,), (2,)]))
    check(method, layer, torch.randn(*rows, channels[0], *size), groups * data.draw(st.integers(1, 2)))


@every_method
@quick
@given(batch=st.lists(st.integers(0, 3), max_size=3), vocabulary=sizes, dim=sizes, r=st.integers(1, 7))
def test_embedding(method, batch, vocabulary, dim, r):
    check(method, nn.Embedding(vocabulary, dim), torch.randint(0, vocabulary, batch), r)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@quick
@given(batch=st.lists(st.integers(0, 3), min_size=1, max_size=2), features=st.tuples(sizes, sizes), bias=st.booleans())
def test_linear_in_half_precision_gives_its_dtype_and_finite_gradients(method, dtype, batch, features, bias):
    torch.manual_seed(0)
    x = torch.randn(*batch, features[0])
    subject = Subject(method, Case("shape", lambda: stack(layer=nn.Linear(*features, bias=bias)), lambda: x))
    model = subject.adapted(dtype)
    y, found = gradients(model, lambda: subject.run(model, x=x))
    assert (y.shape, y.dtype) == ((*batch, features[1]), dtype)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in found.values())
    full = subject.adapted()
    torch.testing.assert_close(y.float(), subject.run(full, x=x).detach(), atol=0.1, rtol=0.1)
