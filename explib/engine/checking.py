"""Whether a list of ops can be run: what a file says is checked before any C++ reads it."""

import math
from dataclasses import fields

import torch

from explib.engine import reference
from explib.engine.geometry import chw
from explib.engine.graph import Graph, Op
from explib.engine.tracing import line
from explib.engine.views import View

LARGEST_VALUE = 2**26
"""Numbers of an image's value, and of the plane with what windows read around it."""
LARGEST_WEIGHT = 2**28
LARGEST_WINDOW = 2**10
"""Of kernels, strides and dilations."""
_ONE_A_CHANNEL = dict.fromkeys(("affine", "layernorm", "groupnorm"), ("weight", "bias"))


def check(graph: Graph) -> None:
    """ValueError, in one line that names the op, unless every op is one that the engine knows.

    Its inputs are made before it, its shape and its tensors' shapes follow from theirs, and all
    numbers are of a size that networks have.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in graph.shapes.items():
        _need(_sane(shape), f"input {name!r} has shape {shape}")
        shapes[name] = shape
    _need(len(graph.inputs) == len({*graph.inputs}), "two inputs have one name")
    _need(bool(shapes), "it has no input")
    for number, op in enumerate(graph.ops):
        try:
            _need(op.name not in graph.inputs and op.name not in shapes, "its name is taken")
            lost = [name for name in op.inputs if name not in shapes]
            _need(not lost, f"nothing before it makes {lost[:1]}")
            _op(op, [shapes[name] for name in op.inputs])
        except ValueError as error:
            raise ValueError(f"op {number}, {op.kind!r} {op.name!r}: {error}") from None
        shapes[op.name] = op.shape
    for number, value in enumerate(graph.results):
        if isinstance(value, View):
            _need(value.base in shapes, f"result {number}: nothing makes {value.base!r}")
            _need(shapes[value.base] == value.shape, f"result {number}: is of another shape")
            _view(number, value)


def _need(true: bool, message: str) -> None:
    if not true:
        raise ValueError(message)


def _sane(shape: tuple[int, ...], ranks: tuple[int, ...] = (1, 2, 3, 4)) -> bool:
    return len(shape) in ranks and min(shape) > 0 and math.prod(shape) <= LARGEST_VALUE


def _view(number: int, view: View) -> None:
    atoms = [atom for dim in view.dims for atom in dim]
    sane = all(n > 0 and step >= 0 for n, step in atoms)
    _need(sane and math.prod(n for n, _ in atoms) <= LARGEST_VALUE, f"result {number}: no view")
    try:
        view.of(torch.empty(2, *view.shape, device="meta"))
    except (RuntimeError, IndexError, ValueError) as error:
        raise ValueError(f"result {number}: no view of its value ({line(error)})") from None


def _op(op: Op, sources: list[tuple[int, ...]]) -> None:
    _need(op.kind in reference.KINDS and op.call is None, "there is no such kind")
    _need(not op.act or op.kind in reference.ACTIVE, "it takes no activation")
    _need(op.act in ("", *reference.ACTS), f"there is no activation {op.act!r}")
    _need(all(_sane(shape, (1, 3)) for shape in (op.shape, *sources)), f"has shape {op.shape}")
    _numbers(op)
    _need(bool(sources), "it has no input")
    _tensors(op, chw(sources[0]))
    _more(op)
    _places(op, chw(sources[0]))
    try:
        found = reference.shape(op, sources)
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        raise ValueError(f"torch does not run it ({line(error)})") from None
    _need(chw(found) == chw(op.shape), f"makes {found}, not {op.shape}")


def _numbers(op: Op) -> None:
    for name in ("kernel", "stride", "dilation"):
        both = getattr(op, name)
        _need(all(1 <= n <= LARGEST_WINDOW for n in both), f"{name} is {both}")
    _need(all(abs(n) <= 2**16 for n in op.pad), f"pad is {op.pad}")
    _need(1 <= op.groups <= LARGEST_VALUE, f"groups is {op.groups}")
    _need(abs(op.before) <= LARGEST_VALUE, f"before is {op.before}")
    _need(not math.isnan(op.alpha) and not math.isnan(op.beta), "alpha or beta is no number")
    plane = [
        (made - 1) * stride + dilation * (kernel - 1) + 1 + 2 * abs(pad)
        for made, stride, dilation, kernel, pad in zip(
            chw(op.shape)[1:], op.stride, op.dilation, op.kernel, op.pad, strict=True
        )
    ]
    _need(math.prod(plane) <= LARGEST_VALUE, f"its windows reach over {plane[0]} x {plane[1]}")


def _tensors(op: Op, source: tuple[int, int, int]) -> None:
    """Whether the tensors are there that the kind needs, finite, of the right shapes."""
    channels = op.shape[0]
    wanted: dict[str, tuple[int, ...]] = {"slope": (channels,)} if op.act == "prelu" else {}
    if op.kind == "conv":
        _need(source[0] % op.groups == channels % op.groups == 0, f"groups is {op.groups}")
        wanted["weight"] = (channels, source[0] // op.groups, *op.kernel)
    elif op.kind == "linear":
        wanted["weight"] = (channels, math.prod(source))
    wanted |= dict.fromkeys(_ONE_A_CHANNEL.get(op.kind, ()), (channels,))
    needed = {*wanted}
    if op.kind in ("conv", "linear"):
        wanted["bias"] = (channels,)
    for name, shape in wanted.items():
        tensor = getattr(op, name)
        if tensor is None:
            _need(name not in needed, f"lacks its {name}")
            continue
        _need(tuple(tensor.shape) == shape, f"{name} is {tuple(tensor.shape)}, not {shape}")
        _need(tensor.numel() <= LARGEST_WEIGHT, f"{name} is larger than {LARGEST_WEIGHT}")
        _need(tensor.dtype == torch.float32, f"{name} is of {tensor.dtype}, not torch.float32")
        _need(bool(torch.isfinite(tensor).all()), f"{name} has NaN or infinite values")
    unused = [n for n in ("weight", "bias", "slope") if n not in wanted and vars(op)[n] is not None]
    _need(not unused, f"takes no {unused[:1]}")


_KNOWN = {
    *("kind", "name", "inputs", "shape", "weight", "bias", "slope", "kernel", "stride", "pad"),
    *("dilation", "groups", "act", "alpha", "beta", "index", "before", "label", "why", "call"),
}


def _more(op: Op) -> None:
    """Fields that have no check of their own here hold one number a channel, or one a value.

    The values are the inputs and the result.
    """
    for name in (field.name for field in fields(op) if field.name not in _KNOWN):
        value, values = getattr(op, name), len(op.inputs) + 1
        if isinstance(value, torch.Tensor):
            _need(tuple(value.shape) == op.shape[:1], f"{name} is {tuple(value.shape)}")
            _need(bool(torch.isfinite(value).all()), f"{name} has NaN or infinite values")
        elif isinstance(value, tuple):
            numbers = all(isinstance(n, (int, float)) and abs(n) < 2**31 for n in value)
            _need(len(value) in (0, values) and numbers, f"{name} is {value}")


def _places(op: Op, source: tuple[int, int, int]) -> None:
    """Whether what is read lies in the input, where the shapes alone do not say so."""
    made = chw(op.shape)
    if op.kind == "gather":
        _need(len(op.index) == made[0], f"index has {len(op.index)} channels, not {made[0]}")
        _need(all(0 <= i < source[0] for i in op.index), "index is beyond the input's channels")
    elif op.kind == "stretch":
        spread = tuple((n - 1) * step + 1 for n, step in zip(source[1:], op.stride, strict=True))
        _need(made == (source[0], *spread), f"stretches {source} to {made}")
    elif op.kind.startswith("upsample"):
        for size, factor, wide in zip(source[1:], (op.alpha, op.beta), made[1:], strict=True):
            _need(factor == 0 or _scaled(size, factor) == wide, f"by {factor} makes {made}")


def _scaled(size: int, factor: float) -> int:
    return int(size * factor) if 0 < factor <= LARGEST_VALUE else -1
