"""Training with the surviving kernels only, on a CPU: what masks cut on paper, cut in hours.

`sparse` rewrites a masked network, whose weights it shares. Forward, the gradients of inputs and
those of weights cost what the surviving kernels cost; pruned kernels have a gradient of zero.
Between its convs activations lie as in the engine, 16 images side by side on AVX-512: *planes*, a
float32 or bfloat16 tensor (blocks, C, plane, lanes), in which a plane is H * W pixels of a map and
a few that mean nothing.
"""

import copy
import ctypes
import functools
import operator
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.autograd.function import once_differentiable
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils._pytree import tree_map

from explib.engine import native
from explib.engine.fused import NormAct, SmallConv, fused, norm_act, scale_and_shift, sound
from explib.engine.native import pointer
from explib.engine.strided import Strided
from explib.engine.tracing import ADDITIONS, RELUS, is_plain_conv, line, outputs_match
from explib.pruning import masks as masking
from explib.pruning.layers import modes_kept
from explib.pruning.masks import Masks

Size = tuple[int, int]
_INT64 = ctypes.c_int64


class _Planes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("blocks", "channels", "height", "width")]


@functools.cache
def library() -> ctypes.CDLL | Any:  # Any: who computes has asked before whether it is there
    """The compiled kernels; None, with a warning, where they cannot be built."""
    try:
        lib = native.load(Path(__file__).parent / "csrc/training.cpp", "-fopenmp")
    except native.NoCompiler as error:
        warnings.warn(f"training multiplies pruned kernels, too: {error}", stacklevel=2)
        return None
    lib.training_plane.restype = _INT64
    return lib


def _ends(x: torch.Tensor) -> tuple[bool, int]:
    """What every C++ function ends with: whether bfloat16, and threads."""
    return x.dtype == torch.bfloat16, torch.get_num_threads()


def _shape(x: torch.Tensor, size: Size) -> ctypes.Array:
    """The shape of planes, for C++. ValueError unless they are planes of maps of that size."""
    lib = library()
    wanted = (lib.training_plane(*size), lib.training_lanes())
    types = (torch.float32, torch.bfloat16)[: 1 + lib.training_halves()]
    if x.ndim != 4 or x.shape[2:] != wanted or x.dtype not in types or not x.is_cpu:
        raise ValueError(f"planes {tuple(x.shape)}, {x.dtype}, on {x.device} for maps {size}")
    if not x.is_contiguous() or x.data_ptr() % 64:
        raise ValueError("planes: not contiguous from a multiple of 64 bytes on")
    return (_Planes * 1)(_Planes(*x.shape[:2], *size))


