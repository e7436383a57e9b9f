"""The checkpoint that Lightning writes when SLURM tells a job that its time is nearly over."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerStatus


def save_alone(trainer: pl.Trainer) -> None:
    """Let that checkpoint be written as one of an interrupted run, by each rank without the others.

    Lightning writes it inside of the signal's handler, so wherever the signal finds a rank; another one may just wait
    for its gradients, and would take for them whatever is sent. To be called when the handlers are set, as training
    starts; Lightning takes them back when it ends.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if not (isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal):
        return
    handler = signal.getsignal(environment.requeue_signal)
    # Python sets handlers in its first thread alone, and so does Lightning
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        return

    def alone(number: int, frame: FrameType | None) -> None:
        before, trainer.state.status = trainer.state.status, TrainerStatus.INTERRUPTED
        try:
            handler(number, frame)
        finally:
            trainer.state.status = before

    signal.signal(environment.requeue_signal, alone)
