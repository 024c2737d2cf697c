"""Inference and training with the surviving kernels only: what masks cut on paper, cut in seconds.

fast = engine.compile(model, torch.zeros(1, 3, 32, 32))
scores = fast(images)
trained = engine.sparse(model, masks, torch.zeros(1, 3, 32, 32))
loss = cross_entropy(trained(images), labels)
"""

import copy
import operator
import warnings
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from explib import registry
from explib.engine import build, graph
from explib.engine.build import NoCompiler
from explib.engine.plan import Network
from explib.engine.tracing import line, outputs_match
from explib.engine.training import sparse
from explib.pruning.checkpoints import load_network

__all__ = ["Compiled", "NoCompiler", "compile", "load", "sparse"]


class Compiled(nn.Module):
    """A network that runs inference on (N, C, H, W) float32 tensors on the CPU, any N.

    report: `engine` (native or torch), `dtype`, `threads`, `instructions`, `kernels` and
    `kernels_dense` (K x K kernels of the native convs, left and in all), `fallbacks` (one line for
    every node that torch runs, and why).
    """

    def __init__(self, run: Callable, shape: tuple[int, ...], report: dict):
        super().__init__()
        self._run, self._shape, self.report = run, tuple(shape), report

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The network's output. ValueError for another shape, TypeError for another type."""
        if not isinstance(images, torch.Tensor) or images.dtype != torch.float32:
            what = getattr(images, "dtype", type(images).__name__)
            raise TypeError(f"input: {what}; give a torch.float32 tensor")
        if images.device.type != "cpu":
            raise TypeError(f"input: on {images.device}; give a tensor on the CPU")
        if images.shape[1:] != self._shape or images.ndim != len(self._shape) + 1:
            shape = ", ".join(map(str, self._shape))
            raise ValueError(f"input: shape {tuple(images.shape)}; give (N, {shape})")
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return self._run(images)


def compile(
    model: nn.Module,
    example_inputs: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    recheck: float = 0.0,
    threads: int | None = None,
    fallback: bool = True,
) -> Compiled:
    """Make a network ready for inference with its surviving kernels (those not all zeros).

    example_inputs: a float32 CPU tensor (N, C, H, W); later inputs have its shape but for N. dtype:
    float32, or where the processor computes in them float16 (sums are float16 too) or bfloat16
    (sums are float32, and so are batches too small to fill its vectors); elsewhere a warning says
    why it is float32. recheck: of a classifier in 16 bits; images whose two highest scores are less
    than this apart are computed once more in float32, so that rounding decides nothing.
    threads: torch's number of threads by default; fixed from here on.
    Nodes the engine has no kernel for, and everything where there is no C++ compiler, run in torch
    with a warning; with fallback=False they raise NotImplementedError and NoCompiler. What was made
    is compared with the model on two random images, and not used where it differs; in 16 bits, as
    where values grow beyond what float16 holds, float32 is tried before torch. The model is not
    changed, and later changes of it have no effect.
    """
    if dtype not in build.TYPES:
        raise ValueError(f"dtype: {dtype}; give {', '.join(map(str, build.TYPES))}")
    if not isinstance(example_inputs, torch.Tensor) or example_inputs.dtype != torch.float32:
        raise TypeError("example_inputs: give a torch.float32 tensor (N, C, H, W)")
    threads = threads or torch.get_num_threads()
    if recheck:
        short, full = (
            compile(model, example_inputs, dtype=t, threads=threads, fallback=fallback)
            for t in (dtype, torch.float32)
        )
        return _rechecked(short, full, example_inputs, recheck)
    try:
        return _native(model, example_inputs, dtype, threads, fallback)
    except (NoCompiler, NotImplementedError) as error:
        if not fallback:
            raise
        warnings.warn(f"{error}; this network runs dense, in torch", stacklevel=2)
        return _in_torch(model, example_inputs, threads, str(error))


def _native(
    model: nn.Module, example: torch.Tensor, dtype: torch.dtype, threads: int, fallback: bool
) -> Compiled:
    """The network in the engine. NotImplementedError or NoCompiler where that is not possible."""
    traced, library = graph.trace(model, example), build.library()
    ops, alias = graph.ops(traced)
    lacking = [op.why for op in ops if op.kind == "torch"]
    if lacking and not fallback:
        raise NotImplementedError(f"{lacking[0]}; compile with fallback=True to run it in torch")
    if not build.computes(library, dtype):
        warnings.warn(
            f"this processor does not compute in {_name(dtype)}; using float32", stacklevel=3
        )
        dtype = torch.float32
    for why in lacking:
        warnings.warn(f"{why}; it runs in torch", stacklevel=3)
    convs = [op.module.weight.detach() for op in ops if op.kind == "conv"]
    report = {
        "engine": "native",
        "dtype": _name(dtype),
        "threads": threads,
        "instructions": build.instructions(library),
        "kernels": sum(int(weight.any(-1).any(-1).sum()) for weight in convs),
        "kernels_dense": sum(weight[:, :, 0, 0].numel() for weight in convs),
        "fallbacks": lacking,
    }
    tolerance = 0.01 if dtype == torch.float32 else 0.5  # of the largest value: no more than sound
    try:
        run = _assemble(traced, ops, alias, dtype, threads)
        made = Compiled(run, example.shape[1:], report)
        same = outputs_match(made, traced, example, tolerance=tolerance)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise NotImplementedError(f"the engine does not run it ({line(error)})") from error
    if same:
        return made
    why = f"in {_name(dtype)} the engine makes something else of it"
    if dtype == torch.float32 or not fallback:
        raise NotImplementedError(why)
    warnings.warn(f"{why}; using float32", stacklevel=3)
    return _native(model, example, torch.float32, threads, fallback)


