"""What is shown in Weights & Biases beside numbers: the configuration, tables and heat maps.

Each function raises what wandb raises, where a run is finished or a disk is full: who calls it during training decides
whether that may end it.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_peft.methods.errors import PEFTError
from lightning_peft.state.secrets import without_secrets
from lightning_peft.tracking.guard import Guard
from lightning_peft.tracking.weights_and_biases.heat_map import Values, heat_map_html

if TYPE_CHECKING:
    from wandb import Run

STEP = "trainer/global_step"
"""The x-axis that WandbLogger gives every metric."""
CHARTED = 100
"""Classes whose confusion matrix is a chart: wandb cuts off its table behind 10,000 rows."""


def wandb_loggers(trainer: pl.Trainer) -> list[WandbLogger]:
    """Those of the Trainer's loggers that are Lightning's WandbLogger; wandb is not imported where there is none.

    `logger.experiment` is the run that the other functions take; asking for it starts the run, and on other ranks than
    the first it stands for nothing.
    """
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def start_runs(trainer: pl.Trainer, strict: bool = False) -> None:
    """Start the run of each WandbLogger, before any work is done.

    Where W&B lets nobody in or can't be reached, the run is recorded offline, and so are later ones of the process.

    Args:
        trainer: with the loggers.
        strict: raise instead.

    Raises:
        PEFTError: `strict`, and the run can't be started.
    """
    for logger in wandb_loggers(trainer):
        import wandb

        try:
            _ = logger.experiment
        except wandb.Error as error:
            told = f"W&B: {' '.join(str(error).split()).rstrip('.')}"
            if strict:
                raise PEFTError(f"{told}; log in, or set WANDB_MODE=offline") from error
            rank_zero_warn(f"{told}; the run is recorded offline, and `wandb sync` uploads it later on")
            wandb.teardown()  # it reads the mode once
            os.environ["WANDB_MODE"] = "offline"
            _ = logger.experiment


@contextmanager
def own_run() -> Iterator[None]:
    """End the run that is started in the context, as failed where that is left by an exception.

    Lightning leaves it open until the process ends, and so what is trained next in the same process would be logged
    into it. A run that was there before goes on, with what is logged in the context. Where wandb can't end it, as its
    own process has died, that is told and no more.
    """
    before = _open_run()
    try:
        yield
    except BaseException:
        _end(before, 1)
        raise
    _end(before, 0)


def _open_run() -> Run | None:
    wandb: Any = sys.modules.get("wandb")
    return None if wandb is None else wandb.run


def _end(before: Run | None, exit_code: int) -> None:
    run = _open_run()
    if run is not None and run is not before:
        with Guard("W&B").trying("the end of the run"):
            run.finish(exit_code=exit_code)


def log_configuration(logger: Logger, configuration: Mapping[str, Any]) -> None:
    """Add a nested configuration to the run's; what a resumed run had under the same names is replaced.

    Args:
        configuration: of plain types; texts that look secret, such as a hub's token, become `…`.
    """
    logger.log_hyperparams(without_secrets(configuration))


def log_table(run: Run, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    """Show a table, which may be logged again at a later step.

    Args:
        run: `logger.experiment`.
        name: the table's name, such as `samples`.
        columns: a name for each column.
        rows: of plain values, as many as columns; a column may hold several types.
        step: the optimizer step.
    """
    import wandb

    table = wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
    run.log({name: table, STEP: step})


def log_heat_map(
    run: Run, name: str, rows: Sequence[str], columns: Sequence[object], values: Values, step: int
) -> None:
    """Show a heat map of all that is known at `step`, which may be logged again, with more columns, at a later step.

    It is an HTML page with an SVG picture: W&B shows it in a panel with a slider over the steps, and offline it is a
    file that a browser opens. W&B's own charts have no heat map with named rows: a custom chart needs a definition that
    is stored on the server, and a histogram over time, which it does draw as one, numbers its rows.

    Args:
        run: `logger.experiment`.
        name: the picture's name, such as `rank`.
        rows: a label for each row: the layers.
        columns: a label for each column: the steps so far.
        values: rows × columns; None where there is no value.
        step: the optimizer step.

    Raises:
        ValueError: the numbers of labels and values don't match.
    """
    _log_page(run, name, heat_map_html(name, rows, columns, values), step)


def log_confusion_matrix(
    run: Run, name: str, labels: Sequence[str], counts: Sequence[Sequence[float]], step: int
) -> None:
    """Show how often each actual class was taken for which, in the chart that `wandb.plot.confusion_matrix` makes.

    That one wants every prediction; here they are counted already. Its table is beside it, as `<name>_table`. Of more
    than `CHARTED` classes it is a heat map like those of `log_heat_map`, with a row for each actual class.

    Args:
        run: `logger.experiment`.
        name: the chart's name.
        labels: the classes.
        counts: a row for each actual class, with a number for each predicted one.
        step: the optimizer step.
    """
    if len(labels) > CHARTED:
        actual, predicted = ([f"{kind} {label}" for label in labels] for kind in ("actual", "predicted"))
        _log_page(run, name, heat_map_html(name, actual, predicted, counts, whole=True), step)
        return
    import wandb

    cells = [
        [actual, predicted, number]
        for actual, row in zip(labels, counts, strict=True)
        for predicted, number in zip(labels, row, strict=True)
    ]
    columns: list[str | int] = ["Actual", "Predicted", "nPredictions"]
    chart = wandb.plot_table(
        vega_spec_name="wandb/confusion_matrix/v1",
        data_table=wandb.Table(columns=columns, data=cells),
        fields={str(column): column for column in columns},
        string_fields={"title": name},
    )
    run.log({name: chart, STEP: step})


def _log_page(run: Run, name: str, page: str, step: int) -> None:
    import wandb

    run.log({name: wandb.Html(io.StringIO(page), inject=False), STEP: step})
