"""A network as a list of ops: traced by torch.fx, BatchNorm folded, what belongs together fused."""

import copy
import operator
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from explib.engine import tracing
from explib.engine.tracing import line

MAX_KERNEL = 7


@dataclass(frozen=True)
class Op:
    """One op of the engine, or one node left to torch (kind `torch`).

    inputs: names of values; the second of a conv is added to its output. shape is the output's
    without the batch: (C, H, W) or (C,). module: the conv or linear layer that holds the weights.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    module: nn.Module | None = None
    kernel: int = 1
    stride: int = 1
    pad: int = 0
    relu: bool = False
    before: int = 0  # subsample: zero channels in front; avgpool: whether padding counts
    why: str = ""  # what keeps a node from being an op
    node: fx.Node | None = field(default=None, compare=False)


def trace(model: nn.Module, example: torch.Tensor) -> fx.GraphModule:
    """The network in evaluation mode as a graph with shapes, BatchNorm folded where it can be.

    The model is not changed. Raises NotImplementedError for a network that torch.fx cannot trace,
    ValueError for one that does not take the example.
    """
    try:
        model = copy.deepcopy(model).cpu().float().eval()
    except RuntimeError as error:  # a weight that is computed from others
        raise ValueError(
            f"the network cannot be copied ({line(error)}); remove what computes its weights, as "
            "by torch.nn.utils.prune.remove"
        ) from None
    try:
        with torch.no_grad():
            model(example.clone())
    except Exception as error:
        shape = tuple(example.shape)
        raise ValueError(f"the network does not take an input {shape} ({line(error)})") from None
    traced = tracing.trace(model, example)
    traced.graph.eliminate_dead_code()
    with torch.no_grad():
        ShapeProp(traced).propagate(example)
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or not node.all_input_nodes:
            continue
        norm, before = modules[node.target], node.all_input_nodes[0]
        source = modules.get(before.target) if before.op == "call_module" else None
        shared = [n.target for n in traced.graph.nodes].count(before.target) > 1
        if len(before.users) > 1 or shared or getattr(norm, "running_mean", None) is None:
            continue
        if isinstance(norm, nn.BatchNorm2d) and type(source) is nn.Conv2d:
            folded = fuse_conv_bn_eval(source, norm)
        elif (
            isinstance(norm, nn.BatchNorm1d)
            and type(source) is nn.Linear
            and len(node.meta["tensor_meta"].shape) == 2  # of sequences it is another axis
        ):
            folded = fuse_linear_bn_eval(source, norm)
        else:
            continue
        parent, _, name = before.target.rpartition(".")
        setattr(traced.get_submodule(parent), name, folded)
        modules[before.target] = folded
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    traced.recompile()
    return traced


def ops(traced: fx.GraphModule) -> tuple[list[Op], dict[str, str]]:
    """The ops of a traced network in order, unfused, and the values that only rename another.

    Kinds: conv, linear, maxpool, avgpool, subsample, add, relu, cat, flatten, and torch.
    """
    modules, made = dict(traced.named_modules()), []
    alias: dict[str, str] = {}
    for node in traced.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        op = _op(node, modules)
        inputs = tuple(alias.get(name, name) for name in op.inputs)
        if op.kind == "same":
            alias[node.name] = inputs[0]
        else:
            made.append(replace(op, inputs=inputs))
    return made, alias


def shape(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a float tensor without its batch, or None for anything else."""
    meta = node.meta.get("tensor_meta")
    if not isinstance(getattr(meta, "shape", None), torch.Size) or meta.dtype != torch.float32:
        return None
    return tuple(meta.shape[1:]) if len(meta.shape) in (2, 4) else None


