"""What two ranks, or four, do under `peft_fsdp`, one thing after the other.

Run as `python -m tests.strategies.sharded FOLDER NAMES`; see ranks.py.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_peft import (
    PEFT,
    AdaLoRA,
    DoRA,
    LoRA,
    PEFTFSDPStrategy,
    disable_adapters,
    export_adapter,
    merge,
    remove,
    save_merged,
)
from lightning_peft.methods._sharded import is_sharded
from lightning_peft.quantization import Quantization
from lightning_peft.quantization.meta import meta_parameters
from lightning_peft.state import frozen_tensors
from lightning_peft.strategies.sharding import SHARDS_INTEGERS
from lightning_peft.tasks import chunked_loss
from lightning_peft.tracking import PredictionFile
from tests.callback.toys import Clipped, Raw, Toy
from tests.strategies import ranks
from tests.strategies.counting import Collectives, Peak
from tests.strategies.kinds import Alternating, Centred
from tests.strategies.language import VOCABULARY, Language, OfLoaders, Precise, Reading, Short, made, run, text, trained
from tests.strategies.ranks import (
    ACCELERATOR,
    RANK,
    fit,
    main,
    manual,
    refused,
    run_to_the_end,
)

WIDE = {"hidden_size": 128, "intermediate_size": 384}
STREAMED = ("dense", "nf4-dq", "DoRA")
METHODS_TRIED = ("LoRA", "DoRA", "IA3", "BitFit", "Houlsby", "PrefixTuning")
QUANTIZED = ("nf4", "nf4-dq", "nf4 in bfloat16", *(["int8"] if SHARDS_INTEGERS else []))


def methods(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in METHODS_TRIED:
        module = Language()
        with Collectives() as counted:
            run(folder, peft=PEFT(made(name))).fit(module, text())
        found[name] = trained(module)
        found[f"{name} losses"] = module.losses
        found[f"{name} bytes"] = dict(counted.bytes)
        found[f"{name} calls"] = dict(counted.calls)
        found[f"{name} sharded"] = [n for n, p in module.named_parameters() if is_sharded(p)]
    return found


def quantized(folder: Path) -> dict[str, Any]:
    """50 steps over a base in 4 or 8 bits, and the bytes of the base on each rank before and after sharding."""
    found: dict[str, Any] = {}
    for name in QUANTIZED:
        module = Language(lr=1e-3, **WIDE)
        peft = PEFT(LoRA(r=4), quantization=quantization(name))
        run(folder, peft=peft, max_epochs=13, max_steps=50).fit(module, text())
        found[name] = trained(module)
        found[f"{name} losses"] = module.losses
        found[f"{name} bytes"] = base_bytes(module)
    return found


def quantization(name: str) -> Any:
    kind, _, storage = name.partition(" in ")
    return Quantization(**{**Quantization.of(kind).fields(), "storage_dtype": storage}) if storage else kind


def base_bytes(module: nn.Module) -> int:
    """Of the base on this rank, with the scales of packed weights."""
    whole = frozen_tensors(module).values()
    local = [tensor.to_local() if is_sharded(tensor) else tensor for tensor in whole]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def chain(folder: Path) -> dict[str, Any]:
    """A run that goes on under other strategies: from one device to peft_fsdp, to peft_ddp."""
    found: dict[str, Any] = {}
    path = folder / "chain" / "single.ckpt"
    for number, strategy in enumerate(("peft_fsdp", "peft_ddp"), 2):
        module = Language(lr=1e-3)
        started = Started()
        fitting = run(folder, strategy, started, peft=plain(), max_epochs=number)
        with Collectives() as counted:
            fitting.fit(module, text(), ckpt_path=path)
        found[f"{strategy} started"] = started.tensors
        found[f"{strategy} losses"] = module.losses
        found[f"{strategy} bytes"] = dict(counted.bytes)
        path = folder / "chain" / f"{strategy}.ckpt"
        with Collectives() as counted:
            fitting.save_checkpoint(path)
        found[f"{strategy} saving"] = counted.total
        found[f"{strategy} saved"] = everything(module, fitting)
    return found


class Started(L.Callback):
    """Keeps what trains, and its optimizer's state, as training starts."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.tensors = everything(pl_module, trainer)


