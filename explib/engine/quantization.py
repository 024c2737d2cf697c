"""Eight bits: every value of a network as a code, x = scale * (code - zero), of 0 to 255.

The range of a value is the one that leaves the least mean square error on calibration images; what
passes values on (pools of maxima, concatenation, slices, ...) shares it with its inputs. Weights of
convs that are computed with bytes are whole multiples of a step for each filter. By what all of
this shifts the mean of a filter's outputs, its bias is corrected.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from explib.engine import geometry, reference
from explib.engine.graph import Op

CODES = 255
BINS = 2048
SHRINKS = torch.linspace(1, 0.3, 71).tolist()  # ranges that are tried, of the widest
PASSING = (
    "maxpool", "adaptive_max", "gather", "slice", "pad", "pad_reflect", "pad_replicate",
    "pad_circular", "stretch", "upsample_nearest", "upsample_bilinear", "cat", "flatten",
)  # fmt: skip
"""Kinds whose results are values, or means of values, of their inputs."""

Values = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Code:
    """How a value is stored: x = scale * (code - zero); with a scale of 0 as it is, a float."""

    scale: float
    zero: int


def quantized(
    ops: Sequence[Op], shapes: dict[str, tuple[int, ...]], results: set[str], batches: list[Values]
) -> list[Op]:
    """The ops with the codes of their values, and weights and biases made for them.

    shapes: of the inputs, without batch. batches: of calibration images, each value of the inputs
    (N, ...) by its name. ValueError where they are not finite.
    """
    codes = _codes(ops, batches)
    used = {name for op in ops for name in op.inputs}
    made = []
    shapes = shapes | {op.name: op.shape for op in ops}
    for op in ops:
        last = op.kind == "linear" and op.name in results and op.name not in used
        own = [codes.get(name, Code(1.0, 0)) for name in (*op.inputs, op.name)]
        if last:
            own[-1] = Code(0.0, 0)
        op = replace(op, scales=tuple(c.scale for c in own), zeros=tuple(c.zero for c in own))
        made.append(_stepped(op, geometry.chw(shapes[op.inputs[0]])) if op.kind == "conv" else op)
    return _corrected(ops, made, [_stored(batch, codes) for batch in batches], batches)


def _stored(batch: Values, codes: dict[str, Code]) -> Values:
    return {name: coded(x, codes[name]) if name in codes else x for name, x in batch.items()}


def _stepped(op: Op, source: geometry.Shape) -> Op:
    """A conv that bytes.h computes, with its weights rounded to multiples of its filters' steps."""
    assert op.weight is not None
    small = geometry.cropped(op, source)  # what of its kernels meets pixels
    if small.weight is None or not geometry.in_bytes(small, source):
        return op
    steps = weight_steps(small.weight, op.groups)
    column = steps[:, None, None, None]
    return replace(op, weight=(op.weight / column).round() * column, steps=steps)


