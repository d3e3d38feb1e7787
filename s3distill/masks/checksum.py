"""Names a backbone by its weights, so that a mask meets the very weights it was learned over."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def backbone_checksum(encoder_state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the encoder's tensors: sorted by name, each as name, shape and little-endian float32 values.

    What stands beside the encoder in the file (heads of pre-training, optimizer, configuration) has no part in it, nor has the
    type of the file: the same values in another type, saved again, or fine-tuned over as a frozen encoder, still fit. A file that
    was rounded to half precision holds other values, and is another backbone.

    Args:
        encoder_state: see `encoder.checkpoint.ParsedCheckpoint`.
    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(encoder_state):
        tensor = encoder_state[name].detach()
        digest.update(f"{name}\0{'x'.join(map(str, tensor.shape))}\0".encode())
        digest.update(tensor.to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()


def content_digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 over stored tensors as they are (name, type, shape, bytes), sorted by name, and what is said about them."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{'x'.join(map(str, tensor.shape))}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