def _in_torch(model: nn.Module, example: torch.Tensor, threads: int, why: str) -> Compiled:
    """The network as it is, dense, with a report that says why."""
    report = {"engine": "torch", "dtype": "float32", "threads": threads, "fallbacks": [why]}
    dense = copy.deepcopy(model).cpu().float().eval()
    # no submodule, whose mode somebody could change
    return Compiled(lambda images: dense(images), example.shape[1:], report)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rechecked(short: Compiled, full: Compiled, example: torch.Tensor, margin: float) -> Compiled:
    """The network `short`, with the scores of `full` for images that it finds hard to tell."""
    scores = full(example)
    if (
        margin < 0
        or not isinstance(scores, torch.Tensor)
        or scores.ndim != 2
        or scores.shape[1] < 2
    ):
        raise ValueError(
            f"recheck: {margin}; give 0 or more, for a network with scores (N, classes)"
        )
    if short.report["dtype"] == "float32":
        return full

    def run(images: torch.Tensor) -> torch.Tensor:
        scores = short(images)
        first, second = scores.topk(2, 1).values.unbind(1)
        close = ~(first - second >= margin)  # NaN, too
        if close.any():
            scores[close] = full(images[close])
        return scores

    return Compiled(run, example.shape[1:], short.report | {"recheck": margin})


def load(path: str | Path, **options) -> Compiled:
    """A compact file of `explib.save`, ready for inference; options as of `compile`.

    ValueError or FileNotFoundError, in one line, for a file that is missing, truncated, or not of
    one of the study's networks.
    """
    model, _, meta = load_network(path)
    side = meta.get("image_size", registry.network(meta["arch"]).image_size)
    return compile(model, torch.zeros(1, 3, side, side), **options)


def _assemble(
    traced: fx.GraphModule,
    ops: list[graph.Op],
    alias: dict[str, str],
    dtype: torch.dtype,
    threads: int,
) -> Callable:
    """Native networks of consecutive ops, and torch between them, as one function."""

    def value_of(values: dict, argument):
        return fx.node.map_arg(argument, lambda node: values[alias.get(node.name, node.name)])

    nodes = list(traced.graph.nodes)
    shapes = {node.name: graph.shape(node) for node in nodes}
    entry, output = (next(n for n in nodes if n.op == op) for op in ("placeholder", "output"))
    result = {alias.get(node.name, node.name) for node in output.all_input_nodes}
    own = {n.name: operator.attrgetter(n.target)(traced) for n in nodes if n.op == "get_attr"}
    # of other arguments of `forward` their defaults
    own |= {n.name: n.args[0] for n in nodes if n.op == "placeholder" and n.args}
    groups = [list(group) for _, group in groupby(ops, key=lambda op: op.kind == "torch")]
    steps: list[Callable] = []
    for i, group in enumerate(groups):
        if group[0].kind == "torch":
            steps += [_torch_step(traced, op.node, value_of) for op in group if op.node]
            continue
        later = {name for rest in groups[i + 1 :] for op in rest for name in op.inputs}
        names = {op.name for op in group}
        outputs = [op.name for op in group if op.name in later | result]
        inputs = {name: shapes[name] for op in group for name in op.inputs if name not in names}
        fused = graph.fuse(group, set(outputs))
        steps.append(_native_step(Network(fused, inputs, outputs, dtype=dtype, threads=threads)))

    def run(images: torch.Tensor):
        values = own | {entry.name: images}
        for step in steps:
            step(values)
        return value_of(values, output.args[0])

    return run


def _native_step(network: Network) -> Callable[[dict], None]:
    """What a native network makes of the values it reads, put among the values."""

    def step(values):
        results = network(*(values[name] for name in network.inputs))
        values.update(zip(network.outputs, results, strict=True))

    return step


def _torch_step(traced: fx.GraphModule, node: fx.Node, value_of: Callable) -> Callable:
    """What torch makes of a node, put among the values."""

    def step(values):
        args, kwargs = value_of(values, node.args), value_of(values, node.kwargs)
        target: Any = node.target
        if node.op == "call_module":
            values[node.name] = traced.get_submodule(target)(*args, **kwargs)
        elif node.op == "call_method":
            values[node.name] = getattr(args[0], target)(*args[1:], **kwargs)
        else:
            values[node.name] = target(*args, **kwargs)

    return step
