from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_peft.data.image_folder import ImageFolderData
from lightning_peft.methods.errors import PEFTError

Write = Callable[..., str]
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="session")
def processor(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a processor that scales images to 4 by 4 and colours to 0…1."""
    from transformers import ViTImageProcessor

    folder = str(tmp_path_factory.mktemp("processor"))
    numbers: dict[str, Any] = {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}
    ViTImageProcessor(size={"height": 4, "width": 4}, **numbers).save_pretrained(folder)
    return folder


def paint(path: Path, colour: Any = (255, 0, 0), mode: str = "RGB", size: tuple[int, int] = (6, 5)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    """Ten red images, ten green ones and five blue ones."""
    folder = tmp_path / "squares"
    for name, count in (("red", 10), ("green", 10), ("blue", 5)):
        for number in range(count):
            paint(folder / name / f"{number}.png", COLOURS[name])
    return folder


def fault(data: ImageFolderData) -> list[str]:
    with pytest.raises(PEFTError) as caught:
        data.setup()
    return list(caught.value.faults)


def rows(loader: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(loader)
    return torch.cat([b["pixel_values"] for b in batches]), torch.cat([b["labels"] for b in batches])


@pytest.mark.parametrize("workers", [0, 2])
def test_folder_of_classes(workers: int, squares: Path, processor: str) -> None:
    data = ImageFolderData(
        str(squares), processor=processor, validation_fraction=0.2, batch_size=4, num_workers=workers
    )
    data.prepare_data()
    data.setup("fit")
    assert (data.class_names, data.num_labels, data.class_counts) == (["blue", "green", "red"], 3, [4, 8, 8])
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch) == ["labels", "pixel_values"]
    assert (batch["pixel_values"].dtype, tuple(batch["pixel_values"].shape)) == (torch.float32, (4, 3, 4, 4))
    pixels, labels = rows(data.train_dataloader())
    assert labels.bincount().tolist() == [4, 8, 8]
    # the classes' order is that of blue, green and red, so that a label says which channel is lit
    assert torch.equal(pixels.amax(dim=(2, 3)), torch.eye(3).flip(1)[labels])
    _, labels = rows(data.val_dataloader())
    assert labels.tolist() == [0, 1, 1, 2, 2]


def test_split_folders_and_test_images_without_classes(tmp_path: Path, processor: str) -> None:
    for split, count in (("Training", 3), ("Val", 2)):
        for name in ("train", "red"):  # a class may be called like a split
            for number in range(count):
                paint(tmp_path / split / name / "deep" / f"{number}.JPG", COLOURS["red"])
    for number in range(2):
        paint(tmp_path / "test" / f"{number}.png", COLOURS["green"])
    (tmp_path / "Training" / "red" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "Training" / ".cache").mkdir()
    (tmp_path / "README.md").write_text("what this is")
    data = ImageFolderData(str(tmp_path), processor=processor)
    data.setup()
    assert (data.class_names, data.class_counts) == (["red", "train"], [3, 3])
    assert rows(data.val_dataloader())[1].tolist() == [0, 0, 1, 1]
    (batch,) = data.predict_dataloader()
    assert sorted(batch) == ["pixel_values"]
    assert batch["pixel_values"][:, 1].tolist() == [[[1.0] * 4] * 4] * 2
    with pytest.raises(PEFTError) as caught:
        data.test_dataloader()
    assert str(caught.value) == "test_path: there are no test images with labels; give a folder that has them"


def test_folders_of_their_own_to_validate_and_test_on(squares: Path, tmp_path: Path, processor: str) -> None:
    paint(tmp_path / "more" / "green" / "a.png", COLOURS["green"])
    more = str(tmp_path / "more")
    data = ImageFolderData(str(squares), validation_path=more, test_path=more, processor=processor)
    data.setup()
    assert data.class_counts == [5, 10, 10]
    assert rows(data.val_dataloader())[1].tolist() == rows(data.test_dataloader())[1].tolist() == [1]


def test_table_names_the_files_from_where_it_lies(write: Write, tmp_path: Path, processor: str) -> None:
    paint(tmp_path / "table" / "images" / "a.png", COLOURS["red"])
    outside = paint(tmp_path / "b.png", COLOURS["blue"])
    table = [{"file": "images/a.png", "colour": "red"}, {"file": str(outside), "colour": "blue"}] * 2
    names = {"image_column": "file", "label_column": "colour"}
    for path in (write("table/data.jsonl", table), write("table/data.csv", table)):
        data = ImageFolderData(path, validation_path=path, processor=processor, **names)  # type: ignore[arg-type]
        data.setup()
        pixels, labels = rows(data.val_dataloader())
        assert (data.class_names, labels.tolist()) == (["blue", "red"], [1, 0, 1, 0])
        assert pixels[:, :, 0, 0].tolist() == [[1, 0, 0], [0, 0, 1]] * 2
    (tmp_path / "table" / "data.jsonl").rename(tmp_path / "table" / "train.jsonl")
    folder = ImageFolderData(str(tmp_path / "table"), processor=processor, **names)  # type: ignore[arg-type]
    folder.setup()
    assert folder.class_counts == [2, 2]


@pytest.mark.parametrize("plain", [False, True])
def test_table_holds_the_files(plain: bool, tmp_path: Path, processor: str) -> None:
    """As the hub has them, and as one finds them in Parquet files that others wrote."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    def png(colour: tuple[int, int, int]) -> dict[str, Any]:
        buffer = io.BytesIO()
        Image.new("RGB", (3, 3), colour).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    kind = {"bytes": Value("binary"), "path": Value("string")} if plain else ImageFeature()
    features = Features({"image": kind, "label": Value("int64")})
    columns = {"image": [png(COLOURS["red"]), png(COLOURS["blue"])], "label": [0, 1]}
    Dataset.from_dict(columns, features).to_parquet(tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    data = ImageFolderData(path, validation_path=path, processor=processor)
    data.setup()
    pixels, labels = rows(data.val_dataloader())
    assert labels.tolist() == [0, 1]
    assert pixels[:, :, 0, 0].tolist() == [[1, 0, 0], [0, 0, 1]]


def test_images_of_all_kinds_are_read_as_rgb(tmp_path: Path, processor: str) -> None:
    place = tmp_path / "images" / "a"
    paint(place / "0.png", 51, "L")
    paint(place / "1.png", (51, 102, 153, 7), "RGBA")
    paint(place / "2.gif", 0, "P")
    paint(place / "3.png", 1, "1")
    Image.fromarray(np.full((5, 6), 51 * 256, np.uint16)).save(place / "4.png")
    turned = Image.new("RGB", (4, 4))
    turned.paste((255, 0, 0), (0, 0, 4, 2))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(place / "5.png", exif=exif)
    paint(tmp_path / "images" / "b" / "0.png")
    path = str(tmp_path / "images")
    data = ImageFolderData(path, validation_path=path, processor=processor, batch_size=7)
    data.setup()
    pixels, _ = rows(data.val_dataloader())
    assert pixels[:5, :, 0, 0].numpy() == pytest.approx(
        np.array([[0.2] * 3, [0.2, 0.4, 0.6], [0.0] * 3, [1.0] * 3, [0.2] * 3]), abs=1e-6
    )
    assert pixels[5, 0, :, 0].tolist() == [0, 0, 1, 1]


def test_rows_that_fill_up_have_no_labels(squares: Path, processor: str) -> None:
    data = ImageFolderData(str(squares), validation_path=str(squares), processor=processor)
    data.setup()
    data.trainer = SimpleNamespace(world_size=4)  # type: ignore[assignment]
    pixels, labels = rows(data.val_dataloader())
    assert labels.tolist() == [0] * 5 + [1] * 10 + [2] * 10 + [-100] * 3
    assert torch.equal(pixels[25:], pixels[:1].expand(3, -1, -1, -1))


def test_faulty_folders_are_told_in_full(tmp_path: Path, processor: str) -> None:
    folder = tmp_path / "images"
    paint(folder / "red" / "a.png")
    paint(folder / "loose.png")
    (folder / "empty").mkdir()
    (folder / "red" / "notes.txt").write_text("x")
    other = tmp_path / "other"
    other.mkdir()
    assert fault(ImageFolderData(str(folder), processor=processor)) == [
        f"path: in {folder} 1 file lies (loose.png) beside the folders of the classes",
        f"path: the class 'empty' has no image in {folder / 'empty'}",
        f"path: in {folder} 1 file lies (red/notes.txt) with an unknown suffix; images: "
        ".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp",
    ]
    assert fault(ImageFolderData(str(other), processor=processor)) == [f"path: {other} has no folder per class"]
    for number in range(7):
        paint(other / f"{number}.png")
    assert fault(ImageFolderData(str(other), processor=processor)) == [
        f"path: {other} has no folder per class; its images lie loose"
    ]
    (other / "only").mkdir()
    for number in range(7):
        (other / f"{number}.png").rename(other / "only" / f"{number}.png")
    assert fault(ImageFolderData(str(other), processor=processor)) == [
        f"path: {other} has one class only, 'only'; a classifier needs two or more"
    ]


def test_faulty_split_folders(tmp_path: Path, processor: str) -> None:
    for name in ("train/a", "train/b", "val/a", "valid/b", "holdout/b"):
        paint(tmp_path / name / "0.png")
    assert fault(ImageFolderData(str(tmp_path), processor=processor)) == [
        f"path: {tmp_path / 'holdout'} is no split; beside `train` there may be `validation` and `test`",
        f"path: {tmp_path / 'valid'} is the split 'val' again; beside `train` there may be `validation` and `test`",
    ]
    data = ImageFolderData(str(tmp_path / "train"), validation_path=str(tmp_path), processor=processor)
    assert fault(data)[0].startswith(f"validation_path: {tmp_path / 'holdout'} is no split")
    for name in ("holdout/b", "valid/b"):
        (tmp_path / name / "0.png").unlink()
        (tmp_path / name).rmdir()
        (tmp_path / name).parent.rmdir()
    assert fault(data) == [f"validation_path: {str(tmp_path)!r} holds the splits train, validation; give one of them"]


def test_images_that_can_not_be_read_are_named(squares: Path, tmp_path: Path, processor: str) -> None:
    (squares / "red" / "1.png").write_bytes(b"")
    (squares / "red" / "2.png").write_bytes(b"no image")
    whole = (squares / "red" / "3.png").read_bytes()
    (squares / "red" / "3.png").write_bytes(whole[:-20])
    data = ImageFolderData(str(squares), processor=processor, validation_fraction=0)
    (told,) = fault(data)
    start = (
        f"train: 3 of 25 images can't be read: {squares}/red/1.png (it is empty), {squares}/red/2.png (cannot identify"
    )
    assert told.startswith(start)
    assert f"{squares}/red/3.png (" in told


def test_files_that_a_table_names_in_vain(write: Write, tmp_path: Path, processor: str) -> None:
    paint(tmp_path / "a.png")
    path = write(
        "a.jsonl", [{"image": "a.png", "label": 0}, {"image": "b.png", "label": 1}, {"image": None, "label": 1}]
    )
    assert fault(ImageFolderData(path, processor=processor, validation_fraction=0)) == [
        f"train: 2 of 3 images can't be read: {tmp_path / 'b.png'} (there is no such file), row 3 (it is null)"
    ]


def test_image_that_breaks_later_is_named(squares: Path, processor: str) -> None:
    data = ImageFolderData(str(squares), processor=processor, validation_path=str(squares), batch_size=25)
    data.setup()
    (squares / "blue" / "0.png").unlink()
    with pytest.raises(PEFTError) as caught:
        rows(data.val_dataloader())
    assert str(caught.value) == f"{squares}/blue/0.png can't be read: there is no such file"


def test_columns_and_labels(write: Write, squares: Path, processor: str) -> None:
    path = write("a.jsonl", [{"images": "a.png", "lable": 0}])
    assert fault(ImageFolderData(path, processor=processor)) == [
        "image_column: the train data has no column 'image'; did you mean 'images'?",
        "label_column: the train data has no column 'label'; did you mean 'lable'?",
    ]
    path = write("b.jsonl", [{"image": 1, "label": 0}])
    assert fault(ImageFolderData(path, processor=processor)) == [
        "image_column: 'image' of the train data holds neither paths nor files"
    ]
    other = paint(squares.parent / "other" / "grene" / "a.png")
    data = ImageFolderData(str(squares), validation_path=str(other.parent.parent), processor=processor)
    assert fault(data) == [
        "validation: the label 'grene' (1 row) does not occur in training; did you mean 'green' or 'red'?"
    ]


def test_place_of_the_processor(squares: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (told,) = fault(ImageFolderData(str(squares), processor=str(tmp_path / "none")))
    assert told.startswith(f"processor: AutoImageProcessor can't load {str(tmp_path / 'none')!r}: ")
    (told,) = fault(ImageFolderData(str(squares)))
    assert told.startswith("processor: none was given, and the module has no hyper-parameter `model`")


def test_missing_package_is_named(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "PIL" else find(name, *more))
    assert fault(ImageFolderData(str(squares), processor="x")) == [
        "vision data needs the package 'PIL'; pip install 'lightning-peft[vision]'"
    ]
