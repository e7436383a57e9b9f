"""Classification of sounds, such as spoken commands."""

from __future__ import annotations

from typing import ClassVar

from lightning_peft.tasks.classification import Classification


class SpeechClassification(Classification):
    """A pretrained speech model with a new head that gives one label to a sound.

    Args, batches and metrics are those of `Classification`.
    """

    auto_class: ClassVar[str] = "AutoModelForAudioClassification"
