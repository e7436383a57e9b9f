"""The kinds of layer and model that a method may meet, and what the properties need to put it there."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import METHODS, BitFit, LoRA, Method, PEFTError, inject
from lightning_peft.injection import adapters
from lightning_peft.methods._prefix_method import PrefixMethod

ROWS = 4
LENGTH = 5
VOCABULARY = 24
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 2, "initializer_range": 0.2}


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(ROWS, *shape)


def ids() -> Tensor:
    return torch.randint(1, VOCABULARY, (ROWS, LENGTH))


@dataclass(frozen=True)
class Case:
    """A model, an input whose first dimension is the rows, and what is to be adapted in it."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    targets: tuple[str, ...] = ("layer",)
    parameters: tuple[str, ...] = ()
    save: tuple[str, ...] = ()
    call: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x)
    compiles: bool = True
    """False where torch.compile takes 10 s or more for the bare model: its layers are compiled in other cases."""


def stack(**layers: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(layers))


def stacked(make: Callable[..., nn.Module], *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """A model of one layer, with something behind it that makes its gradient depend on its output."""
    return lambda: stack(layer=make(*args, **options), act=nn.Tanh())


def conv1d_of_transformers() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(5, 6)


def embedding_of_gemma() -> nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(VOCABULARY, 8, padding_idx=0, embed_scale=math.sqrt(8))


def embedding_of_bart() -> nn.Module:
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    return BartScaledWordEmbedding(VOCABULARY, 8, 0, embed_scale=math.sqrt(8))


def embedding_of_bounded_norm() -> nn.Module:
    embedding = nn.Embedding(VOCABULARY, 8, max_norm=1.5)
    for _ in range(3):  # torch scales the rows it looks up in place, and needs a few passes until none changes
        embedding(torch.arange(VOCABULARY))
    return embedding


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.embedding(x))))


class Shared(nn.Module):
    """One Linear under two names, run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.again = self.layer

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.layer(x)))


class Attention(nn.Module):
    """Attention of x (rows, length, 8) to itself, or to its first `kdim` features."""

    def __init__(self, batch_first: bool, kdim: int | None = None) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=kdim, vdim=kdim)
        self.kdim = kdim or 8

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.layer.batch_first else x.transpose(0, 1)
        seen = x if self.kdim == 8 else x[..., : self.kdim]  # the very same x, for which torch has a fused path
        y = self.layer(x, seen, seen)[0]
        return y if self.layer.batch_first else y.transpose(0, 1)


class Encoder(nn.Module):
    """nn.TransformerEncoder with padding; of each row, the positions that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor) -> Tensor:
        is_padding = torch.arange(x.shape[1]).expand(x.shape[:2]) >= x.shape[1] - 1
        return self.encoder(x, src_key_padding_mask=is_padding)[:, :-1]


