"""What a run reports."""

from lightning_peft.tracking.tables import count, module_table, print_summary, summary_line, summary_table

__all__ = ["count", "module_table", "print_summary", "summary_line", "summary_table"]
