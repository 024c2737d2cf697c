"""A network made ready for inference: traced, planned, compared with what it was made from."""

import copy
import warnings
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from explib.engine import build, export, graph, plan, quantization, reference
from explib.engine.build import NoCompiler
from explib.engine.plan import Network
from explib.engine.tracing import close, line, outputs_match, random_like
from explib.engine.views import View
from explib.pruning.layers import Inputs, call, check_network, described


class Compiled(nn.Module):
    """A network that runs inference on float32 tensors on the CPU, such as (N, C, H, W), any N.

    report: `engine` (native or torch), `dtype`, `threads`, `instructions`, `kernels` and
    `kernels_dense` (K x K kernels of the native convs, left and in all), `fallbacks` (one line for
    every op that torch runs, and why). about: of a network that was loaded, what its file says.
    """

    def __init__(self, run: Callable[[Inputs], Any], example_inputs: Inputs, report: dict):
        super().__init__()
        self._run, self.report = run, report
        self.about: dict = {}
        leaves, form = tree_flatten(example_inputs)
        self._like = [_kind(leaf) for leaf in leaves]
        self._single = isinstance(example_inputs, torch.Tensor)
        self._form = None if self._single else form
        self._names = list(example_inputs) if isinstance(example_inputs, dict) else []

    @property
    def shape(self) -> tuple[int, ...]:
        """Without batch, that of its only input; () where it takes anything else."""
        return self._like[0].shape if self._single else ()

    def forward(self, *args, **kwargs) -> Any:
        """The network's output. ValueError for another shape, TypeError for another type."""
        inputs: Inputs = args
        if self._single and len(args) == 1 and not kwargs:
            inputs = args[0]
        elif kwargs and not args and len(kwargs) == len(self._names):
            inputs = {name: kwargs.get(name) for name in self._names}  # in the example's order
        leaves, form = ([inputs], None) if self._single else tree_flatten(inputs)
        if form != self._form and len(args) == 1 and not kwargs:  # given as the example was
            if isinstance(args[0], tuple) and not self._names:
                return self.forward(*args[0])
            if isinstance(args[0], dict) and args[0].keys() == set(self._names):
                return self.forward(**args[0])
        if form != self._form or (kwargs and not isinstance(inputs, dict)):
            found = " and ".join(described(given) for given in (args, kwargs) if given)
            raise TypeError(
                f"input: {found}; give what the example has, as the network itself is called"
            )
        for leaf, like in zip(leaves, self._like, strict=True):
            _check_like(leaf, like)
        return self._run(inputs)


class _Like(NamedTuple):
    dtype: torch.dtype
    rank: int
    shape: tuple[int, ...]


def _kind(leaf: Any) -> Any:
    """Type, rank and shape without batch of an input tensor; of anything else, itself."""
    return _Like(leaf.dtype, leaf.ndim, tuple(leaf.shape[1:])) if torch.is_tensor(leaf) else leaf


def _check_like(leaf: Any, like: Any) -> None:
    """An error, in one line, where an input is not as the example's."""
    if not isinstance(like, _Like):
        if torch.is_tensor(leaf) or leaf != like:
            raise ValueError(f"input: {described(leaf)}; give {like!r}, as the example has")
        return
    if not isinstance(leaf, torch.Tensor) or leaf.dtype != like.dtype:
        what = getattr(leaf, "dtype", type(leaf).__name__)
        raise TypeError(f"input: {what}; give a {like.dtype} tensor")
    if leaf.device.type != "cpu":
        raise TypeError(f"input: on {leaf.device}; give a tensor on the CPU")
    if leaf.shape[1:] != like.shape or leaf.ndim != like.rank:
        wanted = ", ".join(["N", *map(str, like.shape)])
        raise ValueError(f"input: shape {tuple(leaf.shape)}; give ({wanted})")


