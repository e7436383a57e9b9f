"""Tasks around a model that writes text: token losses, generation, and metrics of the texts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric

from lightning_peft.methods.errors import PEFTError, suggestion
from lightning_peft.tasks.decoding import decode, generate, model_tokenizer, option_faults, text_config, without_cache
from lightning_peft.tasks.metrics import MetricFactory, metric_faults
from lightning_peft.tasks.task import IGNORED, Batch, Outcome, Task
from lightning_peft.tasks.text_metrics import TEXT_METRICS, Perplexity


class Generation(Task):
    """A pretrained model that writes text, or any module whose output is logits over a vocabulary.

    Beside the loss it logs its `metrics`, `val_perplexity` and `val_accuracy`, the part of the labels that the model
    holds for most likely, and the metrics of generated texts that are asked for. All of them are over the rows of all
    devices.

    Args:
        model: a hub id, a folder, `package:NAME/folder`, or a module whose output is logits of shape (batch, length,
            vocabulary) or has them as `.logits`.
        generation: options of transformers' `generate`, such as `{num_beams: 4}`; by default 128 new tokens at most.
        generation_metrics: metrics of texts generated in evaluation, against those of the labels: `bleu`, `chrf`,
            `rouge1`, `rouge2`, `rougeL` (their f-measures), `exact_match`, `token_f1` (as SQuAD has it), each between
            0 and 1, and `wer`, the word error rate.
        **options: see `Task`.

    Raises:
        PEFTError: by the constructor, an unknown metric or option; by `configure_model`, there is no such model, the
            tokenizer has more tokens than it, or it can't generate what is asked for.
    """

    known_metrics: ClassVar[Mapping[str, MetricFactory]] = {
        "perplexity": lambda task: Perplexity(float("nan")),
        "accuracy": lambda task: MeanMetric(),
    }

    def __init__(
        self,
        model: str | torch.nn.Module,
        generation: dict[str, Any] | None = None,
        generation_metrics: Sequence[str] = (),
        **options: Any,
    ) -> None:
        given = options.get("metrics") or ()
        texts = [name for name in given if not isinstance(given, str) and name in TEXT_METRICS]
        faults = [f"metrics: {name!r} is of generated texts; name it in generation_metrics" for name in texts]
        others = given if isinstance(given, str) else [name for name in given if name not in texts]
        faults += metric_faults(others, self.known_metrics, self.takes_other_metrics)
        faults += [
            f"generation_metrics: there is no {name!r}"
            + (suggestion(name, TEXT_METRICS) or f"; the metrics are {', '.join(TEXT_METRICS)}")
            for name in generation_metrics
            if name not in TEXT_METRICS
        ]
        if faults := faults + option_faults(model, generation or {}):
            raise PEFTError(faults)
        super().__init__(model, **options)
        self._tokenizers: dict[str, Any] = {}

    @property
    def tokenizer(self) -> Any:
        """The datamodule's, or that in the model's place; None where there is neither."""
        given, name = getattr(self.data, "tokenizer", None), self.hparams.get("model")
        if given is not None or not isinstance(name, str):
            return given
        if name not in self._tokenizers:
            self._tokenizers[name] = model_tokenizer(name, self.hparams["trust_remote_code"])
        return self._tokenizers[name]

    def configure_model(self) -> None:
        """As every task does it; then the model is held against the data and against what it shall generate."""
        super().configure_model()
        if self._trainer is not None and (faults := self.faults()):
            raise PEFTError(faults)

    def faults(self) -> list[str]:
        """What of a run can't be done with this model and data."""
        faults = []
        size, tokenizer = getattr(text_config(self.model), "vocab_size", None), getattr(self.data, "tokenizer", None)
        if size is not None and tokenizer is not None:
            # a token that stands for images has the first number past the end in some text models, and is in no text
            tokens = len(tokenizer) - (getattr(tokenizer, "image_token_id", None) == size)
            if tokens > size:
                faults.append(
                    f"tokenizer: its {tokens:,} tokens are more than the {size:,} that the model has embeddings for; "
                    "use the model's own, or resize the model's embeddings first"
                )
        predicts = self.trainer.state.fn == TrainerFn.PREDICTING
        measured = self.hparams["generation_metrics"] and not predicts
        if measured and self.tokenizer is None:
            faults.append("generation_metrics: there is no tokenizer to make text with; use a datamodule that has one")
        if (measured or predicts) and not hasattr(self.model, "generate"):
            field = "predict" if predicts else "generation_metrics"
            faults.append(f"{field}: the model, a {type(self.model).__name__}, has no method `generate`")
        return faults

    def default_metrics(self) -> Sequence[str]:
        """Perplexity and accuracy."""
        return ("perplexity", "accuracy")

    def make_metrics(self) -> dict[str, Metric]:
        """Those that were chosen, and the metrics of texts."""
        return super().make_metrics() | {name: TEXT_METRICS[name]() for name in self.hparams["generation_metrics"]}

    @abstractmethod
    def scored(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, (batch, length, vocabulary), and the labels that they are to foresee, int64 of (batch, length)."""

    @abstractmethod
    def prompts(self, batch: Batch) -> tuple[Batch, list[list[int]]]:
        """What to generate from, and each row's answer as token ids; a row without labels has an empty one."""

    def logits(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The model's logits in its dtype; no keys and values are kept, since nothing is generated."""
        output = self.forward(**inputs, **without_cache(self.model))
        logits: torch.Tensor = getattr(output, "logits", output)
        return logits

    def outcome(self, batch: Batch) -> Outcome:
        """The mean cross-entropy over the labels that count, in float32; in evaluation, how many of them it holds for
        most likely."""
        logits, labels = self.scored(batch)
        total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        count = (labels != IGNORED).sum()
        right = None if self.training else (logits.argmax(dim=-1) == labels).sum()
        return Outcome(total / count.clamp(min=1), count, right)

    def update(self, metrics: Mapping[str, Any], batch: Batch, outcome: Outcome) -> None:
        """Enter a batch into the metrics, with texts generated for it where there are metrics of them."""
        tokens = {"perplexity": outcome.loss, "accuracy": outcome.output / outcome.count.clamp(min=1)}
        for name in tokens.keys() & metrics.keys():
            metrics[name].update(tokens[name], outcome.count)
        if names := self.hparams["generation_metrics"]:
            prompts, answers = self.prompts(batch)
            made = self.generate(prompts).tolist()
            # every device generates as often as the others, and rows without labels are left out afterwards
            rows = [row for row, answer in enumerate(answers) if answer]
            texts = decode(self.tokenizer, [made[row] for row in rows])
            references = [[text] for text in decode(self.tokenizer, [answers[row] for row in rows])]
            for name in names:
                metrics[name].update(texts, references)

    def generate(self, prompts: Batch) -> torch.Tensor:
        """The token ids that the model writes, int64 of shape (batch, length), filled up with padding."""
        return generate(self.model, prompts, self.hparams["generation"] or {}, self.tokenizer)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[str] | list[list[int]]:
        """A text for each row, without special tokens; its token ids where there is no tokenizer."""
        made: list[list[int]] = self.generate(self.prompts(batch)[0]).tolist()
        return made if self.tokenizer is None else decode(self.tokenizer, made)