def everything(module: L.LightningModule, fitting: L.Trainer) -> dict[str, Tensor]:
    names = {id(p): name for name, p in module.named_parameters()}
    (optimizer,) = fitting.strategy.optimizers
    states = {
        f"{names[id(p)]} {key}": torch.as_tensor(value).clone()
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }
    return {**trained(module), **states}


def plain() -> PEFT:
    return PEFT(LoRA(r=4), modules_to_save=["lm_head"])


def stages(folder: Path) -> dict[str, Any]:
    """All stages on one Trainer, with `ckpt_path`; 27 rows make another number of batches on each rank."""
    module = Language()
    fitting = run(folder / "stages", "peft_fsdp", PredictionFile(), peft=plain(), enable_checkpointing=True)
    fitting.fit(module, text(), text())
    path = fitting.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    found: dict[str, Any] = {"trained": trained(module), "path": path}
    fitting.save_checkpoint(folder / "stages" / "after.ckpt")
    fitting.save_checkpoint(folder / "stages" / "weights.ckpt", weights_only=True)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    (found["tested"],) = fitting.test(module, text(), ckpt_path=path, verbose=False)
    (found["validated"],) = fitting.validate(module, text(), verbose=False)
    rows = DataLoader(text(rows=5).dataset, 2)
    fitting.predict(module, rows, ckpt_path=path, return_predictions=False)
    with disable_adapters(module), torch.no_grad():
        found["disabled"] = module.predict_step(next(iter(rows)), 0)
    found["merge"] = refused(lambda: merge(module))
    found["remove"] = refused(lambda: remove(module))
    found["save"] = refused(lambda: save_merged(module, folder / "merged"))
    export_adapter(module, folder / f"exported{RANK}")
    return found


def evaluated(folder: Path) -> dict[str, Any]:
    """Predictions, of which the ranks have other numbers of batches, and a fit after them; all under inference_mode
    where Lightning would with nccl."""
    module = Short()
    fitting = run(folder, peft=plain())
    one, two = (DataLoader(text(rows=rows).dataset, 2) for rows in PREDICTED)
    with mock.patch("lightning.pytorch.loops.utilities._distributed_is_initialized", return_value=False):
        short = fitting.predict(module, one)
        fitting.fit(module, text())
        of_loaders = run(folder, peft=plain()).predict(OfLoaders(), [one, two])
    predicted = [torch.cat(batches) for batches in (short, *of_loaders)]
    return {"short": predicted[0], "of loaders": predicted[1:], "losses": module.losses}


PREDICTED = (5, 9)
"""Rows of each loader."""
OPTIONS: dict[str, dict[str, Any]] = {
    "accumulated": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "checkpointed": {"peft": {"gradient_checkpointing": True, "offload_activations": True}},
    "offloaded": {"strategy": {"cpu_offload": True}},
    "named": {"strategy": {"shard": ["layers", "embed_tokens"]}},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16 base": {"precision": "bf16-mixed", "peft": {"base_dtype": "bfloat16"}},
    "bf16-true": {"precision": "bf16-true"},
}


def fit_with(name: str, folder: Path, strategy: str = "") -> tuple[Language, Counter[str], L.Trainer]:
    options = dict(OPTIONS[name])
    peft = PEFT(LoRA(r=4), modules_to_save=["lm_head"], **options.pop("peft", {}))
    chosen = PEFTFSDPStrategy(**options.pop("strategy", {}))
    module = Language(lr=1e-3)
    fitting = run(folder, strategy or chosen, peft=peft, **options)
    with Collectives() as counted:
        fitting.fit(module, text())
    return module, counted.bytes, fitting


