from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_peft.data import SegmentationFolderData
from lightning_peft.methods.errors import PEFTError


@pytest.fixture(scope="session")
def processor(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a processor that scales to 4 by 4 pixels, and was made for masks whose 0 is no class."""
    from transformers import SegformerImageProcessorPil

    folder = str(tmp_path_factory.mktemp("processor"))
    numbers: dict[str, Any] = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "do_reduce_labels": True}
    SegformerImageProcessorPil(size={"height": 4, "width": 4}, **numbers).save_pretrained(folder)
    return folder


def pair(folder: Path, name: str, mask: Any, mode: str = "L", size: tuple[int, int] | None = None) -> None:
    """An image of the colours that its mask says, unless it has another size, and the mask."""
    values = np.asarray(mask, dtype=np.uint8)
    pixels = np.stack([values == 0, values == 1, values == 2], -1).astype(np.uint8) * 255
    image = Image.fromarray(pixels) if size is None else Image.new("RGB", size)
    for place, made in (("images", image), ("masks", Image.fromarray(values).convert(mode))):
        path = folder / place / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        made.save(path)


def fault(data: SegmentationFolderData) -> list[str]:
    with pytest.raises(PEFTError) as caught:
        data.setup()
    return list(caught.value.faults)


QUARTERS = [[0, 0, 1, 1]] * 2 + [[2, 2, 255, 255]] * 2


@pytest.fixture
def quarters(tmp_path: Path) -> Path:
    """Five images of four quarters, the last of which is of no class."""
    for number in range(5):
        pair(tmp_path / "quarters", f"deep/{number}", QUARTERS)
    return tmp_path / "quarters"


@pytest.mark.parametrize("workers", [0, 2])
def test_images_and_masks_are_resized_alike(workers: int, quarters: Path, processor: str) -> None:
    for place in ("images", "masks"):  # twice as large, so that they have to be scaled
        for file in (quarters / place).rglob("*.png"):
            Image.open(file).resize((8, 8), Image.Resampling.NEAREST).save(file)
    data = SegmentationFolderData(
        str(quarters), processor=processor, batch_size=2, num_workers=workers, validation_path=str(quarters)
    )
    data.prepare_data()
    data.setup("fit")
    assert (data.class_names, data.num_labels, data.class_counts) == (["0", "1", "2"], 3, [5 * 16] * 3)
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    assert [sorted(batch) for batch in batches] == [["labels", "pixel_values"]] * 6
    labels = torch.cat([batch["labels"] for batch in batches])
    assert (labels.dtype, tuple(labels.shape)) == (torch.int64, (10, 4, 4))
    assert labels[0].tolist() == [[-100 if value == 255 else value for value in row] for row in QUARTERS]
    assert torch.equal(labels, labels[:1].expand(10, 4, 4))
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    assert pixels.dtype == torch.float32
    # the colours say the classes, so that neither was turned or moved
    known = labels >= 0
    assert torch.equal(pixels.argmax(dim=1)[known], labels[known])


def test_split_folders_names_and_test_images_without_masks(tmp_path: Path, processor: str) -> None:
    for split, count in (("train", 4), ("Val", 2), ("test", 3)):
        for number in range(count):
            pair(tmp_path / split, str(number), [[0, 1], [1, 1]])
    for file in (tmp_path / "test" / "masks").iterdir():
        file.unlink()
    (tmp_path / "classes.txt").write_text("ground\nroad\n\nsky\n")
    data = SegmentationFolderData(str(tmp_path), processor=processor)
    data.setup()
    # a class may be missing in the masks
    assert (data.class_names, data.class_counts) == (["ground", "road", "sky"], [4, 12, 0])
    assert len(next(iter(data.val_dataloader()))["labels"]) == 2
    (batch,) = data.predict_dataloader()
    assert sorted(batch) == ["pixel_values"]
    with pytest.raises(PEFTError) as caught:
        data.test_dataloader()
    assert str(caught.value) == "test_path: there are no test images with masks; give some"


def splits_inside(folder: Path, **counts: int) -> Path:
    """Images and masks in folders of splits within `images` and `masks`."""
    for split, count in counts.items():
        for number in range(count):
            pair(folder / split, str(number), [[0, 1], [1, 1]])
        for kind in ("images", "masks"):
            (folder / kind).mkdir(exist_ok=True)
            (folder / split / kind).rename(folder / kind / split)
        (folder / split).rmdir()
    return folder


def test_split_folders_within_images_and_masks(tmp_path: Path, processor: str) -> None:
    folder = splits_inside(tmp_path / "a", train=6, val=4, Test=3)
    (folder / "masks" / "val").rename(folder / "masks" / "valid")
    data = SegmentationFolderData(str(folder), processor=processor)
    data.setup()
    assert {split: len(rows) for split, rows in data._encoded.items()} == {"train": 6, "validation": 4, "test": 3}
    table = data._encoded["validation"].with_format(None)
    assert (table["image"][3], table["mask"][3]) == (f"{folder}/images/val/3.png", f"{folder}/masks/valid/3.png")
    assert tuple(next(iter(data.test_dataloader()))["labels"].shape) == (3, 4, 4)
    # test images without masks
    shutil.rmtree(folder / "masks" / "Test")
    data = SegmentationFolderData(str(folder), processor=processor)
    data.setup()
    assert sorted(next(iter(data.predict_dataloader()))) == ["pixel_values"]
    # a path of its own for one of them
    other = splits_inside(tmp_path / "b", val=2)
    with_path = SegmentationFolderData(str(folder), validation_path=str(other), processor=processor)
    with_path.setup()
    assert len(with_path._encoded["validation"]) == 2


def test_faulty_split_folders_within_images_and_masks(tmp_path: Path, processor: str) -> None:
    folder = splits_inside(tmp_path / "a", older=1, val=1)
    beside = "beside `train` there may be `validation` and `test`"
    assert fault(SegmentationFolderData(str(folder), processor=processor)) == [
        f"path: {folder}/images/older is no split; {beside}",
        f"path: {folder}/masks/older is no split; {beside}",
        f"path: {folder}/images has folders of splits, but none of them is `train`",
    ]
    folder = splits_inside(tmp_path / "b", train=2, val=1, dev=1)
    shutil.rmtree(folder / "masks" / "dev")
    (folder / "images" / "train" / "1.png").rename(folder / "images" / "1.png")
    (folder / "images" / "notes.txt").write_text("not an image")
    shutil.copytree(folder / "masks" / "val", folder / "masks" / "test")
    assert fault(SegmentationFolderData(str(folder), processor=processor)) == [
        f"path: {folder}/images/val is the split 'dev' again; {beside}",
        f"path: in {folder}/images 1 file lies (1.png) beside the folders of the splits",
        f"path: 1 mask has no image of the same name: {folder}/masks/train/1.png",
        f"path: {folder}/images/test holds no image",
    ]


def test_masks_of_all_kinds(tmp_path: Path, processor: str) -> None:
    pair(tmp_path / "a", "grey", [[0, 1], [0, 1]])
    pair(tmp_path / "a", "bits", [[0, 255], [0, 255]], mode="1")
    pair(tmp_path / "a", "colours", [[0, 1], [0, 1]])
    painted = Image.fromarray(np.array([[0, 1], [0, 1]], dtype=np.uint8), mode="P")
    painted.putpalette([9, 9, 9, 200, 0, 0])
    painted.save(tmp_path / "a" / "masks" / "colours.png")
    data = SegmentationFolderData(str(tmp_path / "a"), processor=processor, validation_path=str(tmp_path / "a"))
    data.setup()
    (batch,) = data.val_dataloader()
    assert batch["labels"].tolist() == [[[0, 0, 1, 1]] * 4] * 3


def test_an_image_that_lies_on_its_side_is_as_large_as_its_mask(tmp_path: Path, processor: str) -> None:
    folder = tmp_path / "a"
    pair(folder, "0", [[0, 1]] * 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (3, 2)).save(folder / "images" / "0.png", exif=exif)
    pair(folder, "1", [[0, 1]] * 3)
    SegmentationFolderData(str(folder), processor=processor).setup()


def test_rows_that_fill_up_have_no_class(quarters: Path, processor: str) -> None:
    data = SegmentationFolderData(str(quarters), validation_path=str(quarters), processor=processor, ignore_index=7)
    for file in (quarters / "masks").rglob("*.png"):
        Image.fromarray(np.array([[0, 7], [1, 1]] * 2, dtype=np.uint8).repeat(2, 1)).save(file)
    data.setup()
    data.trainer = SimpleNamespace(world_size=3)  # type: ignore[assignment]
    (batch,) = data.val_dataloader()
    assert ((batch["labels"] == -100).sum(dim=(1, 2))).tolist() == [4] * 5 + [16]
    assert torch.equal(batch["pixel_values"][5], batch["pixel_values"][0])


def test_what_does_not_fit_is_told_in_full(tmp_path: Path, processor: str) -> None:
    folder = tmp_path / "a"
    pair(folder, "good", [[0, 1], [1, 1]])
    pair(folder, "size", [[0, 1], [1, 1]], size=(3, 2))
    pair(folder, "class", [[0, 9], [8, 1]])
    pair(folder, "colour", [[0, 1], [1, 1]])
    Image.new("RGB", (2, 2)).save(folder / "masks" / "colour.png")
    pair(folder, "broken", [[0, 1], [1, 1]])
    (folder / "images" / "broken.png").write_bytes(b"\x89PNG and more")
    data = SegmentationFolderData(str(folder), processor=processor, validation_fraction=0, classes=["a", "b", "c"])
    faults = fault(data)
    assert faults[0].startswith(f"train: 1 of 5 images can't be read: {folder}/images/broken.png (cannot identify")
    assert faults[1:] == [
        f"train: 1 of 5 masks can't be read: {folder}/masks/colour.png "
        "(its pixels are RGB, not one value of eight bits)",
        f"train: 1 of 5 masks have another size than their image: {folder}/masks/size.png (2 x 2, the image 3 x 2)",
        f"train: 1 of 5 masks hold values that are no class: {folder}/masks/class.png (8, 9); "
        "there are 3 classes, from 0, and 255 for what is left out",
    ]


def test_images_and_masks_that_have_no_other(tmp_path: Path, processor: str) -> None:
    folder = tmp_path / "a"
    for number in range(7):
        pair(folder, f"i{number}", [[0, 1]])
        (folder / "masks" / f"i{number}.png").rename(folder / "masks" / f"m{number}.png")
    (folder / "masks" / "m0.png").rename(folder / "masks" / "i0.png")
    (folder / "masks" / "i0.png").rename(folder / "masks" / "i0.bmp")  # another suffix is as good
    shown = [", ".join(f"{folder}/{place}/{place[0]}{n}.png" for n in range(1, 6)) for place in ("images", "masks")]
    assert fault(SegmentationFolderData(str(folder), processor=processor)) == [
        f"path: 6 images have no mask of the same name: {shown[0]}, …",
        f"path: 6 masks have no image of the same name: {shown[1]}, …",
    ]


def test_folders_and_classes_that_are_not_there(tmp_path: Path, processor: str) -> None:
    assert fault(SegmentationFolderData(str(tmp_path / "none"), processor=processor)) == [
        f"path: there is no file or folder {str(tmp_path / 'none')!r}"
    ]
    (tmp_path / "a").mkdir()
    assert fault(SegmentationFolderData(str(tmp_path / "a"), processor=processor)) == [
        f"path: {tmp_path / 'a' / 'images'} holds no image"
    ]
    pair(tmp_path / "a", "0", [[0, 0]])
    pair(tmp_path / "a", "1", [[0, 0]])
    only = "classes: the training masks hold 1 class; two or more are needed"
    assert fault(SegmentationFolderData(str(tmp_path / "a"), processor=processor)) == [only]
    data = SegmentationFolderData(str(tmp_path / "a"), processor=processor, classes=str(tmp_path / "x.txt"))
    (told,) = fault(data)
    assert (
        told == f"classes: there is no file {str(tmp_path / 'x.txt')!r}; give one with a name on each line, or a list"
    )
    with pytest.raises(PEFTError) as caught:
        SegmentationFolderData("a", ignore_index=256, batch_size=0)
    assert list(caught.value.faults) == [
        "ignore_index: 256 is not between 0 and 255",
        "batch_size: 0 is less than 1",
    ]


def test_classes_of_validation_masks_and_splits_in_their_paths(tmp_path: Path, processor: str) -> None:
    for number in range(2):
        pair(tmp_path / "a", str(number), [[0, 1]])
        pair(tmp_path / "b" / "train", str(number), [[0, 1]])
        pair(tmp_path / "b" / "val", str(number), [[0, 1]])
    pair(tmp_path / "c", "0", [[0, 3]])
    data = SegmentationFolderData(str(tmp_path / "a"), validation_path=str(tmp_path / "c"), processor=processor)
    assert fault(data) == [
        f"validation: 1 of 1 masks hold values that are no class: {tmp_path}/c/masks/0.png (3); "
        "there are 2 classes, from 0, and 255 for what is left out"
    ]
    data = SegmentationFolderData(str(tmp_path / "a"), validation_path=str(tmp_path / "b"), processor=processor)
    assert fault(data) == [
        f"validation_path: {str(tmp_path / 'b')!r} holds the splits train, validation; give one of them"
    ]


def test_a_processor_that_takes_no_masks(quarters: Path, tmp_path: Path) -> None:
    from transformers import ViTImageProcessor

    ViTImageProcessor().save_pretrained(tmp_path / "vit")
    (told,) = fault(SegmentationFolderData(str(quarters), processor=str(tmp_path / "vit")))
    assert told.startswith("processor: ViTImageProcessor")
    assert told.endswith("takes no masks; give one for semantic segmentation")


def test_an_image_that_breaks_later_is_named(quarters: Path, processor: str) -> None:
    data = SegmentationFolderData(str(quarters), processor=processor, validation_path=str(quarters))
    data.setup()
    (quarters / "images" / "deep" / "0.png").unlink()
    with pytest.raises(PEFTError) as caught:
        list(data.val_dataloader())
    assert str(caught.value) == f"{quarters}/images/deep/0.png can't be read: there is no such file"
