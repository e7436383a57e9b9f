"""The callback over a quantized base: what it prepares, what a checkpoint says of it, and what is refused."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import Tensor, nn

from lightning_peft import PEFT, DiffPruning, LoRA, PEFTError, inject, load_from_checkpoint, remove
from lightning_peft.callback import AS_SAVED, load_adapter
from lightning_peft.callback.base import Base
from lightning_peft.callback.compatibility import AVERAGED_CODES
from lightning_peft.methods._quantized import packed
from lightning_peft.quantization import Quantization, dequantize, quantize
from lightning_peft.quantization.loading import LoadingPolicy, loading, loading_policy
from lightning_peft.state import base_keys, base_quantization, read_checkpoint
from tests.callback.toys import BuiltInConfigureModel, BuiltInSetup, Toy, data, lora, trainer

KINDS = ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"]
OTHER = (
    "checkpoint: the base is not the one that the adapter was trained on (other dtypes and other values): it was {was} "
    "there and is {now} here; {do}, or pass allow_other_base=True if you mean it"
)


def peft(quantization: Any = "nf4", **options: Any) -> PEFT:
    return PEFT(lora(), modules_to_save=["head"], quantization=quantization, **options)


def fitted(folder: Path, module: L.LightningModule, callback: PEFT, **options: Any) -> Path:
    """Where `fit` wrote the last checkpoint, with the same random numbers for each."""
    torch.manual_seed(0)
    run = trainer(folder, peft=callback, **options)
    run.fit(module, data())
    return Path(run.checkpoint_callback.best_model_path)  # type: ignore[union-attr]


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor of its state, packed ones included."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one epoch over an nf4-dq base."""
    return fitted(tmp_path_factory.mktemp("saved"), Toy(), peft("nf4-dq"), max_epochs=1)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one epoch over a base that is not quantized."""
    return fitted(tmp_path_factory.mktemp("dense"), Toy(), peft(None), max_epochs=1)


@pytest.mark.parametrize("cls", [Toy, BuiltInSetup, BuiltInConfigureModel])
@pytest.mark.parametrize("kind", KINDS)
def test_the_backbone_is_quantized_and_the_head_and_norms_are_not(cls: type[Toy], kind: str, tmp_path: Path) -> None:
    module = cls()
    run = trainer(tmp_path, peft=peft(kind), max_epochs=1, limit_train_batches=1, enable_checkpointing=False)
    run.fit(module, data())
    assert {name for name, part in module.named_modules() if packed(part)} == {"body.0", "body.4"}
    assert base_quantization(module) == kind
    assert {type(part) for part in (module.head, module.body[1])}.isdisjoint({type(module.body[0])})
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert all(".adapters.default." in name for name in trained)
    assert len(trained) == 6


def test_the_codes_are_those_of_the_weights_themselves(tmp_path: Path) -> None:
    module, bare = Toy(), Toy()
    fitted(tmp_path, module, peft("nf4"), max_epochs=1)
    for place in (0, 4):
        codes, state = bitsandbytes.functional.quantize_4bit(bare.body[place].weight.data, quant_type="nf4")
        assert torch.equal(module.body[place].weight.data, codes)
        assert torch.equal(packed(module.body[place]).scales, state.absmax)  # type: ignore[union-attr]


def test_what_trains_gets_the_gradients_of_a_dense_base_of_the_same_values(tmp_path: Path) -> None:
    """After a validation, in which bitsandbytes would repack its layers on some CPUs."""
    module = Toy()
    run = trainer(tmp_path, peft=peft("nf4-dq"), enable_checkpointing=False, max_epochs=1)
    run.fit(module, data(), data())
    reference = Toy()
    quantize(reference.body, "nf4-dq")
    dequantize(reference.body, torch.float32)
    inject(reference, lora(), modules_to_save=["head"])
    reference.load_state_dict({name: value for name, value in weights(module).items() if ".adapters." in name}, False)
    batch = next(iter(data()))
    gradients = []
    for each in (module, reference):
        each.eval().zero_grad()
        each.loss(batch).backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.cosine_similarity(gradient.flatten(), gradients[1][name].flatten(), dim=0) > 0.9999, name


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "int8"])
def test_two_epochs_and_a_resumed_third_are_three_bit_for_bit(kind: str, tmp_path: Path) -> None:
    unbroken = Toy()
    fitted(tmp_path / "unbroken", unbroken, peft(kind), max_epochs=3)
    first = fitted(tmp_path / "broken", Toy(), peft(kind), max_epochs=2)
    resumed = Toy()
    torch.manual_seed(1)
    trainer(tmp_path / "broken", peft=peft(kind), max_epochs=3).fit(resumed, data(), ckpt_path=first)
    assert same(weights(unbroken), weights(resumed))


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_holds_no_packed_tensor(weights_only: bool, tmp_path: Path) -> None:
    module = Toy()
    run = trainer(tmp_path, peft=peft("nf4-dq"), max_epochs=1, enable_checkpointing=False)
    run.fit(module, data())
    keys = {key for key in module.state_dict() if key.startswith("body.0.weight")}
    assert {"body.0.weight", "body.0.weight.absmax", "body.0.weight.nested_quant_map"} < keys
    assert keys < base_keys(module)
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    moved = {"body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"}
    assert {key for key in state if ".adapters." not in key and " " not in key} <= moved
    assert all(tensor.dtype != torch.uint8 for tensor in state.values())


def test_a_checkpoint_says_how_its_base_is_stored(saved: Path, dense: Path) -> None:
    spec = read_checkpoint(saved)["peft"]
    assert spec["quantization"] == Quantization.of("nf4-dq").fields()
    assert (spec["stored"], spec["base_dtype"]) == ("nf4-dq", None)
    spec = read_checkpoint(dense)["peft"]
    assert (spec["quantization"], spec["stored"], spec["base_dtype"]) == (None, "", None)


def test_loading_quantizes_as_in_training(tmp_path: Path) -> None:
    module = Toy()
    config = Quantization(type="fp4", skip_modules=["body.4"])
    path = fitted(tmp_path, module, peft(config, base_dtype="bfloat16"), max_epochs=1)
    loaded = load_from_checkpoint(Toy, path)
    assert same(weights(module), weights(loaded))
    assert loaded.body[4].weight.dtype == loaded.head.weight.dtype == torch.bfloat16
    x = next(iter(data()))[0].bfloat16()
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    again = trainer(tmp_path, peft=peft(config, base_dtype="bfloat16"), max_epochs=1)
    assert again.validate(loaded, data(), verbose=False) == again.validate(module, data(), verbose=False)


def test_a_checkpoint_from_before_quantization_loads(dense: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(dense, weights_only=True)
    for name in ("quantization", "stored", "base_dtype"):
        del checkpoint["peft"][name]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    x = next(iter(data()))[0]
    old, new = load_from_checkpoint(Toy, tmp_path / "old.ckpt"), load_from_checkpoint(Toy, dense)
    assert torch.equal(old.eval()(x), new.eval()(x))
    with pytest.raises(PEFTError) as error:
        trainer(tmp_path, peft=peft("nf4"), max_epochs=2).fit(Toy(), data(), ckpt_path=tmp_path / "old.ckpt")
    assert str(error.value) == OTHER.format(was="not quantized", now="nf4", do="leave quantization out")


@pytest.mark.parametrize(
    ("path", "quantization", "was", "now", "do"),
    [
        ("saved", None, "quantized to nf4-dq", "not quantized", "pass quantization='nf4-dq'"),
        ("saved", "int8", "quantized to nf4-dq", "int8", "pass quantization='nf4-dq'"),
        ("dense", "nf4", "not quantized", "nf4", "leave quantization out"),
    ],
)
def test_another_quantization_is_named_and_can_be_allowed(
    path: str, quantization: str | None, was: str, now: str, do: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    file: Path = request.getfixturevalue(path)
    message = OTHER.format(was=was, now=now, do=do)
    with pytest.raises(PEFTError) as error:
        load_from_checkpoint(Toy, file, quantization=quantization)
    assert str(error.value) == message
    with pytest.raises(PEFTError) as error:
        trainer(tmp_path, peft=peft(quantization)).validate(Toy(), data(), ckpt_path=file, verbose=False)
    assert str(error.value) == message
    loaded = load_from_checkpoint(Toy, file, quantization=quantization, allow_other_base=True)
    assert base_quantization(loaded) == (quantization or "")
    key = "body.0.adapters.default.lora_B"
    assert torch.equal(loaded.state_dict()[key], read_checkpoint(file)["state_dict"][key])
    allowed = trainer(tmp_path, peft=peft(quantization, allow_other_base=True))
    allowed.validate(Toy(), data(), ckpt_path=file, verbose=False)


def test_other_fields_of_a_quantization_are_named(saved: Path, tmp_path: Path) -> None:
    config = replace(Quantization.of("nf4-dq"), skip_modules=("body.4",))
    with pytest.raises(PEFTError) as error:
        load_from_checkpoint(Toy, saved, quantization=config)
    assert str(error.value) == (
        "checkpoint: the base is not the one that the adapter was trained on (other dtypes and other values): "
        "quantization's skip_modules was [] there and is ['body.4'] here; load it as it was there, or pass "
        "allow_other_base=True if you mean it"
    )
    with pytest.raises(PEFTError, match="base_dtype was None there and is 'bfloat16' here"):
        load_from_checkpoint(Toy, saved, base_dtype="bfloat16")


def test_without_bitsandbytes_the_error_says_how_to_load(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_peft.quantization.config.find_spec", lambda name: None)
    with pytest.raises(PEFTError) as error:
        load_from_checkpoint(Toy, saved)
    assert str(error.value) == (
        f'{saved}: quantization: nf4-dq needs bitsandbytes; pip install "lightning-peft[quantization]"\n'
        "or load the adapter onto the base as it is: quantization=None, allow_other_base=True"
    )
    assert base_quantization(load_from_checkpoint(Toy, saved, quantization=None, allow_other_base=True)) == ""
    with pytest.raises(PEFTError, match=r'^PEFT\.quantization: int8 needs bitsandbytes; pip install "lightning-peft'):
        peft("int8")


def test_an_adapter_is_loaded_onto_a_module_at_hand(saved: Path) -> None:
    module, plain = Toy(), Toy()
    load_adapter(module, read_checkpoint(saved), str(saved), quantization=AS_SAVED)
    assert base_quantization(module) == "nf4-dq"
    load_adapter(plain, read_checkpoint(saved), str(saved), quantization=None, allow_other_base=True)
    assert base_quantization(plain) == ""


def test_removing_gives_back_the_quantized_base(tmp_path: Path) -> None:
    module, bare = Toy(), Toy()
    fitted(tmp_path, module, peft("nf4"), max_epochs=1)
    quantize(bare.body, "nf4")
    remove(module)
    assert type(module) is Toy
    assert type(module.body[0]) is type(bare.body[0])
    kept = {name: value for name, value in weights(module).items() if "body.1" not in name}
    assert same(kept, {name: value for name, value in weights(bare).items() if "body.1" not in name})
    # and a second run stands on it as it is
    trainer(tmp_path, peft=peft("nf4"), max_epochs=1, enable_checkpointing=False).fit(module, data())
    assert torch.equal(module.body[0].weight.data, bare.body[0].weight.data)


def test_a_module_can_be_copied_and_pickled(saved: Path) -> None:
    module = load_from_checkpoint(Toy, saved).eval()
    x = next(iter(data()))[0]
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert same(weights(twin), weights(module))
        assert torch.equal(twin(x), module(x))


def test_the_same_module_runs_again(tmp_path: Path) -> None:
    module, callback = Toy(), peft("nf4")
    fitted(tmp_path, module, callback, max_epochs=1)
    codes = module.body[0].weight.data.clone()
    run = trainer(tmp_path, peft=callback, max_epochs=1, enable_checkpointing=False)
    run.fit(module, data())
    run.test(module, data(), verbose=False)
    # what is left open is as it is
    trainer(tmp_path, peft=peft(None)).validate(module, data(), verbose=False)
    assert torch.equal(module.body[0].weight.data, codes)
    with pytest.raises(PEFTError) as error:
        trainer(tmp_path, peft=peft("int8", base_dtype="bfloat16")).validate(module, data(), verbose=False)
    assert error.value.faults == (
        "quantization: the module's base was prepared with 'nf4', and not with 'int8'; make the module anew",
        "base_dtype: the module's base was prepared with None, and not with 'bfloat16'; make the module anew",
    )


class Theirs(Toy):
    """Quantizes its own body, as a module does that loads with a BitsAndBytesConfig."""

    def build(self) -> None:
        super().build()
        for place in (0, 4):
            layer = self.body[place]
            new = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, compress_statistics=False, quant_type="nf4"
            )
            new.load_state_dict(layer.state_dict())
            self.body[place] = new.to("cpu")


def test_a_base_that_quantizes_itself_is_used_as_it_is(tmp_path: Path) -> None:
    module = Theirs()
    path = fitted(tmp_path, module, peft(None), max_epochs=1)
    assert base_quantization(module) == "nf4"
    assert not module.body[0].support_avx512bf16_for_cpu
    spec = read_checkpoint(path)["peft"]
    assert (spec["quantization"], spec["stored"]) == (None, "nf4")
    assert same(weights(load_from_checkpoint(Theirs, path)), weights(module))
    with pytest.raises(PEFTError) as error:
        load_from_checkpoint(Toy, path)
    was = {"was": "quantized to nf4", "now": "not quantized", "do": "load it as nf4"}
    assert str(error.value) == OTHER.format(**was)
    # the same is asked for, and there already
    fitted(tmp_path, Theirs(), peft("nf4"), max_epochs=1)
    with pytest.raises(PEFTError, match=r"body.0 is nf4 already, which can't become int8; leave quantization out"):
        fitted(tmp_path, Theirs(), peft("int8"))


@pytest.mark.parametrize("averaging", [EMAWeightAveraging(decay=0.9), WeightAveraging()])
def test_averages_of_codes_are_refused(averaging: WeightAveraging, tmp_path: Path) -> None:
    for module, callback in ((Toy(), peft("nf4")), (Theirs(), peft(None))):
        with pytest.raises(PEFTError) as error:
            trainer(tmp_path, averaging, peft=callback, max_epochs=1).fit(module, data())
        assert error.value.faults == (AVERAGED_CODES,)


def test_arguments_are_refused_together() -> None:
    with pytest.raises(PEFTError) as error:
        PEFT("LoRA", quantization="nf5", base_dtype="bf16", base_weights="nowhere")  # type: ignore[arg-type]
    assert error.value.faults == (
        "PEFT.quantization: 'nf5' is none of nf4, nf4-dq, fp4, fp4-dq, int8; did you mean 'nf4'?",
        "PEFT.base_dtype: 'bf16' is none of bfloat16, float16, float32; did you mean 'bfloat16' or 'float16'?",
        "PEFT.base_weights: there is no file or folder 'nowhere'",
        "PEFT.method: 'LoRA' is no method; give one of lightning_peft's, for example LoRA(r=8)",
    )


def test_names_that_match_nothing_are_told_before_anything_is_quantized(tmp_path: Path) -> None:
    for names, message in (
        (["haed"], "modules_to_save: 'haed' matches nothing; did you mean 'head'?"),
        ("head", "modules_to_save: 'head' is a string; give a list, ['head']"),
    ):
        module, run = Toy(), trainer(tmp_path, peft=PEFT(lora(), modules_to_save=names, quantization="nf4"))
        with pytest.raises(PEFTError) as error:
            run.validate(module, data(), verbose=False)
        assert str(error.value) == message
        assert base_quantization(module) == ""
    module, run = Toy(), trainer(tmp_path, peft=peft(Quantization(skip_modules=["boby"])))
    with pytest.raises(PEFTError, match=r"skip_modules: 'boby' matches nothing; did you mean 'body'"):
        run.validate(module, data(), verbose=False)
    assert base_quantization(module) == ""


def test_a_mistake_can_be_mended_on_the_same_module(tmp_path: Path) -> None:
    module = Toy()
    mistyped = PEFT(lora(target_modules=["nope"]), modules_to_save=["head"], quantization="nf4")
    with pytest.raises(PEFTError, match="'nope' matches nothing"):
        fitted(tmp_path, module, mistyped)
    codes = module.body[0].weight.data.clone()
    fitted(tmp_path, module, peft("nf4"), max_epochs=1)
    assert torch.equal(module.body[0].weight.data, codes)


def test_a_method_that_can_not_stand_on_packed_weights_says_so(tmp_path: Path) -> None:
    callback = PEFT(DiffPruning(), modules_to_save=["head"], quantization="nf4")
    with pytest.raises(PEFTError, match="quantized"):
        trainer(tmp_path, peft=callback).fit(Toy(), data())


class Empty(Toy):
    """Built on the meta device, as a large model is."""

    built_in_init = False

    def configure_model(self) -> None:
        if not hasattr(self, "body"):
            with torch.device("meta"):
                self.build()


def test_a_module_on_the_meta_device_gets_its_weights_from_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    full = Toy()
    save_file(full.state_dict(), tmp_path / "model.safetensors")
    file = str(tmp_path / "model.safetensors")
    module, reference = Empty(), Toy()
    path = fitted(tmp_path, module, peft("nf4", base_weights=file, base_dtype="bfloat16"), max_epochs=1)
    fitted(tmp_path / "reference", reference, peft("nf4", base_dtype="bfloat16"), max_epochs=1)
    assert same(weights(module), weights(reference))
    assert same(weights(load_from_checkpoint(Empty, path, base_weights=file)), weights(module))
    with pytest.raises(PEFTError, match="quantization: the model is on the meta device"):
        fitted(tmp_path, Empty(), peft("nf4"))


@pytest.fixture
def policies(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LoadingPolicy | None]]:
    """Those that hold whenever a BuiltInConfigureModel is built."""
    seen: list[LoadingPolicy | None] = []
    build = BuiltInConfigureModel.build
    monkeypatch.setattr(BuiltInConfigureModel, "build", lambda self: (seen.append(loading_policy()), build(self))[1])
    yield seen
    assert loading_policy() is None


def test_who_loads_is_told_what_is_wanted(policies: list[LoadingPolicy | None], tmp_path: Path) -> None:
    BuiltInConfigureModel().configure_model()
    path = fitted(tmp_path, BuiltInConfigureModel(), peft("nf4", base_dtype="bfloat16"), max_epochs=1)
    load_from_checkpoint(BuiltInConfigureModel, path)
    load_from_checkpoint(BuiltInConfigureModel, path, map_location=None, quantization=None, allow_other_base=True)
    loftq = PEFT(LoRA(init="loftq"), modules_to_save=["head"], quantization="nf4")
    fitted(tmp_path, BuiltInConfigureModel(), loftq, max_epochs=1)
    cpu, nf4 = torch.device("cpu"), Quantization.of("nf4")
    assert policies == [
        None,
        LoadingPolicy(nf4, torch.bfloat16, cpu, ("head",)),
        LoadingPolicy(nf4, torch.bfloat16, cpu, ("head",)),
        LoadingPolicy(None, torch.bfloat16, None, ("head",)),
        # the start needs the weights as they were
        LoadingPolicy(None, None, cpu, ("head",)),
    ]


def test_a_policy_ends_with_its_block_however_that_ends() -> None:
    def fail() -> None:
        with loading(LoadingPolicy(skip=("b",))):
            seen.append(loading_policy())
            raise RuntimeError

    outer, seen = LoadingPolicy(skip=("a",)), list[LoadingPolicy | None]()
    with loading(outer):
        with pytest.raises(RuntimeError):
            fail()
        assert loading_policy() == outer
    assert loading_policy() is None
    assert seen == [LoadingPolicy(skip=("b",))]


def test_loftq_starts_nearer_to_the_dense_base(tmp_path: Path) -> None:
    x = next(iter(data()))[0]
    errors = {}
    for init in ("default", "loftq"):
        module = Toy()
        callback = PEFT(LoRA(r=4, init=init), modules_to_save=["head"], quantization="nf4")
        trainer(tmp_path, peft=callback).validate(module, data(), verbose=False)
        dense = Toy().eval()
        with torch.no_grad():
            errors[init] = float((module.eval()(x) - dense(x)).norm())
    assert 0 < errors["loftq"] < 0.8 * errors["default"]


def test_each_rank_quantizes_on_its_own_device() -> None:
    strategy = SimpleNamespace(root_device=torch.device("cuda", 3))
    run: Any = SimpleNamespace(strategy=strategy, precision="bf16-true")
    base = Base.of("nf4").under(run)
    assert (base.device, base.dtype) == (torch.device("cuda", 3), "bfloat16")
    assert base.policy(lora(), ["head"]).device == torch.device("cuda", 3)
    assert Base.of(None).under(run).dtype is None


def test_the_summary_names_the_quantization(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fitted(tmp_path, Toy(), peft("nf4-dq"), max_epochs=1)
    lines = capsys.readouterr().out
    # codes of half a byte, one scale byte for each 64 of 128 and 256 values, and one fp32 scale of those for each layer
    stored = (128 + 256) // 2 + (2 + 4) + 2 * 4
    assert re.search(
        rf"trainable params: 163 \|\| all params: 662 .*\nbase: nf4-dq, 2 layers, {stored} B \(768 B", lines
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_is_the_same_on_the_cpu_and_on_a_gpu(kind: str, tmp_path: Path) -> None:
    path = fitted(tmp_path, Toy(), peft(kind), max_epochs=1, accelerator="gpu", devices=1)
    on_cpu, on_gpu = load_from_checkpoint(Toy, path), load_from_checkpoint(Toy, path, map_location="cuda:0")
    assert on_gpu.body[0].weight.device.type == "cuda"
    assert torch.equal(on_gpu.body[0].weight.data.cpu(), on_cpu.body[0].weight.data)
    x = next(iter(data()))[0]
    torch.testing.assert_close(on_gpu.eval()(x.cuda()).cpu(), on_cpu.eval()(x), atol=1e-4, rtol=1e-4)
