"""Masks that can run faster: whole rows and columns that a mask closes are left out of the multiplication.

Zeros at any place (``unstructured``) cost what other weights cost on dense hardware: such a mask saves storage only. ``2:4``
is fast on GPUs with sparse tensor cores, in half precision or int8, and nowhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from s3distill import products
from s3distill.masks.modules import MaskedLinear, bake, masked_modules


class CompactLinear(nn.Module):
    """A Linear of which some outputs are their bias alone (closed rows) and some inputs are never read (closed columns).

    y[rows] = W[rows, columns] x[columns] + b[rows],   y[other rows] = b

    Args:
        weight: masked weight, [out, in].
        bias: [out], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        open_rows, open_columns = (weight != 0).any(1), (weight != 0).any(0)
        self.weight = nn.Parameter(weight[open_rows][:, open_columns].clone(), requires_grad=False)
        full_bias = torch.zeros(len(weight)) if bias is None else bias.detach().clone()
        self.bias = nn.Parameter(full_bias, requires_grad=False)
        self.rows: Tensor | None
        self.columns: Tensor | None
        self.register_buffer("rows", None if open_rows.all() else open_rows.nonzero()[:, 0])
        self.register_buffer("columns", None if open_columns.all() else open_columns.nonzero()[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        if self.columns is not None:
            x = x.index_select(-1, self.columns)
        if self.rows is None:
            return products.linear(x, self.weight, self.bias)
        y = self.bias.to(x.dtype).expand(*x.shape[:-1], -1).clone()
        return y.index_add_(-1, self.rows, products.linear(x, self.weight))


@torch.no_grad()
def bake_compact(root: nn.Module) -> int:
    """Like `modules.bake`, but Linears with closed rows or columns are made smaller; returns how many became so.

    The result computes what the masked network does, for inference only: its parameters have other shapes than a checkpoint's.
    """
    smaller: dict[str, nn.Module] = {}
    for name, module in masked_modules(root):
        mask = module.mask()
        if isinstance(module, MaskedLinear) and not (mask.any(0).all() and mask.any(1).all()):
            smaller[name] = CompactLinear(module.masked_weight().detach(), module.bias)
    bake(root)
    for name, compact in smaller.items():
        parent, _, child = name.rpartition(".")
        setattr(root.get_submodule(parent), child, compact.eval())
    return len(smaller)
