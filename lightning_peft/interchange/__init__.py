"""Adapters on their way out of, and into, other forms."""

from lightning_peft.interchange.hf_peft import export_adapter, import_adapter
from lightning_peft.interchange.merging import merge, unmerge
from lightning_peft.interchange.standalone import save_merged

__all__ = ["export_adapter", "import_adapter", "merge", "save_merged", "unmerge"]