def compile(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    dtype: torch.dtype = torch.float32,
    calibration: Inputs | Sequence[Inputs] | None = None,
    recheck: float = 0.0,
    threads: int | None = None,
    fallback: bool = True,
) -> Compiled:
    """Make a network ready for inference with its surviving kernels (those not all zeros).

    example_inputs: a float32 CPU tensor (N, C, H, W), or a tuple or dict of what forward takes;
    later inputs have the same shapes but for N, their common batch.
    dtype: float32, or where the processor computes in them float16 (sums are float16 too) or
    bfloat16 (sums are float32, and so are images too few to fill its vectors); elsewhere a warning
    says why it is float32. int8: values are codes of 8 bits, and sums are exact.
    calibration: of int8, what the ranges of its values are taken from: normalized training images
    (some 256 of 32x32, 32 of 224x224), as the example or a list of such batches.
    recheck: of a classifier in 16 bits or int8; images whose two highest scores are less than this
    apart are computed once more in float32, so that rounding decides nothing.
    threads: torch's number of threads by default; fixed from here on.
    Ops the engine has no kernel for, and everything where there is no C++ compiler, run in torch
    with a warning; with fallback=False they raise NotImplementedError and NoCompiler. What was made
    is compared with the model on random images (int8 with float32, on those of calibration), blocks
    of images with single ones, and not used where it differs; in 16 bits, as where values grow
    beyond what float16 holds, and in int8 float32 is tried before torch. The model is not changed,
    and later changes of it have no effect.
    """
    check_network(model)
    check_type(dtype)
    if calibration is not None and dtype != torch.int8:
        raise ValueError(f"calibration: is for dtype=torch.int8, which is {dtype}; leave it out")
    tensors = [leaf for leaf in tree_flatten(example_inputs)[0] if isinstance(leaf, torch.Tensor)]
    if not any(tensor.dtype == torch.float32 for tensor in tensors):
        raise TypeError("example_inputs: give a torch.float32 tensor (N, C, H, W)")

    def traced() -> tuple[graph.Graph, Same]:
        found, plain = export.trace(model, example_inputs)
        # one image, too: torch.export does not see what a network does with that alone
        return found, lambda made, tolerance: all(
            outputs_match(made, plain, example_inputs, count, tolerance) for count in (2, 1)
        )

    def dense() -> Callable[[Inputs], Any]:
        own = copy.deepcopy(model).cpu().float().eval()
        return lambda inputs: call(own, inputs)  # no submodule, whose mode somebody could change

    batches = listed(calibration)
    return ready(traced, dense, example_inputs, dtype, batches, recheck, threads, fallback)


def listed(calibration: Any) -> list[Inputs]:
    """Batches of calibration images: of one, or none, a list too."""
    if isinstance(calibration, list):
        return calibration
    if not isinstance(calibration, torch.Tensor | tuple | dict | None):
        raise ValueError(
            f"calibration: {described(calibration)}; give images as the example, or a list of such "
            "batches"
        )
    return [] if calibration is None else [calibration]


def check_type(dtype: torch.dtype) -> None:
    if dtype not in build.TYPES:
        raise ValueError(f"dtype: {dtype!r}; give {', '.join(map(str, build.TYPES))}")


LAYOUTS = 0.1
"""By how much, of the largest value, a block's answers may be other than single images'."""
Same = Callable[[nn.Module, float], bool]
"""Whether what was made gives the answers that it should, within a tolerance."""


def ready(
    traced: Callable[[], tuple[graph.Graph, Same]],
    dense: Callable[[], Callable[[Inputs], Any]],
    example: Inputs,
    dtype: torch.dtype,
    calibration: list[Inputs],
    recheck: float,
    threads: int | None,
    fallback: bool,
) -> Compiled:
    """A graph, traced or read, in the engine; where that is not possible, `dense` in torch."""
    if threads is not None and (type(threads) is not int or threads < 1):
        raise ValueError(f"threads: {threads!r}; give 1 or more, or None for torch's")
    threads = threads or torch.get_num_threads()
    if recheck:
        short, full = (
            ready(traced, dense, example, chosen, calibration, 0.0, threads, fallback)
            for chosen in (dtype, torch.float32)
        )
        return _rechecked(short, full, example, recheck)
    try:
        with torch.autocast("cpu", enabled=False):
            return _native(*traced(), example, dtype, calibration, threads, fallback)
    except (NoCompiler, NotImplementedError) as error:
        if not fallback:
            raise
        warnings.warn(f"{error}; this network runs dense, in torch", stacklevel=3)
        report = {"engine": "torch", "dtype": "float32", "threads": threads}
        return Compiled(_plainly(dense()), example, report | {"fallbacks": [str(error)]})


