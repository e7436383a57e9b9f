"""What a detector's queries say about boxes, and how well boxes match the right ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torchmetrics import Metric

from lightning_peft.methods.errors import PEFTError

MOST = 100
"""Boxes that are kept of an image, as in COCO's evaluation."""
SIZES = {"small": 1, "medium": 2, "large": 3}
"""Areas below 32², between, and above 96² square pixels: their places in COCO's arrays; 0 is all."""
RECALLED = {"1": 0, "10": 1, "100": 2}
"""At most so many boxes of an image and class count for a recall: their places in COCO's arrays."""
BOX_SCORES = (
    "map",
    "map_50",
    "map_75",
    *(f"map_{size}" for size in SIZES),
    *(f"mar_{most}" for most in RECALLED),
    *(f"mar_{size}" for size in SIZES),
)
"""The names that `MeanAveragePrecision` knows."""


def corners(boxes: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Boxes (…, 4) of centre, width and height, as parts of an image, as left, top, right and bottom in pixels.

    Args:
        boxes: of a dtype that holds pixels, such as float32.
        sizes: height and width, of shape (…, 2), broadcast over the boxes.
    """
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1) * sizes[..., [1, 0, 1, 0]]


def best_boxes(
    logits: torch.Tensor, boxes: torch.Tensor, sizes: torch.Tensor, classes: int
) -> list[dict[str, torch.Tensor]]:
    """The boxes of each image with the highest scores, at most `MOST`, best first.

    Args:
        logits: of each query, float32 of shape (batch, queries, classes + 1), where the last is for no object and the
            others share one softmax with it (DETR, YOLOS); or (batch, queries, classes), where each is a sigmoid's of
            its own, so that a query may give several boxes (Deformable DETR, RT-DETR).
        boxes: centre, width and height as parts of the image, float32 of shape (batch, queries, 4).
        sizes: height and width of the images in pixels, int64 of shape (batch, 2).
        classes: how many there are.

    Returns:
        for each image `boxes`, left, top, right and bottom in pixels, float32 of shape (n, 4); `scores`, float32 of
        shape (n,), from 0 to 1; and `labels`, int64 of shape (n,).
    """
    if logits.shape[-1] == classes + 1:
        scores, labels = logits.softmax(dim=-1)[..., :-1].max(dim=-1)
        scores, order = scores.topk(min(MOST, scores.shape[1]), dim=1)
        labels, queries = labels.gather(1, order), order
    else:
        every = logits.sigmoid().flatten(1)
        scores, order = every.topk(min(MOST, every.shape[1]), dim=1)
        labels, queries = order % classes, order // classes
    chosen = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
    places = corners(chosen, sizes[:, None])
    return [
        {"boxes": place, "scores": score, "labels": label}
        for place, score, label in zip(places, scores, labels, strict=True)
    ]


class MeanAveragePrecision(Metric):
    """COCO's mean average precision and recall of boxes, from 0 to 1, over the images of all devices.

    `map` is the mean over classes and over the ten thresholds of overlap from 0.5 to 0.95; `map_50` and `map_75` are
    those at one threshold; `map_small`, `map_medium` and `map_large` those of the boxes below 32², between, and above
    96² square pixels. `mar_1`, `mar_10` and `mar_100` are the mean recall where so many boxes of an image and class
    count, and `mar_small` and so on that by size. One is NaN where there is no box to find. `faster-coco-eval` computes
    them; torchmetrics' own metric needs torchvision.

    Args:
        names: which of them to give, of `BOX_SCORES`.

    Raises:
        PEFTError: `faster-coco-eval` isn't installed.
    """

    found: Any
    truth: Any
    images: torch.Tensor

    def __init__(self, names: Sequence[str] = ("map",)) -> None:
        super().__init__()
        if importlib.util.find_spec("faster_coco_eval") is None:
            raise PEFTError(
                f"{names[0]}: this metric needs the package 'faster-coco-eval'; pip install 'lightning-peft[vision]'"
            )
        self.names = tuple(names)
        # flat, since torchmetrics gathers an empty state of one dimension alone from a device that has seen no image
        self.add_state("found", default=[], dist_reduce_fx="cat")
        self.add_state("truth", default=[], dist_reduce_fx="cat")
        self.add_state("images", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, found: Sequence[Mapping[str, torch.Tensor]], truth: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Enter images.

        Args:
            found: for each image `boxes`, left, top, right and bottom in pixels, of shape (n, 4), `scores` and
                `labels`, of shape (n,).
            truth: for each image `boxes` and `labels`; and, where they are known, `iscrowd`, 1 for a box around many
                things, in which no box counts as wrong, and `area`, in square pixels, both of shape (n,).
        """
        group = torch.distributed if torch.distributed.is_available() and torch.distributed.is_initialized() else None
        ranks, rank = (group.get_world_size(), group.get_rank()) if group is not None else (1, 0)
        for boxes, right in zip(found, truth, strict=True):
            # no two images of all devices have the same number
            image = int(self.images) * ranks + rank
            area = (right["boxes"][:, 2:] - right["boxes"][:, :2]).prod(dim=1)
            crowd = right.get("iscrowd", torch.zeros_like(right["labels"]))
            self.found.append(_flat(image, boxes["labels"], boxes["scores"], boxes["boxes"]))
            self.truth.append(_flat(image, right["labels"], crowd, right.get("area", area), right["boxes"]))
            self.images += 1

    def compute(self) -> dict[str, torch.Tensor]:
        """The scores by name, float32 scalars."""
        from faster_coco_eval import COCO, COCOeval_faster

        found, truth = _rows(self.found, 7), _rows(self.truth, 8)
        known = set(truth[:, 1].tolist())
        data = {
            "images": [{"id": int(image)} for image in np.unique([*found[:, 0], *truth[:, 0]])],
            "categories": [{"id": int(label)} for label in sorted(known)],
            "annotations": [
                {
                    "id": number,
                    "image_id": int(image),
                    "category_id": int(label),
                    "iscrowd": int(crowd),
                    "area": area,
                    "bbox": _sides(box),
                }
                for number, (image, label, crowd, area, *box) in enumerate(truth.tolist(), 1)
            ],
        }
        answers = [
            {"image_id": int(image), "category_id": int(label), "score": score, "bbox": _sides(box)}
            for image, label, score, *box in found.tolist()
            if label in known
        ]
        if truth.size == 0:
            return {name: torch.tensor(torch.nan) for name in self.names}
        right = COCO(data)
        evaluation = COCOeval_faster(right, right.loadRes(answers), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
        thresholds = {"50": 0, "75": 5}
        scores = {}
        for name in self.names:
            kind, _, part = name.partition("_")
            size = SIZES.get(part, 0)
            if kind == "mar":
                values = recall[:, :, size, RECALLED.get(part, 2)]
            else:
                values = precision[thresholds[part] if part in thresholds else slice(None), ..., size, 2]
            # -1 marks classes without a box of that size
            scores[name] = torch.tensor(values[values > -1].mean() if (values > -1).any() else np.nan).float()
        return scores


def _flat(image: int, *columns: torch.Tensor) -> torch.Tensor:
    """Rows of float32 that begin with the image's number, one after the other."""
    wide = [(column if column.ndim == 2 else column[:, None]).float() for column in columns]
    return torch.cat([torch.full_like(wide[0], image), *wide], dim=1).flatten()


def _rows(state: list[torch.Tensor] | torch.Tensor, width: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What was gathered, in rows; none where nothing was entered."""
    parts = [state] if isinstance(state, torch.Tensor) else state
    return np.concatenate([np.zeros(0), *(part.double().cpu().numpy() for part in parts)]).reshape(-1, width)


def _sides(box: list[float]) -> list[float]:
    """Left, top, width and height, as COCO has boxes."""
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]
