"""The convs of any network: where they are, their BatchNorms, their sizes.

Whatever has to see a network run takes `example_inputs`, as the network does: a tensor, a tuple
(positional arguments) or a dict (keyword arguments).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

Inputs = torch.Tensor | tuple | dict[str, Any]


@dataclass(frozen=True)
class Conv:
    """A conv of a network: where it is, its BatchNorm, and its size."""

    name: str
    norm: str | None  # name of the BatchNorm2d that takes the conv's output, if there is one
    filters: int
    channels: int  # input channels of one filter
    kernel: tuple[int, int]
    groups: int
    out_h: int  # of its last call
    out_w: int
    positions: int  # of a kernel in one example: out_h * out_w, added up over calls and patches
    shares: str | None = None  # the conv before it that has the same weight, if there is one

    @property
    def kernels(self) -> int:
        """Number of K x K kernels, filters * channels."""
        return self.filters * self.channels

    @property
    def kernel_macs(self) -> int:
        """Multiply-adds of one kernel for one example."""
        return self.kernel[0] * self.kernel[1] * self.positions


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Whatever happens to modes inside, each module trains or evaluates afterwards as before."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def check_network(model: Any, then: str = "what it is called with") -> None:
    """ValueError for what is no network, as its class or its inputs."""
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type):
        raise ValueError(
            f"model: the class {model.__name__}; give a network, {model.__name__}(...)"
        )
    raise ValueError(f"model: a {type(model).__name__}; give an nn.Module, then {then}")


def bare(model: nn.Module) -> tuple[nn.Module, str]:
    """The network inside DataParallel and torch.compile, and the prefix of its names."""
    check_network(model)
    prefix = ""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, wrappers) or "_orig_mod" in model._modules:
        inner = "module" if isinstance(model, wrappers) else "_orig_mod"
        model, prefix = getattr(model, inner), f"{prefix}{inner}."
    return model, prefix


def run(model: nn.Module, example_inputs: Inputs) -> Any:
    """Call a network in evaluation mode, without gradients; its modes are left as they were.

    Tensors are moved to the device of its parameters. ValueError, in one line, where the network
    does not take what it is given.
    """
    model, _ = bare(model)
    given = on_device_of(model, example_inputs)
    with modes_kept(model), torch.no_grad(), _eagerly():
        model.eval()
        try:
            return call(model, given)
        except Exception as error:
            why = " ".join(str(error).split())[:300]
            raise ValueError(
                f"example_inputs: {type(model).__name__} does not take {described(example_inputs)} "
                f"({why}); give a tensor, a tuple or a dict of what its forward takes"
            ) from error


def call(network: Callable[..., Any], inputs: Inputs) -> Any:
    """What a network returns for inputs: a tensor, a tuple or a dict, see above."""
    if isinstance(inputs, dict):
        return network(**inputs)
    return network(*inputs) if isinstance(inputs, tuple) else network(inputs)


def on_device_of(model: nn.Module, values: Any) -> Any:
    """Values, nested ones too, with their tensors on the device of a model's parameters."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return tree_map(lambda x: x.to(device) if torch.is_tensor(x) else x, values)


def _eagerly() -> AbstractContextManager:
    """Keep parts that are compiled from being so: hooks added later would not run in them."""
    # what compiles brings seconds of imports, and where it is not there, nothing is compiled
    return (
        torch.compiler.set_stance("force_eager")
        if "torch._dynamo" in sys.modules
        else nullcontext()
    )


def described(example_inputs: Any) -> str:
    """Example inputs in one line: shapes for tensors, types for all else."""
    if isinstance(example_inputs, torch.Tensor):
        return str(tuple(example_inputs.shape))
    if isinstance(example_inputs, dict):
        parts = [f"{name}={described(value)}" for name, value in example_inputs.items()]
        return f"{{{', '.join(parts)}}}"
    if isinstance(example_inputs, tuple | list):
        return f"[{', '.join(map(described, example_inputs))}]"
    return type(example_inputs).__name__


def conv_at(model: nn.Module, name: str) -> nn.Conv2d:
    """Return the conv of that name."""
    return cast(nn.Conv2d, model.get_submodule(name))


def find_convs(model: nn.Module, example_inputs: Inputs) -> list[Conv]:
    """List the Conv2d layers of a network in the order in which it runs them.

    A conv's BatchNorm is the BatchNorm2d (or SyncBatchNorm) that takes its very output. A conv that
    runs several times, or on patches folded into the batch, is listed once, with the positions of
    all. The model's modes and statistics are left as they were. ValueError, in one line, where the
    network does not take the inputs, or none of what it runs is a Conv2d.
    """
    convs, _ = visited(model, example_inputs)
    if not convs:
        raise ValueError(
            f"no Conv2d of this network runs with these example inputs ({_instead(model)}); kernel "
            "pruning is for the Conv2d layers of an nn.Module as it is trained"
        )
    return convs


