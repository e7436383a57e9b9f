"""Every precision of Lightning beside `base_dtype` and `quantization`: the dtype of every kind of tensor."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.plugins import BitsandbytesPrecision, MixedPrecision, TransformerEnginePrecision
from torch import Tensor, nn

from lightning_peft import METHODS, PEFT, LoRA, PEFTError, load_from_checkpoint, trainable_parameters
from lightning_peft.injection import adapters
from lightning_peft.methods._saved_copy import SavedCopy
from tests.callback.toys import FEATURES, Toy, data, made, standing_on, tensors, trainer

WIDTH = 16


class Watched(Toy):
    """A body without statistics and a head; it notes what a training step keeps, gives and gets."""

    def build(self) -> None:
        super().build()
        with torch.random.fork_rng():
            torch.manual_seed(self.hparams["seed"])
            self.body = nn.Sequential(
                nn.Linear(FEATURES, WIDTH), nn.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.Tanh()
            )

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(self.note, lambda tensor: tensor):
            self.x, self.logits = batch[0], self(batch[0])
        return nn.functional.cross_entropy(self.logits, batch[1])

    def note(self, tensor: Tensor) -> Tensor:
        self.kept.append(tensor)
        return tensor

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.gradients = {name: p.grad for name, p in self.named_parameters() if p.requires_grad}


class Row(NamedTuple):
    """Names of dtypes, several joined by +, of each kind of tensor in one training step."""

    weight: str
    norm: str
    adapter: str
    head: str
    gradient: str
    state: str
    activation: str
    logits: str


def row(weight: str, norm: str, trained: str, activation: str, logits: str) -> Row:
    """A row in which all that is trained has one dtype, as in all of them."""
    return Row(weight, norm, trained, trained, trained, trained, activation, logits)


F32, BF16, F16, F64 = "float32", "bfloat16", "float16", "float64"
TABLE: dict[tuple[str, str | None, str | None], Row] = {
    # precision, base_dtype, quantization
    ("32-true", None, None): row(F32, F32, F32, F32, F32),
    ("32-true", F32, None): row(F32, F32, F32, F32, F32),
    ("32-true", BF16, None): row(BF16, BF16, F32, BF16, BF16),
    ("32-true", F16, None): row(F16, F16, F32, F16, F16),
    ("32-true", None, "nf4-dq"): row("uint8", F32, F32, F32, F32),
    ("32-true", BF16, "nf4-dq"): row("uint8", BF16, F32, BF16, BF16),
    ("32-true", F16, "nf4-dq"): row("uint8", F16, F32, F16, F16),
    ("32-true", None, "int8"): row("int8", F32, F32, F32, F32),
    ("32-true", BF16, "int8"): row("int8", BF16, F32, BF16, BF16),
    ("bf16-mixed", None, None): row(F32, F32, F32, BF16, BF16),
    ("bf16-mixed", BF16, None): row(BF16, BF16, F32, BF16, BF16),
    ("bf16-mixed", None, "nf4-dq"): row("uint8", F32, F32, BF16, BF16),
    ("bf16-mixed", BF16, "nf4-dq"): row("uint8", BF16, F32, BF16, BF16),
    ("bf16-mixed", BF16, "int8"): row("int8", BF16, F32, BF16, BF16),
    ("16-mixed", None, None): row(F32, F32, F32, F16, F16),
    ("16-mixed", F16, None): row(F16, F16, F32, F16, F16),
    ("16-mixed", F16, "nf4-dq"): row("uint8", F16, F32, F16, F16),
    ("16-mixed", F16, "int8"): row("int8", F16, F32, F16, F16),
    ("bf16-true", None, None): row(BF16, BF16, BF16, BF16, BF16),
    ("bf16-true", BF16, None): row(BF16, BF16, F32, BF16, BF16),
    ("bf16-true", None, "nf4-dq"): row("uint8", BF16, F32, BF16, BF16),
    ("bf16-true", BF16, "nf4-dq"): row("uint8", BF16, F32, BF16, BF16),
    ("bf16-true", None, "int8"): row("int8", BF16, F32, BF16, BF16),
    ("16-true", None, None): row(F16, F16, F16, F16, F16),
    ("16-true", F16, None): row(F16, F16, F32, F16, F16),
    ("16-true", None, "nf4-dq"): row("uint8", F16, F32, F16, F16),
    ("16-true", F16, "int8"): row("int8", F16, F32, F16, F16),
    ("64-true", None, None): row(F64, F64, F64, F64, F64),
}


def trained(
    folder: Path,
    peft: PEFT,
    precision: str,
    module: type[Toy] = Watched,
    *,
    max_steps: int = 2,
    ckpt_path: Path | None = None,
) -> Any:
    """A module and its Trainer after some steps.

    On a CPU Lightning makes bf16-mixed of 16-mixed; its plugin itself, scaler and all, works there.
    """
    given = {"plugins": MixedPrecision("16-mixed", "cpu")} if precision == "16-mixed" else {"precision": precision}
    run = trainer(folder, peft=peft, max_epochs=-1, max_steps=max_steps, **given)
    model = module()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="precision=")
        run.fit(model, data(batch_size=5), ckpt_path=ckpt_path)
    return model, run


def shown(*found: Tensor) -> str:
    return "+".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in found}))


def kept(model: Watched) -> tuple[list[Tensor], list[Tensor]]:
    """What the last step kept: activations, and copies of weights in another dtype.

    The parameters themselves and the batch are nobody's copy; a normalization's mean and deviation of each row are
    always in fp32.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), model.x]}
    shapes = {shape for p in model.parameters() if p.dim() == 2 for shape in (p.shape, p.shape[::-1])}
    copies, activations = [], []
    for tensor in model.kept:
        if tensor.untyped_storage().data_ptr() not in own and tensor.dim() == 2 and tensor.shape[-1] > 1:
            (copies if tensor.shape in shapes else activations).append(tensor)
    return activations, copies


