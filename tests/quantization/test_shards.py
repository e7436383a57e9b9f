"""Headers and slices of safetensors files, and files that are none."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from lightning_peft import PEFTError
from lightning_peft.quantization.shards import DTYPES, INDEX, ONE_FILE, open_shards

TENSORS = {
    "b.weight": torch.randn(5, 4),
    "a.weight": torch.randn(3, 4, 2).to(torch.bfloat16),
    "a.steps": torch.tensor(7),
    "a.mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3, dtype=torch.float16),
}


def sharded(folder: Path, tensors: dict[str, Tensor], count: int = 2) -> Path:
    """The tensors dealt to files in turn, and the index of them."""
    folder.mkdir(exist_ok=True)
    names = {key: f"model-{place % count + 1:05}-of-{count:05}.safetensors" for place, key in enumerate(tensors)}
    for name in set(names.values()):
        save_file({key: tensors[key] for key in tensors if names[key] == name}, folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sharded(tmp_path / "sharded", TENSORS)


def test_all_places_of_a_model_give_the_same(tmp_path: Path, folder: Path) -> None:
    save_file(TENSORS, tmp_path / ONE_FILE)
    for path in (tmp_path, tmp_path / ONE_FILE, str(tmp_path), folder, folder / INDEX):
        with open_shards(path) as shards:
            assert set(shards) == set(TENSORS)
            assert len(shards) == len(TENSORS)
            assert "a.mask" in shards
            for key, tensor in TENSORS.items():
                assert (shards.stored[key].shape, shards.stored[key].dtype) == (tuple(tensor.shape), tensor.dtype)
                assert shards.stored[key].file.parent == (folder if "sharded" in str(path) else tmp_path)
                assert torch.equal(shards.read(key), tensor)


def test_keys_come_in_the_order_of_the_files(folder: Path) -> None:
    # each file has its widest dtypes in front, and equal ones by name
    assert list(open_shards(folder)) == ["a.steps", "b.weight", "empty", "a.weight", "a.mask"]


def test_slices_are_those_of_the_tensor(folder: Path) -> None:
    with open_shards(folder) as shards:
        assert torch.equal(shards.read_slice("b.weight", slice(1, 3)), TENSORS["b.weight"][1:3])
        assert torch.equal(shards.read_slice("b.weight", slice(None), slice(2, 4)), TENSORS["b.weight"][:, 2:4])
        assert torch.equal(shards.read_slice("a.weight", slice(2, None), slice(0, 1)), TENSORS["a.weight"][2:, :1])
        assert torch.equal(shards.read_slice("a.weight", slice(3, 3)), TENSORS["a.weight"][3:3])
        assert torch.equal(shards.read_slice("a.steps"), TENSORS["a.steps"])


def test_what_was_read_outlives_the_files_being_closed(folder: Path) -> None:
    with open_shards(folder) as shards:
        tensor = shards.read("b.weight")
    assert torch.equal(tensor, TENSORS["b.weight"])
    with pytest.raises(KeyError):
        shards.read("b.weight")


def test_a_key_that_is_not_there_is_named(folder: Path) -> None:
    with (
        open_shards(folder) as shards,
        pytest.raises(KeyError, match=r"has no tensor 'c\.weight'; did you mean 'b\.weight'"),
    ):
        shards.read("c.weight")


def test_every_dtype_is_read(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(2, dtype=dtype) for name, dtype in DTYPES.items()}
    save_file(tensors, tmp_path / ONE_FILE)
    with open_shards(tmp_path) as shards:
        assert {name: shards.stored[name].dtype for name in shards} == DTYPES
        assert all(shards.read(name).dtype == dtype for name, dtype in DTYPES.items())


def test_links_into_a_cache_are_followed(tmp_path: Path, folder: Path) -> None:
    # so the hub's cache keeps its files
    links = tmp_path / "snapshot"
    links.mkdir()
    for file in folder.iterdir():
        (links / file.name).symlink_to(file)
    assert set(open_shards(links)) == set(TENSORS)


# bad input -----------------------------------------------------------------------------------------------------------


def faults(path: Path) -> tuple[str, ...]:
    with pytest.raises(PEFTError) as raised:
        open_shards(path)
    return raised.value.faults


@pytest.mark.parametrize("kept", [0, 4, 20, -3])
def test_a_truncated_file_is_named(kept: int, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / ONE_FILE)
    whole = (tmp_path / ONE_FILE).read_bytes()
    (tmp_path / ONE_FILE).write_bytes(whole[:kept])
    (message,) = faults(tmp_path)
    assert message.startswith(f"{tmp_path / ONE_FILE}: is truncated or no safetensors file (")
    assert message.endswith(f"{len(whole[:kept])} bytes); fetch it again")


@settings(max_examples=40)
@given(content=st.binary(max_size=200))
def test_garbage_is_no_safetensors_file(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "garbage.safetensors"
    file.write_bytes(content)
    assert len(faults(file)) == 1


def test_a_pointer_that_git_left_is_told(tmp_path: Path) -> None:
    (tmp_path / ONE_FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert faults(tmp_path) == (f"{tmp_path / ONE_FILE}: is a pointer of Git LFS; run `git lfs pull`",)


def test_a_dtype_that_torch_can_not_compute_with_is_named(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / ONE_FILE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))
    assert faults(tmp_path) == (f"{tmp_path / ONE_FILE}: w has the dtype F8_E8M0, which can't be loaded",)


def test_pickles_are_refused_with_how_to_convert_them(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, ("raise SystemExit('ran')",)

    for name in ("pytorch_model.bin", "model.pt", "last.ckpt"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    for path in (tmp_path, tmp_path / "model.pt", tmp_path / "pytorch_model.bin.index.json"):
        (message,) = faults(path)
        assert "is pickled, so that reading it could run code" in message
        assert "safetensors.torch.save_file({k: v.contiguous().clone() for k, v in torch.load(" in message
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": "pytorch_model.bin"}}))
    assert "pytorch_model.bin: is pickled" in faults(tmp_path)[0]


def test_the_conversion_that_is_told_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weight = torch.randn(3, 2)
    torch.save({"w": weight.T, "tied": weight.T}, "pytorch_model.bin")
    (message,) = faults(tmp_path)
    exec("import safetensors.torch, torch; " + message.partition("else ")[2])
    with open_shards(tmp_path) as shards:
        assert torch.equal(shards.read("tied"), weight.T)


def test_all_that_is_wrong_with_shards_is_told_at_once(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= {
        "c.weight": "model-00003-of-00003.safetensors",
        "d.weight": "model-00002-of-00002.safetensors",
    }
    (folder / INDEX).write_text(json.dumps(index))
    first = folder / "model-00001-of-00002.safetensors"
    first.write_bytes(first.read_bytes()[:-2])
    found = faults(folder)
    assert len(found) == 3
    assert found[0].startswith(f"{first}: is truncated or no safetensors file")
    assert found[1] == f"{folder}/model-00002-of-00002.safetensors: d.weight is not in it, as {folder / INDEX} says"
    assert found[2] == (
        f"{folder}/model-00003-of-00003.safetensors: the file is missing, as {folder / INDEX} names it; fetch the "
        "whole model again"
    )


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/secret.safetensors", "sub/secret.safetensors", "..\\secret.safetensors",
     "C:secret.safetensors", "secret.txt", "", ".."],
)  # fmt: skip
def test_an_index_does_not_lead_out_of_its_folder(name: str, tmp_path: Path) -> None:
    inner = tmp_path / "model"
    (inner / "sub").mkdir(parents=True)
    save_file({"w": torch.zeros(1)}, tmp_path / "secret.safetensors")
    save_file({"w": torch.zeros(1)}, inner / "sub" / "secret.safetensors")
    (inner / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    assert faults(inner) == (
        f"{inner / INDEX}: names {name!r}, which is not a .safetensors file in the same folder; nothing else is read",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no index of shards, which is JSON with"),
        ("[]", "is no index of shards, which is JSON with"),
        ("\xff\xfe", "is no index of shards, which is JSON with"),
        ('{"weight_map": ["w"]}', "is no index of shards, which is JSON with"),
        ('{"weight_map": {"w": 3}}', "names 3 for 'w'"),
        ('{"weight_map": {}}', "names no tensor"),
    ],
)
def test_a_garbled_index_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(content.encode("latin-1"))
    (found,) = faults(tmp_path)
    assert found.startswith(f"{tmp_path / INDEX}: {message}")


def test_a_place_where_nothing_is_has_its_neighbours_named(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    assert faults(tmp_path / "adapter_modle.safetensors")[0].endswith(
        "there is no such file or folder; did you mean 'adapter_model.safetensors'?"
    )
    assert faults(tmp_path) == (
        f"{tmp_path}: the folder holds neither {ONE_FILE} nor {INDEX}; give one of its files: "
        "adapter_model.safetensors",
    )
    (tmp_path / "notes.txt").write_text("")
    assert "is no .safetensors file, no index of shards" in faults(tmp_path / "notes.txt")[0]
    assert "there is no such file or folder" in faults(tmp_path / "no" / "folder")[0]


def test_what_the_index_leaves_out_is_not_there(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["a.mask"]
    (folder / INDEX).write_text(json.dumps(index))
    assert set(open_shards(folder)) == set(TENSORS) - {"a.mask"}