class Recurrent(nn.Module):
    """A Linear, and an LSTM as the head that is trained whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.head = nn.LSTM(6, 5, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)))[0]


def cnn() -> nn.Module:
    return stack(
        layer=nn.Conv2d(3, 8, 3, padding=1),
        norm=nn.BatchNorm2d(8),
        act=nn.Tanh(),
        conv=nn.Conv2d(8, 6, 3),
        last=nn.BatchNorm2d(6),
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SMALL, intermediate_size=24, num_hidden_layers=1, num_key_value_heads=1, tie_word_embeddings=True
    )
    return LlamaForCausalLM(config)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SMALL, intermediate_size=24, num_hidden_layers=1, num_labels=3))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=8,
            n_embd=16,
            n_layer=1,
            n_head=2,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def mixtral(experts: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import MixtralConfig, MixtralForCausalLM

        few = {"num_hidden_layers": 1, "num_key_value_heads": 1, "num_local_experts": 3}
        return MixtralForCausalLM(MixtralConfig(**SMALL, **few, intermediate_size=24, experts_implementation=experts))

    return build


def gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    few = {
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "head_dim": 8,
    }
    return GptOssForCausalLM(GptOssConfig(**SMALL, **few, intermediate_size=24))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).logits


def seq2seq_logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(input_ids=x, decoder_input_ids=x.flip(1)).logits


EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
CASES = [
    Case("linear", stacked(nn.Linear, 6, 5), floats(6)),
    Case("linear-no-bias", stacked(nn.Linear, 6, 5, bias=False), floats(LENGTH, 6)),
    Case("transformers-conv1d", stacked(conv1d_of_transformers), floats(LENGTH, 6)),
    Case("conv1d-strided", stacked(nn.Conv1d, 4, 6, 3, stride=2, padding=1), floats(4, 9)),
    Case("conv2d-reflect", stacked(nn.Conv2d, 4, 6, 3, padding=1, padding_mode="reflect"), floats(4, 7, 6)),
    Case(
        "conv2d-circular-dilated",
        stacked(nn.Conv2d, 4, 6, 3, padding=2, padding_mode="circular", dilation=2),
        floats(4, 7, 6),
    ),
    Case("conv2d-same-groups", stacked(nn.Conv2d, 4, 6, (3, 1), padding="same", groups=2, bias=False), floats(4, 7, 6)),
    Case("conv2d-depthwise", stacked(nn.Conv2d, 4, 8, 3, groups=4), floats(4, 7, 6)),
    Case(
        "conv3d-strided", stacked(nn.Conv3d, 3, 5, (2, 3, 1), stride=(1, 2, 1), padding=(0, 1, 0)), floats(3, 4, 5, 3)
    ),
    Case("embedding", stacked(nn.Embedding, VOCABULARY, 8), ids),
    Case("embedding-padding", stacked(nn.Embedding, VOCABULARY, 8, padding_idx=3, scale_grad_by_freq=True), ids),
    Case("embedding-max-norm", stacked(embedding_of_bounded_norm), ids),
    Case("embedding-gemma", stacked(embedding_of_gemma), ids),
    Case("embedding-bart", stacked(embedding_of_bart), ids),
    Case("tied-embedding", Tied, ids, ("embedding",)),
    Case("tied-both", Tied, ids, ("embedding", "head", "layer")),
    Case("shared-linear", Shared, floats(6)),
    Case("attention-rows-first", lambda: Attention(True), floats(LENGTH, 8)),
    Case("attention-length-first", lambda: Attention(False), floats(LENGTH, 8)),
    Case("attention-kdim", lambda: Attention(True, kdim=6), floats(LENGTH, 8)),
    Case("encoder", Encoder, floats(LENGTH, 8), ("linear1", "self_attn")),
    Case("batchnorm-cnn", cnn, floats(3, 6, 6), ("layer", "conv")),
    Case("batchnorm-cnn-saved", cnn, floats(3, 6, 6), save=("conv", "last")),
    Case("lstm-saved", Recurrent, floats(LENGTH, 6), save=("head",)),
    Case("llama", llama, ids, ("v_proj", "down_proj"), call=logits),
    Case("bert", bert, ids, ("query", "value"), save=("classifier",), call=logits),
    Case("gpt2", gpt2, ids, ("c_attn", "c_fc"), call=logits),
    Case("t5", t5, ids, ("q", "wo"), call=seq2seq_logits, compiles=False),
    Case("mixtral-eager", mixtral("eager"), ids, ("v_proj",), EXPERTS, call=logits, compiles=False),
    Case("mixtral-batched", mixtral("batched_mm"), ids, (), EXPERTS[:1], call=logits, compiles=False),
    Case("mixtral-grouped", mixtral("grouped_mm"), ids, (), (*EXPERTS, "mlp.gate.weight"), call=logits),
    Case("gpt-oss", gpt_oss, ids, (), EXPERTS, call=logits, compiles=False),
]


@cache
def built(case: Case) -> nn.Module:
    torch.manual_seed(1)
    return case.build().eval()


@cache
def batch(case: Case, seed: int) -> Tensor:
    torch.manual_seed(2 + seed)
    return case.inputs()


@dataclass(frozen=True)
class Subject:
    """A method on a case."""

    method: type[Method]
    case: Case

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A fresh copy of the case's model, in eval mode."""
        return copy.deepcopy(built(self.case)).to(dtype)

    def widest(self) -> torch.dtype:
        """float64, or fp32 where the bare model has an operation that knows no float64."""
        return _widest(self.case)

    def make(self, **options: Any) -> Method:
        """The method, aimed at the case's layers; skips where it has no field for what the case or `options` ask."""
        known = {field.name for field in dataclasses.fields(self.method)}  # type: ignore[arg-type]
        asked = {name for name, value in {**options, "target_parameters": self.case.parameters}.items() if value}
        if absent := asked - known:
            pytest.skip(f"{self.method.__name__} has no field {', '.join(sorted(absent))}")
        aim: dict[str, Any] = {"r": 4, "num_virtual_tokens": 3, "target_parameters": [*self.case.parameters]}
        aim |= {"target": 0.3, "alpha_init": 0.5}  # gates that are neither open nor shut, and so have a gradient
        if not issubclass(self.method, PrefixMethod):  # which is for attention, and finds it
            aim["target_modules"] = [*self.case.targets]
        # methods that are made of others
        targets = [*self.case.targets] or ["none"]
        aim["methods"] = [LoRA(r=4, target_modules=targets), BitFit(target_modules=targets)]
        aim["config"] = {"peft_type": "VERA", "r": 4, "target_modules": targets}
        return self.method(**{name: value for name, value in {**aim, **options}.items() if name in known})

    def put(self, model: nn.Module, name: str = "default", *, moved: bool = True, **options: Any) -> nn.Module:
        """Inject, and move the adapter's values away from their start; skips where the method says it can't."""
        try:
            self.inject(model, name, **options)
        except PEFTError as error:
            pytest.skip(str(error))
        return move(model, name) if moved else model

    def inject(
        self, model: nn.Module, name: str = "default", save: Sequence[str] | None = None, **options: Any
    ) -> nn.Module:
        torch.manual_seed(3)  # the same start of the same adapter
        whole = self.case.save if save is None else save
        return inject(model, self.make(**options), adapter_name=name, modules_to_save=whole)

    def adapted(self, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
        return self.put(self.base(dtype), **options)

    def run(self, model: nn.Module, seed: int = 0, x: Tensor | None = None) -> Tensor:
        x = batch(self.case, seed) if x is None else x
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        return self.case.call(model, x.to(dtype) if x.is_floating_point() else x)

    def values(self, model: nn.Module, seed: int = 0) -> Tensor:
        with torch.no_grad():
            return self.run(model, seed)


@cache
def _widest(case: Case) -> torch.dtype:
    subject = Subject(Method, case)
    try:
        subject.values(subject.base(torch.float64))
    except RuntimeError:
        return torch.float32
    return torch.float64


@torch.no_grad()
def move(model: nn.Module, name: str = "default") -> nn.Module:
    """Give the adapters of that name values as after some training, the same ones for the same name."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    for adapter in adapters(model, name).values():
        for parameter in adapter.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(
                parameter.dtype
            )
    return model


@cache
def is_refused(method: type[Method], case: Case) -> bool:
    """Whether the method says that it can't stand on the case."""
    subject = Subject(method, case)
    try:
        subject.inject(subject.base())
    except PEFTError:
        return True
    except Exception:
        # a fault of the method's, which is each property's to show, and no test file's that can't be read
        return False
    return False


def each(
    *names: str,
    refused_too: bool = False,
    cases: Sequence[Case] = CASES,
    where: Callable[[type[Method], Case], bool] = lambda method, case: True,
) -> pytest.MarkDecorator:
    """Every method on every one of `cases`, or on those with `names`, that has the fields which the case asks for.

    Args:
        names: of cases.
        refused_too: whether the property is about cases that the method refuses too.
        cases: the cases.
        where: which pairs of them the property is about.
    """
    assert set(names) <= {case.name for case in cases}
    fields = {method: {field.name for field in dataclasses.fields(method)} for method in METHODS.values()}  # type: ignore[arg-type]
    params = [
        pytest.param(Subject(method, case), id=f"{name}-{case.name}")
        for case in cases
        if not names or case.name in names
        for name, method in METHODS.items()
        if not case.parameters or "target_parameters" in fields[method]
        if where(method, case) and (refused_too or not is_refused(method, case))
    ]
    return pytest.mark.parametrize("subject", params)
