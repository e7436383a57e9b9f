"""A Trainer that never runs: what a module asks of its own while a plan is made."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from lightning_peft.methods.errors import PEFTError

STEPS = 10**6
"""Optimizer steps that a plan takes training to have: no schedule or method ends within the one that is simulated."""


class PlanningTrainer(pl.Trainer):
    """On the CPU, with nothing that writes.

    Args:
        precision: as in the Trainer that is planned for.
        accumulate_grad_batches: as in that one.
        datamodule: what a task asks for its data.
    """

    def __init__(self, precision: Any = "32-true", accumulate_grad_batches: int = 1, datamodule: Any = None) -> None:
        super().__init__(
            accelerator="cpu",
            devices=1,
            precision=precision,
            accumulate_grad_batches=accumulate_grad_batches,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        self.state.fn = TrainerFn.FITTING
        self.datamodule = datamodule
        self._is_prepared = False

    @property
    def estimated_stepping_batches(self) -> int | float:
        """A number of steps that no data has to be read for."""
        return STEPS

    def prepare_data(self) -> None:
        """Let the datamodule get ready for training, where that has not been done.

        Raises:
            PEFTError: it can't.
        """
        if self._is_prepared:
            return
        self.datamodule.trainer = self
        try:
            self.datamodule.prepare_data()
            self.datamodule.setup("fit")
        except (PEFTError, ImportError):
            raise
        except Exception as error:
            raise PEFTError(
                f"plan: {type(self.datamodule).__name__} can't be set up ({type(error).__name__}: {error})"
            ) from error
        self._is_prepared = True

    def take(self, module: pl.LightningModule) -> None:
        """Attach a module."""
        self.strategy.connect(module)
        module.trainer = self
