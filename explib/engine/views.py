"""Tensors that are another one's values in another order: reshaped, permuted, expanded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch

Atom = tuple[int, int]
"""A run of values: how many, and how far apart in memory (0: the same one, repeated)."""


@dataclass(frozen=True)
class View:
    """A tensor whose values are those of an engine's value, `base`, of that shape without batch.

    dims: for each axis but the batch, the runs of `base` that it goes through, outermost first.
    """

    base: str
    shape: tuple[int, ...]
    dims: tuple[tuple[Atom, ...], ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The shape of the tensor itself, without the batch."""
        return tuple(prod(n for n, _ in dim) for dim in self.dims)

    @property
    def channels(self) -> tuple[Atom, ...]:
        """The runs of an axis that is the base's channels in order."""
        return _joined([(self.shape[0], prod(self.shape[1:]))])

    def reshaped(self, sizes: Sequence[int]) -> "View | None":
        """The view in row-major order with these sizes; None where an axis would be cut askew."""
        left = [atom for dim in self.dims for atom in dim]
        dims = []
        for size in sizes:
            dim: list[Atom] = []
            while size > 1:
                n, step = left.pop(0) if left else (1, 0)
                if n == 1 or (size % n and n % size):
                    return None
                taken = min(n, size)
                if n > taken:
                    left.insert(0, (n // taken, step))
                dim.append((taken, step * (n // taken)))
                size //= taken
            dims.append(_joined(dim))
        return None if left else replace(self, dims=tuple(dims))

    def permuted(self, order: Sequence[int]) -> "View":
        """The view with its axes (the batch not counted) in that order."""
        return replace(self, dims=tuple(self.dims[axis] for axis in order))

    def expanded(self, sizes: Sequence[int]) -> "View | None":
        """The view with axes of one repeated to these sizes; None where it does not fit them."""
        if len(sizes) != len(self.dims):
            return None
        pairs = list(zip(sizes, self.sizes, self.dims, strict=True))
        if any(size != own and own != 1 for size, own, _ in pairs):
            return None
        return replace(self, dims=tuple(d if s == own else ((s, 0),) for s, own, d in pairs))

    def unexpanded(self) -> "View":
        """The view with one value where an axis repeats it."""
        repeated = [len(dim) == 1 and dim[0][1] == 0 for dim in self.dims]
        pairs = zip(repeated, self.dims, strict=True)
        return replace(self, dims=tuple(() if again else dim for again, dim in pairs))

    @cached_property
    def _itself(self) -> bool:
        """Whether it is the value itself, of one shape or another."""
        return self.dims == whole("", self.sizes).dims

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of a tensor (N, *shape) of its base's values."""
        if self._itself and self.sizes == tuple(tensor.shape[1:]):
            return tensor
        atoms = [atom for dim in self.dims for atom in dim]
        order = sorted({atom for atom in atoms if atom[1]}, key=lambda atom: -atom[1])
        count = len(tensor)
        found = tensor.reshape(count, *(n for n, _ in order))
        found = found.permute(0, *(1 + order.index(atom) for atom in atoms if atom[1]))
        found = found.reshape(count, *(n if step else 1 for n, step in atoms))
        return found.expand(count, *(n for n, _ in atoms)).reshape(count, *self.sizes)


def whole(base: str, shape: Sequence[int], last: bool = False) -> View:
    """The value itself; last: its channels (of C, H, W) as the last axis."""
    dims = [_joined([(size, prod(shape[i + 1 :]))]) for i, size in enumerate(shape)]
    return View(base, tuple(shape), tuple(dims[1:] + dims[:1] if last else dims))


def _joined(atoms: list[Atom]) -> tuple[Atom, ...]:
    """Runs without those of one, and what follows on itself as one run."""
    joined: list[Atom] = []
    for n, step in atoms:
        if n == 1:
            continue
        if joined and joined[-1][1] == n * step:
            joined[-1] = (joined[-1][0] * n, step)
        else:
            joined.append((n, step))
    return tuple(joined)
