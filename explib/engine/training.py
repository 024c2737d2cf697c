"""Training with the surviving kernels only, on a CPU: what masks cut on paper, cut in hours.

`sparse` rewrites a masked network, whose weights it shares. Forward, the gradients of inputs and
those of weights cost what the surviving kernels cost; pruned kernels have a gradient of zero.
Between its convs activations are planes (training_layers.py).
"""

import copy
import operator
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils._pytree import tree_map

from explib.engine import native
from explib.engine.fused import NormAct, SmallConv, fused, sound
from explib.engine.strided import Strided
from explib.engine.tracing import ADDITIONS, RELUS, is_plain_conv, line, outputs_match
from explib.engine.training_layers import (
    Conv,
    FromPlanes,
    Indexed,
    Norm,
    Pool,
    Size,
    ToPlanes,
    library,
)
from explib.pruning import masks as masking
from explib.pruning.layers import modes_kept
from explib.pruning.masks import Masks


class Sparse(nn.Module):
    """A network on planes; what does not fit them goes through `dense`.

    Those are images of another size, and in training batches that do not fill the last block; the
    first of each kind that is trained so is told in a warning.
    """

    def __init__(self, dense: nn.Module, network: nn.Module, size: Size):
        super().__init__()
        self.dense, self.network, self.size = dense, network, size
        self.norms = [m for m in dense.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.told: set[str] = set()

    def forward(self, x):
        count, lanes = len(x), library().training_lanes()
        missing = -count % lanes
        if not count or x.shape[2:] != self.size:
            return self._in_torch(
                x, "size", f"its images are {tuple(x.shape[2:])}, not {self.size}"
            )
        mixes = any(norm.training or norm.running_mean is None for norm in self.norms)
        if missing and (count < lanes or mixes):
            why = f"{count} images are no multiple of {lanes}"
            return self._in_torch(x, "count", f"{why}; take a batch size that is, and drop_last")
        if not missing:
            return self.network(x)
        made = self.network(torch.cat([x, x.new_zeros(missing, *x.shape[1:])]))
        return tree_map(lambda tensor: tensor[:count], made)

    def _in_torch(self, x: torch.Tensor, kind: str, why: str) -> torch.Tensor:
        if torch.is_grad_enabled() and len(x) and kind not in self.told:
            self.told.add(kind)
            warnings.warn(f"this batch trains in torch, over all kernels: {why}", stacklevel=3)
        return self.dense(x)


def sparse(model: nn.Module, masks: Masks, example_inputs: torch.Tensor) -> Sparse | None:
    """A network that computes what the masked `model` does, from its surviving kernels.

    It shares weights and modes. example_inputs: images (N, C, H, W). Convs 3x3 padded by 1 and 1x1
    run so, others in torch, with a warning that names those that have masks; batches that are no
    multiple of the lanes (16 on AVX-512) train in torch. None, with a warning that says why, where
    no masked conv is of these, where masks of another are not applied yet, where the graph cannot
    be traced, or nothing could be compiled. ValueError, naming the layer, for masks that do not
    fit.
    """
    masks = masking.check(model, masks)
    try:
        return _sparse(model, masks, example_inputs)
    except (NotImplementedError, native.NoCompiler) as error:
        warnings.warn(f"training multiplies pruned kernels, too: {error}", stacklevel=2)
        return None


def _sparse(model: nn.Module, masks: Masks, example: torch.Tensor) -> Sparse:
    """The network of `sparse`; NotImplementedError or NoCompiler, saying why, without one."""
    if library() is None:
        raise native.NoCompiler("its C++ could not be compiled")
    in_torch = [name for name in masks if not is_plain_conv(model.get_submodule(name))]
    if len(in_torch) == len(masks):
        raise NotImplementedError(f"no masked conv is {_PLAIN}" + _first(model, in_torch))
    unapplied = masking.leaks(model, {name: masks[name] for name in in_torch})
    if unapplied:
        raise NotImplementedError(
            f"the mask of {next(iter(unapplied))}, which stays in torch, is not applied; hold or "
            "apply the masks before"
        )
    dense = fused(model, example)
    norms = {module for module in dense.modules() if isinstance(module, nn.BatchNorm2d)}
    for name, module in model.named_modules():
        if module in norms and not sound(module):
            raise NotImplementedError(f"{name} has no scale or no running statistics")
    try:
        network = _Rewriting(dense, masks, example).network()
        made = Sparse(dense, network, (example.shape[2], example.shape[3]))
        masked = copy.deepcopy(model)
        masking.apply(masked, masks)
        same = outputs_match(made, masked, example, library().training_lanes(), 0.01)
    except (
        Exception
    ) as error:  # whatever a network does that nobody thought of: torch does it right
        raise NotImplementedError(f"the engine does not run it ({line(error)})") from error
    if not same:
        raise NotImplementedError("the engine makes something else of it")
    if in_torch:
        warnings.warn(
            f"training multiplies the pruned kernels of {len(in_torch)} convs, too, which are not "
            f"{_PLAIN}" + _first(model, in_torch),
            stacklevel=3,
        )
    return made


_PLAIN = "3x3 padded by 1 or 1x1, of one stride and undilated"


def _first(model: nn.Module, names: list[str]) -> str:
    """The first of these convs in words."""
    if not names:
        return ""
    conv: Any = model.get_submodule(names[0])
    kernel = "x".join(map(str, conv.kernel_size))
    return f": {names[0]} is {kernel}, padded by {conv.padding}, stride {conv.stride}"


class _Rewriting:
    """The graph of `fuse` anew, from the first conv on planes as long as all ops know them."""

    def __init__(self, dense: fx.GraphModule, masks: Masks, example: torch.Tensor):
        self.dense, self.masks = dense, masks
        self.names = {id(module): name for name, module in dense.named_modules()}
        self.graph, self.new_modules = fx.Graph(), {}
        self.as_images, self.as_planes = {}, {}  # old node -> new node, as far as it is there
        with modes_kept(dense), torch.no_grad():
            ShapeProp(dense.eval()).propagate(example)

    def network(self) -> fx.GraphModule:
        for node in self.dense.graph.nodes:
            made = self._on_planes(node)
            if made is not None:
                self.as_planes[node] = made
            else:
                self.as_images[node] = self.graph.node_copy(node, self._images)
        root = dict(self.dense.named_modules()) | self.new_modules
        own = [node.target for node in self.graph.nodes if node.op == "get_attr"]
        root |= {name: operator.attrgetter(name)(self.dense) for name in own}
        return fx.GraphModule({name: part for name, part in root.items() if name}, self.graph)

    def _call(self, node, module: nn.Module, *inputs) -> fx.Node:
        name = f"planes_{len(self.new_modules)}_{node.name}"
        self.new_modules[name] = module
        return self.graph.call_module(name, inputs)

    def _planes(self, node):
        if node not in self.as_planes:
            self.as_planes[node] = self._call(node, ToPlanes(), self.as_images[node])
        return self.as_planes[node]

    def _images(self, node):
        if node not in self.as_images:
            self.as_images[node] = self._call(node, FromPlanes(_size(node)), self.as_planes[node])
        return self.as_images[node]

    def _on_planes(self, node) -> fx.Node | None:
        """The node on planes; None if it is one for images."""
        module: Any = self.dense.get_submodule(node.target) if node.op == "call_module" else None
        conv = module.conv if isinstance(module, (SmallConv, Strided)) else module
        if is_plain_conv(conv):
            mask = self.masks.get(self.names[id(conv)], torch.ones(conv.weight.shape[:2]).bool())
            made = Conv(conv, mask.cpu(), _size(node.args[0]), _size(node))
            return self._call(node, made, self._planes(node.args[0]))
        if not any(source in self.as_planes for source in node.all_input_nodes):
            return None
        if any(
            len(_shape_of(source)) != 4 or source.op == "get_attr"
            for source in node.all_input_nodes
        ):
            return None
        alike = all(_shape_of(source) == _shape_of(node) for source in node.all_input_nodes)
        if isinstance(module, NormAct):
            if not alike:  # it broadcasts
                return None
            inputs = [arg and self._planes(arg) for arg in node.args]
            return self._call(node, Norm(module.norm, module.relu, _size(node)), *inputs)
        if type(module) in (nn.MaxPool2d, nn.AvgPool2d):
            if getattr(module, "return_indices", False):
                return None
            return self._call(node, Pool(module, _size(node.args[0])), self._planes(node.args[0]))
        if node.op == "call_function" and node.target is operator.getitem:
            index = node.args[1]
            slices = isinstance(index, tuple) and all(isinstance(i, slice) for i in index)
            if slices and index[0] == slice(None):  # of images there are blocks
                size = _size(node.args[0])
                return self._call(node, Indexed(index, size), self._planes(node.args[0]))
        adds = node.target in ADDITIONS
        if _same_on_planes(node, module) and (alike or not adds):
            return self.graph.node_copy(node, self._planes)
        return None


def _shape_of(node) -> torch.Size:
    return getattr(node.meta.get("tensor_meta"), "shape", torch.Size())


def _size(node) -> Size:
    height, width = _shape_of(node)[2:]
    return height, width


def _same_on_planes(node, module) -> bool:
    """Whether a node does to planes what it does to images, argument by argument."""
    if node.op == "call_module":
        return type(module) in (nn.ReLU, nn.Identity, nn.Dropout)
    if node.op != "call_function":
        return False
    if node.target is F.pad:  # of channels
        widths = node.args[1] if len(node.args) > 1 else ()
        return len(widths) == 6 and not any(widths[:4])
    if node.target is torch.cat:
        return 1 in (*node.args[1:2], node.kwargs.get("dim"))
    return node.target in (*ADDITIONS, *RELUS)
