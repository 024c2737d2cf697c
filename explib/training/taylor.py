"""A criterion that looks at the loss: which kernels would change it least, to first order.

Setting a weight w to 0 changes the loss by about -w * dL/dw; a kernel, by the sum of these over its
weights. A kernel's score is the mean over batches of that sum's square (Molchanov et al., 2019,
https://doi.org/10.1109/CVPR.2019.01152, eq. 8, for kernels instead of filters).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from explib.engine import strided
from explib.errors import ParamError
from explib.pruning.criteria import Layer, mask_of
from explib.pruning.layers import Conv, Inputs, call, conv_at, modes_kept
from explib.pruning.masks import Masks
from explib.training.evaluation import pair_of


def taylor(
    model: nn.Module,
    example_inputs: Inputs,
    convs: list[Conv],
    rates: dict[str, float],
    *,
    batches: Iterable | None = None,
) -> Masks:
    """Masks by `taylor_scores`: of each conv the int(rate * F * C) kernels of least score go."""
    if batches is None:
        raise ParamError(
            "batches: criterion 'taylor' needs the loss; give batches of (images, labels), as a "
            "DataLoader does"
        )
    named = [conv for conv in convs if conv.name in rates]
    scores = taylor_scores(model, batches, [conv.name for conv in named])
    masks = {}
    for conv in named:
        weight = conv_at(model, conv.name).weight.detach().cpu()
        layer = Layer(conv.name, weight, rate=rates[conv.name])
        masks[conv.name] = mask_of(layer, lambda layer: scores[layer.name])
    return masks


def taylor_scores(model: nn.Module, batches: Iterable, names: list[str]) -> dict[str, torch.Tensor]:
    """The mean squared effect of each kernel on the cross-entropy, (F, C) by the conv's name.

    In evaluation mode; the model is left as it was. ValueError for batches that are none, and where
    there are none.
    """
    weights = [conv_at(model, name).weight for name in names]
    found = [weight.new_zeros(weight.shape[:2]) for weight in weights]
    count = 0
    with modes_kept(model), _trainable(weights), strided.Guard():
        model.eval()
        for batch in batches:
            images, labels = pair_of(model, batch)
            try:
                loss = F.cross_entropy(call(model, images), labels)
            except (RuntimeError, IndexError, ValueError) as error:
                raise ValueError(f"batches: {' '.join(str(error).split())}") from None
            if not loss.isfinite():
                raise ValueError(f"batches: the loss is {float(loss)}; give finite images, labels")
            for own, weight, slope in zip(
                found, weights, torch.autograd.grad(loss, weights), strict=True
            ):
                own += (weight.detach() * slope).sum((2, 3)) ** 2
            count += 1
    if not count:
        raise ValueError("batches: empty; give batches of (images, labels), as a DataLoader does")
    return {name: (own / count).cpu() for name, own in zip(names, found, strict=True)}


@contextmanager
def _trainable(weights: list[torch.Tensor]) -> Iterator[None]:
    """Gradients of weights inside, frozen ones among them."""
    frozen = [weight for weight in weights if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_()
    try:
        with torch.enable_grad():
            yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
