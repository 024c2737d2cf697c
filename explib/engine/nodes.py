"""Calls of aten ops as the rules see them, and the ops they become."""

from math import prod
from typing import Any

import torch

from explib.engine.graph import Op
from explib.engine.views import View, whole


class Made:
    """The ops made so far."""

    def __init__(self):
        self.ops: list[Op] = []
        self.of: dict[str, Op] = {}  # by the name of its value
        self._settled: dict[View, View] = {}

    def add(self, kind: str, name: str, inputs: tuple[str, ...], shape: tuple, **fields) -> View:
        """One more op, and its value."""
        own, count = name, 0
        while own in self.of:
            own, count = f"{name}.{count + 1}", count + 1
        self.of[own] = Op(kind, own, inputs, tuple(shape), **fields)
        self.ops.append(self.of[own])
        return whole(own, shape)

    def settled(self, view: View, label: str) -> View | None:
        """A view as one whose axes are the engine's, by a gather or a flatten where it takes one.

        Those are (C, H, W), (H, W, C), and (C,) of what has but one pixel. None for others.
        """
        if form_of(view):
            return view
        if view not in self._settled:
            found = self._gathered(view, label) or self._flat(view, label)
            if found is None:
                return None
            self._settled[view] = found
        return self._settled[view]

    def _gathered(self, view: View, label: str) -> View | None:
        """Channels in another order."""
        if len(view.shape) != 3:
            return None
        plane = prod(view.shape[1:])
        for last in (False, True):
            form = whole(view.base, view.shape, last)
            axis = 2 if last else 0
            rest = [dim for i, dim in enumerate(view.dims) if i != axis]
            if len(view.dims) != 3 or rest != [d for i, d in enumerate(form.dims) if i != axis]:
                continue
            if all(step and step % plane == 0 for _, step in view.dims[axis]):
                index = [0]
                for n, step in view.dims[axis]:
                    index = [i + step // plane * j for i in index for j in range(n)]
                new = self.add(
                    "gather", f"{view.base}.gather", (view.base,), view.shape,
                    index=tuple(index), label=label,
                )  # fmt: skip
                return whole(new.base, view.shape, last)
        return None

    def _flat(self, view: View, label: str) -> View | None:
        """All of a plane in one axis."""
        if len(view.shape) != 3 or view.dims != whole("", (prod(view.shape),)).dims:
            return None
        shape = (prod(view.shape),)
        return self.add("flatten", f"{view.base}.flatten", (view.base,), shape, label=label)


def form_of(view: View) -> str:
    """Which of the engine's orders the axes of a view have; "" where none."""
    if len(view.shape) not in (1, 3):
        return ""
    if len(view.dims) == 1:
        return "flat" if prod(view.shape[1:]) == 1 and view.dims[0] == view.channels else ""
    shape = (*view.shape, 1, 1)[:3]
    forms = {"plane": whole("", shape).dims, "last": whole("", shape, last=True).dims}
    return next((form for form, dims in forms.items() if dims == view.dims), "")


CHANNELS = {"plane": 0, "last": 2, "flat": 0}  # of the channels


class Node:
    """A call of an aten op as the rules see it.

    args: by the names of its schema; tensors are a View, an Other, or a torch.Tensor that is known.
    size: the result's shape without batch, None where it is no batch of float tensors; of several
    results, sizes has those. used: which of several results somebody reads.
    """

    def __init__(self, made: Made, name: str, label: str, args: dict, sizes: list, used: set[int]):
        self.made, self.name, self.label, self.args = made, name, label, dict(args)
        self.sizes, self.used = sizes, used
        self.size: Any = sizes[0] if len(sizes) == 1 else None

    def __getitem__(self, name: str) -> Any:
        return self.args.get(name)

    def add(self, kind: str, inputs: tuple[str, ...], shape: tuple, **fields) -> View:
        """An op of this node, and its value."""
        return self.made.add(kind, self.name, inputs, shape, label=self.label, **fields)

    def settled(self, value: Any) -> View | None:
        """A value with its axes in one of the engine's orders, if that can be."""
        return self.made.settled(value, self.label) if isinstance(value, View) else None

    def plane(self, value: Any) -> View | None:
        """A value as (C, H, W), if that can be."""
        view = self.settled(value)
        return view if view and len(view.dims) == 3 and form_of(view) == "plane" else None

    def along(self, value: Any, axis: int) -> View | None:
        """A value whose channels are that axis (the batch not counted)."""
        for view in (value, self.settled(value)):
            if not isinstance(view, View) or len(view.shape) not in (1, 3) or not view.dims:
                continue
            if view.dims[axis] == view.channels:
                return view
        return None

    def axis(self, view: View, axis: int) -> int:
        """An axis of the tensor as one of the view, which has no batch: -1 for the batch."""
        return axis % (len(view.dims) + 1) - 1

    def like(self, view: View, kind: str, *others: str, **fields) -> View | None:
        """An op whose result has the axes of its input."""
        if len(view.shape) not in (1, 3):
            return None
        new = self.add(kind, (view.base, *others), view.shape, **fields)
        return View(new.base, view.shape, view.dims)


def floats(value: Any) -> torch.Tensor | None:
    """A known tensor of floats."""
    known = isinstance(value, torch.Tensor) and value.dtype == torch.float32
    return value.detach() if known else None


def pair(value: Any, default: tuple[int, int] | None = None) -> tuple[int, int]:
    """Two numbers for one, or for two."""
    if isinstance(value, (list, tuple)):
        values = tuple(value) or default
        assert values is not None
        return values if len(values) == 2 else values * 2  # type: ignore[return-value]
    return value, value


def formed(value: View, form: str) -> View:
    """A value with its axes in that order."""
    flat = View(value.base, value.shape, (value.channels,))
    return flat if form == "flat" else whole(value.base, (*value.shape, 1, 1)[:3], form == "last")