def _beside(x: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor | None:
    """Other planes in the type of x and contiguous. ValueError for another shape."""
    if other is None:
        return None
    if other.shape != x.shape:
        raise ValueError(f"planes {tuple(other.shape)} beside {tuple(x.shape)}")
    return other.to(x.dtype).contiguous()


def _empty(x: torch.Tensor, channels: int, size: Size) -> torch.Tensor:
    return x.new_empty(x.shape[0], channels, library().training_plane(*size), x.shape[3])


def maps(x: torch.Tensor, size: Size) -> torch.Tensor:
    """Planes as (blocks, C, H, W, lanes), a view."""
    return x[:, :, : size[0] * size[1]].unflatten(2, size)


def planes(x: torch.Tensor) -> torch.Tensor:
    """What `maps` gives, as planes again."""
    more = library().training_plane(*x.shape[2:4]) - x.shape[2] * x.shape[3]
    x = x.flatten(2, 3)
    return (F.pad(x, (0, 0, 0, more)) if more else x).contiguous()


class ToPlanes(nn.Module):
    """(N, C, H, W) to planes, N a multiple of the lanes; in bfloat16 where autocast says so."""

    def forward(self, x):
        half = torch.is_autocast_enabled("cpu") and library().training_halves()
        x = x.to(torch.bfloat16 if half else torch.float32)
        lanes = library().training_lanes()
        return planes(x.unflatten(0, (-1, lanes)).permute(0, 2, 3, 4, 1))


class FromPlanes(nn.Module):
    """Planes to (N, C, H, W)."""

    def __init__(self, size: Size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return maps(x, self.size).permute(0, 4, 1, 2, 3).flatten(0, 1)


class Indexed(nn.Module):
    """x[index] of maps, slices of the first four dimensions."""

    def __init__(self, index: tuple[slice, ...], size: Size):
        super().__init__()
        self.index, self.size = index, size

    def forward(self, x):
        return planes(maps(x, self.size)[self.index])


class Pool(nn.Module):
    """A pooling layer of the network; a map of a block is an image of as many channels as lanes."""

    def __init__(self, pool: nn.Module, size: Size):
        super().__init__()
        self.pool, self.size = pool, size

    def forward(self, x):
        images = maps(x, self.size).flatten(0, 1).permute(0, 3, 1, 2)
        pooled = self.pool(images).permute(0, 2, 3, 1)
        return planes(pooled.unflatten(0, x.shape[:2]))


def _kernel_list(mask: torch.Tensor, half: bool) -> tuple[torch.Tensor, ...]:
    """The kernels of a mask (rows, columns) row by row: start (rows + 1,), column, row.

    half: they go in pairs, and start counts pairs; where their number in a row is odd, the last one
    has itself for a partner, of row -1.
    """
    row, column = mask.nonzero().unbind(1)
    counts = mask.sum(1)
    each = counts + counts % 2 if half else counts
    start = F.pad(each.cumsum(0), (1, 0))
    place = start[row] + torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    columns = torch.zeros(int(start[-1]), dtype=torch.int32)
    rows = torch.full((int(start[-1]),), -1)
    columns[place], rows[place] = column.int(), row
    lonely = start[1:][each > counts] - 1
    columns[lonely] = columns[lonely - 1]
    return (start // 2 if half else start).int(), columns, rows


class Conv(nn.Module):
    """A conv of the network, 3x3 padded by 1 or 1x1, over the kernels of its mask."""

    def __init__(self, conv: nn.Conv2d, mask: torch.Tensor, size: Size, out_size: Size):
        """mask: bool (F, C); size and out_size: of the maps it takes and gives."""
        super().__init__()
        self.conv, self.size, self.out_size = conv, size, out_size
        self.kernel, self.stride = conv.kernel_size[0], conv.stride[0]
        self.lists = {
            (turned, half): _kernel_list(mask.T if turned else mask, half)
            for turned in (False, True)
            for half in (False, True)
        }
        self.f, self.c = (index.int().contiguous() for index in mask.nonzero().unbind(1))
        self.offsets: dict[tuple, torch.Tensor] = {}

    def forward(self, x):
        return _Conv.apply(x, self.conv.weight, self.conv.bias, self)

    def run(self, x, weight, bias, turned: bool = False) -> torch.Tensor:
        """The conv of x; turned: from the gradient of its outputs, spread, that of its inputs."""
        if weight.dtype != torch.float32 or not weight.is_cpu:
            raise TypeError(f"weight: {weight.dtype} on {weight.device}; give float32 on the CPU")
        half, threads = _ends(x)
        start, columns, rows = self.lists[turned, half]
        at = self.offsets.get((turned, half, weight.stride()))
        if at is None:
            outer, inner = weight.stride()[:2]
            at = rows * (inner if turned else outer) + columns * (outer if turned else inner)
            self.offsets[turned, half, weight.stride()] = at.masked_fill_(rows < 0, -1)
        kernels = len(at) // (1 + half)
        words = torch.empty(kernels * self.kernel**2, dtype=torch.int32)
        down, right = map(_INT64, weight.stride()[2:])
        library().training_pack(
            *(pointer(weight), pointer(at), _INT64(kernels), down, right),
            *(self.kernel, turned, half),
            *(pointer(words), threads),
        )
        filters = len(start) - 1
        size, stride = (self.size, 1) if turned else (self.out_size, self.stride)
        y = _empty(x, filters, size)
        bias = (
            torch.zeros(filters, dtype=torch.float32)
            if bias is None
            else bias.detach().float().contiguous()
        )
        library().training_conv(
            *(pointer(x), pointer(y), _shape(x, self.size), _shape(y, size)),
            *(self.kernel, stride),
            *map(pointer, (words, bias, start, columns)),
            *(half, threads),
        )
        return y

    def spread(self, dy: torch.Tensor) -> torch.Tensor:
        """The gradient of the outputs as that of a conv of stride 1."""
        if self.stride == 1:
            return dy
        wide = _empty(dy, dy.shape[1], self.size).zero_()
        maps(wide, self.size)[:, :, :: self.stride, :: self.stride] = maps(dy, self.out_size)
        return wide

    def gradient(self, dy, x, weight) -> torch.Tensor:
        """That of the weight, from that of the outputs, spread, and the inputs."""
        made = torch.zeros_like(weight, dtype=torch.float32)
        outer, inner, down, right = made.stride()
        at = self.f.long() * outer + self.c.long() * inner
        library().training_kernels(
            *(pointer(dy), pointer(x), _shape(dy, self.size), _shape(x, self.size)),
            *(pointer(self.f), pointer(self.c), pointer(at), _INT64(len(at))),
            *(self.kernel, _INT64(down), _INT64(right), pointer(made), *_ends(x)),
        )
        return made


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, conv):
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.conv = conv
        return conv.run(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, weight), conv = ctx.saved_tensors, ctx.conv
        dy, dbias = dy.to(x.dtype).contiguous(), None
        if ctx.needs_input_grad[2]:
            dbias = torch.empty(dy.shape[1], dtype=torch.float32)
            shape = _shape(dy, conv.out_size)
            library().training_sums(pointer(dy), shape, pointer(dbias), *_ends(dy))
        dy = conv.spread(dy)
        dx = conv.run(dy, weight, None, turned=True) if ctx.needs_input_grad[0] else None
        return dx, conv.gradient(dy, x, weight), dbias, None


class Norm(nn.Module):
    """A BatchNorm2d of the network with what follows it: relu(norm(x) + add)."""

    def __init__(self, norm: nn.BatchNorm2d, relu: bool, size: Size):
        super().__init__()
        self.norm, self.relu, self.size = norm, relu, size

    def forward(self, x, add=None):
        norm, x, add = self.norm, x.contiguous(), _beside(x, add)
        if norm.training:
            count = x.shape[0] * x.shape[3] * self.size[0] * self.size[1]
            passes = (
                functools.partial(_normalize, size=self.size),
                functools.partial(_norm_back, size=self.size),
            )
            return norm_act(norm, x, add, self.relu, count, passes)
        scale, shift = scale_and_shift(norm)
        if torch.is_grad_enabled():  # frozen statistics
            y = maps(x, self.size) * scale[:, None, None, None] + shift[:, None, None, None]
            y = planes(y.to(x.dtype))
            y = y if add is None else y + add
            return F.relu(y) if self.relu else y
        y = torch.empty_like(x)
        scale, shift = scale.float().contiguous(), shift.float().contiguous()
        library().training_affine(
            *map(pointer, (x, add, y)), _shape(x, self.size),
            *(pointer(scale), pointer(shift), self.relu, *_ends(x)),
        )  # fmt: skip
        return y


def _normalize(x, weight, bias, add, eps: float, relu: bool, *, size: Size) -> tuple:
    """As `fused.normalize`, on planes."""
    y, shape = torch.empty_like(x), _shape(x, size)
    mean, var, invstd = torch.empty(3, x.shape[1], dtype=torch.float32).unbind()
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    library().training_norm(
        *map(pointer, (x, add, y)), shape, pointer(weight), pointer(bias),
        *(ctypes.c_double(eps), relu, *map(pointer, (mean, var, invstd)), *_ends(x)),
    )  # fmt: skip
    return y, mean, var, invstd


def _norm_back(dy, x, y, weight, mean, invstd, wants_add: bool, *, size: Size) -> tuple:
    """As `fused.backward`, on planes."""
    dy, dx = _beside(x, dy), torch.empty_like(x)
    dadd = torch.empty_like(x) if wants_add else None
    dweight, dbias = torch.empty(2, x.shape[1], dtype=torch.float32).unbind()
    weight = weight.float().contiguous()
    library().training_norm_back(
        *map(pointer, (dy, x, y, dx, dadd)), _shape(x, size),
        *map(pointer, (weight, mean, invstd, dweight, dbias)), *_ends(x),
    )  # fmt: skip
    return dx, dadd, dweight, dbias


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
