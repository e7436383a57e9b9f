"""`peft_ddp`: Lightning's DDP strategy, with nothing frozen on the wire."""

from __future__ import annotations

import re
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_peft.state import frozen_tensors
from lightning_peft.strategies.agreement import agree_on_base
from lightning_peft.strategies.buffers import KeepsBuffersEqual, MovingBuffers

MARK = "_ddp_ignored"
MARKS = "_ddp_params_and_buffers_to_ignore"
LOST = (
    "connection closed by peer|connection reset|connection refused|broken pipe|timed? ?out|socket|remote process exited"
)


class PEFTDDPStrategy(KeepsBuffersEqual, DDPStrategy):
    """DDP that sends what trains, and nothing else: `strategy="peft_ddp"`.

    Lightning's `ddp` broadcasts all parameters and buffers when training starts and again before it validates, tests or
    predicts. Here the frozen base stays where it is. Its bytes are compared across ranks instead, by checksums, since a
    base that each rank made at random would stay another one on each. What stands in adapters is sent as DDP does, and
    so are the base's buffers that training turns out to move.

    Args:
        sync_base: where the ranks' bases differ in values, broadcast those tensors from the first rank, rather than
            raise an error.
        **kwargs: as in Lightning's DDPStrategy, such as `find_unused_parameters`, `static_graph`, `ddp_comm_hook` and
            `timeout`. A communication hook works on a CPU as well.

    Raises:
        PEFTError: as training or another run starts, on every rank: the ranks' bases differ.
    """

    strategy_name = "peft_ddp"

    def __init__(self, *, sync_base: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sync_base = sync_base

    def model_to_device(self) -> None:
        """Move the model, compare the ranks' bases, and leave them out of what DDP sends from here on."""
        super().model_to_device()
        module = self.lightning_module
        assert module is not None
        frozen = frozen_tensors(module)
        agree_on_base(frozen, sync=self.sync_base)
        # private, as the method that sets it: checked on torch 2.13 and lightning 2.6, whose DDP strategy reads it too
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(frozen))  # type: ignore[no-untyped-call]
        self.buffers = MovingBuffers(module)

    def configure_ddp(self) -> None:
        """As Lightning does, which drops a communication hook on a CPU; DDP takes it there, too."""
        super().configure_ddp()
        hook = self._ddp_comm_hook
        if hook is not None and self.root_device.type != "cuda":
            assert isinstance(self.model, DistributedDataParallel)
            wrap = self._ddp_comm_wrapper
            self.model.register_comm_hook(self._ddp_comm_state, hook if wrap is None else wrap(hook))

    def on_exception(self, exception: BaseException) -> None:
        """Say what to do where another rank is gone, and where a parameter was not used."""
        super().on_exception(exception)
        tell_of_lost_ranks(exception)
        text = str(exception)
        if "strategy='ddp_find_unused_parameters_true'" in text:
            text = text.replace("strategy='ddp_find", "strategy='peft_ddp_find").replace("=DDPStr", "=PEFTDDPStr")
            exception.args = (text,)

    def teardown(self) -> None:
        """Take the marks off the model: under another strategy they would hide what then trains."""
        if self.lightning_module is not None:
            _unmark(self.lightning_module)
        super().teardown()

    @property
    def sends_buffers(self) -> bool:
        """As DDP is asked to."""
        names = ("broadcast_buffers", "forward_sync_buffers")
        return all(self._ddp_kwargs.get(name) is not False for name in names)


def tell_of_lost_ranks(exception: BaseException) -> None:
    """Add to an exception's text what to do, where it says that another rank is gone."""
    text = str(exception)
    if isinstance(exception, RuntimeError) and re.search(LOST, text, re.IGNORECASE):
        exception.args = (
            f"{text}\nA process of another rank has ended or hangs: its own error, or that the system killed it, "
            "is told above or in its log. Start all ranks again, with ckpt_path='last', to go on from the last "
            "checkpoint.",
        )


def _unmark(module: nn.Module) -> None:
    vars(module).pop(MARKS, None)
    for tensor in (*module.parameters(), *module.buffers()):
        vars(tensor).pop(MARK, None)
