"""Checkpoints as folders: nothing but a whole one is ever read, and nothing in one is run."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft.methods.errors import PEFTError
from lightning_peft.state import AtomicCheckpointIO, folders, read_checkpoint, save_folder, whole
from lightning_peft.strategies import PEFTFSDPStrategy

RAN = []


class Runs:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return RAN.append, (True,)


def checkpoint(epoch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(epoch)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    state = {"step": torch.tensor(3.0), "exp_avg": numbers(4, 3), "kept": "text", "none": None}
    return {
        "epoch": epoch,
        "state_dict": {"A": numbers(4, 3), "b": numbers(5).bfloat16(), "empty": torch.empty(0), "n": torch.tensor(7)},
        "optimizer_states": [{"state": {0: state}, "param_groups": [{"lr": 0.1, "params": [0], "betas": (0.9, 0.99)}]}],
        "peft": {"rng_states": [{"torch": numbers(2)}]},
    }  # fmt: skip


def assert_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_same(ours[name], theirs[name])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(ours, Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    save_folder(checkpoint(1), path, together=False)
    return path


def test_what_is_read_is_what_was_written(path: Path) -> None:
    assert_same(read_checkpoint(path), checkpoint(1))
    assert all(tensor.is_meta for tensor in read_checkpoint(path, "meta")["state_dict"].values())
    moved = path.rename(path.with_name("elsewhere.ckpt"))
    assert_same(AtomicCheckpointIO().load_checkpoint(moved), checkpoint(1))
    assert str(path.parent).encode() not in (moved / folders.INDEX).read_bytes()


def test_a_file_and_a_folder_take_each_others_place(path: Path) -> None:
    save_folder(checkpoint(2), path, together=False)
    assert_same(read_checkpoint(path), checkpoint(2))
    AtomicCheckpointIO().save_checkpoint(checkpoint(3), path)
    assert path.is_file()
    save_folder(checkpoint(4), path, together=False)
    assert_same(read_checkpoint(path), checkpoint(4))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("moment", ["writing", "before the renames", "between the renames", "removing"])
def test_a_killed_save_leaves_one_to_read(moment: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    places: dict[str, tuple[Any, str]] = {
        "writing": (folders, "save"),
        "before the renames": (folders, "put_in_place"),
        "between the renames": (Path, "replace"),
    }
    with monkeypatch.context() as patch:
        if moment == "removing":
            remove, removed = whole._remove, []

            def die_then(what: Path) -> None:
                # the first removes what an earlier one has left
                removed.append(what)
                remove(what) if len(removed) == 1 else die()

            patch.setattr(whole, "_remove", die_then)
        else:
            patch.setattr(*places[moment], die)
        with pytest.raises(Killed):
            save_folder(checkpoint(2), path, together=False)
    assert path.exists() == (moment != "between the renames")
    assert_same(read_checkpoint(path), checkpoint(2 if moment == "removing" else 1))
    save_folder(checkpoint(3), path, together=False)
    assert_same(read_checkpoint(path), checkpoint(3))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.pt"])
@pytest.mark.parametrize("share", [0.0, 0.5, None])
def test_what_is_broken_is_told(name: str, share: float | None, path: Path) -> None:
    file = path / name
    if share is None:
        file.unlink()
    else:
        os.truncate(file, int(share * file.stat().st_size))
    with pytest.raises(PEFTError, match=rf"^{re.escape(str(path))}: (is truncated or no|there is no such) checkpoint"):
        read_checkpoint(path)


def test_nothing_in_a_folder_is_run(path: Path) -> None:
    told = "holds Python objects other than tensors and plain types, which could run code when loaded"
    for name in (".metadata", "meta.pt"):
        before = (path / name).read_bytes()
        if name == "meta.pt":
            torch.save({"epoch": Runs()}, path / name)
        else:
            (path / name).write_bytes(pickle.dumps(Runs()))
        with pytest.raises(PEFTError, match=told):
            read_checkpoint(path)
        (path / name).write_bytes(before)
    # of the words that an index is made of, others can't be made
    (path / ".metadata").write_bytes(pickle.dumps({"a": torch.Size([1])}))
    with pytest.raises(PEFTError, match="is truncated or no checkpoint"):
        read_checkpoint(path)
    assert not RAN


def test_an_index_can_not_name_other_files(path: Path, tmp_path: Path) -> None:
    index = folders._Reader(path).read_metadata()
    for place in index.storage_data.values():
        place.relative_path = "../other.distcp"
    (path / ".metadata").write_bytes(pickle.dumps(index))
    (path / "__0_0.distcp").rename(tmp_path / "other.distcp")
    with pytest.raises(PEFTError, match=r"is truncated or no checkpoint \(not a local file; names files outside of"):
        read_checkpoint(path)


def test_an_address_is_no_folder() -> None:
    strategy = PEFTFSDPStrategy(save_distributed_checkpoint=True)
    with pytest.raises(PEFTError, match="save_distributed_checkpoint: s3://bucket/a is no folder of a file system"):
        strategy.save_checkpoint({}, "s3://bucket/a")
