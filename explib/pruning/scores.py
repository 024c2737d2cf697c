"""The score: a kernel's expectation scaling factor, and the level it falls in."""

import torch
import torch.nn.functional as F
from torch import nn

from explib.pruning.layers import conv_at


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
    # in float64, so that the order of the additions, another one on another processor, cannot lift
    # a kernel into another level
    delta = weight.detach().flatten(2).sum(2, dtype=torch.float64)
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


@torch.no_grad()
def linear_relation(
    model: nn.Module, name: str, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Measure E[output] / E[input] of every kernel of conv `name` on real activations.

    Each kernel is convolved by itself with its own input channel, as the layer does it (stride and
    zero padding included), while the network sees `images` (N, 3, H, W), normalized. Returns
    (delta_e, ratio, r2): the first two of shape (n,), for the kernels whose input channel is alive;
    r2 is the share of the ratios' variance that the line ratio = delta_e explains.
    """
    conv = conv_at(model, name)
    caught = []
    hook = conv.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        model.eval()(images)
    finally:
        hook.remove()
    x = caught[0].float()
    delta = delta_e(conv.weight, layer=name).cpu()
    into = x.mean((0, 2, 3), dtype=torch.float64).cpu()
    alive = into.abs() > 1e-3 * into.abs().max()
    ratio = torch.empty_like(delta)
    for channel in range(conv.in_channels):
        kernels = conv.weight[:, channel : channel + 1]
        y = F.conv2d(x[:, channel : channel + 1], kernels, None, conv.stride, conv.padding)
        ratio[:, channel] = y.mean((0, 2, 3), dtype=torch.float64).cpu() / into[channel]
    delta, ratio = delta[:, alive].flatten(), ratio[:, alive].flatten()
    r2 = 1 - ((ratio - delta) ** 2).sum() / ((ratio - ratio.mean()) ** 2).sum()
    return delta, ratio, float(r2)


def redundancy(scores: dict[str, torch.Tensor], groups: int = 13) -> list[dict]:
    """How redundant each layer is, from its scores (F, C).

    A row a layer: layer, kernels, redundant_pct (share with a twin of the same level), levels (in
    use).
    """
    rows = []
    for name, delta in scores.items():
        sizes = torch.unique(levels(delta, groups), return_counts=True)[1]
        twins = 100 * int(sizes[sizes > 1].sum()) / delta.numel()
        rows.append(
            {"layer": name, "kernels": delta.numel(), "redundant_pct": twins, "levels": len(sizes)}
        )
    return rows
