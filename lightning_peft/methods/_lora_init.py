"""Starts of LoRA's A and B that are taken from the frozen weight."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.methods.errors import PEFTError


def from_weight_name(init: str) -> bool:
    """Whether an init of this name starts from W, so that the start has to be subtracted from the layer."""
    return init.startswith("pissa") or init == "olora"


def from_weight(init: str, W: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (…, r, in) and B (…, out, r) such that s·BA is the part of W (…, out, in) that the method starts from.

    "pissa": W = USVᵀ, A = √(S/s)·Vᵀ, B = U·√(S/s), cut to the r largest singular values (arXiv 2404.02948, eq. 2 and
    3); "pissa_niter_N" finds them by N subspace iterations (arXiv 0909.4061). "olora": W = QR, A = R[:r], B = Q[:, :r]
    (arXiv 2406.01775, algorithm 1), whose s·BA is subtracted as it is.

    Raises:
        PEFTError: r is larger than W has singular values.
    """
    limit = min(W.shape[-2:])
    if r > limit:
        raise PEFTError(
            f"r: {r} is more than the {limit} that init {init!r} can take from a weight of {tuple(W.shape)}"
        )
    if init == "olora":
        Q, R = torch.linalg.qr(W)
        return R[..., :r, :], Q[..., :r]
    if init == "pissa":
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(W, q=r, niter=int(init.rsplit("_", 1)[1]))
        Vh = V.mH
    root = (S[..., :r] / scale).sqrt()
    return root[..., :, None] * Vh[..., :r, :], U[..., :r] * root[..., None, :]
