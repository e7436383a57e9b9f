"""Which modules of a model virtual tokens concern: its text models, their input embeddings, and decoders that read an
encoder's output."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_peft.methods._host import own_class
from lightning_peft.methods._prompts import argument_names
from lightning_peft.methods._prompts_layout import Kind
from lightning_peft.methods._targets import base_modules, inside
from lightning_peft.methods.errors import PEFTError

NEEDED = {"input_ids", "inputs_embeds", "attention_mask"}
MEMORIES = {"cache_params", "state", "mems"}
"""Where recurrent models keep what they have read, which does not tell how many tokens that was."""
BY_FIRST_TOKEN = ("ForSequenceClassification", "ForMultipleChoice")


@dataclass(frozen=True)
class TextModel:
    """The part of a model that reads tokens: a decoder, an encoder, or the encoder half of an encoder-decoder."""

    path: str
    module: nn.Module
    embedding_path: str
    embedding: nn.Embedding
    outermost: nn.Module
    """The model of transformers that it is the body of, or itself."""
    decoder_path: str = ""
    decoder: nn.Module | None = None
    """What reads its output, in an encoder-decoder."""

    @property
    def kind(self) -> Kind:
        """Which of them it is."""
        if self.decoder is not None:
            return Kind.HALF
        flags = [flag for inner in self.module.modules() if isinstance(flag := getattr(inner, "is_causal", None), bool)]
        is_causal = any(flags) if flags else "past_key_values" in argument_names(self.module)
        return Kind.DECODER if is_causal else Kind.ENCODER

    @property
    def leads(self) -> bool:
        """Whether a head reads its first token's output, which then is the first virtual token's, as in HF peft."""
        config: Any = getattr(self.outermost, "config", None)
        is_mean = getattr(config, "classifier_pooling", None) == "mean"
        name = own_class(self.outermost).__name__
        return name.endswith(BY_FIRST_TOKEN) and self.kind is Kind.ENCODER and not is_mean


def text_models(model: nn.Module, skip: Container[str] = ()) -> list[TextModel]:
    """The text models in `model`.

    Raises:
        PEFTError: there is none, or its embeddings are trained whole.
    """
    modules = dict(base_modules(model))
    names = {id(module): path for path, module in reversed(modules.items())}
    readers = {path: module for path, module in modules.items() if names[id(module)] == path and _reads_tokens(module)}
    found, faults = [], []
    for path, module in readers.items():
        outer = [modules[other] for other in readers if other != path and _is_inside(path, other)]
        if any(_is_inside(other, path) for other in readers if other != path) or inside(path, skip):
            continue
        pair = next((pair for module in reversed(outer) if (pair := _halves(module)) is not None), None)
        if pair is not None and pair[0] is not module:
            continue
        embedding = _embedding(module)
        if embedding is None or id(embedding) not in names:
            continue
        where = names[id(embedding)]
        if inside(where, skip):
            faults.append(f"modules_to_save: {where} is trained whole, and virtual tokens stand on it; leave it out")
        if memory := MEMORIES & set(argument_names(module)):
            name = own_class(module).__name__
            faults.append(
                f"{name} keeps what it has read in {min(memory)}, which does not tell whether virtual tokens are in it"
            )
        decoder = None if pair is None else pair[1]
        decoder_path = "" if decoder is None else names[id(decoder)]
        found.append(TextModel(path, module, where, embedding, (outer or [module])[0], decoder_path, decoder))
    if not found:
        faults.append(_reason(model))
    if faults:
        raise PEFTError(faults)
    return found


def _reads_tokens(module: nn.Module) -> bool:
    cls = own_class(module)
    if getattr(cls, "main_input_name", None) is None or not hasattr(module, "config"):
        return False
    return module.main_input_name == "input_ids" and set(argument_names(module)) >= NEEDED


def _is_inside(path: str, other: str) -> bool:
    return not other or path.startswith(f"{other}.")


def _halves(module: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The encoder and the decoder of an encoder-decoder."""
    model: Any = module
    if not getattr(model.config, "is_encoder_decoder", False):
        return None
    encoder, decoder = model.get_encoder(), model.get_decoder()
    if encoder is model or decoder is model or encoder is decoder:
        return None
    return (encoder, decoder) if "encoder_attention_mask" in argument_names(decoder) else None


def _embedding(module: nn.Module) -> nn.Embedding | None:
    model: Any = module
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return embedding if isinstance(embedding, nn.Embedding) else None


def _reason(model: nn.Module) -> str:
    """Why there is no place for virtual tokens."""
    name = type(model).__name__
    inputs = {
        getattr(module, "main_input_name", None)
        for _, module in base_modules(model)
        if hasattr(own_class(module), "main_input_name")
    } - {None, "input_ids"}
    reads = f"; it reads {' and '.join(sorted(map(str, inputs)))}" if inputs else ""
    return (
        f"{name} has no place for virtual tokens, which stand beside the input embeddings of a text model of "
        f"transformers{reads}"
    )
