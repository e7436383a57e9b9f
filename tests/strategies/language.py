"""A small decoder to be sharded, and how it is trained on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_peft import METHODS
from tests.callback.toys import trainer
from tests.strategies.ranks import ACCELERATOR, RANK, WORLD

VOCABULARY, LENGTH, ROWS = 256, 12, 32


class Language(L.LightningModule):
    """A small decoder of transformers, whose adapters start at random and whose losses are kept."""

    def __init__(self, seed: int = 0, lr: float = 1e-2, **sizes: Any) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.save_hyperparameters()
        given = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=VOCABULARY,
                    num_key_value_heads=2,
                    tie_word_embeddings=False,
                    attention_bias=True,
                    **{**given, **sizes},
                )
            )
        self.losses: list[float] = []

    def loss(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids).loss

    def on_fit_start(self) -> None:
        if self.trainer.ckpt_path is None:
            stir(self)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss = self.loss(batch[0])
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("val_loss", self.loss(batch[0]), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self.model(input_ids=batch[0]).logits[:, -1, :4]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


class Short(Language):
    """Whose hook asks for no number of the batch."""

    def predict_step(self, batch: list[Tensor]) -> Tensor:
        return super().predict_step(batch, 0)


class OfLoaders(Language):
    def predict_step(self, batch: list[Tensor], _: int, dataloader_idx: int) -> Tensor:
        return super().predict_step(batch, 0)


class Reading(Language):
    """Reads the weight of its embedding without a call."""

    def loss(self, ids: Tensor) -> Tensor:
        embedded = nn.functional.embedding(ids, self.model.model.embed_tokens.weight)
        return self.model(inputs_embeds=embedded, labels=ids).loss


class Precise(Language):
    """Runs its head in float32, outside of autocast."""

    def loss(self, ids: Tensor) -> Tensor:
        hidden = self.model.model(input_ids=ids).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            return self.model.lm_head(hidden.float()).logsumexp(-1).mean()


def stir(module: nn.Module) -> None:
    """Start what trains anew, the same on any number of ranks, and away from where it does nothing."""
    generator = torch.Generator().manual_seed(4)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def text(rows_per_step: int = 8, rows: int = ROWS) -> DataLoader[Any]:
    """The same batches on any number of ranks, of which each has its share."""
    generator = torch.Generator().manual_seed(3)
    dataset = TensorDataset(torch.randint(VOCABULARY, (rows, LENGTH), generator=generator))
    sampler = DistributedSampler(dataset, WORLD, RANK, shuffle=False)
    return DataLoader(dataset, rows_per_step // WORLD, sampler=sampler)


def made(name: str) -> Any:
    fields = {"LoRA": {"r": 4}, "DoRA": {"r": 4}}
    return METHODS[name](**fields.get(name, {}))


def run(folder: Path, strategy: Any = "peft_fsdp", *callbacks: L.Callback, **options: Any) -> L.Trainer:
    defaults = {"devices": WORLD, "accelerator": ACCELERATOR, "max_epochs": 1, "enable_checkpointing": False}
    return trainer(folder, *callbacks, strategy=strategy, **{**defaults, **options})


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu().clone() for name, p in module.named_parameters() if p.requires_grad}
