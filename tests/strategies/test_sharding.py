"""What is done to a base's tensors on the way to FSDP2, without a group of processes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import PEFTError
from lightning_peft.quantization import quantize
from lightning_peft.strategies import sharding


@pytest.mark.parametrize("integers", [True, False])
def test_codes_are_shared_out_as_numbers_where_torch_takes_no_integers(
    integers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(sharding, "SHARDS_INTEGERS", integers)
    layer = quantize(nn.Sequential(nn.Linear(64, 32)), "nf4")[0]
    x = torch.randn(3, 64)
    expected, codes = layer(x), layer.weight.data.clone()
    plain = sharding._plain(layer.weight)
    assert type(plain) is nn.Parameter
    assert not plain.requires_grad
    assert plain.dtype == (torch.uint8 if integers else torch.bfloat16)
    assert torch.equal(plain.data.view(torch.uint8).flatten(), codes.flatten())
    layer._parameters["weight"] = plain
    assert torch.equal(layer(x), expected)


def test_eight_bits_are_refused_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(sharding, "SHARDS_INTEGERS", False)
    layer = quantize(nn.Sequential(nn.Linear(64, 32)), "int8")[0]
    with pytest.raises(PEFTError) as error:
        sharding._plain(layer.weight)
    assert str(error.value) == (
        f"peft_fsdp: torch {torch.__version__} can't shard these codes; quantize to 4 bits, or take torch 2.12"
    )


def test_shards_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)), nn.Linear(4, 2))
    shard = model[0][0].weight
    monkeypatch.setattr(sharding, "is_sharded", lambda tensor: tensor is shard)
    sharding.move_whole(model, torch.device("meta"))
    devices = {name: tensor.device.type for name, tensor in model.state_dict().items()}
    assert devices == {name: "cpu" if name == "0.0.weight" else "meta" for name in devices}
    assert isinstance(model[0][0].weight, Tensor)
    assert model[0][0].weight is shard
