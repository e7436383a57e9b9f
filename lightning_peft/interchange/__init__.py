"""Adapters on their way out of, and into, other forms."""

from lightning_peft.interchange.merging import merge, unmerge

__all__ = ["merge", "unmerge"]
