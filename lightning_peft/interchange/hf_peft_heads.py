"""What of a model is trained whole, and for which task, in HF peft's words. Checked on peft 0.21.2."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from torch import Tensor, nn

from lightning_peft.interchange.roots import is_transformers_model
from lightning_peft.methods._host import Host, own_class, own_tensors
from lightning_peft.methods._targets import base_modules, inside
from lightning_peft.methods.errors import PEFTError

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""Tasks by the end of a transformers model's name."""
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""What HF peft trains whole for a task, asked to or not."""


def trained_whole(root: nn.Module, names: Iterable[str]) -> set[str]:
    """Paths of the outermost modules that `modules_to_save` means in HF peft: those whose path ends in a name, be it in
    the middle of a word."""
    endings = tuple(names)
    return outermost(
        path
        for path, module in base_modules(root)
        if path and endings and path.endswith(endings) and any(True for _ in module.parameters())
    )


def outermost(paths: Iterable[str]) -> set[str]:
    """The paths that lie below no other of them."""
    kept = set(paths)
    return {path for path in kept if not inside(path.rpartition(".")[0], kept)}


def names_to_save(root: nn.Module, saved: set[str], given: Sequence[str]) -> tuple[str, ...]:
    """Names by which HF peft trains just the modules `saved` whole: the given ones, the modules' own, or their paths.

    Raises:
        PEFTError: there are no such, or a module has several names, of which HF peft would train a copy each.
    """
    names: dict[int, list[str]] = {}
    for path, module in base_modules(root):
        names.setdefault(id(module), []).append(path)
    for path in sorted(saved):
        others = [name for name in names[id(root.get_submodule(path))] if name != path]
        if others:
            raise PEFTError(
                f"modules_to_save: {path} is the same module as {', '.join(others)}, and HF peft would train a copy "
                "under each name"
            )
    for candidate in (sorted(given), sorted({path.rpartition(".")[2] for path in saved}), sorted(saved)):
        if trained_whole(root, candidate) == saved:
            return tuple(candidate)
    raise PEFTError(f"modules_to_save: HF peft would train others whole beside {', '.join(sorted(saved))}")


def task_type(root: nn.Module, saved: set[str], names: Sequence[str], adapted: Collection[str]) -> str | None:
    """The task by which HF peft's AutoPeftModel loads the base; None where HF peft would train more of it for that task
    than is trained here, or where the model has no such task."""
    name = own_class(root).__name__
    task = next((task for ending, task in TASKS.items() if name.endswith(ending)), None)
    if task is None or not is_transformers_model(root):
        return None
    if task == "SEQ_2_SEQ_LM" and not getattr(root.config, "is_encoder_decoder", False):
        return None
    heads = HEADS.get(task, ())
    adapted_heads = [path for path in adapted if any(re.search(rf"(^|\.){head}($|\.)", path) for head in heads)]
    if adapted_heads or trained_whole(root, (*names, *heads)) != saved:
        return None
    return task


def base_tensors(root: nn.Module) -> dict[str, Tensor]:
    """The base's own tensors by their key in its state dict, adapters left out; a shared one under each name."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, module in base_modules(root)
        for name, tensor in own_tensors(module).items()
        if name not in module._non_persistent_buffers_set
    }


def saved_tensors(root: nn.Module, saved: Iterable[str], adapter_name: str) -> dict[str, Tensor]:
    """The trained copies of all tensors in the modules `saved`, by their key in the base's state dict."""
    return {
        f"{path}.{name}": tensor
        for top in saved
        for path, module in base_modules(root.get_submodule(top), top)
        if isinstance(module, Host) and adapter_name in module.adapters
        for name, tensor in module.adapters[adapter_name].state_dict().items()
    }
