"""What a run is, before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_peft.injection import records
from lightning_peft.state import Spec, base_fingerprint, base_quantization, make_spec
from lightning_peft.state.secrets import without_secrets
from lightning_peft.tracking.tables import count
from lightning_peft.tracking.weights_and_biases.sources import Source, plain


def describe(module: pl.LightningModule, uses: Sequence[Source], spec: Spec | None = None) -> dict[str, Any]:
    """The method with its fields, how many parameters train, the base and its fingerprint, and the data.

    Args:
        module: with or without adapters; of several, the last one that was injected is meant.
        uses: the base and the data, as `sources` tells them.
        spec: what checkpoints say of the adapter; None reads it off the module.

    Returns:
        Plain, nested values, without texts that look secret.
    """
    if spec is None and (taken := records(module)):
        name, record = list(taken.items())[-1]
        base = base_fingerprint(module, name)
        spec = make_spec(record.method, name, list(record.modules_to_save), base, stored=base_quantization(module))
    parameters = count(module)
    total = parameters.trainable + parameters.frozen
    described: dict[str, Any] = {"method": None, "trainable": parameters.trainable, "total": total}
    if total:
        described["trainable_share"] = parameters.trainable / total
    for source in uses:
        described[source.kind] = {"name": source.name, **source.identity}
    if spec is not None:
        described |= {name: spec[name] for name in ("method", "adapter_name", "modules_to_save")}
        held = {name: spec.get(name) for name in ("quantization", "base_dtype", "stored")}
        described["base"] |= {**held, "fingerprint": spec["base"]}
    result: dict[str, Any] = without_secrets(plain(described))
    return result
