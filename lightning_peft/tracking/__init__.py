"""What a run reports."""

from lightning_peft.tracking.cost.meter import Cost, CostMeter
from lightning_peft.tracking.monitor.callback import AdapterMonitor
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
    "AdapterMonitor",
    "Cost",
    "CostMeter",
    "PredictionFile",
    "count",
    "module_table",
    "print_summary",
    "quantization_line",
    "summary_line",
    "summary_table",
]
