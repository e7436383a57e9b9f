"""Starts of LoRA's A and B that are taken from the frozen weight, or from what was lost when it was quantized."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_peft.methods._quantized import kept_error
from lightning_peft.methods.errors import PEFTError

FROM_ERROR = "loftq"
"""The init that starts from the error of quantization."""


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


def from_error(module: nn.Module, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) such that s·BA is the best that rank r can say of W − Q, with Q the packed weight of
    `module` and W what it was packed from.

    That is LoftQ (arXiv 2310.08659, algorithm 1) with one step, after which Q is W quantized as ever. Further steps
    would quantize W − s·BA in place of W: the base would be one that only this adapter's file could restore.

    Raises:
        PEFTError: W is not known any more.
    """
    kept = kept_error(module)
    if kept is None:
        raise PEFTError(
            f"init: {FROM_ERROR!r} starts from what quantization loses, and this layer was quantized before; let "
            f"PEFT(LoRA(init={FROM_ERROR!r}, …), quantization=…) quantize a base in full precision, or choose another "
            "init"
        )
    A, B = kept
    if len(A) < r:
        raise PEFTError(f"r: {r} is more than the {len(A)} singular values of its error that were kept")
    root = abs(scale) ** 0.5
    return A[:r] / root, B[:, :r] * (root / scale)
