"""Several devices and nodes: what is broadcast, compared and gathered between the processes of a run.

Importing it, as the callback does, registers the strategies' names with Lightning.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_peft.strategies.agreement import agree_on_base, agree_on_configuration, everyones
from lightning_peft.strategies.ddp import PEFTDDPStrategy
from lightning_peft.strategies.fsdp import PEFTFSDPStrategy

__all__ = ["PEFTDDPStrategy", "PEFTFSDPStrategy", "agree_on_base", "agree_on_configuration", "everyones"]

StrategyRegistry.register(
    "peft_ddp",
    PEFTDDPStrategy,
    "DDP that broadcasts and compares adapters, and nothing frozen",
    override=True,
)
StrategyRegistry.register(
    "peft_ddp_find_unused_parameters_true",
    PEFTDDPStrategy,
    "peft_ddp with `find_unused_parameters` as True, for adapters that a step may not use",
    override=True,
    find_unused_parameters=True,
)
StrategyRegistry.register(
    "peft_fsdp",
    PEFTFSDPStrategy,
    "FSDP2 that shards the frozen base, with whole adapters on each rank",
    override=True,
)
