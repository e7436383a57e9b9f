"""Everything that can be wrong with a checkpoint: one clear error, and nothing half-loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft import PEFT, DoRA, LoRA, PEFTError, load_from_checkpoint
from tests.callback.toys import Toy, data, lora, trainer

A, B = "body.0.adapters.default.lora_A", "body.0.adapters.default.lora_B"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = trainer(tmp_path_factory.mktemp("good"), max_epochs=1)
    run.fit(Toy(), data())
    return Path(run.checkpoint_callback.best_model_path)  # type: ignore[union-attr]


def rewritten(good: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    checkpoint = torch.load(good, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, folder / "changed.ckpt")
    return folder / "changed.ckpt"


def move(checkpoint: dict[str, Any], old: str, new: str) -> None:
    checkpoint["state_dict"][new] = checkpoint["state_dict"].pop(old)


WRONG_TENSORS = [
    (lambda c: c["state_dict"].pop(A), f"1 missing from the checkpoint: {A}"),
    (lambda c: c["state_dict"].update({"body.9.lora_A": torch.ones(2)}), "1 not of this model: body.9.lora_A"),
    (
        lambda c: c["state_dict"].update({A: torch.ones(3, 8)}),
        f"1 of another shape: {A} is (3, 8) in the checkpoint and (2, 8) here",
    ),
    (lambda c: c["state_dict"].update({A: "text"}), f"1 no tensor: {A} holds a str"),
    (
        lambda c: move(c, A, "body.0.adapters.default.loraA"),
        f"1 missing from the checkpoint: {A}|1 not of this model: body.0.adapters.default.loraA; did you mean {A!r}?",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG_TENSORS)
def test_tensors_that_do_not_fit(change: Any, message: str, good: Path, tmp_path: Path) -> None:
    path = rewritten(good, tmp_path, change)
    expected = "\n".join(f"checkpoint: {part}" for part in message.split("|"))
    with pytest.raises(PEFTError) as error:
        load_from_checkpoint(Toy, path)
    assert str(error.value) == expected
    module = Toy()
    # a first run attaches the adapters; the failed load must leave them as they were
    trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(module, data())
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(PEFTError) as error:
        trainer(tmp_path, max_epochs=3).fit(module, data(), ckpt_path=path)
    assert str(error.value) == expected
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (DoRA(r=2), "checkpoint: the checkpoint's method is LoRA, this run's is DoRA"),
        (lora(alpha=8), "checkpoint: LoRA.alpha is 16 in the checkpoint and 8 here"),
        (lora(rslora=True), "checkpoint: LoRA.rslora is False in the checkpoint and True here"),
        (lora(r=4), "checkpoint: LoRA.r is 2 in the checkpoint and 4 here"),
    ],
)
def test_another_method(method: LoRA, message: str, good: Path, tmp_path: Path) -> None:
    with pytest.raises(PEFTError) as error:
        trainer(tmp_path, method=method, max_epochs=3).fit(Toy(), data(), ckpt_path=good)
    assert message in error.value.faults


def test_fields_that_only_steer_training_may_change(good: Path, tmp_path: Path) -> None:
    method, module = lora(dropout=0.5, target_modules=["body.0", "body.4"]), Toy()
    trainer(tmp_path, method=method, max_epochs=1).validate(module, data(), ckpt_path=good, verbose=False)
    assert torch.equal(module.state_dict()[A], torch.load(good, weights_only=True)["state_dict"][A])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: nn.init.zeros_(m.body[4].bias), "other values"),
        (lambda m: m.body[1].double(), "other dtypes and other values"),
        (lambda m: setattr(m, "extra", nn.LayerNorm(2)), "other names or shapes and other dtypes and other values"),
    ],
)
def test_another_base_is_refused_unless_it_is_meant(change: Any, reason: str, good: Path) -> None:
    class Other(Toy):
        def build(self) -> None:
            super().build()
            change(self)

    with pytest.raises(PEFTError) as error:
        load_from_checkpoint(Other, good)
    assert str(error.value) == (
        f"checkpoint: the base is not the one that the adapter was trained on ({reason}); load that base, or pass "
        "allow_other_base=True if you mean it"
    )
    loaded = load_from_checkpoint(Other, good, allow_other_base=True)
    assert torch.equal(loaded.state_dict()[A], torch.load(good, weights_only=True)["state_dict"][A])


def test_the_callback_can_allow_another_base(good: Path, tmp_path: Path) -> None:
    peft = PEFT(lora(), modules_to_save=["head"], allow_other_base=True)
    trainer(tmp_path, peft=peft).validate(Toy(seed=1), data(), ckpt_path=good, verbose=False)
    with pytest.raises(PEFTError, match=r"\(other values\); load that base"):
        trainer(tmp_path).validate(Toy(seed=1), data(), ckpt_path=good, verbose=False)


def test_a_new_head_made_at_random_is_no_other_base(good: Path) -> None:
    class OtherHead(Toy):
        def build(self) -> None:
            super().build()
            nn.init.normal_(self.head.weight)

    (x, _), *_ = data()
    assert torch.equal(load_from_checkpoint(OtherHead, good).eval()(x), load_from_checkpoint(Toy, good).eval()(x))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file(share: float, good: Path, tmp_path: Path) -> None:
    whole = good.read_bytes()
    path = tmp_path / "cut.ckpt"
    path.write_bytes(whole[: int(len(whole) * share)])
    (tmp_path / "epoch=3.ckpt").write_bytes(whole)
    for load in (
        lambda: load_from_checkpoint(Toy, path),
        lambda: trainer(tmp_path).fit(Toy(), data(), ckpt_path=path),
    ):
        with pytest.raises(PEFTError) as error:
            load()
        assert re.fullmatch(
            rf"{re.escape(str(path))}: is truncated or no checkpoint \({path.stat().st_size:,} bytes; .*\); resume "
            rf"from another one; in {re.escape(str(tmp_path))} there is epoch=3.ckpt",
            str(error.value),
        )


def test_garbled_file(tmp_path: Path) -> None:
    path = tmp_path / "noise.ckpt"
    path.write_bytes(bytes(range(256)) * 40)
    with pytest.raises(PEFTError, match=r"is truncated or no checkpoint \(10,240 bytes; "):
        load_from_checkpoint(Toy, path)
    torch.save([1, 2], path)
    with pytest.raises(PEFTError, match="holds a list"):
        load_from_checkpoint(Toy, path)


def test_absent_file(good: Path) -> None:
    path = good.with_name("epoch=9.ckpt")
    with pytest.raises(PEFTError) as error:
        load_from_checkpoint(Toy, path)
    assert str(error.value) == f"{path}: there is no such checkpoint file; in {good.parent} there is {good.name}"


class Payload:
    """What a hostile file would hold."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('it ran')",))


