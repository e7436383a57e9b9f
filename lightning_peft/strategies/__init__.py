"""Several devices and nodes: what is broadcast, compared and gathered between the processes of a run."""

from lightning_peft.strategies.agreement import agree_on_base, agree_on_configuration, everyones
from lightning_peft.strategies.ddp import PEFTDDPStrategy
from lightning_peft.strategies.fsdp import PEFTFSDPStrategy

__all__ = ["PEFTDDPStrategy", "PEFTFSDPStrategy", "agree_on_base", "agree_on_configuration", "everyones"]
