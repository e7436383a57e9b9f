"""`lightning-peft import wandb://…`: wandb's own client against a stand-in of its server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from lightning_peft import PEFTError, load_from_checkpoint
from lightning_peft.interchange.wandb_artifacts import fetch_checkpoint
from lightning_peft.state import read_checkpoint
from tests.callback.toys import Toy, data, trainer
from tests.cli.conftest import Command
from tests.interchange.wandb_stand_in import KEY, Server, server
from tests.tracking.wandb_records import offline

wandb = pytest.importorskip("wandb")
pytestmark = pytest.mark.xdist_group("wandb")  # one run, and one process of wandb, for all of a file
NAME = "me/reviews/adapter-1"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server, and wandb set up to ask it."""
    with offline(tmp_path_factory.mktemp("wandb")), server() as started, pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_BASE_URL", started.address)
        patch.setenv("WANDB_API_KEY", KEY)
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        wandb.teardown()
        yield started


@pytest.fixture
def served(running: Server) -> Iterator[Server]:
    yield running
    running.artifacts.clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter-only checkpoint."""
    saving = trainer(tmp_path_factory.mktemp("checkpoint"), max_epochs=1, limit_val_batches=0)
    saving.fit(Toy(), data(16))
    path = Path(saving.default_root_dir) / "a.ckpt"
    saving.save_checkpoint(path)
    return path


@pytest.fixture
def trained(command: Command, folder: Path) -> Path:
    """A checkpoint of one epoch, as `fit` writes it."""
    assert command("fit", "--config", "lora.yaml")[0] == 0
    [path] = folder.glob("runs/**/*.ckpt")
    return path


def test_a_checkpoint_comes_back_to_the_byte_and_a_run_goes_on_with_it(
    served: Server, trained: Path, command: Command, folder: Path
) -> None:
    served.artifacts |= {
        f"{NAME}:v0": {"adapter.ckpt": b"older"},
        f"{NAME}:best": {"adapter.ckpt": trained.read_bytes()},
    }
    code, printed, errors = command("import", f"wandb://{NAME}:best", "out/best.ckpt")
    assert (code, [line for line in errors.splitlines() if not line.startswith("wandb:")]) == (0, [])
    assert (folder / "out" / "best.ckpt").read_bytes() == trained.read_bytes()
    assert [path.name for path in (folder / "out").iterdir()] == ["best.ckpt"]
    wrote, use, _, *section = printed.splitlines()
    assert wrote.startswith("Wrote     out/best.ckpt  ")
    assert use == "Use it    --ckpt_path out/best.ckpt, with this section in the configuration:"
    (folder / "peft.yaml").write_text("\n".join(section))
    assert yaml.safe_load((folder / "lora.yaml").read_text())["peft"] == yaml.safe_load("\n".join(section))["peft"]
    go_on = ["--config", "base.yaml", "--config", "peft.yaml", "--ckpt_path", "out/best.ckpt", "--trainer.max_epochs=2"]
    assert command("fit", *go_on)[0] == 0
    assert [path.name for path in folder.glob("runs/**/*.ckpt") if path != trained] == ["epoch=1-step=4.ckpt"]


def test_lightnings_own_artifacts_come_back_too(served: Server, checkpoint: Path, tmp_path: Path) -> None:
    served.artifacts["me/reviews/model-1:v3"] = {"x.ckpt": b"", "model.ckpt": checkpoint.read_bytes(), "note.txt": b"a"}
    file = fetch_checkpoint("wandb://me/reviews/model-1:v3", tmp_path / "there")
    assert file.read_bytes() == checkpoint.read_bytes()
    assert [path.name for path in file.parent.iterdir()] == ["model.ckpt"]
    served.artifacts["me/reviews/other:v0"] = {"deep/epoch=1.ckpt": checkpoint.read_bytes(), "note.txt": b"a"}
    assert read_checkpoint(fetch_checkpoint("wandb://me/reviews/other:v0", tmp_path / "there"))["epoch"] == 1


def test_a_quantized_bases_section_says_so(served: Server, checkpoint: Path, command: Command, folder: Path) -> None:
    content = read_checkpoint(checkpoint)
    content["peft"] |= {"quantization": {"kind": "nf4"}, "base_dtype": "bfloat16"}
    torch.save(content, folder / "quantized.ckpt")
    served.artifacts[f"{NAME}:best"] = {"adapter.ckpt": (folder / "quantized.ckpt").read_bytes()}
    code, printed, _ = command("import", f"wandb://{NAME}:best", "out.ckpt")
    assert code == 0
    section = yaml.safe_load(printed.partition("\n\n")[2])["peft"]
    assert (section["quantization"], section["base_dtype"]) == ({"kind": "nf4"}, "bfloat16")


def test_what_the_artifact_holds_is_checked_and_nothing_is_left_behind(
    served: Server, command: Command, folder: Path
) -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}}, folder / "whole.ckpt")
    torch.save({"peft": Path}, folder / "code.ckpt")
    whole, code = ((folder / name).read_bytes() for name in ("whole.ckpt", "code.ckpt"))
    for alias, files in {
        "none": {"a.txt": b"a", "b.json": b"{}"},
        "empty": {},
        "several": {"a.ckpt": whole, "b.ckpt": whole},
        "whole": {"adapter.ckpt": whole},
        "code": {"adapter.ckpt": code},
        "cut": {"adapter.ckpt": whole[:-40]},
    }.items():
        served.artifacts[f"{NAME}:{alias}"] = files
    before = sorted(folder.iterdir())
    for alias, told in {
        "none": "holds no checkpoint (*.ckpt) but a.txt, b.json\n",
        "empty": "holds no checkpoint (*.ckpt) but nothing\n",
        "several": "holds several checkpoints (a.ckpt, b.ckpt), and none of them is adapter.ckpt or model.ckpt\n",
        "whole": "holds no adapter. ",
        "code": "which could run code when loaded",
        "cut": "is truncated or no checkpoint",
    }.items():
        code_, _, errors = command("import", f"wandb://{NAME}:{alias}", "out.ckpt")
        assert code_ == 2
        assert told in errors
        assert "Traceback" not in errors
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("address", "told"),
    [
        (f"wandb://{NAME}:bst", "there is no such artifact; did you mean 'best'?"),
        (f"wandb://{NAME}:xyz", "there is no such artifact; adapter-1 has best, latest, v0"),
        ("wandb://me/reviews/adapter-2:best", "there is no such artifact; did you mean 'adapter-1'?"),
        ("wandb://me/reviews/xyz:best", "there is no such artifact; in me/reviews there is adapter-1"),
        ("wandb://me/wrk/adapter-1:best", "there is no project me/wrk, or it is not shown to you"),
    ],
)
def test_an_artifact_that_is_not_there_is_told_with_the_nearest(
    served: Server, tmp_path: Path, address: str, told: str
) -> None:
    served.artifacts |= {f"{NAME}:{alias}": {} for alias in ("best", "latest", "v0")}
    with pytest.raises(PEFTError) as error:
        fetch_checkpoint(address, tmp_path)
    assert str(error.value) == f"{address}: {told}"


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        (
            "wandb://me/reviews/adapter-1",
            "for example wandb://me/reviews/adapter-1:best or wandb://me/reviews/adapter-1:v0",
        ),
        ("wandb://adapter-1:best", "for example wandb://me/reviews/adapter-3kq:best"),
        ("wandb:me/reviews/adapter-1:best", "for example wandb://me/reviews/adapter-3kq:best"),
        ("wandb://me/reviews/adapter-1:a:b", "for example wandb://me/reviews/adapter-3kq:best"),
        ("wandb://me//adapter-1:best", "for example wandb://me/reviews/adapter-3kq:best"),
    ],
)
def test_an_address_of_another_form_is_told_before_anything_is_asked(
    served: Server, command: Command, address: str, hint: str
) -> None:
    asked = len(served.queries)
    code, _, errors = command("import", address, "out.ckpt")
    form = "wandb://ENTITY/PROJECT/NAME:ALIAS"
    assert code == 2
    assert errors == f"lightning-peft: {address!r} is no address of an artifact; give {form}, {hint}\n"
    assert len(served.queries) == asked


def test_options_for_a_base_are_refused(command: Command) -> None:
    code, _, errors = command("import", f"wandb://{NAME}:best", "out.ckpt", "--base", "bert")
    assert code == 2
    told = f"import: wandb://{NAME}:best is a checkpoint already; leave --config, --model and --base to its use"
    assert errors == f"lightning-peft: {told}\n"


def test_an_address_in_place_of_a_checkpoint_says_what_to_do() -> None:
    with pytest.raises(PEFTError) as error:
        load_from_checkpoint(Toy, f"wandb://{NAME}:best")
    told = f"bring it here first: lightning-peft import wandb://{NAME}:best adapter.ckpt"
    assert str(error.value) == f"wandb://{NAME}:best: is in W&B; {told}"


def test_who_is_not_let_in_is_told_how(served: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in = "run `wandb login`, or set WANDB_API_KEY"
    wrong = "f" * 40
    monkeypatch.setenv("WANDB_API_KEY", wrong)
    wandb.teardown()
    with pytest.raises(PEFTError, match=rf"^wandb://{NAME}:best: W&B does not let you in \(.*\); {log_in}$") as error:
        fetch_checkpoint(f"wandb://{NAME}:best", tmp_path)
    assert wrong not in str(error.value)
    monkeypatch.delenv("WANDB_API_KEY")
    wandb.teardown()
    with pytest.raises(PEFTError) as error:
        fetch_checkpoint(f"wandb://{NAME}:best", tmp_path)
    assert str(error.value) == f"wandb://{NAME}:best: W&B knows no key of yours here; {log_in}"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    wandb.teardown()


def test_without_wandb_it_is_told_what_to_install(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, errors = command("import", f"wandb://{NAME}:best", "out.ckpt")
    assert code == 2
    assert errors == "lightning-peft: wandb is not installed; pip install 'lightning-peft[wandb]'\n"