def weight_steps(weight: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """The step of each filter of a weight (F, C / groups, K, K): (F,).

    Weights are 127 steps at most, and two that are added first (of a row the first two, the next
    two, ...; of a 1x1 conv two neighbouring channels) 128 where they have one sign: times codes of
    255 at most their sum fits in 16 bits, in which processors without dot products of four bytes
    have it.
    """
    if weight.shape[2:] == (1, 1):
        flat = torch.nn.functional.pad(weight[:, :, 0, 0], (0, 2))
        pairs = flat.unfold(1, 2, 2 if groups == 1 else 1)  # a group may begin with an odd channel
    else:
        rows = torch.nn.functional.pad(weight, (0, weight.shape[3] % 2))
        pairs = rows.unflatten(3, (-1, 2)).flatten(1, 3)
    sums = [part.clamp(min=0).sum(2).amax(1) for part in (pairs, -pairs)]
    steps = torch.stack([weight.abs().flatten(1).amax(1) / 127, *(s / 127.5 for s in sums)]).amax(0)
    return steps.where(steps > 0, torch.ones_like(steps))


def _corrected(
    ops: Sequence[Op], made: Sequence[Op], stored: list[Values], exact: list[Values]
) -> list[Op]:
    """The ops with biases that leave the mean of every filter's sums where it was.

    Op by op, so that each takes what those before it have left over.
    """
    stored, exact = [dict(v) for v in stored], [dict(v) for v in exact]
    counts = [_size(batch) for batch in exact]  # later all that is left may be what torch returns
    end = _ends(ops)
    found = []
    for now, (op, new) in enumerate(zip(ops, made, strict=True)):
        if op.kind in ("conv", "linear") and op.call is None:
            plain, changed = replace(op, act=""), replace(new, act="", scales=())
            shift = torch.zeros(op.shape[0])
            for a, b, n in zip(exact, stored, counts, strict=True):
                gap = reference.run(plain, a, n) - reference.run(changed, b, n)
                shift += gap.transpose(0, 1).flatten(1).mean(1) / len(exact)
            new = replace(new, bias=shift if new.bias is None else new.bias + shift)
        for values, own in ((exact, op), (stored, new)):
            for v, n in zip(values, counts, strict=True):
                v[op.name] = reference.run(own, v, n)
                for name in [name for name in v if end.get(name) == now]:
                    del v[name]
        found.append(new)
    return found


def _size(values: Values) -> int:
    return len(next(x for x in values.values() if isinstance(x, torch.Tensor) and x.ndim))


def _groups(ops: Sequence[Op]) -> dict[str, str]:
    """Of every value the one whose range it shares."""
    root: dict[str, str] = {}

    def find(name: str) -> str:
        while root.get(name, name) != name:
            name = root[name]
        return name

    for op in ops:
        for name in (op.name, *op.inputs):
            root.setdefault(name, name)
        if op.kind in PASSING:
            for name in op.inputs:
                root[find(name)] = find(op.name)
    return {name: find(name) for name in root}


def _ends(ops: Sequence[Op]) -> dict[str, int]:
    """The number of the op after which a value is no longer read."""
    return {name: now for now, op in enumerate(ops) for name in (op.name, *op.inputs)}


def _each(ops: Sequence[Op], batches: list[Values], use: Callable[[str, torch.Tensor], None]):
    """Call use(name, value) with every float value of the network, in float32, batch by batch."""
    end = _ends(ops)
    for batch in batches:
        values = dict(batch)
        size = _size(values)
        for name in batch:
            use(name, batch[name])
        for now, op in enumerate(ops):
            values[op.name] = reference.run(op, values, size)
            use(op.name, values[op.name])
            for name in [n for n in values if end.get(n) == now and n not in batch]:
                del values[name]


def _codes(ops: Sequence[Op], batches: list[Values]) -> dict[str, Code]:
    """The code of every value that is a batch of floats."""
    groups = _groups(ops)
    bounds: dict[str, tuple[float, float]] = {}

    def widen(name: str, x: torch.Tensor) -> None:
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float32 or not x.numel():
            return
        own = groups.get(name, name)
        low, high = (float(v) for v in x.aminmax())
        if not (low > -torch.inf and high < torch.inf):
            raise ValueError(f"calibration: {name} is not finite; give images as it was trained on")
        least, most = bounds.get(own, (0.0, 0.0))
        bounds[own] = min(low, least), max(high, most)

    _each(ops, batches, widen)
    counts = {own: torch.zeros(BINS) for own in bounds}

    def count(name: str, x: torch.Tensor) -> None:
        own = groups.get(name, name)
        if own in bounds and bounds[own][1] > bounds[own][0]:
            counts[own] += torch.histc(x, BINS, *bounds[own])

    _each(ops, batches, count)
    found = {own: _code(counts[own], *bounds[own]) for own in bounds}
    names = {*groups, *(name for batch in batches for name in batch)}
    return {n: found[groups.get(n, n)] for n in names if groups.get(n, n) in found}


def _code(counts: torch.Tensor, least: float, most: float) -> Code:
    """The code of least mean square error for a histogram from `least` (0 or less) to `most`."""
    if most == least:
        return Code(1.0, 0)
    middle = least + (most - least) * (torch.arange(BINS) + 0.5) / BINS
    scales = [(most - least) * part / CODES for part in SHRINKS]
    zeros = [round(-least * part / scale) for part, scale in zip(SHRINKS, scales, strict=True)]
    step, zero = torch.tensor(scales)[:, None], torch.tensor(zeros)[:, None]
    kept = ((middle / step + zero).round().clamp(0, 255) - zero) * step  # as `reference.coded`
    best = int((counts * (kept - middle) ** 2).sum(1).argmin())
    return Code(scales[best], zeros[best])


def coded(x: torch.Tensor, code: Code) -> torch.Tensor:
    """The values that are stored for x."""
    return reference.coded(x, code.scale, code.zero)
