"""What a method does while its adapters train: a term in the loss, and work after each optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.callback.module import AdaptedModule
from lightning_peft.callback.optimizers import optimizers_in
from lightning_peft.injection import method_adapters
from lightning_peft.methods._host import Adapter
from lightning_peft.methods.base import Method


class TrainedModule(AdaptedModule):
    """Mixed in front of a LightningModule's class where the method takes part in training.

    The method's penalty is added to what `training_step` returns, before Lightning divides it by the accumulated
    batches and scales it for 16 bits; under manual optimization, to each loss that is given to `manual_backward`.
    """

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, with the penalty in its loss."""
        output = self._peft_own("training_step")(*args, **kwargs)
        if not self.automatic_optimization:
            return output
        if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
            return {**output, "loss": self._peft_penalized(output["loss"])}
        return self._peft_penalized(output) if isinstance(output, Tensor) else output

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The module's own, of the loss with the penalty."""
        self._peft_own("manual_backward")(self._peft_penalized(loss), *args, **kwargs)

    def configure_optimizers(self) -> Any:
        """As without training, and the method is told of each step that the adapters' optimizer takes.

        Raises:
            PEFTError: by the method, it can't be trained for that long.
        """
        configured = super().configure_optimizers()
        plan = self._peft_plan
        held = {id(parameter) for adapter in self._peft_attached().values() for parameter in adapter.parameters()}
        own = [optimizer for optimizer in optimizers_in(configured) if held & set(map(id, _parameters(optimizer)))]
        if not own:
            return configured
        # an optimizer that is given to the strategy is stepped by its torch class, whatever is wrapped around it; under
        # 16-bit scaling a step that overflowed is not taken, and not told
        estimated = float(self.trainer.estimated_stepping_batches)
        total = estimated if estimated > 0 else math.inf  # Lightning says -1 of a stream without a length
        plan.method.start(self._peft_attached(), total)

        def after(*_: Any) -> None:
            plan.steps += 1
            plan.method.after_step(self._peft_attached(), plan.steps, total)

        own[0].register_step_post_hook(after)
        return configured

    def _peft_attached(self) -> dict[str, Adapter]:
        return method_adapters(self, self._peft_plan.adapter_name)

    def _peft_penalized(self, loss: Tensor) -> Tensor:
        penalty = self._peft_plan.method.penalty(self._peft_attached())
        return loss if penalty is None else loss + penalty.to(loss.dtype)


def kind_for(method: Method) -> type[AdaptedModule]:
    """What to mix in front of a LightningModule's class: a module's training is left alone where nothing needs it."""
    cls = type(method)
    hooks = ("penalty", "start", "after_step")
    return TrainedModule if any(getattr(cls, name) is not getattr(Method, name) for name in hooks) else AdaptedModule


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return cast("list[nn.Parameter]", [parameter for group in optimizer.param_groups for parameter in group["params"]])
