"""Multiply-adds (MACs) and weights: of the dense network, and left after masks.

MACs here are all products that a network sums up: those of convs, linear layers, attention and
matrix products, without biases. ptflops counts the same network with biases, BatchNorm, activations
and pooling on top; see `explib.study.published.by_ptflops`.
"""

import warnings
from contextlib import ExitStack
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from explib.pruning.layers import Conv, Inputs, conv_at, per_example, visited
from explib.pruning.masks import Masks, check, masks_of, spread
from explib.rates import number_to_prune


def layer_table(
    convs: list[Conv], masks: Masks | None = None, rates: dict[str, float] | None = None
) -> list[dict]:
    """One row per conv: sizes, rate, kernels, nominal and pruned kernels, MACs dense and left."""
    rows = []
    for conv in convs:
        mask = (masks or {}).get(conv.shares or conv.name)
        rate = (rates or {}).get(conv.shares or conv.name, 0.0)
        left = conv.kernels if mask is None else int(mask.sum())
        rows.append(
            {
                "name": conv.name,
                "filters": conv.filters,
                "channels": conv.channels,
                "kernel": list(conv.kernel),
                "out_h": conv.out_h,
                "out_w": conv.out_w,
                "kernels": conv.kernels,
                "rate": rate,
                "nominal": number_to_prune(rate, conv.kernels),
                "pruned": conv.kernels - left,
                "macs_dense": conv.kernels * conv.kernel_macs,
                "macs": left * conv.kernel_macs,
            }
        )
    return rows


def macs(model: nn.Module, example_inputs: Inputs, masks: Masks | None = None) -> dict[str, int]:
    """MACs of one example: {"dense": of all the network does, "left": without pruned kernels}.

    masks: by default those that the network has, its kernels of zeros; {} for none. Layers,
    attention and matrix products in `forward` count alike; what cannot be counted is named in a
    warning. ValueError, naming the layer, for masks that do not fit, or of a conv that does not run
    with these inputs.
    """
    masks = masks_of(model) if masks is None else check(model, masks)
    convs, dense = counted(model, example_inputs)
    everywhere = spread(model, masks)
    names = {conv.name for conv in convs}
    for name in masks:
        if not any(masks[name] is everywhere[other] for other in names & everywhere.keys()):
            raise ValueError(
                f"masks: {name} does not run with these example inputs, so that what its mask cuts "
                "is not known; leave it out, or give inputs with which it runs"
            )
    return {"dense": dense, "left": dense - macs_pruned(convs, everywhere)}


def macs_pruned(convs: list[Conv], masks: Masks) -> int:
    """MACs of one example that masks remove from these convs."""
    return sum(row["macs_dense"] - row["macs"] for row in layer_table(convs, masks))


def counted(model: nn.Module, example_inputs: Inputs) -> tuple[list[Conv], int]:
    """The convs of a network and the MACs of all that it does, for one example."""
    with ExitStack() as stack:
        # one op for a whole layer would hide the products in it
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)
        backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
        for backend in backends:
            stack.callback(setattr, backend, "enabled", backend.enabled)
            backend.enabled = False
        products = stack.enter_context(_Products())
        convs, count = visited(model, example_inputs)
    if products.unknown:
        names = ", ".join(sorted(products.unknown))
        warnings.warn(f"MACs of {names} are not counted; the network does more", stacklevel=3)
    return convs, per_example(products.macs, count, "MACs")


_aten = torch.ops.aten
_ELEMENTWISE_SUMS = {_aten.mv, _aten.dot, _aten.vdot, _aten.addmv}  # a MAC for each of the matrix
_UNCOUNTED = {"aten._trilinear", "aten._cdist_forward", "aten._fft_r2c", "aten._fft_c2c"}
_UNCOUNTED |= {"torchvision.deform_conv2d"}
_KNOWN = {"aten", "prim", "prims", "profiler", "torchvision"}  # others' ops may do anything


class _Products(TorchDispatchMode):
    """Count the multiply-adds of every op that runs, by torch's own formulas."""

    def __init__(self):
        super().__init__()
        self.macs, self.unknown = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), torch._C.DispatchKey.CompositeImplicitAutograd
        ):
            with self:  # of smaller ops, which are seen one by one
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if packet in flop_registry:
            self.macs += flop_registry[packet](*args, **kwargs, out_val=out) // 2
        elif packet in _ELEMENTWISE_SUMS:
            matrix = args[1] if packet is _aten.addmv else args[0]
            self.macs += prod(matrix.shape)
        elif str(packet) in _UNCOUNTED or func.namespace not in _KNOWN:
            self.unknown.add(str(packet))
        return out


def weights(model: nn.Module, masks: Masks | None = None) -> dict[str, int]:
    """Trainable numbers: {"dense": all of them, "left": without the pruned kernels' elements}.

    masks: as in `macs`.
    """
    masks = masks_of(model) if masks is None else check(model, masks)
    dense = sum(parameter.numel() for parameter in model.parameters())
    pruned = sum(
        int((~mask).sum()) * conv_at(model, name).weight[0, 0].numel()
        for name, mask in masks.items()
    )
    return {"dense": dense, "left": dense - pruned}
