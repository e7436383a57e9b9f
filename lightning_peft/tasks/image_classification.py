"""Classification of images."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning_peft.tasks.classification import Classification


class ImageClassification(Classification):
    """A pretrained vision model with a head that gives one label to an image.

    Args, batches and metrics are those of `Classification`. A checkpoint with a head for another number of classes gets
    a new one.
    """

    auto_class: ClassVar[str] = "AutoModelForImageClassification"

    def model_arguments(self) -> dict[str, Any]:
        """The classes, and that a head of another size is replaced."""
        return {**super().model_arguments(), "ignore_mismatched_sizes": True}