def visited(model: nn.Module, example_inputs: Inputs) -> tuple[list[Conv], int]:
    """The convs of `find_convs`, of which there may be none, and how many examples were given."""
    inner, prefix = bare(model)
    watch = _Watch()
    for name, module in inner.named_modules():
        if isinstance(module, nn.Conv2d):
            watch.conv(name, module)
        elif isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            watch.norm(name, module)
    try:
        run(inner, example_inputs)
    finally:
        watch.remove()
    count = 1 if watch.unbatched(example_inputs) else batch_size(example_inputs)
    first_with = {}  # id of a weight -> the conv that had it first
    convs = []
    for name, (shape, positions) in watch.calls.items():
        conv, norm = conv_at(inner, name), watch.norms.get(name)
        filters, channels = conv.weight.shape[:2]
        first = first_with.setdefault(id(conv._parameters.get("weight", conv)), name)
        convs.append(
            Conv(
                prefix + name,
                None if norm is None else prefix + norm,
                filters,
                channels,
                (conv.kernel_size[0], conv.kernel_size[1]),
                conv.groups,
                shape[-2],
                shape[-1],
                per_example(positions, count, f"positions of {name}"),
                None if first == name else prefix + first,
            )
        )
    return convs, count


class _Watch:
    """Hooks that note what each conv and each BatchNorm of a network is given."""

    def __init__(self):
        self.calls: dict[str, tuple] = {}  # name -> shape of its last output, positions in all
        self.norms: dict[str, str] = {}  # conv -> BatchNorm
        self._hooks, self._made = [], {}  # id of an output -> output, its version, its conv

    def conv(self, name: str, module: nn.Module) -> None:
        def hook(module, inputs, output):
            output = _tensors(output)[0]
            _, before = self.calls.get(name, (None, 0))
            self.calls[name] = output.shape, before + output.numel() // module.out_channels
            # the tensor is kept, so that no other gets its id
            self._made[id(output)] = output, _version(output), name

        self._hooks.append(module.register_forward_hook(hook))

    def norm(self, name: str, module: nn.Module) -> None:
        def hook(module, inputs):
            tensor, version, conv = self._made.get(id(inputs[0]), (None, None, None))
            # an activation in place leaves the tensor the same, and its values another's
            if conv is not None and version == _version(tensor):
                self.norms[conv] = name

        self._hooks.append(module.register_forward_pre_hook(hook))

    def unbatched(self, example_inputs: Inputs) -> bool:
        """Whether the network takes one image without a batch (C, H, W), as a conv does."""
        leaves = _tensors(example_inputs)
        shapes = [shape for shape, _ in self.calls.values()]
        return bool(leaves and shapes) and leaves[0].ndim == len(shapes[0]) == 3

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written in place; torch does not count that of inference tensors."""
    return 0 if tensor.is_inference() else tensor._version


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _instead(model: nn.Module) -> str:
    """What a network has that is no Conv2d, in words."""
    modules = [type(module) for module in model.modules()]
    if isinstance(model, torch.jit.ScriptModule):
        return "it is scripted by torch.jit"
    if any("quantized" in kind.__module__ for kind in modules):
        return "it is quantized"
    convs = sorted({kind.__name__ for kind in modules if "Conv" in kind.__name__})
    return f"it has {', '.join(convs)}" if convs else "it has no convs"


def batch_size(example_inputs: Inputs) -> int:
    """How many examples these are: the first dimension of the first tensor.

    A list of images (C, H, W), as detection networks take them, is as many examples. Where there is
    no tensor, it is one.
    """
    values: Any = example_inputs
    if isinstance(values, tuple | dict):
        values = list(values.values()) if isinstance(values, dict) else values
        values = next((value for value in values if _tensors(value)), None)
    tensors = _tensors(values)
    if not tensors or not tensors[0].ndim:
        return 1
    return len(tensors) if isinstance(values, list) and tensors[0].ndim == 3 else len(tensors[0])


def per_example(total: int, count: int, what: str) -> int:
    """A total over `count` examples as that of one. ValueError where they cannot be alike."""
    if count == 0 or total % count:
        raise ValueError(
            f"example_inputs: {total} {what} cannot be shared among {count} examples; give one "
            "example (a batch of 1)"
        )
    return total // count


def prunable(convs: list[Conv]) -> list[Conv]:
    """The convs the method is defined for: grouped and depthwise ones stay dense.

    A grouped conv's kernels do not share their inputs, so that none can stand for another. Of convs
    that share a weight it is the first, whose mask is that of all. ValueError where none is left.
    """
    usable = [conv for conv in convs if conv.groups == 1 and conv.shares is None]
    if convs and not usable:
        raise ValueError(
            "every Conv2d of this network is grouped or depthwise, whose kernels have no others "
            "that could stand for them; kernel pruning needs convs with groups=1"
        )
    return usable