def options(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in OPTIONS:
        module, sent, _ = fit_with(name, folder)
        found[name] = trained(module)
        found[f"{name} losses"] = module.losses
        found[f"{name} gathered"] = sent["allgather_base"]
        found[f"{name} sharded"] = [n for n, p in module.named_parameters() if is_sharded(p)]
    with torch.no_grad():
        output = module.model(input_ids=next(iter(text()))[0], output_hidden_states=True)
        found["hidden states"] = len(output.hidden_states)
        ids = next(iter(text()))[0][:1]
        # one rank ends sooner than the other
        made = module.model.generate(ids, max_new_tokens=2 + 3 * RANK, do_sample=False, pad_token_id=0)
        found["generated"] = made.shape[1] - ids.shape[1]
    return found


def toys(folder: Path) -> dict[str, Any]:
    """What trains of small modules that are no transformers, after `peft_ddp` and `peft_fsdp`."""
    found: dict[str, Any] = {}

    def both(name: str, module: Callable[[], L.LightningModule], **options: Any) -> None:
        for strategy in ("peft_ddp", "peft_fsdp"):
            made = {key: value() for key, value in options.items() if key == "peft"}
            finds = "_find_unused_parameters_true" if (strategy, name) == ("peft_ddp", "unused") else ""
            state = fit(folder, module(), strategy + finds, **{**options, **made})
            found[f"{strategy} {name}"] = {key: tensor for key, tensor in state.items() if not is_sharded(tensor)}
            found[f"{strategy} {name} keys"] = list(state)

    both("center", Centred, max_epochs=2)
    both("manual", manual)
    both("clipped", Clipped)
    both("raw", Raw)
    both("adalora", Toy, peft=lambda: PEFT(AdaLoRA(target_r=2, init_r=4, tinit=1, tfinal=2, total_steps=8)))
    both("unused", Alternating, peft=lambda: PEFT(LoRA(r=2), modules_to_save=["head"]))
    return found


def faults(folder: Path) -> dict[str, Any]:
    class Sharded(Language):
        def configure_model(self) -> None:
            fully_shard(self.model.model.layers[0])

    found = {
        "own": refused(lambda: run(folder, peft=plain()).fit(Sharded(), text())),
        "lr": refused(lambda: run(folder, peft=plain()).fit(Language(lr=0.25 * (1 + RANK)), text())),
        "other base": refused(lambda: run(folder, peft=plain()).fit(Language(seed=RANK), text())),
        "replicas": refused(lambda: run(folder, PEFTFSDPStrategy(replicas=3), peft=plain()).fit(Language(), text())),
        "names": refused(lambda: run(folder, PEFTFSDPStrategy(shard=["layer"]), peft=plain()).fit(Language(), text())),
    }
    bare = L.Trainer(
        devices=2, accelerator=ACCELERATOR, strategy="peft_fsdp", logger=False, enable_checkpointing=False,
        default_root_dir=folder, enable_model_summary=False, enable_progress_bar=False, max_epochs=1,
    )  # fmt: skip
    found["no callback"] = refused(lambda: bare.fit(Language(), text()))
    with torch.device("meta"):
        empty = Language()
    found["meta"] = refused(lambda: run(folder, peft=PEFT(LoRA(r=4))).fit(empty, text()))
    synced = Language(seed=RANK)
    run(folder, PEFTFSDPStrategy(sync_base=True), peft=plain()).fit(synced, text())
    found["synced"] = synced.losses
    same = Language()
    run(folder, peft=plain()).fit(same, text())
    found["wanted"] = same.losses
    found["other strategy"] = refused(lambda: run(folder, "peft_ddp", peft=plain()).test(same, text(), verbose=False))
    for name, module, precision in (("reading", Reading(), "32-true"), ("precise", Precise(), "bf16-mixed")):
        try:
            run(folder, peft=PEFT(LoRA(r=4)), precision=precision).fit(module, text())
        except RuntimeError as error:
            found[name] = str(error)
    again = run(folder, peft=PEFT(LoRA(r=4)))
    found["precision"] = refused(lambda: again.test(module, text(), verbose=False))
    return found


def hybrid(folder: Path) -> dict[str, Any]:
    """Two copies of the base, of which each is sharded over two of four ranks."""
    module = Language()
    run(folder, PEFTFSDPStrategy(replicas=2), peft=plain()).fit(module, text())
    return {"state": trained(module), "losses": module.losses, "bytes": base_bytes(module)}


class Empty(Language):
    """Built on the meta device, with an embedding and a head that are small beside its blocks."""

    def __init__(self, **sizes: Any) -> None:
        with meta_parameters():
            super().__init__(**{**LARGE, **sizes})


LARGE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}


