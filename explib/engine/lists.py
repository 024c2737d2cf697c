"""The kernels of a conv that survive, as the lists that the C++ goes through."""

import ctypes
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from explib.engine import geometry, winograd
from explib.engine.build import (
    at_once,
    block,
    byte_chunk,
    byte_filters,
    byte_point,
    byte_tiny,
    chunk,
    pair_chunk,
    sums_near,
    tap_chunk,
)
from explib.engine.geometry import Shape
from explib.engine.graph import Op

ALIKE = 400
"""Up to so many pixels it pays to compute filters in the order of their numbers of kernels."""
ALIKE_POINTS = 100
"""And of 1x1 convs."""
TOGETHER = 1.85
"""int8: how many times the words may become for several filters at once, which load them once."""


class Target(NamedTuple):
    """What the lists are for: the library that reads them, its type, so many threads."""

    library: ctypes.CDLL
    dtype: torch.dtype
    threads: int
    blocks: bool = True  # whether images ever go in blocks


def floats(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()


def scalars(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Values as the C++ computes outside of convs: floats, or halves."""
    with np.errstate(over="ignore"):  # what is infinite then shows in the results, too
        return values.astype(np.float16 if dtype == torch.float16 else np.float32)


def words(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Each value as a 32-bit word: a float, or the same half twice."""
    values = scalars(values, dtype)
    return np.repeat(values, 2, axis=-1) if values.dtype == np.float16 else values


def kernels(weight: np.ndarray, op: Op, source: Shape, target: Target) -> dict[str, Any]:
    """What the C++ reads of a conv's kernels (F, C / groups, KH, KW) that are not all zeros.

    The arrays of its Op, by name: by filter, by channel, in pairs, as bytes; see plan.h.
    """
    library, dtype, threads, blocks = target
    channels, plain = source[0], geometry.plain(op, source)
    by_chunk = plain and op.kernel == (1, 1)
    tiled = plain and op.stride[0] <= 2  # of blocks of images; others go row by row
    if by_chunk and op.groups > 1:
        weight = _ungrouped(weight, op.groups)
    filters, local = weight.shape[:2]
    keep = np.asarray(weight.any((2, 3)))
    flat = weight.reshape(filters, local, -1)
    # of each filter, the first channel that it may read
    offset = np.arange(filters) // (filters // (channels // local)) * local
    f, c = keep.nonzero()
    # each thread's share of the filters holds about the same number of kernels, and each list by
    # channel, of which it may have several, too
    near = sums_near(library) if dtype != torch.int8 else filters
    passes = -(-filters // (threads * near))
    total = np.concatenate([[0], keep.sum(1).cumsum()])
    wanted = total[-1] * np.arange(threads * passes + 1) / (threads * passes)
    shares = np.searchsorted(total, wanted)
    if dtype == torch.int8 and by_chunk:
        shares = shares // 4 * 4  # no thread begins within filters that are computed together
    shares[0], shares[-1] = 0, filters
    share = shares[::passes]
    lists: dict[str, Any] = {"share": share.astype(np.int32), "passes": passes}
    each = np.arange(filters)
    # a loop that is run for many tiles is learned as it is
    few = op.shape[1] * op.shape[2] <= (ALIKE_POINTS if by_chunk else ALIKE)
    alike = few and not geometry.depthwise(op, source)
    alike &= dtype != torch.int8
    cuts = _cuts(filters, share, library) if alike else each
    if by_chunk and dtype != torch.int8:
        vectors = (
            math.prod(op.shape[1:]) if blocks else geometry.vectors(op.shape, block(library, dtype))
        )
        lists["chunk"] = chunk(library, vectors)
    if dtype == torch.bfloat16:
        size = pair_chunk(library, lists["chunk"]) if by_chunk else channels
        pairs = _by_chunk(_pairs, flat, keep, size, each)
        if op.groups > 1 and not by_chunk:
            own = np.repeat(offset, 2 * np.diff(pairs["start"]))
            pairs["index"] = (pairs["index"] + own).astype(np.int32)
        lists |= {f"pair_{part}": pairs[part] for part in ("weight", "start", "index")}
    if dtype == torch.int8 and op.steps is not None and geometry.in_bytes(op, source):
        return lists | _bytes(weight, op, source, library)
    if by_chunk:
        lists |= _by_chunk(_singles, flat, keep, lists["chunk"], cuts)
        lists["weight"] = words(lists["weight"], dtype)
        small = {n: lists[n].astype(np.uint8) for n in ("index", "pair_index") if n in lists}
        return lists | small
    singles = _by_chunk(_singles, flat, keep, local, cuts if tiled else each)
    own = np.repeat(offset[singles["order"]], np.diff(singles["start"]))
    lists |= singles | {
        "weight": words(singles["weight"], dtype),
        "index": (singles["index"] + own).astype(np.int32),
    }
    if geometry.depthwise(op, source):
        return lists
    if dtype in (torch.float32, torch.bfloat16):  # whose single images are computed in float32
        in_blocks = blocks and dtype == torch.float32
        lists |= winograd.points(op, source, keep, singles["weight"], in_blocks, library)
    size = tap_chunk(library, math.prod(op.kernel))
    if size:
        made = _in_chunks(flat, f, c, offset, size, np.unique(share))
        lists["chunk"] = size
    else:
        made = _by_channel(flat, f, c, offset, shares)
    made["weight"] = words(made["weight"], dtype)
    return lists | {f"plane_{name}": array for name, array in made.items()}


def _in_chunks(
    weight: np.ndarray,
    f: np.ndarray,
    c: np.ndarray,
    offset: np.ndarray,
    size: int,
    cuts: np.ndarray,
) -> dict[str, np.ndarray]:
    """The kernels (f, c) of weight (F, C / groups, taps) in chunks of `size` channels, by filter.

    offset: of each filter, the first channel that it may read. order: see `_order`.
    """
    own, filters = c + offset[f], len(weight)
    chunk = own // size
    chunks = 1 + (offset[-1] + weight.shape[1] - 1) // size
    counts = np.bincount(chunk * filters + f, minlength=chunks * filters).reshape(-1, filters)
    order = np.stack([_order(found, cuts) for found in counts])
    place = order.argsort(1)
    sort = np.lexsort((own, place[chunk, f], chunk))
    starts = np.take_along_axis(counts, order, 1).ravel().cumsum()
    return {
        "weight": weight[f, c][sort],
        "start": np.concatenate([[0], starts]).astype(np.int32),
        "index": (own % size)[sort].astype(np.int32),
        "order": order.astype(np.int32).ravel(),
    }


def _by_channel(
    weight: np.ndarray, f: np.ndarray, c: np.ndarray, offset: np.ndarray, shares: np.ndarray
) -> dict[str, np.ndarray]:
    """The same kernels, of each share of the filters by channel."""
    own, channels = c + offset[f], offset[-1] + weight.shape[1]
    one = np.searchsorted(shares, f, side="right") - 1
    order = np.lexsort((f, own, one))
    counts = np.bincount(one * channels + own, minlength=(len(shares) - 1) * channels)
    starts = np.concatenate([[0], counts.cumsum()])
    return {
        "weight": weight[f, c][order],
        "start": starts.astype(np.int32),
        "index": f[order].astype(np.int32),
    }


def _bytes(weight: np.ndarray, op: Op, source: Shape, library: ctypes.CDLL) -> dict[str, Any]:
    """int8: the kernels by chunk and filter as words of four bytes, and how sums are scaled.

    Of a row of a kernel a word for four pixels, of a 1x1 conv one for four channels, or two in 16
    bits each, then such that the same filters keep; of filters that are computed `together` one
    each, also where it is zero for some.
    """
    assert op.steps is not None
    steps, side = op.steps.numpy(), op.kernel[0]
    whole = np.rint(weight / steps[:, None, None, None])
    scale, zero = steps * op.scales[0], op.zeros[0]
    bias = np.zeros(len(weight)) if op.bias is None else floats(op.bias)
    made: dict[str, Any] = {
        "byte_scale": scale.astype(np.float32),
        "byte_bias": (bias - scale * zero * whole.sum((1, 2, 3))).astype(np.float32),
    }
    codes = byte_point(library) if side == 1 else 4  # of a word
    if side == 1:
        channels = source[0]
        whole = np.pad(whole[:, :, 0, 0], ((0, 0), (0, -channels % codes)))
        # of four neighbours the first two and the last two are added in 16 bits (quantization.py)
        order = _partners(whole != 0) if codes == 2 else np.arange(whole.shape[1])
        words = whole.take(order, 1).reshape(len(whole), -1, 1, codes)
        made["byte_channel"] = np.minimum(order, channels - 1).astype(np.int32)
    else:
        if not geometry.depthwise(op, source):
            whole = _ungrouped(whole, op.groups)
        words = np.pad(whole, ((0, 0), (0, 0), (0, 0), (0, -side % 4)))
        words = words.reshape(*words.shape[:2], -1, 4)
    keep = np.asarray(words.any((2, 3)))
    flat = words.astype(np.int8 if codes == 4 else np.int16).view(np.int32)[..., 0]
    like = side, op.stride[0], *geometry.chw(op.shape)[1:]
    grouped = _grouped(flat, keep, 4) if side == 1 else (flat, keep)
    many = side == 1 and bool(grouped[1].mean() < TOGETHER * keep.mean())
    together = made["together"] = byte_filters(library) if many else 1
    small = geometry.plain(op, source) and like == (3, 1, 2, 2)
    tiny = byte_tiny(library, source[0]) if small else 0
    if tiny:
        made |= _tiny_bytes(whole, tiny, bias, scale, zero)
    for layout, name in enumerate(("byte", "flat")):
        if tiny and name == "flat":
            continue  # made above
        size = byte_chunk(library, *like, source[0], together, layout)
        size //= codes if side == 1 else 1
        taps, kept = grouped if together > 1 else (flat, keep)
        lists = _by_chunk(_singles, taps, kept, size, np.arange(len(kept)))
        made |= {f"{name}_{part}": lists[part] for part in ("weight", "start", "index")}
    return made


def _tiny_bytes(
    whole: np.ndarray, many: int, bias: np.ndarray, scale: np.ndarray, zero: int
) -> dict[str, np.ndarray]:
    """int8: kernels (F, C, 3, 3) on planes of 2x2, for each output the weights of the four pixels.

    Of each filter a multiple of `many`, the last ones zero. What lies outside has no weight, so
    that each output has a bias of its own.
    """
    side = np.arange(2)
    near = side - side[:, None] + 1  # of an output's row (or column) and a pixel's: the tap's
    taps = 3 * near[:, None, :, None] + near[None, :, None, :]
    words = whole.reshape(*whole.shape[:2], 9)[:, :, taps.reshape(4, 4)]
    lists = _singles(words, np.asarray(words.any((2, 3))))
    counts = np.diff(lists["start"])
    most = -(-counts // many) * many
    start = np.concatenate([[0], most.cumsum()])
    at = np.arange(counts.sum()) + np.repeat(start[:-1] - lists["start"][:-1], counts)
    weight, index = np.zeros((start[-1], 4, 4), np.int8), np.zeros(start[-1], np.int32)
    weight[at], index[at] = lists["weight"], lists["index"]
    own = bias[:, None] - scale[:, None] * zero * words.sum((1, 3))
    return {
        "flat_weight": weight,
        "flat_start": start.astype(np.int32),
        "flat_index": index,
        "flat_bias": own.astype(np.float32),
    }


def _partners(keep: np.ndarray) -> np.ndarray:
    """The channels of keep (F, C), C even, by twos that the same filters keep as far as possible.

    Again and again those that are the best for each other: among them the best two of all.
    """
    kept = keep.astype(np.float32)
    shared = kept.T @ kept
    chance = np.random.default_rng(0).random(shared.shape, np.float32)  # between equals
    shared += (chance + chance.T) / 4
    np.fill_diagonal(shared, -1)
    left, found = np.arange(len(shared)), []
    while len(left):
        best = shared.argmax(1)
        here = np.arange(len(left))
        first = (best[best] == here) & (here < best)
        found.append(np.stack([left[first], left[best[first]]], 1))
        rest = np.ones(len(left), bool)
        rest[here[first]] = rest[best[first]] = False
        left, shared = left[rest], shared[np.ix_(rest, rest)]
    return np.concatenate(found).ravel()


def _grouped(weight: np.ndarray, keep: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (F, C, 1) as taps (F / size, C, size) of `size` filters, kept where one is."""
    more = ((0, -len(weight) % size), (0, 0))
    weight = np.pad(weight[:, :, 0], more).reshape(-1, size, weight.shape[1]).swapaxes(1, 2)
    return weight, np.asarray(np.pad(keep, more).reshape(-1, size, keep.shape[1]).any(1))


def _ungrouped(weight: np.ndarray, groups: int) -> np.ndarray:
    """Weights (F, C / groups, ...) as (F, C, ...), zero for the channels of other groups."""
    filters, local = weight.shape[0] // groups, weight.shape[1]
    whole = np.zeros((len(weight), local * groups, *weight.shape[2:]), weight.dtype)
    for g in range(groups):
        rows = slice(g * filters, (g + 1) * filters)
        whole[rows, g * local : (g + 1) * local] = weight[rows]
    return whole


def _cuts(filters: int, share: np.ndarray, library: ctypes.CDLL) -> np.ndarray:
    """Where the C++ may begin to compute filters: it takes only so many at once."""
    many = at_once(library)
    return np.unique(np.concatenate([np.arange(first, filters, many) for first in {0, *share}]))


def _order(counts: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """The filters, of so many kernels each, between cuts those with many first.

    Processors predict the end of a loop that is as long as the one before.
    """
    part = np.searchsorted(cuts, np.arange(len(counts)), side="right")
    return np.lexsort((-counts, part))


def _by_chunk(
    lists: Callable[[np.ndarray, np.ndarray], dict],
    weight: np.ndarray,
    keep: np.ndarray,
    size: int,
    cuts: np.ndarray,
) -> dict[str, np.ndarray]:
    """The lists of `size` channels after those of the `size` channels before, as one.

    order: the filters of each chunk as they are listed, see `_order`.
    """
    parts = []
    for first in range(0, weight.shape[1], size):
        kept = keep[:, first : first + size]
        order = _order(kept.sum(1), cuts)
        made = lists(weight[order, first : first + size], kept[order])
        parts.append(made | {"order": order.astype(np.int32)})
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    counts = [np.diff(part["start"]) for part in parts]
    joined["start"] = np.concatenate([[0], np.concatenate(counts).cumsum()]).astype(np.int32)
    return joined


def _singles(weight: np.ndarray, keep: np.ndarray) -> dict[str, np.ndarray]:
    """The kernels of `keep` by filter, of weight (F, C, taps)."""
    f, c = keep.nonzero()
    return {
        "weight": weight[f, c],
        "start": np.concatenate([[0], keep.sum(1).cumsum()]).astype(np.int32),
        "index": c.astype(np.int32),
    }


def _pairs(weight: np.ndarray, keep: np.ndarray) -> dict[str, np.ndarray]:
    """The kernels of `keep`, two of a filter at once: weight (F, C, taps) as pairs of bfloat16.

    Where their number is odd the last one has itself for a partner, with weights of zero.
    """
    starts, channels, words = [0], [], []
    for filter_weight, kept in zip(weight, keep, strict=True):
        own = kept.nonzero()[0]
        values = filter_weight[own]
        if len(own) % 2:
            own, values = np.append(own, own[-1]), np.append(values, 0 * values[-1:], 0)
        starts.append(starts[-1] + len(own) // 2)
        channels.append(own)
        words.append(values.reshape(-1, 2, weight.shape[2]).swapaxes(1, 2))
    pairs = torch.from_numpy(np.concatenate(words)).bfloat16().view(torch.int16)
    return {
        "weight": pairs.numpy(),
        "start": np.array(starts, np.int32),
        "index": np.concatenate(channels).astype(np.int32),
    }
