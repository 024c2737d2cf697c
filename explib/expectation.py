"""The score: a kernel's expectation scaling factor, and the level it falls in."""

import numpy as np
import torch


def delta_e(
    weight: torch.Tensor, bias: torch.Tensor | None = None, layer: str = "layer"
) -> torch.Tensor:
    """Expectation scaling factor of every kernel: the sum of its elements (method: section 1).

    Convolving patches of mean m with kernel (f, c) gives mean delta_e[f, c] * m, away from the
    border. weight: (F, C, K, K); bias: (F,), added to each of its filter's scores as the reference
    does for VGG-16 in way A. Returns (F, C), float64. ValueError names a layer whose weights are
    not finite or not a conv's.
    """
    if weight.ndim != 4:
        raise ValueError(f"{layer}: weight has shape {tuple(weight.shape)}; give (F, C, K, K)")
    # numpy's product with ones: three times faster than a sum over short rows, and exact fp32
    # whatever precision torch is allowed for products
    rows = weight.detach().cpu().flatten(2)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    delta = torch.from_numpy(rows.numpy() @ np.ones(rows.shape[2], rows.numpy().dtype)).double()
    delta = delta.to(weight.device)
    if bias is not None:
        delta += bias.detach().double()[:, None]
    # a NaN or infinity in a kernel is one in its sum
    if not torch.isfinite(delta.sum()):
        raise ValueError(f"{layer}: weights hold NaN or infinite values; give a sound checkpoint")
    return delta


def levels(delta: torch.Tensor, groups: int = 13) -> torch.Tensor:
    """Level of every kernel, round((sigmoid(2 delta / max delta) - 1/2) * groups).

    max is the signed maximum over the layer. Where it is not positive, the largest magnitude
    stands in for it, so that the order of scores is kept; a layer of zeros is one level, 0.
    delta: (F, C); returns (F, C), int64, ties of rounding to even.
    """
    if delta.numel() == 0:
        return torch.zeros_like(delta, dtype=torch.int64)
    scale = delta.max()
    if scale <= 0:
        scale = delta.abs().max()
    if scale == 0:
        return torch.zeros_like(delta, dtype=torch.int64)
    return ((torch.sigmoid(2 * (delta / scale)) - 0.5) * groups).round().long()


def redundant(level: torch.Tensor) -> torch.Tensor:
    """Which kernels share their level with another kernel of the layer. (F, C) -> (F, C), bool."""
    low = level.min()
    return torch.bincount((level - low).flatten())[level - low] > 1