def test_code_in_a_file_does_not_run(good: Path, tmp_path: Path) -> None:
    path = rewritten(good, tmp_path, lambda c: c.update(payload=Payload()))
    for load in (
        lambda: load_from_checkpoint(Toy, path),
        lambda: trainer(tmp_path).fit(Toy(), data(), ckpt_path=path),
    ):
        with pytest.raises(
            PEFTError, match="holds Python objects other than tensors and plain types, which could run code"
        ):
            load()


def test_a_trusted_object_is_read_in_the_way_that_is_told(good: Path, tmp_path: Path) -> None:
    path = rewritten(good, tmp_path, lambda c: c.update(activation=nn.ReLU))
    with pytest.raises(PEFTError) as error:
        load_from_checkpoint(Toy, path)
    assert str(error.value) == (
        f"{path}: holds Python objects other than tensors and plain types, which could run code when loaded "
        "(torch.nn.modules.activation.ReLU); if you trust the file, pass weights_only=False to trainer.fit, test or "
        "predict, or call torch.serialization.add_safe_globals([ReLU]) before load_from_checkpoint"
    )
    with torch.serialization.safe_globals([nn.ReLU]):
        loaded = load_from_checkpoint(Toy, path)
    assert torch.equal(loaded.state_dict()[A], torch.load(good, weights_only=True)["state_dict"][A])


def test_a_whole_model_is_no_adapter(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    run.callbacks.pop(0)  # type: ignore[attr-defined]
    run.fit(Toy(), data())
    run.save_checkpoint(tmp_path / "whole.ckpt")
    message = (
        "holds no adapter. To start from the weights of a whole model, load them first (MyModule.load_from_checkpoint) "
        "and fit without ckpt_path; ckpt_path resumes a run with adapters"
    )
    with pytest.raises(PEFTError) as error:
        load_from_checkpoint(Toy, tmp_path / "whole.ckpt")
    assert str(error.value) == f"{tmp_path / 'whole.ckpt'}: {message}"
    with pytest.raises(PEFTError) as error:
        trainer(tmp_path).fit(Toy(), data(), ckpt_path=tmp_path / "whole.ckpt")
    assert str(error.value) == f"the checkpoint: {message}"


def test_a_newer_format_and_an_unknown_method(good: Path, tmp_path: Path) -> None:
    path = rewritten(good, tmp_path, lambda c: c["peft"].update(format=2, version="9.9"))
    with pytest.raises(PEFTError, match=r"was written by lightning-peft 9.9; update lightning-peft to load it"):
        load_from_checkpoint(Toy, path)
    path = rewritten(good, tmp_path, lambda c: c["peft"]["method"].update(name="LoRa"))
    with pytest.raises(PEFTError, match=r"method 'LoRa' is not known here; did you mean 'LoRA'"):
        load_from_checkpoint(Toy, path)
    path = rewritten(good, tmp_path, lambda c: c["peft"]["method"]["fields"].update(rank=3))
    with pytest.raises(PEFTError, match="unexpected keyword argument 'rank'"):
        load_from_checkpoint(Toy, path)


def test_a_state_dict_is_checked_before_it_is_loaded(tmp_path: Path) -> None:
    module = Toy()
    trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(module, data())
    before = {key: value.clone() for key, value in module.state_dict().items()}
    partial = {key: torch.zeros_like(value) for key, value in before.items() if key != A}
    with pytest.raises(PEFTError, match=f"1 missing from the checkpoint: {A}"):
        module.load_state_dict(partial)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    module.load_state_dict({key: torch.zeros_like(value) for key, value in before.items() if "adapters" in key})
    assert not module.state_dict()[B].any()
    assert module.body[0].weight.any()
