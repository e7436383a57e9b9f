"""What happens to adapters as they train, told to whatever logger the Trainer has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import WandbLogger
from torch.optim import Optimizer

from lightning_peft.injection import records, trainable_parameters
from lightning_peft.methods._sharded import is_sharded
from lightning_peft.methods.errors import PEFTError
from lightning_peft.state import Spec
from lightning_peft.tracking.cost.memory import peak_memory
from lightning_peft.tracking.guard import Guard, guard_calls
from lightning_peft.tracking.monitor.description import describe
from lightning_peft.tracking.monitor.layers import History, by_layer, reported_layers
from lightning_peft.tracking.monitor.norms import Norms, StepNorms, trained_groups
from lightning_peft.tracking.monitor.samples import sample_table
from lightning_peft.tracking.monitor.steps import gradient_scale, learning_rates, logged_step
from lightning_peft.tracking.monitor.throughput import Throughput
from lightning_peft.tracking.weights_and_biases.artifacts import checkpoints, log_checkpoint
from lightning_peft.tracking.weights_and_biases.runs import log_heat_map, log_table, wandb_loggers
from lightning_peft.tracking.weights_and_biases.sources import Source, class_path, sources


@dataclass
class _Run:
    """What is known of one run so far."""

    guard: Guard
    every: int
    """Steps from one that is logged to the next."""
    speed: Throughput = field(default_factory=Throughput)
    history: History = field(default_factory=History)
    due: int | None = None
    """The step since which there is something to log."""
    norms: StepNorms | None = None
    stepped: bool = False
    """Whether an optimizer has stepped since then."""
    rates: dict[str, float] = field(default_factory=dict)
    """Of the step that is logged."""
    drawn: int = -1
    """The last step that the heat maps show."""
    handed_on: tuple[Any, ...] = ()
    """The checkpoints' paths and times when they were handed on."""
    _uses: list[Source] | None = None

    def uses(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[Source]:
        """The base and the data; they are read once, as files take their time."""
        if self._uses is None:
            self._uses = sources(trainer, module)
        return self._uses

    def is_over(self, step: int, by_hand: bool) -> bool:
        """Whether what is due can be logged: an optimizer has stepped; one that steps by hand may do so batches later,
        or be none of torch's."""
        return self.due is not None and (self.stepped or (by_hand and step - self.due >= self.every - 1))


class AdapterMonitor(pl.Callback):
    """Logs what happens to adapters as they train; PEFT adds one where the Trainer has a logger.

    At the start, as hyper-parameters: the method with its fields, how many parameters train, the base's identity and
    fingerprint, and the data. At every n-th step:

    - `adapter/grad_norm/total` before clipping, `adapter/weight_norm/total`, and `adapter/update_ratio/total`, the
      step's change over the weights;
    - the same of each module that adapters stand on, and what the method reports of each layer, such as AdaLoRA's
      `adapter/rank/…`: at most 32 of each, above that the means of modules whose paths begin alike;
    - `lr/…` unless a LearningRateMonitor does so, `speed/samples_per_second` and `speed/tokens_per_second` of all
      devices, by the first one's, and `memory/peak_gb`, see `peak_memory`.

    A WandbLogger gets heat maps, layers by steps, in place of the layers' numbers; the table `samples` of predictions
    at validation, see `sample_table`; and adapter-only checkpoints as artifacts with the aliases `best` and `latest`.

    Training is not changed by it, not to the bit. In a step that is logged it keeps a copy of the trained tensors until
    the step is done. Without adapters, it is about modules' own trained parameters. What fails in it is told once and
    left out from then on; what Lightning logs to a WandbLogger may fail too, and is told once. Under `fast_dev_run` and
    without a logger it does nothing.

    Args:
        every_n_steps: how often to log; None is as often as the Trainer does.
        samples: rows of the table of predictions; 0 leaves it out.
        strict: let what fails in it, or in W&B, end the run.

    Raises:
        PEFTError: with all that is wrong with the arguments.
    """

    def __init__(self, every_n_steps: int | None = None, samples: int = 8, strict: bool = False) -> None:
        faults = []
        if every_n_steps is not None and every_n_steps < 1:
            faults.append(f"every_n_steps: {every_n_steps} is no number of steps; give 1 or more, or None")
        if samples < 0:
            faults.append(f"samples: {samples} is no number of rows; give 0 or more")
        if faults:
            raise PEFTError([f"AdapterMonitor.{fault}" for fault in faults])
        self.every_n_steps, self.samples, self.strict = every_n_steps, samples, strict
        self.spec: Spec | None = None
        """What checkpoints say of the adapter; PEFT tells it when the run starts."""
        self._guard = Guard("AdapterMonitor", strict)
        self._run: _Run | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let W&B fail, before Lightning logs anything."""
        if stage == "fit":
            self._guard = Guard("AdapterMonitor", self.strict)
            for logger in wandb_loggers(trainer):
                guard_calls(logger, self._guard)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew."""
        self._run = None
        if not trainer.loggers or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._run = _Run(self._guard, self.every_n_steps or trainer.log_every_n_steps)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what is trained, and on what."""
        if self._run is not None and trainer.is_global_zero:
            with self._run.guard.trying("the description of the run"):
                description = {"adapter": describe(pl_module, self._run.uses(trainer, pl_module), self.spec)}
                for logger in trainer.loggers:
                    # TensorBoard shows what it was given last
                    known = getattr(logger, "hparams", None)
                    logger.log_hyperparams({**known, **description} if isinstance(known, dict) else description)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the clock run, and see whether this step is logged."""
        run = self._run
        if run is None or not run.every:
            return
        run.speed.resume()
        step = logged_step(trainer)
        if run.due is None and (step + 1) % run.every == 0:
            run.due = step

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Take learning rates, gradients and weights of a step that is logged."""
        run = self._run
        if run is None or run.due is None:
            return
        is_first, run.stepped = not run.stepped, True
        with run.guard.trying("learning rates") as tried:
            if tried and is_first:
                run.rates = learning_rates(trainer.optimizers)
        with run.guard.trying("norms") as tried:
            if is_first:
                run.norms = StepNorms(trained_groups(pl_module)) if tried and _takes_part(trainer, pl_module) else None
            if run.norms is not None:
                parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
                run.norms.before(parameters, gradient_scale(trainer, optimizer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, if an optimizer has stepped."""
        run = self._run
        if run is None or not run.every:
            return
        if trainer.is_global_zero:
            with run.guard.trying("the batches' sizes") as tried:
                if tried:
                    run.speed.add(batch)
        step = logged_step(trainer)
        if not run.is_over(step, not pl_module.automatic_optimization):
            return
        norms, rates = run.norms, run.rates
        run.due, run.stepped, run.norms, run.rates = None, False, None, {}
        taken = Norms()
        with run.guard.trying("norms"):
            taken = norms.after() if norms is not None else taken
        if trainer.is_global_zero:
            self._log(run, trainer, pl_module, step, taken, rates)
            self._hand_on(run, trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        if self._run is not None:
            self._run.speed.pause()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show what the module predicts for the first rows."""
        run, is_first = self._run, batch_idx == dataloader_idx == 0
        if run is None or not is_first or trainer.sanity_checking or not self.samples or not wandb_loggers(trainer):
            return
        if not trainer.is_global_zero and not any(map(is_sharded, pl_module.parameters())):
            return
        with run.guard.trying("the table of predictions") as tried:
            table = sample_table(trainer, pl_module, batch, self.samples) if tried else None
            if table is not None and trainer.is_global_zero:
                for logger in wandb_loggers(trainer):
                    log_table(logger.experiment, "samples", *table, logged_step(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the heat maps."""
        self._draw(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hand on what was saved when the last epoch ended."""
        if self._run is not None and trainer.is_global_zero:
            self._hand_on(self._run, trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock, and draw the heat maps."""
        if self._run is not None:
            self._run.speed.pause()
            self._draw(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hand on what was saved last."""
        if self._run is not None and trainer.is_global_zero:
            self._hand_on(self._run, trainer, pl_module)
        self._run = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Draw what is known."""
        if self._run is not None:
            self._draw(trainer)
        self._run = None

    def _log(
        self,
        run: _Run,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        step: int,
        norms: Norms,
        rates: Mapping[str, float],
    ) -> None:
        layers: dict[str, Mapping[str, float]] = {
            "grad_norm": norms.gradient,
            "weight_norm": norms.weight,
            "update_ratio": norms.update_ratio(),
        }
        values = {f"adapter/{name}/total": value for name, value in norms.totals().items()}
        with run.guard.trying("what the method reports") as tried:
            layers |= reported_layers(module) if tried else {}
        with run.guard.trying("speed and memory") as tried:
            if tried:
                speed, parts = run.speed.read(), _parts(trainer)
                values |= {f"speed/{name}": rate * parts for name, rate in speed.items()}
                if (peak := peak_memory(module.device)) is not None:
                    values["memory/peak_gb"] = peak / 1e9
        if not any(isinstance(callback, LearningRateMonitor) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            values |= {f"lr/{name}": rate for name, rate in rates.items()}
        run.history.add(step, {name: own for name, own in layers.items() if own})
        for place, logger in enumerate(trainer.loggers, 1):
            several = f" (logger {place})" if len(trainer.loggers) > 1 else ""
            with run.guard.trying(f"logging to {type(logger).__name__}{several}") as tried:
                if tried:
                    own = {} if isinstance(logger, WandbLogger) else by_layer(layers)
                    logger.log_metrics({**values, **own}, step=step)

    def _draw(self, trainer: pl.Trainer) -> None:
        run = self._run
        if run is None or not trainer.is_global_zero or trainer.sanity_checking or run.history.last == run.drawn:
            return
        run.drawn = run.history.last
        for logger in wandb_loggers(trainer):
            with run.guard.trying("the heat maps") as tried:
                for name, drawn in run.history.heat_maps().items() if tried else ():
                    labels = drawn.rows, drawn.columns
                    log_heat_map(logger.experiment, f"heat_map/{name}", *labels, drawn.values, run.drawn)

    def _hand_on(self, run: _Run, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Give new checkpoints to W&B."""
        loggers = wandb_loggers(trainer)
        if not loggers or not records(module):
            return
        with run.guard.trying("an artifact of a checkpoint") as tried:
            stamp = _stamp(trainer)
            if not tried or stamp == run.handed_on:
                return
            run.handed_on = stamp
            for path, aliases in checkpoints(trainer).items():
                for logger in loggers:
                    known = {"class_path": class_path(module)}
                    log_checkpoint(logger, path, aliases=aliases, metadata=known, uses=run.uses(trainer, module))


def _parts(trainer: pl.Trainer) -> int:
    """Into how many the rows are divided: under tensor parallelism, ranks have the same ones."""
    divided: dict[str, int] = trainer.distributed_sampler_kwargs or {}
    return divided.get("num_replicas", trainer.world_size)


def _takes_part(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether this rank has to take norms: the first one logs them, and of what is sharded each holds a part."""
    return trainer.is_global_zero or any(map(is_sharded, trainable_parameters(module).values()))


def _stamp(trainer: pl.Trainer) -> tuple[Any, ...]:
    """What changes when a checkpoint is written or deleted."""
    stamp: list[Any] = []
    for saver in trainer.checkpoint_callbacks:
        stamp += getattr(saver, "best_k_models", ())
        for name in ("best_model_path", "last_model_path"):
            path = Path(getattr(saver, name, None) or "absent")
            stamp.append((path, path.stat().st_mtime_ns if path.exists() else None))
    return tuple(stamp)