def _op(node: fx.Node, modules: dict[str, nn.Module]) -> Op:
    """What a node is to the engine."""
    inputs = tuple(n.name for n in node.all_input_nodes)
    size, sources = shape(node), [shape(n) for n in node.all_input_nodes]
    made = Op("torch", node.name, inputs, size or (), node=node)

    def torch_op(why: str) -> Op:
        return replace(made, why=why)

    if node.op == "call_module":
        module = modules[node.target]
        what, label = type(module), f"{node.target} ({type(module).__name__})"
    else:
        module, what = None, node.target
        label = f"{node.name} ({getattr(what, '__name__', what)})"
    if size is None or not sources or any(source is None for source in sources):
        return torch_op(f"{label}: not an op on float tensors (N, C, H, W) or (N, C)")
    if any(n.op == "get_attr" for n in node.all_input_nodes):
        return torch_op(f"{label}: takes a tensor of the network's own")
    if what in (nn.Identity, nn.Dropout, nn.Dropout2d, F.dropout):
        return replace(made, kind="same")
    if what is nn.Conv2d:
        return _conv(made, module, label)
    if what is nn.Linear and len(size) == 1:
        return replace(made, kind="linear", module=module)
    if what in (nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_"):
        return replace(made, kind="relu", relu=True)
    if what in (operator.add, operator.iadd, torch.add, "add", "add_"):
        plain = len(node.args) == 2 and not node.kwargs and sources[0] == sources[-1] == size
        # x + x has one input node
        pair = tuple(a.name for a in node.args if isinstance(a, fx.Node))
        if plain and len(pair) == 2:
            return replace(made, kind="add", inputs=pair)
    if what in (torch.cat, torch.concat) and len(size) == 3:
        tensors, axis = (*node.args, *node.kwargs.values(), 0)[:2]
        if axis in (1, -3) and isinstance(tensors, (list, tuple)):
            return replace(made, kind="cat", inputs=tuple(t.name for t in tensors))
    if what in (nn.Flatten, torch.flatten, "flatten") and len(size) == 1:
        start = module.start_dim if module else (*node.args[1:], *node.kwargs.values(), 0)[0]
        if start == 1:
            return replace(made, kind="flatten" if len(sources[0]) == 3 else "same")
    if what in (nn.MaxPool2d, nn.AvgPool2d):
        return _pool(made, module, label)
    if what in (nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d) and size[1:] == (1, 1):
        return _mean(made, sources[0])
    if what in (torch.mean, "mean") and len(sources[0]) == 3:
        axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if isinstance(axes, (list, tuple)) and {a % 4 for a in axes} == {2, 3}:
            return _mean(made, sources[0])
    if what is operator.getitem and len(sources[0]) == 3:
        step = _subsampling(node.args[1])
        if step:
            return replace(made, kind="subsample", stride=step)
    if getattr(what, "__name__", "") == "pad" and len(sources[0]) == 3:
        sides = node.args[1] if len(node.args) > 1 else ()
        how = [*node.args[2:], *node.kwargs.values()]
        plain = how in ([], ["constant"], ["constant", None], ["constant", 0])
        if plain and len(sides) == 6 and not any(sides[:4]) and min(sides) >= 0:
            return replace(made, kind="subsample", before=sides[4])
    return torch_op(f"{label}: no kernel for it")


def _square(value) -> int | None:
    """The one number of an int or of a pair of equals."""
    if isinstance(value, int):
        return value
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else None


def _conv(made: Op, conv: nn.Conv2d, label: str) -> Op:
    kernel, stride = _square(conv.kernel_size), _square(conv.stride)
    pad = (
        kernel // 2 if conv.padding == "same" and kernel and stride == 1 else _square(conv.padding)
    )
    if conv.groups != 1 or _square(conv.dilation) != 1 or conv.padding_mode != "zeros":
        return replace(made, why=f"{label}: grouped, dilated or not padded with zeros")
    if (
        None in (kernel, stride, pad)
        or kernel % 2 == 0
        or kernel > MAX_KERNEL
        or pad != kernel // 2
    ):
        return replace(
            made, why=f"{label}: not a square kernel of 1 to 7 with half of it as padding"
        )
    return replace(made, kind="conv", module=conv, kernel=kernel, stride=stride, pad=pad)


def _pool(made: Op, pool: nn.Module, label: str) -> Op:
    kernel, stride, pad = map(_square, (pool.kernel_size, pool.stride, pool.padding))
    most = isinstance(pool, nn.MaxPool2d)
    special = pool.dilation != 1 or pool.return_indices if most else pool.divisor_override
    if None in (kernel, stride, pad) or pool.ceil_mode or special:
        return replace(made, why=f"{label}: only square pools without ceil_mode, dilation, indices")
    counts = 0 if most else int(pool.count_include_pad)
    kind = "maxpool" if most else "avgpool"
    return replace(made, kind=kind, kernel=kernel, stride=stride, pad=pad, before=counts)


def _mean(made: Op, source: tuple[int, ...]) -> Op:
    """The mean over a plane, as a pool that covers it."""
    side = max(source[1:])
    return replace(made, kind="avgpool", kernel=side, stride=side)


def _subsampling(index) -> int | None:
    """The step of x[:, :, ::step, ::step]."""
    plain = isinstance(index, tuple) and len(index) == 4
    if not plain or not all(isinstance(i, slice) for i in index):
        return None
    if any(i.start not in (None, 0) or i.stop is not None for i in index):
        return None
    steps = [i.step or 1 for i in index]
    return steps[2] if steps[:2] == [1, 1] and steps[2] == steps[3] else None


def fuse(made: list[Op], kept: set[str]) -> list[Op]:
    """ReLU, a residual and channel padding as parts of the op before them.

    kept: values that are needed outside the list, and so cannot vanish. A fused op has the name of
    the last value it makes.
    """
    uses = Counter(name for op in made for name in op.inputs)
    fused: dict[str, Op] = {}
    for op in made:
        names = [n for n in op.inputs if n in fused and n not in kept and uses[n] == 1]
        host = next((n for n in names if _takes(fused[n], op)), None)
        if host is None:
            fused[op.name] = op
            continue
        # the host moves here, where its other input is there too; nothing between used it
        before = fused.pop(host)
        other = tuple(n for n in op.inputs if n != host)
        fused[op.name] = replace(
            before, name=op.name, inputs=before.inputs + other, shape=op.shape, relu=op.relu,
            before=op.before if op.kind == "subsample" else before.before,
        )  # fmt: skip
    return list(fused.values())


def _takes(host: Op, op: Op) -> bool:
    """Whether `host` can do what `op` does to its value."""
    if op.kind == "relu":
        return host.kind in ("conv", "linear", "add") and not host.relu
    if op.kind == "add":
        return host.kind == "conv" and len(host.inputs) == 1 and not host.relu
    # subsampling, then padding: the option-A shortcut
    return op.kind == host.kind == "subsample" and op.stride == 1 and not host.before