def streamed(folder: Path) -> dict[str, Any]:
    """A base that is read from a file into each rank's shards."""
    # memory that is freed is given back to the system (M_MMAP_THRESHOLD)
    ctypes.CDLL(None).mallopt(-3, 2**16)
    found: dict[str, Any] = {}
    # what is imported for a first run is no part of it
    run(folder, peft=PEFT(LoRA(r=4), quantization="nf4")).fit(Language(), text())
    for name in STREAMED:
        module = Empty()
        given = {"quantization": "nf4-dq"} if name == "nf4-dq" else {}
        peft = PEFT(of_queries(name), base_weights=str(folder / "base.safetensors"), **given)
        peak = Peak()
        fitting = run(folder, "peft_fsdp", peak, peft=peft, max_steps=2)
        fitting.fit(module, text())
        fitting.save_checkpoint(folder / f"streamed-{name}.ckpt")
        found[name] = trained(module)
        found[f"{name} losses"] = module.losses
        found[f"{name} bytes"] = base_bytes(module)
        found[f"{name} peak"] = peak.bytes
        del module, fitting
    return found


class Chunked(Language):
    """Whose loss is computed a few tokens at a time."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        with self.trainer.precision_plugin.forward_context():
            self.refused = chunked_loss.refusal(self.model)

    def loss(self, ids: Tensor) -> Tensor:
        labels = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        scores = chunked_loss.chunked_scores(lambda: self.model(input_ids=ids), self.model.lm_head, labels, False)
        return scores.total / (labels != -100).sum()


def chunks(folder: Path) -> dict[str, Any]:
    """A head that is sharded and computes a few tokens' logits at a time, frozen or trained in a copy."""
    chunked_loss.LOGITS = 5 * VOCABULARY
    found: dict[str, Any] = {}
    for name, options in CHUNKS.items():
        module, peft = Chunked(lr=1e-3), PEFT(LoRA(r=4), modules_to_save=options["saved"])
        run(folder, peft=peft, precision=options["precision"]).fit(module, text(), text())
        found[name] = trained(module)
        found[f"{name} losses"] = module.losses
        found[f"{name} refused"] = module.refused
        found[f"{name} sharded"] = is_sharded(module.model.lm_head.weight)
    return found


CHUNKS: dict[str, dict[str, Any]] = {
    "frozen": {"saved": [], "precision": "32-true"},
    "copied": {"saved": ["lm_head"], "precision": "bf16-mixed"},
}


def shares(folder: Path) -> dict[str, Any]:
    """A checkpoint as a folder, of which both ranks write a share, over an earlier one."""
    module = Language(lr=1e-3)
    saving = ModelCheckpoint(folder / "shares", filename="{epoch}", save_last=True, save_top_k=-1)
    strategy = PEFTFSDPStrategy(save_distributed_checkpoint=True)
    fitting = run(folder, strategy, saving, peft=plain(), max_epochs=2, enable_checkpointing=True)
    fitting.fit(module, text())
    found = {"saved": everything(module, fitting)}
    (found["tested"],) = fitting.test(module, text(), ckpt_path="best", verbose=False)
    module, started = Language(lr=1e-3), Started()
    again = run(folder, "peft_fsdp", started, peft=plain(), max_epochs=3)
    again.fit(module, text(), ckpt_path=folder / "shares" / "last.ckpt")
    with mock.patch.dict(os.environ, HOME=str(folder / "home")):
        fitting.save_checkpoint("~/shares.ckpt")
    return {**found, "started": started.tensors}


def unbroken(folder: Path) -> dict[str, Any]:
    return run_to_the_end(folder / "unbroken", kind=PEFTFSDPStrategy)


def broken(folder: Path) -> dict[str, Any]:
    return ranks.broken(folder, PEFTFSDPStrategy)


def of_queries(name: str) -> Any:
    return (DoRA if name == "DoRA" else LoRA)(r=4, target_modules=["q_proj"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), [globals()[name] for name in sys.argv[2:]])
