"""Which convs go by Winograd's way, and their kernels at its points; see csrc/winograd.h."""

import ctypes

import numpy as np
import torch

from explib.engine import geometry
from explib.engine.build import block
from explib.engine.geometry import Shape
from explib.engine.graph import Op

_VALUES = np.array([0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5)])
_APART = (_VALUES[:, None] - _VALUES + np.eye(5)).prod(1)
_POINTS = np.vstack([np.vander(_VALUES, 3, increasing=True) / _APART[:, None], [0, 0, 1]])
"""What three weights in a row are at the points (6, 3)."""


def points(
    op: Op,
    source: Shape,
    keep: np.ndarray,
    weight: np.ndarray,
    blocks: bool,
    library: ctypes.CDLL,
) -> dict[str, np.ndarray]:
    """The kernels (K, 9) of a conv at the points at which float32 is computed, by plan.h's names.

    Of blocks of images, if wanted, and of single ones; those that go another way are left out.
    keep (F, C / groups): which kernels of the conv these are.
    """
    if op.kernel != (3, 3) or op.stride != (1, 1) or not geometry.plain(op, source):
        return {}
    shared = keep.sum() / max(keep.shape[0], source[0])  # kernels of a filter, or of a channel
    lanes = block(library, torch.float32)
    by_columns = bool(library.explib_winograd_by_columns())
    # Transforms have to be shared by enough kernels, and tiles to fit the plane. By measurements of
    # 16 to 512 channels, on a Zen 5 and, with 16 registers, a Zen 3
    least, side = (18, 4) if by_columns else (7, 7) if lanes > 8 else (4, 4)
    blocks = blocks and min(op.shape[1:]) >= side
    found = {}
    if blocks and shared >= least:
        found["winograd"] = _both(weight, source, library)
    elif blocks and by_columns and shared >= 3:
        found["winograd_columns"] = _columns(weight)
    _, height, width = geometry.chw(op.shape)
    runs = -(-height // 4) * -(-width // lanes)  # of tiles side by side, four in a vector
    if shared >= 4 and library.explib_winograd_four(height, width):
        found["winograd_alone"] = _four(weight)
    # of single images, vectors of tiles have to be much fewer than those of pixels
    elif shared >= 4 and geometry.vectors(op.shape, lanes) >= 8 * -(-runs // 4):
        both = found.get("winograd")
        found["winograd_alone"] = _both(weight, source, library) if both is None else both
    return found


def _spread(weight: np.ndarray) -> np.ndarray:
    """Kernels (K, 9) at the points along both axes: (K, 6, 6)."""
    return _POINTS @ weight.reshape(-1, 3, 3).astype(np.float64) @ _POINTS.T


def _both(weight: np.ndarray, source: Shape, library: ctypes.CDLL) -> np.ndarray:
    """Kernels (K, 9) at the points along both axes, (6, K, 6) or (36, K, 1)."""
    whole_rows = library.explib_winograd_whole_rows(source[0])
    spread = _spread(weight).reshape(len(weight), *((6, 6) if whole_rows else (36, 1)))
    return np.ascontiguousarray(spread.swapaxes(0, 1), np.float32)


def _four(weight: np.ndarray) -> np.ndarray:
    """Kernels (K, 9) at the points along both axes, two rows together: (3, K, 6, 2)."""
    spread = _spread(weight)
    pairs = np.stack([spread[:, [0, 1, 3]], spread[:, [5, 2, 4]]], -1)  # (K, 3, 6, 2)
    return np.ascontiguousarray(pairs.swapaxes(0, 1), np.float32)


def _columns(weight: np.ndarray) -> np.ndarray:
    """Kernels (K, 9) at the points along columns, of each tap across: (2, K, 3, 3)."""
    spread = _POINTS @ weight.reshape(-1, 3, 3).astype(np.float64)  # (K, 6, 3)
    spread = spread.reshape(-1, 2, 3, 3).transpose(1, 0, 3, 2)
    return np.ascontiguousarray(spread, np.float32)
