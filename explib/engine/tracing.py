"""A network as a graph of torch.fx that means what the network does, or none."""

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from explib.pruning.holding import Held
from explib.pruning.layers import Inputs, call, modes_kept

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
RELUS = (nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_")
_WRITES = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


def trace(model: nn.Module, like: torch.Tensor) -> fx.GraphModule:
    """The model in its present mode as a graph in which the order of writing no longer matters.

    like: images as it takes them, of whatever content. It shares the model's modules. Raises
    NotImplementedError where torch.fx cannot trace it, or traces something else.
    """
    refuse_hooks(model)
    try:
        traced = fx.GraphModule(model, fx.Tracer().trace(model))
    except Exception as error:  # control flow that depends on the data: any error can come of it
        raise NotImplementedError(f"torch.fx cannot trace it ({line(error)})") from None
    try:
        _follow_writes(traced, like)
        faithful = outputs_match(traced, model, like)
    except NotImplementedError:
        raise
    except Exception as error:
        raise NotImplementedError(f"what torch.fx traces does not run ({line(error)})") from None
    if not faithful:
        raise NotImplementedError("torch.fx traces another network than the one that runs")
    return traced


def refuse_hooks(model: nn.Module) -> None:
    """NotImplementedError where a network has hooks other than those that hold masks."""
    for name, module in model.named_modules():
        hooks = [hook for kind in _HOOKS for hook in getattr(module, f"_{kind}_hooks").values()]
        if not all(isinstance(hook, Held) for hook in hooks):  # those go with their convs
            raise NotImplementedError(
                f"{name or 'the network'} has hooks, which tracing would lose"
            )


_HOOKS = ("forward", "forward_pre", "backward", "backward_pre")


def target_of(node: fx.Node | None, modules: dict[str, nn.Module]) -> object:
    """What a node calls: a layer's type, a function, or a method's name; None for other nodes."""
    if node is None or node.op in ("placeholder", "get_attr", "output"):
        return None
    return type(modules.get(str(node.target))) if node.op == "call_module" else node.target


def is_relu(node: fx.Node | None, modules: dict[str, nn.Module]) -> bool:
    """Whether a node is a ReLU, as a layer, a function or a method."""
    return target_of(node, modules) in RELUS


def is_addition(node: fx.Node) -> bool:
    """Whether a node adds two values as they are; of torch.add, without alpha."""
    plain = len(node.args) == 2 and not node.kwargs
    return plain and node.op != "call_module" and node.target in ADDITIONS


def is_plain_conv(conv: nn.Module | None, kernels: tuple[int, ...] = (1, 3)) -> bool:
    """Whether a layer is a square Conv2d of these sizes, padded by half of it with zeros.

    Of one stride, undilated, without groups.
    """
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size[0] in kernels
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.padding == (conv.kernel_size[0] // 2,) * 2
        and conv.dilation == (1, 1)
        and conv.stride[0] == conv.stride[1]
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:200]


def outputs_match(
    built: nn.Module,
    model: nn.Module,
    like: Inputs,
    count: int = 2,
    tolerance: float = 1e-3,
    random: bool = True,
) -> bool:
    """Whether both make the same of `count` random images like these, in evaluation mode.

    random: or else of the first of these themselves.
    tolerance: of the largest value. torch.fx takes `a += b` for `a = a + b`, which is something
    else where the old `a` is still read; of Python's own branches it sees the one that was taken;
    and what is built from a graph may lack something that nobody has thought of.
    """

    def inputs() -> Inputs:
        if random:
            return random_like(like, count)
        return tree_map_only(torch.Tensor, lambda x: x[:count].clone() if x.ndim else x, like)

    with modes_kept(model), modes_kept(built), torch.no_grad():
        wanted, form = tree_flatten(call(model.eval(), inputs()))
        found, found_form = tree_flatten(call(built.eval(), inputs()))
    return form == found_form and all(
        close(a, b, tolerance) for a, b in zip(found, wanted, strict=True)
    )


def random_like(like: Inputs, count: int) -> Inputs:
    """As many random inputs of the same shapes; of other than floats, the first again and again."""
    generator = torch.Generator().manual_seed(0)

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.ndim:
            return tensor
        if not tensor.is_floating_point():
            return tensor[:1].repeat(count, *[1] * (tensor.ndim - 1))
        return torch.randn(count, *tensor.shape[1:], generator=generator).to(tensor)

    return tree_map_only(torch.Tensor, leaf, like)


def close(found, wanted, tolerance: float) -> bool:
    """Whether two results are the same; tolerance: of the largest finite value that is wanted."""
    if not isinstance(wanted, torch.Tensor):
        return found == wanted
    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape:
        return False
    if not wanted.is_floating_point():
        return torch.equal(found, wanted)
    found, wanted = found.detach().double(), wanted.detach().double()
    finite = wanted[wanted.isfinite()].abs()
    most = tolerance * float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(found, wanted, rtol=0, atol=most + 1e-6, equal_nan=True)


def _follow_writes(traced: fx.GraphModule, like: torch.Tensor) -> None:
    """Let every op that reads what an op in place has overwritten read that op's result.

    NotImplementedError where it is read later through another view of the same memory.
    """
    modules = dict(traced.named_modules())
    written = {node: _written(node, modules) for node in traced.graph.nodes}
    if not any(written.values()):
        return
    place = {node: number for number, node in enumerate(traced.graph.nodes)}
    memory = _memory(traced, like)
    for node, target in written.items():
        if target is None:
            continue
        for other in [n for n in place if place[n] < place[node] and memory[n] & memory[target]]:
            for later in [user for user in other.users if place[user] > place[node]]:
                if other is not target:
                    raise NotImplementedError(f"{node.name} overwrites what {later.name} reads")
                later.replace_input_with(target, node)
    traced.recompile()


def _memory(traced: fx.GraphModule, like: torch.Tensor) -> dict[fx.Node, set[int]]:
    """Where the tensors of each node's result lie."""
    found, kept = {}, []

    class Watching(fx.Interpreter):
        def run_node(self, node):
            result = super().run_node(node)
            tensors = [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]
            found[node] = {t.untyped_storage().data_ptr() for t in tensors}
            kept.append(result)  # so that no other tensor gets its place
            return result

    with modes_kept(traced), torch.no_grad():
        Watching(traced.eval()).run(like[:1].clone())
    return found


def _written(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The node whose tensor this one overwrites, if it is an op in place."""
    if node.op == "call_module":
        in_place = modules[str(node.target)].__dict__.get("inplace") is True
    else:
        name = str(getattr(node.target, "__name__", node.target))
        in_place = node.op in ("call_function", "call_method") and (
            node.target in _WRITES
            or (name.endswith("_") and not name.endswith("__"))
            or node.kwargs.get("inplace") is True
            or (node.target is F.relu and node.args[1:] == (True,))
        )
    return next(iter(node.all_input_nodes), None) if in_place else None
