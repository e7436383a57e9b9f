"""Ordinary LightningDataModules: they read, check and batch data, and know nothing of adapters."""

from lightning_peft.data.docstrings import DocstringData
from lightning_peft.data.text_classification import TextClassificationData

__all__ = ["DocstringData", "TextClassificationData"]
