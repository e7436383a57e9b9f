from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_peft.interchange.locations import resolve
from lightning_peft.methods.errors import PEFTError


def test_package_folder_is_found_without_an_import() -> None:
    before = set(sys.modules)
    place = Path(resolve("package:networkx/algorithms", "model"))
    assert (place / "clique.py").is_file()
    assert {name for name in set(sys.modules) - before if name.startswith("networkx")} == set()


def test_hub_ids_stay_as_they_are_and_paths_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("bert-base-uncased", "model") == "bert-base-uncased"
    assert resolve("org/name-1.5", "model") == "org/name-1.5"
    assert resolve("~/model", "model") == str(tmp_path / "model")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "package:networx/algorithms",
            "model: 'package:networx/algorithms' names the Python package 'networx', which isn't installed; "
            "did you mean 'networkx'?",
        ),
        (
            "package:zzqqjj/x",
            "model: 'package:zzqqjj/x' names the Python package 'zzqqjj', which isn't installed; "
            "install it first, or give a folder or a hub id",
        ),
        (
            "package:networkx/algoritms",
            "model: the package 'networkx' holds no 'algoritms'; did you mean 'algorithms'?",
        ),
    ],
)
def test_missing_package_is_answered_with_the_nearest(source: str, message: str) -> None:
    with pytest.raises(PEFTError) as caught:
        resolve(source, "model")
    assert str(caught.value).startswith(message.rstrip("?"))


def test_missing_path_is_answered_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.csv").touch()
    wrong = str(tmp_path / "trian.csv")
    with pytest.raises(PEFTError) as caught:
        resolve(wrong, "path")
    assert str(caught.value) == f"path: there is no file or folder {wrong!r}; did you mean 'train.csv'?"
    with pytest.raises(PEFTError) as caught:
        resolve(f"{tmp_path}/no/such/qqq", "path")
    assert str(caught.value) == f"path: there is no file or folder '{tmp_path}/no/such/qqq'"