def _plainly(run: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
    """What torch runs, without gradients and in its own types; the engine knows no others."""

    def plain(inputs: Inputs) -> Any:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return run(inputs)

    return plain


def _native(
    traced: graph.Graph,
    same: Same,
    example: Inputs,
    dtype: torch.dtype,
    calibration: list[Inputs],
    threads: int,
    fallback: bool,
) -> Compiled:
    """The graph in the engine. NotImplementedError or NoCompiler where that is not possible."""
    library = build.library()
    build.library(dtype)
    results = graph.names(traced.results)
    ops = graph.fuse(traced.ops, results, traced.shapes, plan.native)
    if dtype == torch.int8 and not any(op.scales for op in ops):
        ops = coded(traced, ops, calibration)
    if calibration and dtype == torch.int8:
        full = _native(traced, same, example, torch.float32, [], threads, fallback)

        def same(made: nn.Module, tolerance: float) -> bool:
            """Beside float32, on images whose values are in the ranges."""
            return all(
                outputs_match(made, full, calibration[0], n, tolerance, False) for n in (2, 1)
            )

    shapes = traced.shapes | {op.name: op.shape for op in ops}
    lacking = {op.name: why for op in ops if (why := _lacking(op, shapes)) is not None}
    named = [why for why in lacking.values() if why]
    if named and not fallback:
        raise NotImplementedError(f"{named[0]}; compile with fallback=True to run it in torch")
    if not build.computes(library, dtype):
        warnings.warn(
            f"this processor does not compute in {_name(dtype)}; using float32", stacklevel=4
        )
        dtype = torch.float32
    for why in named:
        warnings.warn(f"{why}; it runs in torch", stacklevel=4)
    weights = [op.weight for op in ops if op.kind == "conv" and op.name not in lacking]
    report = {
        "engine": "native",
        "dtype": _name(dtype),
        "threads": threads,
        "instructions": build.instructions(library),
        "kernels": sum(int(w.flatten(2).any(2).sum()) for w in weights if w is not None),
        "kernels_dense": sum(w[:, :, 0, 0].numel() for w in weights if w is not None),
        "fallbacks": named,
    }
    tolerance = 0.01 if dtype == torch.float32 else 0.5  # of the largest value: no more than sound
    try:
        run = _assemble(traced, ops, set(lacking), dtype, threads)
        made = Compiled(run, example, report)
        right = same(made, tolerance) and _layouts_agree(made, example, build.block(library, dtype))
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise NotImplementedError(f"the engine does not run it ({line(error)})") from error
    if right:
        return made
    why = f"in {_name(dtype)} the engine makes something else of it"
    if dtype == torch.float32 or not fallback:
        raise NotImplementedError(why)
    warnings.warn(f"{why}; using float32", stacklevel=4)
    return _native(traced, same, example, torch.float32, [], threads, fallback)


def _layouts_agree(made: Compiled, example: Inputs, block: int) -> bool:
    """Whether a block of images gives what each image does alone, which goes another way."""
    images = random_like(example, block)
    together, _ = tree_flatten(call(made, images))
    last = tree_map_only(torch.Tensor, lambda x: x[-1:] if x.ndim else x, images)
    alone, _ = tree_flatten(call(made, last))
    return all(
        close(x[-1:], y, LAYOUTS)
        for x, y in zip(together, alone, strict=True)
        if torch.is_tensor(x) and x.ndim and len(x) == block
    )


def coded(traced: graph.Graph, ops: list[graph.Op], calibration: list[Inputs]) -> list[graph.Op]:
    """The ops with codes for their values, from calibration images."""
    if not calibration:
        raise ValueError("calibration: none; give normalized training images, as the example")
    batches = [_named(traced, batch) for batch in calibration]
    with torch.no_grad():
        return quantization.quantized(ops, traced.shapes, graph.names(traced.results), batches)


def _named(traced: graph.Graph, inputs: Inputs) -> dict[str, Any]:
    """Inputs by the names of their values. ValueError for others than the network takes."""
    leaves = tree_flatten(inputs)[0]
    if len(leaves) != len(traced.inputs):
        raise ValueError(
            f"calibration: {described(inputs)}; give images as the example, or a list of such "
            "batches"
        )
    named = dict(zip(traced.inputs, leaves, strict=True))
    for name, shape in traced.shapes.items():
        x = named[name]
        if not torch.is_tensor(x) or x.dtype != torch.float32 or tuple(x.shape[1:]) != shape:
            wanted = ", ".join(["N", *map(str, shape)])
            raise ValueError(f"calibration: {described(inputs)}; give float32 ({wanted})")
        if not (x.numel() and x.isfinite().all() and x.min() < x.max()):
            raise ValueError(
                "calibration: images without two finite values; give training images, normalized"
            )
    return named


def _lacking(op: graph.Op, shapes: dict[str, tuple[int, ...]]) -> str | None:
    """Why torch runs an op ("" for what belongs to one that is named); None where it does not."""
    if op.kind == "torch":
        return op.why
    known = plan.native(op, [shapes[name] for name in op.inputs])
    what = f"{op.kind}, {op.act}" if op.act and op.kind != "act" else op.kind
    return None if known else f"{op.label}: no kernel for this {what}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rechecked(short: Compiled, full: Compiled, example: Inputs, margin: float) -> Compiled:
    """The network `short`, with the scores of `full` for images that it finds hard to tell."""
    if not isinstance(example, torch.Tensor):
        raise ValueError("recheck: only of networks that take one tensor; leave it out")
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

    def run(images: Any) -> torch.Tensor:
        scores = short(images)
        first, second = scores.topk(2, 1).values.unbind(1)
        close = ~(first - second >= margin)  # NaN, too
        if close.any():
            scores[close] = full(images[close])
        return scores

    return Compiled(run, example, short.report | {"recheck": margin})


def _assemble(
    traced: graph.Graph, ops: list[graph.Op], lacking: set[str], dtype: torch.dtype, threads: int
) -> Callable[[Inputs], Any]:
    """Native networks of consecutive ops, and torch between them, as one function."""
    results = graph.names(traced.results)
    shapes = traced.shapes | {op.name: op.shape for op in ops}
    groups = [list(group) for _, group in groupby(ops, key=lambda op: op.name in lacking)]
    steps: list[Callable[[dict, int], None]] = []
    for i, group in enumerate(groups):
        if group[0].name in lacking:
            steps += [_torch_step(op) for op in group]
            continue
        later = {name for rest in groups[i + 1 :] for op in rest for name in op.inputs}
        names = {op.name for op in group}
        outputs = [op.name for op in group if op.name in later | results]
        inputs = {name: shapes[name] for op in group for name in op.inputs if name not in names}
        steps.append(_native_step(Network(group, inputs, outputs, dtype=dtype, threads=threads)))

    # of one tensor the way there is short: a call of a small network takes no longer than that
    single = len(traced.results) == 1 and traced.form.is_leaf()
    only = traced.results[0] if single and isinstance(traced.results[0], View) else None

    def run(inputs: Inputs) -> Any:
        leaves = [inputs] if isinstance(inputs, torch.Tensor) else tree_flatten(inputs)[0]
        values = dict(zip(traced.inputs, leaves, strict=True))
        batch = len(values[next(iter(traced.shapes))])
        for step in steps:
            step(values, batch)
        if only is not None:
            return only.of(values[only.base])
        return tree_unflatten(reference.resolved(traced.results, values, batch), traced.form)

    return _plainly(run) if lacking else run


def _native_step(network: Network) -> Callable[[dict, int], None]:
    """What a native network makes of the values it reads, put among the values."""

    def step(values: dict, batch: int) -> None:
        results = network(*(values[name] for name in network.inputs))
        values.update(zip(network.outputs, results, strict=True))

    return step


def _torch_step(op: graph.Op) -> Callable[[dict, int], None]:
    """What torch makes of an op, put among the values."""

    def step(values: dict, batch: int) -> None:
        values[op.name] = reference.run(op, values, batch)

    return step