def observed(model: Watched, run: Any) -> Row:
    whole = {type(adapter) is SavedCopy: adapter for adapter in adapters(model, "default").values()}
    (optimizer,) = run.optimizers
    state = [tensor for tensor in tensors(list(optimizer.state.values())) if tensor.dim()]
    return Row(
        shown(*(model.body[index]._parameters["weight"] for index in (0, 3))),
        shown(*model.body[1].parameters()),
        shown(*whole[False].parameters()),
        shown(*whole[True].parameters()),
        shown(*model.gradients.values()),
        shown(*state),
        shown(*kept(model)[0]),
        shown(model.logits),
    )


def lora_over(base_dtype: str | None = None, quantization: str | None = None) -> PEFT:
    method = LoRA(r=2, target_modules=["body.0", "body.3"])
    return PEFT(method, modules_to_save=["head"], base_dtype=base_dtype, quantization=quantization)


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.detach().double().flatten() for gradient in gradients.values()])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """All gradients of the first step in fp32."""
    torch.manual_seed(0)
    return flat(trained(tmp_path_factory.mktemp("reference"), lora_over(), "32-true", max_steps=1)[0].gradients)


@pytest.mark.parametrize(("precision", "base_dtype", "quantization"), TABLE, ids=str)
def test_dtype_of_every_kind_of_tensor(
    precision: str, base_dtype: str | None, quantization: str | None, reference: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, run = trained(tmp_path, lora_over(base_dtype, quantization), precision, max_steps=1)
    assert observed(model, run) == TABLE[precision, base_dtype, quantization]
    # beside what was given no weight is kept but the head's, once, which is trained in another dtype than it is read in
    assert [sorted(tensor.shape) for tensor in kept(model)[1]] in ([], [sorted(model.head.weight.shape)])
    found = flat(model.gradients)
    cosine = torch.nn.functional.cosine_similarity(found, reference, dim=0)
    assert cosine > (0.999 if quantization is None else 0.97)
    assert float(found.norm()) == pytest.approx(float(reference.norm()), rel=0.02 if quantization is None else 0.1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_trains_in_fp32_over_a_base_in_bf16(name: str, precision: str, tmp_path: Path) -> None:
    class Noted(standing_on(made(name))):  # type: ignore[misc]
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            self.gradients = {name: p.grad for name, p in self.named_parameters() if p.requires_grad}

    peft = PEFT(made(name), modules_to_save=["head"], base_dtype="bfloat16")
    model, run = trained(tmp_path, peft, precision, Noted)
    trains = trainable_parameters(model)
    assert model.gradients.keys() == trains.keys()
    gradients = [gradient for gradient in model.gradients.values() if gradient is not None]
    states = [tensor for optimizer in run.optimizers for tensor in tensors(list(optimizer.state.values()))]
    assert shown(*trains.values()) == shown(*gradients) == shown(*states) == F32
    assert all(tensor.isfinite().all() for tensor in [*trains.values(), *gradients])
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    assert sum(p.dtype == torch.bfloat16 for p in frozen) > len(frozen) / 2


@pytest.mark.parametrize(("precision", "dtype", "share"), [("bf16-true", BF16, "1/256"), ("16-true", F16, "1/2048")])
def test_adapters_of_16_bits_are_told_to_lose_small_updates_and_do(
    precision: str, dtype: str, share: str, tmp_path: Path
) -> None:
    class Slow(Watched):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-7)

    def moved(base_dtype: str | None) -> tuple[bool, list[str]]:
        model = Slow()
        run = trainer(tmp_path, peft=lora_over(base_dtype), precision=precision, max_steps=1, max_epochs=-1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.fit(model, data())
        trained = adapters(model, "default")["head"].weight
        before = Slow().head.weight.to(getattr(torch, dtype)).to(trained.dtype)
        return not torch.equal(trained, before), [str(w.message) for w in caught if "precision=" in str(w.message)]

    def unscaled(more: str) -> list[str]:
        said = (
            f"precision={precision!r} scales no gradients, and float16 makes those below 6e-8 zero{more}; use "
            "precision='16-mixed' with base_dtype='float16', or bfloat16"
        )
        return [said] if dtype == F16 else []

    assert moved(None) == (
        False,
        [
            f"precision={precision!r} keeps adapters and their optimizer in {dtype} too, where an update below {share} "
            f"of a weight rounds to zero; give PEFT(base_dtype={dtype!r}), and they stay in float32",
            *unscaled(", and the 1e-8 that Adam divides by as well"),
        ],
    )
    assert moved(dtype) == (True, unscaled(""))


def test_a_base_in_float16_is_told_to_scale_no_gradients(tmp_path: Path) -> None:
    run = trainer(tmp_path, peft=lora_over(F16), max_steps=1, max_epochs=-1)
    said = (
        "precision='32-true' scales no gradients, and float16 makes those below 6e-8 zero; use precision='16-mixed' "
        "with base_dtype='float16', or bfloat16"
    )
    with pytest.warns(UserWarning, match=re.escape(said) + "$"):
        run.fit(Watched(), data())


def test_nothing_is_said_of_what_loses_nothing(tmp_path: Path) -> None:
    for precision, base_dtype in (("32-true", BF16), ("bf16-mixed", BF16), ("bf16-true", BF16), ("32-true", None)):
        run = trainer(tmp_path, peft=lora_over(base_dtype), precision=precision, max_steps=1, max_epochs=-1)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="precision=")
            run.fit(Watched(), data())
            run.validate(Watched(), data())


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_adapters_in_fp32_come_back_to_the_bit(precision: str, tmp_path: Path) -> None:
    model, run = trained(tmp_path, lora_over(BF16), precision)
    run.save_checkpoint(tmp_path / "two.ckpt")
    expected = trainable_parameters(model)
    assert any((parameter != parameter.bfloat16()).any() for parameter in expected.values())
    resumed, _ = trained(tmp_path, lora_over(BF16), precision, ckpt_path=tmp_path / "two.ckpt")
    loaded = load_from_checkpoint(Watched, tmp_path / "two.ckpt")
    for other in (resumed, loaded):
        found = trainable_parameters(other)
        assert all(torch.equal(found[name], parameter) for name, parameter in expected.items())
    x = next(iter(data()))[0]
    assert torch.equal(loaded.eval()(x), model.eval()(x))


REFUSED = [
    (
        "64-true",
        {"base_dtype": BF16},
        "base_dtype: 'bfloat16' contradicts precision='64-true', which makes every parameter float64; leave it out, or "
        "use precision='32-true'",
    ),
    (
        "64-true",
        {"quantization": "nf4"},
        "quantization: packed weights can't be computed with in float64, as precision='64-true' asks; use "
        "precision='32-true'",
    ),
    (
        "bf16-true",
        {"base_dtype": F32},
        "base_dtype: 'float32' contradicts precision='bf16-true', which computes in bfloat16; use "
        "base_dtype='bfloat16', or precision='32-true'",
    ),
    (
        "16-true",
        {"base_dtype": BF16},
        "base_dtype: 'bfloat16' contradicts precision='16-true', which computes in float16; use base_dtype='float16', "
        "or precision='32-true'",
    ),
    (
        "bf16-mixed",
        {"base_dtype": F16},
        "base_dtype: 'float16' would be cast to bfloat16 in every call under precision='bf16-mixed', and so kept "
        "twice; use base_dtype='bfloat16', or precision='32-true'",
    ),
]


class Unbuilt(Toy):
    """Fails where a refusal came too late."""

    built_in_init = False

    def configure_model(self) -> None:
        raise AssertionError("the model was built")


@pytest.mark.parametrize(("precision", "options", "fault"), REFUSED)
def test_what_can_not_be_is_refused_before_the_model_is_built(
    precision: str, options: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    run = trainer(tmp_path, peft=PEFT(LoRA(), **options), precision=precision)
    with pytest.raises(PEFTError) as error:
        run.fit(Unbuilt(), data())
    assert error.value.faults == (fault,)


@pytest.fixture
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the library, which needs a GPU, as far as Lightning's plugin knows it: its layers apart."""
    recipe, layers = ModuleType("transformer_engine.common.recipe"), ModuleType("transformer_engine.pytorch")
    recipe.DelayedScaling = type("DelayedScaling", (), {})
    layers.fp8_autocast = lambda **_: contextlib.nullcontext()
    for module in (recipe, layers, ModuleType("transformer_engine"), ModuleType("transformer_engine.common")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    sys.modules["transformer_engine"].pytorch = layers
    monkeypatch.setattr("lightning.fabric.plugins.precision.transformer_engine._TRANSFORMER_ENGINE_AVAILABLE", True)


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("base_dtype", [None, BF16])
def test_transformer_engine_that_replaces_nothing_keeps_adapters_as_bf16_true_does(
    base_dtype: str | None, tmp_path: Path
) -> None:
    plugin = TransformerEnginePrecision(weights_dtype=torch.bfloat16, replace_layers=False)
    run = trainer(tmp_path, peft=lora_over(base_dtype), plugins=plugin, max_steps=1, max_epochs=-1)
    model = Watched()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(model, data(batch_size=5))
    assert observed(model, run) == TABLE["bf16-true", base_dtype, None]
    assert any("rounds to zero" in str(warning.message) for warning in caught) == (base_dtype is None)


@pytest.mark.usefixtures("transformer_engine")
def test_precisions_that_replace_layers_are_refused(tmp_path: Path) -> None:
    plugin = TransformerEnginePrecision(weights_dtype=torch.bfloat16)
    run = trainer(tmp_path, peft=lora_over(), plugins=plugin)
    with pytest.raises(PEFTError) as error:
        run.fit(Unbuilt(), data())
    assert error.value.faults == (
        "precision='transformer-engine' replaces the layers that adapters stand on; build the model of its layers and "
        "give the Trainer plugins=TransformerEnginePrecision(weights_dtype=torch.bfloat16, replace_layers=False)",
    )
    run.strategy.precision_plugin = BitsandbytesPrecision.__new__(BitsandbytesPrecision)
    with pytest.raises(PEFTError) as error:
        run.fit(Unbuilt(), data())
    assert error.value.faults == (
        "BitsandbytesPrecision quantizes after adapters are attached and replaces the layers that they stand on; leave "
        "it out and give PEFT(quantization='nf4')",
    )
