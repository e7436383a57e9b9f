"""What a configuration would train, without training."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from lightning_peft.callback import PEFT, AdaptedModule
from lightning_peft.cli.reporting import console_for_tables
from lightning_peft.state import read_checkpoint
from lightning_peft.tracking import module_table, quantization_line, summary_line


class InspectingTrainer(pl.Trainer):
    """Lightning's Trainer with one verb more, for the command line to offer it."""

    def inspect(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Shows what would be trained, module by module, without training.

        Args:
            model: the module, which is built and injected as `fit` would do it.
            datamodule: data that the module may ask for, such as the number of classes.
            ckpt_path: a checkpoint to check against the model.
            weights_only: False reads a checkpoint with Python objects in it.

        Raises:
            PEFTError: targets that match nothing, or a checkpoint that doesn't fit.
        """
        self.state.fn = TrainerFn.FITTING
        self.strategy.connect(model)
        model.trainer = self
        if datamodule is not None:
            # by hand, as a run of the Trainer would open its loggers
            self.datamodule = datamodule
            datamodule.trainer = self
            datamodule.prepare_data()
            datamodule.setup("fit")
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PEFT):
                callback.setup(self, model, "fit")
        model.setup("fit")
        model.configure_model()
        if ckpt_path is not None and isinstance(model, AdaptedModule):
            model.check_checkpoint(read_checkpoint(ckpt_path, "meta", weights_only is not False))
        console = console_for_tables()
        console.print(module_table(model))
        for line in filter(None, (summary_line(model), quantization_line(model))):
            console.print(line, highlight=False, soft_wrap=True)
        if ckpt_path is not None:
            console.print(f"{ckpt_path} fits this model", highlight=False, markup=False, soft_wrap=True)
