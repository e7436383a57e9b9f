"""Speech recognition: a model spells what it hears."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from lightning_peft.methods.errors import PEFTError
from lightning_peft.tasks.metrics import MetricFactory
from lightning_peft.tasks.task import IGNORED, Batch, Outcome, Task
from lightning_peft.tasks.text_metrics import CharacterErrors, WordErrors

_MARK = re.compile(r"<.+>|\[.+\]")
_UNKNOWN = "\ufffd"


class SpeechRecognition(Task):
    """A pretrained speech model with a head that gives a character, or none, to each frame (CTC), such as wav2vec 2.0.

    A batch holds `labels`, int64 of shape (batch, tokens), filled up with -100, and what the model is called with, as
    keywords. The loss is CTC's (Graves et al. 2006), divided by the number of labels; a row with more of them than its
    frames can spell adds nothing to it. Beside it, `val_wer` and `val_cer` are the errors in words and in characters of
    the likeliest character of each frame, without a language model, as a part of those in all transcripts, where a
    character that the vocabulary lacks is one that no answer has. Rows without labels are left out.

    Args:
        model: see `Task`; a given module's output is logits of shape (batch, frames, tokens) or has them as `.logits`.
        vocabulary: the tokens by id, where `<pad>` or `[PAD]`, else the first, stands for none; by default the
            datamodule's `vocabulary`, kept in the hyper-parameters. A checkpoint with a head for another number of
            tokens gets a new one.
        **options: see `Task`.

    Raises:
        PEFTError: by `configure_model`, there is no such model, or the vocabulary is unknown or not the data's.
    """

    auto_class: ClassVar[str] = "AutoModelForCTC"
    known_metrics: ClassVar[Mapping[str, MetricFactory]] = {
        "wer": lambda task: WordErrors(),
        "cer": lambda task: CharacterErrors(),
    }

    def __init__(self, model: str | torch.nn.Module, vocabulary: Sequence[str] | None = None, **options: Any) -> None:
        super().__init__(model, **options)

    def model_arguments(self) -> dict[str, Any]:
        """The size of the vocabulary and its blank."""
        given, known = self.hparams["vocabulary"], getattr(self.data, "vocabulary", None)
        tokens = list(given or known or [])
        if not tokens:
            raise PEFTError("vocabulary: give the tokens by id, or use a datamodule that has `vocabulary`")
        if known and list(known) != tokens:
            raise PEFTError(
                f"vocabulary: the data's {len(known):,} tokens are not the model's {len(tokens):,}; give the data the "
                "tokenizer or the training transcripts that the model had"
            )
        self.hparams.update(vocabulary=tokens)
        return {"vocab_size": len(tokens), "pad_token_id": blank_of(tokens), "ignore_mismatched_sizes": True}

    def default_metrics(self) -> Sequence[str]:
        """Both error rates."""
        return ("wer", "cer")

    def outcome(self, batch: Batch) -> Outcome:
        """CTC's loss for each label, and the likeliest token of each frame, -100 after a row's last one."""
        logits, frames = self._logits(batch)
        labels = batch["labels"]
        lengths = (labels != IGNORED).sum(dim=1)
        losses = F.ctc_loss(
            logits.log_softmax(dim=-1).transpose(0, 1),
            labels.clamp(min=0),
            frames,
            lengths,
            blank=blank_of(self.hparams["vocabulary"]),
            reduction="none",
            zero_infinity=True,
        )
        count = lengths.sum()
        total = losses.masked_fill(lengths == 0, 0).sum()
        return Outcome(total / count.clamp(min=1), count, None if self.training else _likeliest(logits, frames))

    def update(self, metrics: Mapping[str, Any], batch: Batch, outcome: Outcome) -> None:
        """Enter the texts of the rows with labels into the metrics."""
        tokens = self.hparams["vocabulary"]
        pairs = [
            (heard(tokens, guess), spelled(tokens, [label for label in labels if label != IGNORED]))
            for guess, labels in zip(outcome.output.tolist(), batch["labels"].tolist(), strict=True)
            if any(label != IGNORED for label in labels)
        ]
        for metric in metrics.values():
            metric.update([text for text, _ in pairs], [[reference] for _, reference in pairs])

    def predict_step(self, batch: Batch, batch_idx: int) -> list[str]:
        """A text for each row."""
        guesses = _likeliest(*self._logits(batch)).tolist()
        return [heard(self.hparams["vocabulary"], guess) for guess in guesses]

    def _logits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits in float32, (batch, frames, tokens), and how many frames of each row are no padding."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        output = self.forward(**inputs)
        logits: torch.Tensor = getattr(output, "logits", output)
        return logits.float(), frame_counts(self.model, batch, logits)


def frame_counts(model: Any, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """How many frames of each row are the sound's, int64 of shape (batch,): all where nothing masks the padding."""
    mask, count = batch.get("attention_mask"), getattr(model, "_get_feat_extract_output_lengths", None)
    if mask is None or mask.all():
        return torch.full((len(logits),), logits.shape[1], device=logits.device)
    samples = mask.sum(dim=-1)
    # transformers' models of waves count them so for their own loss (private; seen in 5.23)
    frames: torch.Tensor = count(samples) if count else (samples * logits.shape[1]).div(mask.shape[1]).ceil()
    return frames.long().clamp(1, logits.shape[1])


def blank_of(tokens: Sequence[str]) -> int:
    """The id of CTC's blank: that of padding in transformers' models, else the first."""
    return next((tokens.index(name) for name in ("<pad>", "[PAD]") if name in tokens), 0)


def spelled(tokens: Sequence[str], ids: Sequence[int]) -> str:
    """The text of token ids, without space around it; a mark such as `<unk>` is one character, U+FFFD.

    Where no token is the space between words, `|` is, and so is the `▁` of tokens that are parts of words.
    """
    text = "".join(_UNKNOWN if _MARK.fullmatch(tokens[number]) else tokens[number] for number in ids)
    return (text if " " in tokens else text.replace("|", " ").replace("▁", " ")).strip()


def heard(tokens: Sequence[str], frames: Sequence[int]) -> str:
    """The text of a row's frames: a token that lasts is one, and blanks and marks such as `<unk>` are none."""
    starts = [token for token, before in zip(frames, [IGNORED, *frames], strict=False) if token != before]
    blank = blank_of(tokens)
    kept = [token for token in starts if token not in (IGNORED, blank) and not _MARK.fullmatch(tokens[token])]
    return spelled(tokens, kept)


def _likeliest(logits: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    places = torch.arange(logits.shape[1], device=logits.device)
    return logits.argmax(dim=-1).masked_fill(places >= frames[:, None], IGNORED)
