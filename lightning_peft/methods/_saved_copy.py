"""`modules_to_save`: a module trained whole, with the original kept beside it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_peft.methods._host import Adapter, adapter_dtype, own_tensors


class SavedCopy(Adapter):
    """A trained copy of one module's own parameters and buffers, which the module reads instead of its frozen ones.

    Parameters are kept, and trained, in fp32 over a base of lower precision, and read in the base's dtype.

    Args:
        module: the module whose tensors are copied.
        shared: copies already made, by the id of the original, so that tied tensors stay tied.
    """

    def __init__(self, module: nn.Module, shared: dict[int, Tensor]) -> None:
        super().__init__()
        self.overrides = tuple(own_tensors(module))
        for name, tensor in own_tensors(module).items():
            copy = shared.get(id(tensor))
            if copy is None:
                copy = tensor.detach().clone()
                if isinstance(tensor, nn.Parameter):
                    is_trained = tensor.is_floating_point()
                    copy = nn.Parameter(copy.to(adapter_dtype(tensor)) if is_trained else copy, is_trained)
                shared[id(tensor)] = copy
            if isinstance(copy, nn.Parameter):
                self.register_parameter(name, copy)
            else:
                self.register_buffer(name, copy, persistent=name not in module._non_persistent_buffers_set)

    def effective(self, module: nn.Module, name: str, frozen: Tensor) -> Tensor:
        return own_tensors(self)[name].to(frozen.dtype)


def saved_copies(modules: Mapping[str, nn.Module]) -> dict[str, SavedCopy]:
    """A copy for each of `modules` that has tensors of its own, by path; tied ones share theirs."""
    shared: dict[int, Tensor] = {}
    return {path: SavedCopy(module, shared) for path, module in modules.items() if own_tensors(module)}
