"""Which tensors are the adapter's, how they are stored, and whether they fit the model that they are loaded into."""

from lightning_peft.state.checksum import checksum
from lightning_peft.state.files import AtomicCheckpointIO, expanded, read_checkpoint
from lightning_peft.state.fingerprint import Fingerprint, fingerprint, keep_sample, sample_bytes
from lightning_peft.state.folders import save_folder
from lightning_peft.state.frozen import frozen_buffers, frozen_tensors
from lightning_peft.state.rng import RNGState, rng_state, set_rng_state
from lightning_peft.state.selection import (
    adapter_tensors,
    base_buffers,
    base_fingerprint,
    base_keys,
    base_parameters,
    base_quantization,
    tensor_faults,
)
from lightning_peft.state.spec import KEY, Spec, make_spec, method_of, spec_faults, spec_of

__all__ = [
    "KEY",
    "AtomicCheckpointIO",
    "Fingerprint",
    "RNGState",
    "Spec",
    "adapter_tensors",
    "base_buffers",
    "base_fingerprint",
    "base_keys",
    "base_parameters",
    "base_quantization",
    "checksum",
    "expanded",
    "fingerprint",
    "frozen_buffers",
    "frozen_tensors",
    "keep_sample",
    "make_spec",
    "method_of",
    "read_checkpoint",
    "rng_state",
    "sample_bytes",
    "save_folder",
    "set_rng_state",
    "spec_faults",
    "spec_of",
    "tensor_faults",
]
