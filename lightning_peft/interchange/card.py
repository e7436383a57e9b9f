"""The model card (README.md) of an exported adapter or a merged model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from torch import nn

from lightning_peft.injection import adapters, records
from lightning_peft.interchange.locations import PACKAGE
from lightning_peft.interchange.roots import is_transformers_model, peft_root
from lightning_peft.interchange.standalone import base_place
from lightning_peft.methods._host import hosts, own_class
from lightning_peft.methods._quantized import packed
from lightning_peft.methods._targets import base_modules
from lightning_peft.methods.base import Method
from lightning_peft.methods.errors import PEFTError
from lightning_peft.state import KEY, base_quantization
from lightning_peft.state.secrets import SECRET_NAME, without_secrets
from lightning_peft.state.versions import installed

TAG = "lightning-peft"
PIPELINES = {
    "ForSequenceClassification": {"input_ids": "text-classification", "input_values": "audio-classification"},
    "ForAudioClassification": {"input_values": "audio-classification", "input_features": "audio-classification"},
    "ForTokenClassification": {"input_ids": "token-classification"},
    "ForQuestionAnswering": {"input_ids": "question-answering"},
    "ForCausalLM": {"input_ids": "text-generation"},
    "LMHeadModel": {"input_ids": "text-generation"},
    "ForMaskedLM": {"input_ids": "fill-mask"},
    "ForImageClassification": {"pixel_values": "image-classification"},
    "ForObjectDetection": {"pixel_values": "object-detection"},
    "ForSemanticSegmentation": {"pixel_values": "image-segmentation"},
    "ForCTC": {"input_values": "automatic-speech-recognition", "input_features": "automatic-speech-recognition"},
}
"""The hub's pipeline for a kind of model and its main input; others are not guessed."""
HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForImageClassification", "ForAudioClassification")
AUTO_CLASSES = {"ForConditionalGeneration": "ForSeq2SeqLM", "LMHeadModel": "ForCausalLM"}
Active = tuple[Method, str, tuple[str, ...]]
VERSIONS = (TAG, "torch", "lightning", "transformers")


def model_card(
    model: nn.Module,
    *,
    name: str,
    base: str | None = None,
    checkpoint: Mapping[str, Any] | None = None,
    merged: bool = False,
) -> str:
    """The text of README.md for the adapter of `model`, or for the model that it was merged into.

    It has the hub's metadata as YAML, without a licence. What `checkpoint` tells of the data is shown without values
    that look secret, and paths by their last name.

    Args:
        model: the model with its active adapter.
        name: what the card calls it, and loads it by: the folder's name or the hub id.
        base: the hub id or folder of the base; by default where the transformers model was loaded from.
        checkpoint: the checkpoint that the adapter was loaded from, for its metrics and data.
        merged: whether it describes a standalone model.

    Raises:
        PEFTError: no adapter is active.
    """
    root = peft_root(model)[1]
    base = base_place(root) if base is None else base
    active = _active(model, root)
    sections = [
        _front_matter(root, active[0], base, merged),
        f"# {name}",
        _what(model, root, active, base, merged),
        f"## Data\n\n{_data(checkpoint or {})}",
        f"## Metrics\n\n{_metrics(checkpoint or {})}",
        f"## Loading\n\n{_merged_loading(root, name) if merged else _loading(root, name, base)}",
        f"## Versions\n\n{_versions(merged)}",
    ]
    return "\n\n".join(sections) + "\n"


def is_own_card(folder: Path) -> bool:
    """Whether the README.md in `folder` is one of these."""
    file = folder / "README.md"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return front is not None and f"- {TAG}" in front[1].splitlines()


def changed_fields(method: Method) -> dict[str, Any]:
    """The fields of `method` that differ from their defaults, in plain types."""
    defaults = {}
    for item in dataclasses.fields(method):  # type: ignore[arg-type]
        factory = item.default_factory
        defaults[item.name] = item.default if factory is dataclasses.MISSING else factory()
    return {name: value for name, value in method.fields().items() if value != defaults[name]}


def auto_class(root: nn.Module) -> str:
    """The class of transformers by which a folder of `root`'s kind is loaded."""
    kind = re.search(r"(For[A-Z]\w*|LMHeadModel)$", own_class(root).__name__)
    return f"AutoModel{AUTO_CLASSES.get(kind[0], kind[0].removeprefix('LMHeadModel')) if kind else ''}"


def is_local(base: str) -> bool:
    """Whether `base` is a folder, and no name on the hub."""
    return base.startswith((PACKAGE, ".", "/", "~")) or base.count("/") > 1 or "\\" in base or Path(base).exists()


def public_name(base: str) -> str:
    """A hub id as it is, a folder by its last name."""
    return PurePosixPath(_without_place(base)).name.removeprefix(PACKAGE) if is_local(base) else base


def _active(model: nn.Module, root: nn.Module) -> Active:
    name = next((host.active_adapter for _, host in hosts(model) if host.active_adapter is not None), None)
    known = {**records(root), **records(model)}
    if name is None or name not in known:
        raise PEFTError("model_card: no active adapter stands on the model")
    return known[name].method, name, known[name].saved_modules


def _front_matter(root: nn.Module, method: Method, base: str, merged: bool) -> str:
    data: dict[str, Any] = {"library_name": "transformers" if merged else "peft"}
    if base:
        data["base_model"] = public_name(base)
    if pipeline := _pipeline(root):
        data["pipeline_tag"] = pipeline
    data["tags"] = [type(method).__name__.lower(), TAG]
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    if base and is_local(base):
        # the hub would take the name for one of its own
        text = re.sub(r"(?m)^(base_model: .*)$", r"\1  # a local folder; put its id on the hub here", text)
    return f"---\n{text}---"


