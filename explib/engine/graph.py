"""A network as a list of ops: traced by torch.fx, BatchNorm folded, what belongs together fused."""

import copy
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

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
    module: Any = None
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
            folded: nn.Module = fuse_conv_bn_eval(source, norm)
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
    meta: Any = node.meta.get("tensor_meta")
    if not isinstance(getattr(meta, "shape", None), torch.Size) or meta.dtype != torch.float32:
        return None
    return tuple(meta.shape[1:]) if len(meta.shape) in (2, 4) else None


@dataclass(frozen=True)
class _Call:
    """A node as the rules see it: its result and sources as shapes without batch, all float."""

    node: fx.Node
    module: Any  # of call_module, else None
    label: str
    size: tuple[int, ...]
    sources: list[tuple[int, ...]]

    def made(self, kind: str, **fields) -> Op:
        inputs = tuple(source.name for source in self.node.all_input_nodes)
        return Op(kind, self.node.name, **{"inputs": inputs, "shape": self.size, **fields})

    def left(self, why: str = "no kernel for it") -> Op:
        """The node left to torch, and why."""
        return self.made("torch", node=self.node, why=f"{self.label}: {why}")


def _op(node: fx.Node, modules: dict[str, nn.Module]) -> Op:
    """What a node is to the engine: by the rule of its target, or left to torch."""
    size, sources = shape(node), [s for n in node.all_input_nodes if (s := shape(n))]
    what = tracing.target_of(node, modules)
    module = modules[str(node.target)] if node.op == "call_module" else None
    label = f"{node.target if module else node.name} ({getattr(what, '__name__', what)})"
    call = _Call(node, module, label, size or (), sources)
    if size is None or not sources or len(sources) < len(node.all_input_nodes):
        return call.left("not an op on float tensors (N, C, H, W) or (N, C)")
    if any(source.op == "get_attr" for source in node.all_input_nodes):
        return call.left("takes a tensor of the network's own")
    rule = _RULES.get(what)
    return (rule and rule(call)) or call.left()


def _square(value) -> int | None:
    """The one number of an int or of a pair of equals."""
    if isinstance(value, int):
        return value
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else None


def _same(call: _Call) -> Op:
    return call.made("same")


def _relu(call: _Call) -> Op:
    return call.made("relu", relu=True)


def _linear(call: _Call) -> Op | None:
    return call.made("linear", module=call.module) if len(call.size) == 1 else None


def _conv(call: _Call) -> Op:
    conv = call.module
    kernel, stride = _square(conv.kernel_size), _square(conv.stride)
    pad = (
        kernel // 2 if conv.padding == "same" and kernel and stride == 1 else _square(conv.padding)
    )
    if conv.groups != 1 or _square(conv.dilation) != 1 or conv.padding_mode != "zeros":
        return call.left("grouped, dilated or not padded with zeros")
    if (
        kernel is None
        or stride is None
        or pad != kernel // 2
        or kernel % 2 == 0
        or kernel > MAX_KERNEL
    ):
        return call.left("not a square kernel of 1 to 7 with half of it as padding")
    return call.made("conv", module=conv, kernel=kernel, stride=stride, pad=pad)


def _add(call: _Call) -> Op | None:
    """x + y of one shape; x + x has one input node, and is an addition, too."""
    node = call.node
    pair = tuple(a.name for a in node.args if isinstance(a, fx.Node))
    alike = call.sources[0] == call.sources[-1] == call.size
    plain = tracing.is_addition(node) and len(pair) == 2
    return call.made("add", inputs=pair) if alike and plain else None


def _cat(call: _Call) -> Op | None:
    """A concatenation of channels."""
    tensors, axis = (*call.node.args, *call.node.kwargs.values(), 0)[:2]
    if len(call.size) != 3 or axis not in (1, -3) or not isinstance(tensors, (list, tuple)):
        return None
    return call.made("cat", inputs=tuple(tensor.name for tensor in tensors))


def _flatten(call: _Call) -> Op | None:
    """From the first dimension after the batch on; of what is flat already, nothing."""
    node, module = call.node, call.module
    start = module.start_dim if module else (*node.args[1:], *node.kwargs.values(), 0)[0]
    if len(call.size) != 1 or start != 1:
        return None
    return call.made("flatten" if len(call.sources[0]) == 3 else "same")


def _pool(call: _Call) -> Op:
    pool = call.module
    kernel, stride, pad = map(_square, (pool.kernel_size, pool.stride, pool.padding))
    most = isinstance(pool, nn.MaxPool2d)
    special = pool.dilation != 1 or pool.return_indices if most else pool.divisor_override
    if None in (kernel, stride, pad) or pool.ceil_mode or special:
        return call.left("only square pools without ceil_mode, dilation, indices")
    counts = 0 if most else int(pool.count_include_pad)
    kind = "maxpool" if most else "avgpool"
    return call.made(kind, kernel=kernel, stride=stride, pad=pad, before=counts)


def _plane_mean(call: _Call) -> Op:
    """The mean over a plane, as a pool that covers it."""
    side = max(call.sources[0][1:])
    return call.made("avgpool", kernel=side, stride=side)


def _adaptive(call: _Call) -> Op | None:
    return _plane_mean(call) if call.size[1:] == (1, 1) else None


def _mean(call: _Call) -> Op | None:
    axes = call.node.args[1] if len(call.node.args) > 1 else call.node.kwargs.get("dim")
    plane = isinstance(axes, (list, tuple)) and {axis % 4 for axis in axes} == {2, 3}
    return _plane_mean(call) if plane and len(call.sources[0]) == 3 else None


def _index(call: _Call) -> Op | None:
    """x[:, :, ::step, ::step]."""
    step = _subsampling(call.node.args[1]) if len(call.sources[0]) == 3 else None
    return call.made("subsample", stride=step) if step else None


def _subsampling(index) -> int | None:
    """The step of x[:, :, ::step, ::step]."""
    plain = isinstance(index, tuple) and len(index) == 4
    if not plain or not all(isinstance(i, slice) for i in index):
        return None
    if any(i.start not in (None, 0) or i.stop is not None for i in index):
        return None
    steps = [i.step or 1 for i in index]
    return steps[2] if steps[:2] == [1, 1] and steps[2] == steps[3] else None


def _channel_pad(call: _Call) -> Op | None:
    """Zero channels before and behind, as an option-A shortcut adds them."""
    args: Any = call.node.args
    sides: Any = args[1] if len(args) > 1 else ()
    how = [*args[2:], *call.node.kwargs.values()]
    if len(call.sources[0]) != 3 or len(sides) != 6 or any(sides[:4]) or min(sides) < 0:
        return None
    plain = how in ([], ["constant"], ["constant", None], ["constant", 0])
    return call.made("subsample", before=sides[4]) if plain else None


_RULES: dict[object, Callable[[_Call], Op | None]] = {
    target: rule
    for rule, targets in {
        _same: (nn.Identity, nn.Dropout, nn.Dropout2d, F.dropout),
        _conv: (nn.Conv2d,),
        _linear: (nn.Linear,),
        _relu: tracing.RELUS,
        _add: tracing.ADDITIONS,
        _cat: (torch.cat, torch.concat),
        _flatten: (nn.Flatten, torch.flatten, "flatten"),
        _pool: (nn.MaxPool2d, nn.AvgPool2d),
        _adaptive: (nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d),
        _mean: (torch.mean, "mean"),
        _index: (operator.getitem,),
        _channel_pad: (F.pad,),
    }.items()
    for target in targets
}
"""The engine's ops by what torch.fx calls: a layer's type, a function, or a method's name."""


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
