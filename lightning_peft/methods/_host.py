"""How an adapter stands on a module: the module's class is swapped, in place, for a subclass that consults the adapter.

The module keeps its identity, its name in the tree, its parameters and their keys; `isinstance(module, nn.Linear)`
stays true; and taking the adapters off is putting the old class back. The subclass is made on the fly, so that it works
for any class, and is pickled by naming the class that it stands on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_peft.methods._sharded import is_sharded
from lightning_peft.methods.errors import PEFTError

Base = Callable[..., Any]
M = TypeVar("M", bound=nn.Module)


class Adapter(nn.Module):
    """What one method puts beside one frozen module: raw parameters, and what they do to the module.

    A method overrides `forward` to act on the module's output, or names tensors in `overrides` and gives them a value
    in `effective`; whichever it uses, `merged` returns the module's tensors with the adapter folded in.
    """

    overrides: tuple[str, ...] = ()
    """Names of the module's own parameters or buffers whose value this adapter gives."""
    on_split: bool = False
    """Whether it can stand on a Linear that tensor parallelism has split; see `_split`."""
    around_split: bool = False
    """Whether it can stand on a module that has split layers in it."""

    def forward(self, base: Base, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The adapted output. `base` is the frozen module's own forward, to be called with the module's arguments."""
        return base(*args, **kwargs)

    def effective(self, module: nn.Module, name: str, frozen: Tensor) -> Tensor:
        """The value that the module sees under `name`, one of `overrides`; `frozen` is the base's tensor."""
        raise NotImplementedError

    def forward_rows(
        self, rows: Sequence[Adapter | None], base: Base, module: nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        """The adapted output where row i of the batch goes through `rows[i]`, or through the bare base.

        For adapters whose module can't be run on some of the rows alone; the others need not have it. It is called on
        one of the module's adapters for all, if they are of one kind.
        """
        raise NotImplementedError

    def merged(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's tensors with this adapter folded in, by name, in the adapter's dtype (fp32)."""
        return {name: self.effective(module, name, own_tensors(module)[name]) for name in self.overrides}

    def awaits(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapter's tensors by key, with the shapes that they would have to take over `given`.

        For adapters whose tensors change their shapes in training, and take those of what they load.

        Args:
            given: what a file holds of this adapter, by key; values may have wrong types.

        Raises:
            PEFTError: `given` holds values that none can have.
        """
        return self.state_dict()

    def before_training(self) -> None:
        """Called before optimizers are built over the parameters: the last moment to give them other shapes."""


class Swapped(nn.Module):
    """What is mixed in front of a module's own class; the pair is pickled by naming both."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # a recurrent layer collects its weights here, and what an adapter computes with a gradient can't be copied
        with torch.no_grad():
            reduced: tuple[Any, ...] = super().__reduce_ex__(protocol)  # type: ignore[assignment]
        _, (_, *args), *state = reduced
        return (_rebuild, (own_class(self), mixins(self), overridden(self), *args), *state)

    def take_off(self) -> None:
        """Give the module its own class again, with nothing left behind."""
        self.__class__ = own_class(self)  # type: ignore[assignment]


class Host(Swapped):
    """Runs the module through its active adapter."""

    adapters: nn.ModuleDict
    active_adapter: str | None
    row_adapters: tuple[str | None, ...] | None
    merged_from: dict[str, Tensor]
    own_forward: Base | None
    """A forward that was set on the instance, as accelerate sets it; it would hide this class's."""
    _cached: dict[str, Tensor] | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.row_adapters is not None:
            return _forward_rows(self, args, kwargs)
        base = super().forward if self.own_forward is None else self.own_forward
        adapter = active(self)
        if adapter is None:
            return base(*args, **kwargs)
        if not adapter.overrides:
            return adapter(base, self, *args, **kwargs)
        # a forward may read a tensor many times (once per expert): its effective value is computed once
        self._cached = {}
        try:
            return adapter(base, self, *args, **kwargs)
        finally:
            self._cached = None

    def restore_merged(self) -> None:
        """Put back the tensors that were merged into: the very same objects, unless the module has moved since."""
        for name, original in self.merged_from.items():
            device = own_tensors(self)[name].device
            moved = original if original.device == device else original.to(device)
            if not isinstance(original, nn.Parameter):
                self._buffers[name] = moved
            elif isinstance(moved, nn.Parameter):
                # the same, or a packed weight, which moves with its scales as the parameter that it is
                self._parameters[name] = moved
            else:
                self._parameters[name] = nn.Parameter(moved, original.requires_grad)
        if self.merged_from and (link := getattr(self, "link", None)) is not None:
            link()  # a packed layer holds the scales of its weight
        self.merged_from = {}

    def take_off(self) -> None:
        self.restore_merged()
        del self.adapters
        if self.own_forward is not None:
            vars(self)["forward"] = self.own_forward
        for name in ("active_adapter", "row_adapters", "merged_from", "own_forward", "_cached"):
            vars(self).pop(name, None)
        super().take_off()


class FrozenStatistics(Swapped):
    """Keeps a normalization layer on its running statistics while the model trains, unless an adapter trains a copy of
    them and is active."""

    asked_to_train: bool

    def train(self, mode: bool = True) -> Any:
        vars(self)["asked_to_train"] = mode
        adapter = active(self) if isinstance(self, Host) else None
        return super().train(mode and adapter is not None and "running_mean" in adapter.overrides)

    def refresh(self) -> None:
        """Follow a change of the active adapter."""
        self.train(self.asked_to_train)

    def take_off(self) -> None:
        self.training = vars(self).pop("asked_to_train")
        super().take_off()


class SlowPath(Swapped):
    """Makes nn.TransformerEncoder and its layers call their submodules while an adapter is active in them.

    In inference both can take a fused path that reads `linear1.weight` and its like, and so would pass over an adapter.
    The two attributes are what their forward looks at; checked on torch 2.11 and 2.13.
    """

    @property
    def use_nested_tensor(self) -> bool:
        return bool(vars(self)["use_nested_tensor"]) and not _any_active(self)

    @property
    def activation_relu_or_gelu(self) -> int:
        return 0 if _any_active(self) else int(vars(self)["activation_relu_or_gelu"])


def _any_active(model: nn.Module) -> bool:
    return any(active(host) is not None or host.row_adapters is not None for _, host in hosts(model))


@cache
def _swapped_class(cls: Any, mixed_in: tuple[type, ...], names: tuple[str, ...]) -> type[nn.Module]:
    body: dict[str, Any] = {name: _effective_property(name) for name in names}
    # the name stays: libraries (and people) tell layers apart by it; the place says that it can't be imported, so that
    # a parser which looks for a class among all subclasses finds the original alone
    place = f"_swapped_class.<locals>.{cls.__name__}"
    body |= {"__module__": cls.__module__, "__qualname__": place, "_swapped": (cls, mixed_in, names)}
    swapped = cast("type[nn.Module]", type(cls.__name__, (*mixed_in, cls), body))
    record_outputs_of(cls, swapped)
    return swapped


def record_outputs_of(cls: type, swapped: type[nn.Module]) -> None:
    """transformers looks up by how a class prints which hidden states and attentions it can give; checked on 5.23."""
    capturing: Any = sys.modules.get("transformers.utils.output_capturing")
    outputs = getattr(cls, "_can_record_outputs", None)
    if outputs is not None and hasattr(capturing, "_CAN_RECORD_REGISTRY"):
        dict.__setitem__(capturing._CAN_RECORD_REGISTRY, str(swapped), outputs)


def _effective_property(name: str) -> property:
    def effective(self: Host) -> Tensor:
        frozen = own_tensors(self)[name]
        adapter = active(self)
        # a sharded one is gathered for each forward; FSDP alone asks for it in between, and means it as it is
        if adapter is None or name not in adapter.overrides or (is_sharded(frozen) and not adapter.on_split):
            return frozen
        if self._cached is not None and name in self._cached:
            return self._cached[name]
        try:
            value = adapter.effective(self, name, frozen)
        except AttributeError as error:
            # nn.Module would take an AttributeError for "no such attribute", and answer with the frozen tensor
            raise RuntimeError(f"{type(adapter).__name__}.effective({name!r}): {error}") from error
        if self._cached is not None:
            self._cached[name] = value
        return value

    return property(effective)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before any swap."""
    return cast("type[nn.Module]", getattr(type(module), "_swapped", (type(module),))[0])


def mixins(module: nn.Module) -> tuple[type, ...]:
    """The classes mixed in front of the module's own, outermost first."""
    return cast("tuple[type, ...]", getattr(type(module), "_swapped", (None, ()))[1])


def overridden(module: nn.Module) -> tuple[str, ...]:
    """The names of the module's tensors that are read through an adapter."""
    return cast("tuple[str, ...]", getattr(type(module), "_swapped", (None, (), ()))[2])


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters and buffers (not its children's) as they stand in it, unadapted; none that is
    None."""
    both = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def adapter_dtype(frozen: Tensor) -> torch.dtype:
    """fp32, or fp64 over an fp64 base: small updates to low-precision numbers would round to nothing."""
    return torch.float64 if frozen.dtype == torch.float64 else torch.float32


def swap(module: nn.Module, mixin: type | None = None, names: Iterable[str] = ()) -> None:
    """Put `mixin` in front of the module's class (once), and read the tensors `names` through its active adapter."""
    mixed_in = mixins(module) if mixin is None or mixin in mixins(module) else (mixin, *mixins(module))
    all_names = tuple(dict.fromkeys((*overridden(module), *names)))
    own: Any = own_class(module)
    module.__class__ = _swapped_class(own, mixed_in, all_names)


def _rebuild(cls: Any, mixed_in: tuple[type, ...], names: tuple[str, ...], *args: Any) -> nn.Module:
    swapped = _swapped_class(cls, mixed_in, names)
    return swapped.__new__(swapped, *args)


def active(host: Host) -> Adapter | None:
    """The adapter that the module runs through; None where it is off, or folded into the weights."""
    if host.active_adapter is None or host.merged_from:
        return None
    # by the dicts, since this runs in every forward: nn.Module finds its children by failing to find an attribute first
    return cast("Adapter | None", host._modules["adapters"]._modules.get(host.active_adapter))  # type: ignore[union-attr]


def hosts(model: nn.Module) -> Iterator[tuple[str, Host]]:
    """`(path, module)` of every module of `model` that an adapter stands on."""
    for path, module in model.named_modules():
        if isinstance(module, Host):
            yield path, module


def refusal(module: nn.Module) -> str | None:
    """Why no adapter can stand on `module`; None where one can."""
    if not isinstance(module, Host) and hasattr(module, "adapters"):
        return f"{type(module).__name__} has an attribute 'adapters' of its own, where adapters would stand"
    if isinstance(module, Host) and module.merged_from:
        return "an adapter is merged into its weights; unmerge(model) first"
    return None


def put(module: nn.Module, name: str, adapter: Adapter) -> None:
    """Stand `adapter` on `module` under `name`, and make it the active one.

    The module must take it: see `refusal`.
    """
    if not isinstance(module, Host):
        swap(module, Host)
        module.adapters = nn.ModuleDict()
        own_forward = vars(module).pop("forward", None)
        vars(module).update(
            active_adapter=None, row_adapters=None, merged_from={}, own_forward=own_forward, _cached=None
        )
    host = cast(Host, module)
    swap(module, names=adapter.overrides)
    host.adapters[name] = adapter.train(module.training)
    host.active_adapter = name


def _forward_rows(host: Host, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rows = cast("tuple[str | None, ...]", host.row_adapters)
    own = cast("list[Adapter]", [*host.adapters.values()])
    kinds = {type(adapter).forward_rows for adapter in own}
    if len(kinds) == 1 and kinds != {Adapter.forward_rows}:
        base = super(Host, host).forward if host.own_forward is None else host.own_forward
        named = [cast("Adapter | None", host._modules["adapters"]._modules.get(name or "")) for name in rows]  # type: ignore[union-attr]
        return own[0].forward_rows(named, base, host, *args, **kwargs)
    batched = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()), None)
    if batched is None or batched.shape[0] != len(rows):
        raise PEFTError(
            f"adapter_per_row: {len(rows)} names, but {type(host).__name__} was given "
            f"{'no tensor' if batched is None else tuple(batched.shape)}; its first dimension must be the rows"
        )
    # an inner module's adapters can act without its forward, through the tensors that this one reads of it
    inner = [module for _, module in hosts(host)]
    before = [(module, module.active_adapter, module.row_adapters) for module in inner]
    output: Tensor | None = None
    try:
        for name in dict.fromkeys(rows):
            for module in inner:
                module.active_adapter, module.row_adapters = name, None
            index = torch.tensor([row for row, other in enumerate(rows) if other == name], device=batched.device)
            pick = partial(_rows_of, index=index, count=len(rows))
            part = Host.forward(host, *map(pick, args), **{key: pick(value) for key, value in kwargs.items()})
            if not isinstance(part, Tensor):
                raise PEFTError(f"adapter_per_row: {type(host).__name__} returns {type(part).__name__}, not a tensor")
            output = part.new_empty(len(rows), *part.shape[1:]) if output is None else output
            output = output.index_copy(0, index, part)
    finally:
        for module, active_adapter, row_adapters in before:
            module.active_adapter, module.row_adapters = active_adapter, row_adapters
    return output


def _rows_of(value: Any, index: Tensor, count: int) -> Any:
    is_batch = isinstance(value, Tensor) and value.dim() and value.shape[0] == count
    return value.index_select(0, index) if is_batch else value
