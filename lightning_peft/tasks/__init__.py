"""Ordinary LightningModules that train a given model on a given kind of data; they know nothing of adapters."""

from lightning_peft.tasks.sequence_classification import SequenceClassification

__all__ = ["SequenceClassification"]
