"""What a run reports."""

from lightning_peft.tracking.predictions import PredictionFile
from lightning_peft.tracking.tables import (
    count,
    module_table,
    print_summary,
    quantization_line,
    summary_line,
    summary_table,
)

__all__ = [
    "PredictionFile",
    "count",
    "module_table",
    "print_summary",
    "quantization_line",
    "summary_line",
    "summary_table",
]
