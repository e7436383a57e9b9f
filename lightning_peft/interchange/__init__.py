"""Adapters on their way out of, and into, other forms."""

from lightning_peft.interchange.hf_peft import export_adapter, import_adapter
from lightning_peft.interchange.standalone import save_merged
from lightning_peft.methods._merging import merge, unmerge

__all__ = ["export_adapter", "import_adapter", "merge", "save_merged", "unmerge"]
