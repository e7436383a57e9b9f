"""Language modelling: a decoder learns to go on with a text, from whole texts or from the answers in them."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.nn import functional as F

from lightning_peft.methods.errors import PEFTError
from lightning_peft.tasks.chunked_loss import chunked_scores, refusal
from lightning_peft.tasks.decoding import left_padded, text_config, without_cache
from lightning_peft.tasks.generation import Generation
from lightning_peft.tasks.packed import check_packing
from lightning_peft.tasks.task import IGNORED, Batch, Outcome


class CausalLM(Generation):
    """A pretrained decoder that goes on with a text.

    A batch holds `input_ids`, `attention_mask` and `labels`, each int64 of shape (batch, length), where a label is the
    token at its own place, and those of -100 are left out. Packed rows, several texts in one, have `position_ids` that
    start anew with each text, and no `attention_mask`. Metrics are those of `Generation`.

    Metrics of texts, and predictions, are of what the model writes after all that stands before a row's last run of
    labels, or after the whole row where it has none.

    Args:
        model: see `Generation`.
        chunked_loss: compute losses in a Trainer, and accuracy, over a few tokens at a time, so that the logits of a
            batch (tokens x vocabulary) never exist whole. A warning tells why where a model does not let it be so: one
            that changes its output layer's logits, as Gemma 2 does, or that is compiled.
        **options: see `Generation`.

    Raises:
        PEFTError: beside what `Generation` tells, when training starts: with packed rows, the model mixes texts.
    """

    auto_class: ClassVar[str] = "AutoModelForCausalLM"

    def __init__(self, model: str | torch.nn.Module, chunked_loss: bool = True, **options: Any) -> None:
        super().__init__(model, **options)
        self._is_chunked = False

    def faults(self) -> list[str]:
        """What of a run can't be done with this model and data."""
        faults = super().faults()
        measured = self.hparams["generation_metrics"] and self.trainer.state.fn != TrainerFn.PREDICTING
        if measured and getattr(self.data, "packing", False):
            faults.append("generation_metrics: rows with several texts have no prompt; use packing=False")
        return faults

    def on_fit_start(self) -> None:
        """Tries whether the model keeps packed texts apart, where there are to be any, and whether its loss can be
        computed in parts."""
        if getattr(self.data, "packing", False):
            vocabulary = getattr(text_config(self.model), "vocab_size", None) or len(self.tokenizer)
            with self.trainer.precision_plugin.forward_context():
                check_packing(self.model, vocabulary)
        self._try_chunks()

    def on_validation_start(self) -> None:
        """Tries whether the loss can be computed in parts, where that was not done as training began."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            self._try_chunks()

    on_test_start = on_validation_start

    def outcome(self, batch: Batch) -> Outcome:
        """As `Generation` has it, in parts where the model lets it be so."""
        if not self._is_chunked:
            return super().outcome(batch)
        labels = _following(batch["labels"])
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        run = partial(self.forward, **inputs, **without_cache(self.model))
        total, right = chunked_scores(run, self.model.get_output_embeddings(), labels, not self.training)
        count = (labels != IGNORED).sum()
        return Outcome(total / count.clamp(min=1), count, right)

    def scored(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, (batch, length, vocabulary), and at each place the label of the next."""
        logits = self.logits({name: value for name, value in batch.items() if name != "labels"})
        return logits, _following(batch["labels"])

    def prompts(self, batch: Batch) -> tuple[Batch, list[list[int]]]:
        """What stands before each row's last run of labels, padded on the left; and the tokens of that run.

        Raises:
            PEFTError: the rows are packed, or one has nothing before its labels.
        """
        if "position_ids" in batch:
            raise PEFTError("packing: rows with several texts have no prompt to go on from; use packing=False")
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).tolist()
        labels = batch.get("labels", torch.full_like(ids, IGNORED)).tolist()
        rows = [split(*row) for row in zip(ids.tolist(), mask, labels, strict=True)]
        if not all(prompt for prompt, _ in rows):
            raise PEFTError(
                "a row has nothing before its labels to generate from; use data with prompts, such as InstructionData"
            )
        return left_padded([prompt for prompt, _ in rows], ids.device), [answer for _, answer in rows]

    def generate(self, prompts: Batch) -> torch.Tensor:
        """The token ids that the model writes after the prompts, int64 of shape (batch, length)."""
        return super().generate(prompts)[:, prompts["input_ids"].shape[1] :]

    def _try_chunks(self) -> None:
        self._is_chunked = False
        if not self.hparams["chunked_loss"]:
            return
        with self.trainer.precision_plugin.forward_context():
            reason = refusal(self.model)
        self._is_chunked = reason is None
        if reason:
            rank_zero_warn(
                f"chunked_loss: the logits of all tokens are kept at once, since {reason}; chunked_loss=False asks for "
                "that"
            )


def _following(labels: torch.Tensor) -> torch.Tensor:
    """At each place the label of the next, (batch, length)."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def split(ids: list[int], mask: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """The tokens before a row's last run of labels, and those of the run; all of them and none in a row without one."""
    end = max((place + 1 for place, label in enumerate(labels) if label != IGNORED), default=0)
    start = next((place for place in range(end, 0, -1) if labels[place - 1] == IGNORED), 0) if end else len(ids)
    return [token for token, kept in zip(ids[:start], mask[:start], strict=True) if kept], labels[start:end]