def _pipeline(root: nn.Module) -> str | None:
    name, main_input = own_class(root).__name__, getattr(root, "main_input_name", "")
    return next((inputs.get(main_input) for kind, inputs in PIPELINES.items() if name.endswith(kind)), None)


def _what(model: nn.Module, root: nn.Module, active: Active, base: str, merged: bool) -> str:
    method, adapter_name, saved = active
    kind = type(method).__name__
    where = f"`{public_name(base)}`" if base else f"a {own_class(root).__name__}"
    local = " (a local folder; only its name is given here)" if base and is_local(base) else ""
    trained = {id(p): p.numel() for adapter in adapters(model, adapter_name).values() for p in adapter.parameters()}
    numbers = {id(parameter): parameter.numel() for parameter in model.parameters()}
    for _, module in base_modules(model):
        if (weight := packed(module)) is not None:
            numbers[id(module._parameters["weight"])] = weight.shape.numel()
    total = sum(numbers.values())
    quantization = base_quantization(model)
    lines = [
        f"{where}{local}, fine-tuned by {kind}, with the update folded into its weights."
        if merged
        else f"A {kind} adapter for {where}{local}.",
        "",
        "| | |",
        "|---|---|",
        f"| method | {kind} |",
        *(f"| {name} | `{_shown(value)}` |" for name, value in changed_fields(method).items()),
        *([f"| trained whole | `{', '.join(saved)}` |"] if saved else []),
        *([f"| base quantized to | {quantization} |"] if quantization else []),
        f"| trained parameters | {sum(trained.values()):,} of {total:,} ({sum(trained.values()) / total:.2%}) |",
    ]
    return "\n".join(lines)


def _data(checkpoint: Mapping[str, Any]) -> str:
    given = checkpoint.get("datamodule_hyper_parameters")
    if not isinstance(given, Mapping):
        return "Not recorded."
    class_path = str(given.get("_class_path", ""))
    lines = [f"`{class_path.rpartition('.')[2]}`", ""] if class_path else []
    shown = {name: _shown(value) for name, value in _public(without_secrets(given)).items() if value is not None}
    rows = [f"| {name} | `{value}` |" for name, value in shown.items()]
    return "\n".join([*lines, *(["| | |", "|---|---|", *rows] if rows else [])]) or "Not recorded."


def _metrics(checkpoint: Mapping[str, Any]) -> str:
    metrics = (checkpoint.get(KEY) or {}).get("metrics")
    if not metrics:
        return "Not recorded."
    rows = [f"| {name} | {value:.4g} |" for name, value in sorted(metrics.items())]
    return "\n".join(["| metric | value |", "|---|---|", *rows])


def _loading(root: nn.Module, name: str, base: str) -> str:
    if is_transformers_model(root):
        auto, config = auto_class(root), getattr(root, "config", None)
        labels = f", num_labels={config.num_labels}" if auto.endswith(HEADS) and config is not None else ""
        start = f'from transformers import {auto}\n\nbase = {auto}.from_pretrained("{public_name(base)}"{labels})'
        merged = f"""

In transformers, folded into the weights and without this or any adapter library afterwards:

```python
model.merge_and_unload().save_pretrained("merged")
model = {auto}.from_pretrained("merged")
```"""
    else:
        start, merged = f"\nbase = {own_class(root).__name__}(...)  # as your code builds it", ""
    return f"""\
In HF peft:

```python
from peft import PeftModel
{start}
model = PeftModel.from_pretrained(base, "{name}")
```{merged}

In lightning-peft, onto the same `base` or onto the LightningModule that holds it:

```python
from lightning_peft import import_adapter

model = import_adapter(base, "{name}")
```"""


def _merged_loading(root: nn.Module, name: str) -> str:
    auto = auto_class(root)
    return f'```python\nfrom transformers import {auto}\n\nmodel = {auto}.from_pretrained("{name}")\n```'


def _versions(merged: bool) -> str:
    rows = [f"| {package} | {installed(package)} |" for package in VERSIONS]
    if not merged:
        rows.append("| format | HF PEFT: adapter_config.json and adapter_model.safetensors |")
    return "\n".join(["| | |", "|---|---|", *rows])


def _public(value: Any) -> Any:
    """`value` without what is named like a secret, or is of use to Lightning alone."""
    if isinstance(value, Mapping):
        kept = {
            str(name): item
            for name, item in value.items()
            if not str(name).startswith("_") and not SECRET_NAME.search(str(name))
        }
        return {name: _public(item) for name, item in kept.items()}
    if isinstance(value, (list, tuple)):
        return [_public(item) for item in value]
    if isinstance(value, str):
        return _without_place(value)
    return value if value is None or isinstance(value, (bool, int, float)) else type(value).__name__


def _shown(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("`", "'").replace("\n", " ")


def _without_place(text: str) -> str:
    """A path outside of the current folder by its last name, an address without its credentials, else `text`."""
    if address := re.match(r"([a-z][a-z0-9+]*)://(?:[^/@]*@)?([^?#]*)", text):
        return address[2].rsplit("/", 1)[-1] if address[1] == "file" else f"{address[1]}://{address[2]}"
    if re.match(r"[A-Za-z]:[\\/]|\\\\", text):
        return PureWindowsPath(text).name
    if text.startswith(("/", "~", "..")):
        return PurePosixPath(text).name
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text
