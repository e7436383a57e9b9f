"""A model of its own out of a base and its active adapter: a folder that transformers loads without this package."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_peft.interchange.locations import resolve
from lightning_peft.interchange.roots import is_transformers_model, peft_root
from lightning_peft.methods._host import active, hosts, own_class, own_tensors
from lightning_peft.methods._merging import dense_dtype_of
from lightning_peft.methods._quantized import dense_weight, packed
from lightning_peft.methods._sharded import ON_ONE, refuse_sharded
from lightning_peft.methods._targets import base_modules, inside
from lightning_peft.methods.errors import PEFTError
from lightning_peft.quantization.others import is_bitsandbytes, is_conv1d_class
from lightning_peft.state import base_keys

SCALES_IF_TIED = {"switch_transformers"}
"""Model types whose forward reads `tie_word_embeddings` to decide on a scale, and so must keep it; in others that do,
the configuration sets it by itself. Checked on transformers 5.23."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", *TOKENIZER_FILES)


def save_merged(model: nn.Module, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write the transformers model in `model`, the active adapter and what was trained whole folded in, to `folder`.

    `from_pretrained` loads it without this package, and its outputs are those of `model`. Sums are taken in fp32. Where
    an embedding and the head that is tied to it part, both are written and the configuration says so. A quantized base
    is written in full, and the configuration then says nothing of a quantization. The base's tokenizer or processor
    goes beside it where it can be loaded. `model` itself is not changed.

    Args:
        model: a transformers model with adapters, or a LightningModule that holds one.
        folder: made where it is missing; an earlier model in it is replaced.
        dtype: the dtype of every floating-point tensor that is written; by default that of the base's, and for what was
            quantized that of most of the rest.

    Returns:
        The folder.

    Raises:
        PEFTError: `model` holds no transformers model, or adapters outside of it; its base is sharded; no adapter is
            active, or the active one can't be merged; the base is quantized by another library than bitsandbytes;
            `folder` is the base's own or holds an adapter.
    """
    target = Path(folder)
    root: Any = _transformers_root(model)
    refuse_sharded(root, "save_merged", ON_ONE)
    if faults := [*_root_faults(root), *_folder_faults(root, target), *_dtype_faults(dtype)]:
        raise PEFTError([f"save_merged: {fault}" for fault in faults])
    state = _merged_state(root, dtype)
    # a second object over the same modules: what is written has the base's class and a configuration of its own
    shell = copy.copy(root)
    shell.__class__ = own_class(root)
    copies: dict[int, Any] = {}
    shell.config = copy.deepcopy(root.config, copies)
    _forget_quantization(shell)
    if _parted(root, state):
        _untie(root, copies)
        state = {key: tensor.clone() for key, tensor in state.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
        unfinished = Path(name)
        shell.save_pretrained(unfinished, state_dict=state)
        if dtype is not None or _is_quantized(root):
            shell.config.dtype = dtype or dense_dtype_of(root)
            shell.config.save_pretrained(unfinished)
        _write_processor(root, unfinished)
        _replace(target, unfinished)
    return target


def _transformers_root(model: nn.Module) -> nn.Module:
    root = peft_root(model)[1]
    if is_transformers_model(root):
        return root
    found = [path for path, module in base_modules(model) if is_transformers_model(module)]
    outside = [path for path, _ in hosts(model) if not inside(path, found)]
    if found and outside:
        raise PEFTError(
            f"save_merged: {', '.join(outside[:3])} {'is' if len(outside) == 1 else 'are'} adapted but not part of the "
            f"transformers model {found[0]!r}, and would be lost; export the adapter instead, or {_BY_HAND}"
        )
    raise PEFTError(f"save_merged: {type(model).__name__} holds no transformers model; {_BY_HAND}")


_BY_HAND = "call merge(model), and save the keys of model.state_dict() that have no '.adapters.' in them"


def _root_faults(root: Any) -> list[str]:
    faults = []
    if not any(active(host) is not None or host.merged_from for _, host in hosts(root)):
        faults.append("no active adapter stands on the model; inject or load one, or set_adapter(model, name)")
    if getattr(root, "hf_quantizer", None) is not None and not _is_quantized(root):
        method = getattr(root.hf_quantizer.quantization_config, "quant_method", "another library")
        faults.append(
            f"the base is quantized by {getattr(method, 'value', method)}; load it in full precision (without "
            "quantization_config), load the adapter onto it, and merge there"
        )
    return faults


def _is_quantized(root: nn.Module) -> bool:
    """Whether it has layers of bitsandbytes, which are dense where an adapter is merged into them."""
    return any(is_bitsandbytes(module) for module in root.modules())


def _forget_quantization(shell: Any) -> None:
    """Leave out what transformers keeps of a quantization on a model; checked on 5.23."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(shell).pop(name, None)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        vars(shell.config).pop(name, None)


def _folder_faults(root: Any, folder: Path) -> list[str]:
    if folder.exists() and not folder.is_dir():
        return [f"{folder} is a file; give a folder"]
    if (folder / "adapter_config.json").exists():
        return [f"{folder} holds an adapter, which transformers would load on top; give another folder"]
    place = base_place(root)
    if place and folder.is_dir() and Path(place).is_dir() and Path(place).samefile(folder):
        return [f"{folder} is the base's own folder; give another one"]
    return []


def _dtype_faults(dtype: torch.dtype | None) -> list[str]:
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return []
    return [f"dtype: {dtype!r} is no floating-point dtype; give one such as torch.bfloat16"]


def base_place(root: nn.Module) -> str:
    """The folder or hub id that a transformers model was loaded from; empty where it was made from a configuration."""
    return str(getattr(getattr(root, "config", None), "_name_or_path", "") or "")


@torch.no_grad()
def _merged_state(root: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The base's state dict with the active adapters folded in, in `dtype` or the base's dtypes; nothing is packed in
    it, and weights are stored as the classes of transformers store them."""
    unpacked_dtype = dtype or dense_dtype_of(root)

    def stored(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
        target = unpacked_dtype if packed(module, name) else own_tensors(module)[name].dtype
        return tensor.detach().to(dtype if dtype is not None and target.is_floating_point else target)

    folded = {
        (id(host), name): stored(host, name, tensor)
        for _, host in hosts(root)
        if (adapter := active(host)) is not None
        for name, tensor in adapter.merged(host).items()
    }
    ours = base_keys(root)
    state = {key: _cast(tensor, dtype) for key, tensor in root.state_dict().items() if key in ours}
    for path, module in base_modules(root):
        prefix = f"{path}." if path else ""
        for name in own_tensors(module):
            if f"{prefix}{name}" in ours:
                tensor = folded.get((id(module), name))
                tensor = stored(module, name, dense_weight(module, name)) if tensor is None else tensor
                is_turned = name == "weight" and is_conv1d_class(getattr(module, "source_cls", type(None)))
                state[f"{prefix}{name}"] = tensor.T.contiguous() if is_turned else tensor
        if is_bitsandbytes(module):
            # scales, and how they are to be read
            more = (f"{prefix}weight.", f"{prefix}SCB", f"{prefix}weight_format")
            ours -= {key for key in ours if key.startswith(more)}
    return {key: tensor for key, tensor in state.items() if key in ours}


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _parted(root: Any, state: dict[str, Tensor]) -> bool:
    """Whether tensors that the base ties have become different; those that are still equal are made one again."""
    parted = False
    for tied, source in root.get_expanded_tied_weights_keys(all_submodels=True).items():
        if tied in state and source in state:
            if torch.equal(state[tied], state[source]):
                state[tied] = state[source]
            else:
                parted = True
    return parted


def _untie(root: Any, copies: Mapping[int, Any]) -> None:
    """Say in the copied configurations, found by the id of the original, that nothing is tied."""
    for _, module in base_modules(root):
        config: Any = copies.get(id(getattr(module, "config", None)))
        if getattr(config, "tie_word_embeddings", False) and config.model_type not in SCALES_IF_TIED:
            config.tie_word_embeddings = False


def _write_processor(root: nn.Module, folder: Path) -> None:
    """Write the base's tokenizer or processor, or tell that there is none."""
    import transformers

    auto: Any = transformers.AutoProcessor
    place = base_place(root)
    try:
        source = resolve(place, "base") if place else ""
        if not any(_has(source, name) for name in PROCESSOR_FILES):
            # transformers makes up an empty tokenizer for some models that come without one
            raise PEFTError("there is none beside the base")
        auto.from_pretrained(source, trust_remote_code=False).save_pretrained(folder)
    except Exception as error:  # whatever it is, the model is what was asked for
        reason = " ".join(str(error).split())[:200]
        rank_zero_warn(f"save_merged: no tokenizer or processor is written ({reason}); save yours to the same folder")


def _has(place: str, name: str) -> bool:
    if not place or Path(place).is_dir():
        return bool(place) and Path(place, name).is_file()
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(place, name)
    except (OSError, ValueError):
        return False
    return True


def _replace(folder: Path, new: Path) -> None:
    """Move what is in `new` to `folder`, in place of an earlier model there."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    for file in sorted(new.rglob("*")):
        if file.is_file():
            place = folder / file.relative_to(new)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
