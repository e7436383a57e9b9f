"""`Quantization`: names, fields, faults, and what transformers is told."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lightning_peft import PEFTError
from lightning_peft.quantization import Quantization
from lightning_peft.quantization import config as module

NAMES = {
    "nf4": ("nf4", False),
    "nf4-dq": ("nf4", True),
    "fp4": ("fp4", False),
    "fp4-dq": ("fp4", True),
    "int8": ("int8", False),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stands_for_a_configuration(name: str) -> None:
    config = Quantization.of(name)
    assert (config.type, config.double_quantization) == NAMES[name]
    assert config.name == name
    assert Quantization.of(config) is config
    assert Quantization(**config.fields()) == config


def test_fields_are_plain_and_make_an_equal_one() -> None:
    config = Quantization("fp4", True, "bfloat16", "bfloat16", ["a", "b.c"])
    assert config.fields() == {
        "type": "fp4",
        "double_quantization": True,
        "compute_dtype": "bfloat16",
        "storage_dtype": "bfloat16",
        "skip_modules": ["a", "b.c"],
    }
    assert Quantization(**config.fields()) == config
    assert hash(config) == hash(Quantization(**config.fields()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nf5", "quantization: 'nf5' is none of nf4, nf4-dq, fp4, fp4-dq, int8; did you mean 'nf4'?"),
        ("NF4", "quantization: 'NF4' is none of nf4, nf4-dq, fp4, fp4-dq, int8; did you mean 'nf4'?"),
        ("qlora", "quantization: 'qlora' is none of nf4, nf4-dq, fp4, fp4-dq, int8"),
        (4, "quantization: 4 is none of nf4, nf4-dq, fp4, fp4-dq, int8; or give a Quantization"),
    ],
)
def test_an_unknown_name_names_the_nearest(given: object, message: str) -> None:
    with pytest.raises(PEFTError) as error:
        Quantization.of(given)  # type: ignore[arg-type]
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        (
            {"type": "nf4-dq"},
            ["type: 'nf4-dq' is none of nf4, fp4, int8; it is 'nf4' or 'fp4' with double_quantization: true"],
        ),
        ({"type": "int4"}, ["type: 'int4' is none of nf4, fp4, int8; did you mean 'int8' or 'nf4'?"]),
        ({"double_quantization": "yes"}, ["double_quantization: 'yes' is neither true nor false"]),
        (
            {"compute_dtype": "bf16"},
            ["compute_dtype: 'bf16' is none of bfloat16, float16, float32; did you mean 'bfloat16' or 'float16'?"],
        ),
        (
            {"storage_dtype": "float32"},
            [
                "storage_dtype: 'float32' is none of uint8, bfloat16, float16; FSDP would cast it to its mixed "
                "precision's dtype, which destroys packed bits"
            ],
        ),
        (
            {"storage_dtype": "int8"},
            ["storage_dtype: 'int8' is none of uint8, bfloat16, float16; did you mean 'uint8'?"],
        ),
        ({"skip_modules": "head"}, ["skip_modules: 'head' is no list of names"]),
        ({"skip_modules": [""]}, ["skip_modules: ('',) is no list of names"]),
        (
            {"type": "int8", "double_quantization": True, "compute_dtype": "bfloat16", "storage_dtype": "bfloat16"},
            [
                "double_quantization: int8 has one scale a row, too few to be quantized; leave it out",
                "compute_dtype: int8 can't do 'bfloat16', it multiplies in the dtype of its input; leave it out, and "
                "set the Trainer's precision or base_dtype",
                "storage_dtype: int8 can't do 'bfloat16', its weights are int8 tensors; leave it out",
            ],
        ),
    ],
)
def test_all_faults_are_told_at_once(fields: dict[str, object], messages: list[str]) -> None:
    with pytest.raises(PEFTError) as error:
        Quantization(**fields)  # type: ignore[arg-type]
    assert error.value.faults == tuple(f"Quantization.{message}" for message in messages)


def test_bitsandbytes_missing_is_told_before_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(PEFTError) as error:
        Quantization.of("nf4-dq")
    assert str(error.value) == 'quantization: nf4-dq needs bitsandbytes; pip install "lightning-peft[quantization]"'


def test_transformers_is_told_the_same() -> None:
    config = Quantization("nf4", True, "bfloat16", "bfloat16", ["a"]).bits_and_bytes_config(["b"])
    assert config.load_in_4bit
    assert not config.load_in_8bit
    assert config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == config.bnb_4bit_quant_storage == torch.bfloat16
    assert config.llm_int8_skip_modules == ["a", "b"]
    plain = Quantization.of("fp4").bits_and_bytes_config()
    assert plain.bnb_4bit_quant_storage == torch.uint8
    assert plain.llm_int8_skip_modules is None
    assert Quantization.of("int8").bits_and_bytes_config().load_in_8bit


def test_nothing_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, lightning_peft.quantization as q; q.Quantization.of('nf4'); q.quantize\n"
        "assert 'bitsandbytes' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
