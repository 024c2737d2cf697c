"""Masks held: pruned kernels stay zero in any training loop, whatever an optimizer makes of them.

Three things together, since none is enough. Gradients of pruned kernels become zero, so that norms,
momentum and matrix updates do not know them. After the step of any torch.optim.Optimizer of the
process, pruned weights and what the optimizer keeps of them become zero: whatever it did. And
before a conv computes, or is saved, its pruned weights become zero: whoever else wrote to them, and
whichever tensor is its weight by now.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from explib.pruning.layers import conv_at, described
from explib.pruning.masks import Masks, apply, check, spread, take_over

# all bits or none: faster than filling by a mask, and no NaN survives it
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Held:
    """The hook of a masked conv, which goes with its copies, to other devices and into files."""

    def __init__(self, name: str, pruned: torch.Tensor, gradients: bool = True):
        """name: of the conv. pruned: bool, (F, C, 1, 1) or (F, C, K, K).

        gradients: zeroed as soon as they are there; else somebody does that before the step.
        """
        self.name, self.pruned, self.gradients = name, pruned, gradients
        self._bits: dict[tuple, torch.Tensor] = {}
        self._wide: dict[tuple, torch.Tensor] = {}
        self._weight: Callable[[], Any] = lambda: None
        self._conv: Callable[[], Any] = lambda: None
        self._hook = None
        self.released = False

    def __getstate__(self) -> dict:
        return {"name": self.name, "pruned": self.pruned}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)  # type: ignore[misc]  # no subclass has another one

    def __call__(self, conv: nn.Module, inputs: tuple) -> None:
        """Before the conv computes."""
        # graphs that are recorded for elsewhere shall hold the network alone; compiled ones rely on
        # what follows each step
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        weight: Any = conv.weight
        if isinstance(weight, nn.Parameter):
            self.follow(conv)
        elif conv._parameters.get("weight") is None and not getattr(conv, "_is_replica", False):
            raise RuntimeError(
                f"masks: {self.name}'s weight has become one that is computed from others, and is "
                "not held; remove what computes it, or release the masks (explib.release)"
            )
        self.zero(weight)

    def before_saving(self, conv: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Before the conv's state is read."""
        if (weight := conv._parameters.get("weight")) is not None:
            self.zero(weight)

    def put_on(self, conv: nn.Module) -> None:
        """Hold the conv from now on."""
        conv.register_forward_pre_hook(self)
        conv.register_state_dict_pre_hook(self.before_saving)
        self.follow(conv)

    def take_off(self, conv: nn.Module) -> None:
        """Hold it no longer."""
        self.forget()
        hooks = ((conv._forward_pre_hooks, self), (conv._state_dict_pre_hooks, self.before_saving))
        for own, hook in hooks:
            for key in [key for key, value in own.items() if value == hook]:
                del own[key]

    def follow(self, conv: nn.Module) -> None:
        """See to the weight that the conv has now."""
        weight: Any = conv.weight
        if self._weight() is not weight:
            self.forget()
            self._weight, self._conv = weakref.ref(weight), weakref.ref(conv)
            _everywhere.add(self)
        if self.gradients and self._hook is None and weight.requires_grad and weight.is_leaf:
            self._hook = weight.register_post_accumulate_grad_hook(self._on_gradient)

    def forget(self) -> None:
        """Leave the weight to itself."""
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._weight = None, lambda: None
        _everywhere.discard(self)

    def weight(self) -> torch.Tensor | None:
        """The conv's present weight; None once it is gone."""
        conv = self._conv()
        if conv is not None and conv._parameters.get("weight") is not self._weight():
            self.follow(conv)
        return self._weight()

    def zero(self, tensor: torch.Tensor) -> None:
        """Zero what is pruned, NaN included, in a tensor of the weight's shape."""
        # autograd may have saved the weight already, for another call; its values do not change
        bits = tensor.data.view(_BITS[tensor.element_size()])
        key = bits.device, bits.dtype
        if key not in self._bits:  # laid out as the weight, for speed
            full = torch.full_like(bits, -1)
            self._bits[key] = full.masked_fill_(self.pruned.to(bits.device), 0)
        bits.bitwise_and_(self._bits[key])

    def factor(self, weight: torch.Tensor) -> torch.Tensor:
        """1 where a weight stays and 0 elsewhere, of the weight's own shape, type and layout."""
        key = weight.device, weight.dtype
        if key not in self._wide:
            kept = ~self.pruned.to(weight.device)
            self._wide[key] = torch.ones_like(weight, requires_grad=False) * kept
        return self._wide[key]

    def _on_gradient(self, weight: torch.Tensor) -> None:
        if weight.grad is not None:
            self.zero(weight.grad)


_everywhere: "weakref.WeakSet[Held]" = weakref.WeakSet()  # all that is held in this process


def _after_step(optimizer: torch.optim.Optimizer, *_) -> None:
    """Zero pruned weights, and what an optimizer keeps in their shape, after any one's step."""
    if not _everywhere:
        return
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    every = [(held, held.weight()) for held in list(_everywhere)]
    pairs = [(held, w) for held, w in every if w is not None and id(w) in own]
    _zero_all([(held, t) for held, weight in pairs for t in (weight, *_kept(optimizer, weight))])


register_optimizer_step_post_hook(_after_step)


def _kept(optimizer: torch.optim.Optimizer, weight: torch.Tensor) -> list[torch.Tensor]:
    """What an optimizer keeps of a weight in its shape, as momentum."""
    state = optimizer.state.get(weight, {})
    tensors = [v for v in getattr(state, "values", list)() if isinstance(v, torch.Tensor)]
    return [v for v in tensors if v.shape == weight.shape and v.is_floating_point()]


def _zero_all(pairs: list[tuple[Held, torch.Tensor]]) -> None:
    """Zero what is pruned in many tensors; on a GPU in few operations."""
    alike = [(t.data, held.factor(t)) for held, t in pairs if t.is_cuda]
    if alike:  # 0 * NaN stays NaN until the conv computes
        torch._foreach_mul_(*map(list, zip(*alike, strict=True)))
    for held, tensor in pairs:
        if not tensor.is_cuda:
            held.zero(tensor)


def hold(
    model: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], None]:
    """Zero the pruned kernels and keep them zero in any training loop; returns what undoes it.

    It holds for every torch.optim.Optimizer, for gradients changed or set by hand, for copies of
    the model and for weights loaded or moved later. optimizer: the only one that trains the model;
    gradients are then zeroed in one operation before its step rather than one by one, and what it
    has gathered of pruned kernels is cleared at once rather than after its next step. Masks held
    before are replaced, with a warning where they were others, until this is undone. ValueError,
    naming the layer, for masks that do not fit or cannot be held: see `check`; TypeError for an
    optimizer that has no step.
    """
    if optimizer is not None and not callable(getattr(optimizer, "step", None)):
        raise TypeError(
            f"optimizer: {described(optimizer)}; give a torch.optim.Optimizer, or leave it out"
        )
    masks = check(model, masks)
    elements = take_over(model, masks)
    masks = spread(model, masks)
    names = {conv_at(model, name): name for name in masks}  # one registered twice is one
    convs = {name: conv for conv, name in names.items()}
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        optimizer = None  # no torch.optim.Optimizer, or a wrapper that never became one
    if optimizer is not None:
        _trains(optimizer, convs)
    replaced = _replace(convs, model, masks)
    apply(model, masks)
    held = {}
    for name, conv in convs.items():
        pruned = ~masks[name].to(conv.weight.device)[:, :, None, None]
        if name in elements:
            pruned = pruned | ~elements[name].to(pruned.device)
        one = held[name] = Held(name, pruned, gradients=optimizer is None)
        one.put_on(conv)
    hook = None
    if optimizer is not None:
        for name, conv in convs.items():
            for kept in _kept(optimizer, conv.weight):
                held[name].zero(kept)
        hook = optimizer.register_step_pre_hook(_before_step(list(held.values())))

    def release() -> None:
        if hook is not None:
            hook.remove()
        there = any(one is found for _, found in _holders(model) for one in held.values())
        for name, conv in convs.items():
            held[name].take_off(conv)
            held[name].released = True
        for conv, earlier in replaced if there else ():
            if not earlier.released:
                earlier.put_on(conv)

    return release


def mask_gradients(
    model: nn.Module, masks: Masks, optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    """Zero the gradients of pruned kernels before each step, and nothing else; returns the undoing.

    For weights that shrink to zero meanwhile: weight decay and momentum may still change them.
    """
    held = []
    for name, mask in check(model, masks).items():
        conv = conv_at(model, name)
        one = Held(name, ~mask.to(conv.weight.device)[:, :, None, None], gradients=False)
        one._weight = weakref.ref(conv.weight)
        held.append(one)
    return optimizer.register_step_pre_hook(_before_step(held)).remove


def release(model: nn.Module) -> None:
    """Let a model's pruned kernels learn again, whoever holds them."""
    for conv, held in list(_holders(model)):
        held.take_off(conv)
        held.released = True


def _before_step(held: list[Held]) -> Callable:
    """What an optimizer does before its step: zero gradients, also those a closure makes."""

    def mask_all() -> None:
        weights = [(one._weight(), one) for one in held]
        pairs = [(w.grad, one.factor(w)) for w, one in weights if w is not None]
        pairs = [(grad, factor) for grad, factor in pairs if grad is not None]
        if pairs:
            torch._foreach_mul_(*map(list, zip(*pairs, strict=True)))

    def hook(optimizer, args: tuple, kwargs: dict):
        mask_all()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            return None

        def masked():
            loss = closure()
            mask_all()
            return loss

        if len(args) > 1:
            return (args[0], masked, *args[2:]), kwargs
        return args, kwargs | {"closure": masked}

    return hook


def _trains(optimizer: torch.optim.Optimizer, convs: dict[str, nn.Conv2d]) -> None:
    """ValueError unless an optimizer has a weight of these convs, where any is trained at all."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {name: c for name, c in convs.items() if c.weight.requires_grad}
    if trained and not any(id(conv.weight) in own for conv in trained.values()):
        raise ValueError(
            f"optimizer: has no weight of a masked conv, {next(iter(trained))} for one; make it of "
            "this model's parameters, as they are after loading and moving"
        )


def _replace(convs: dict[str, nn.Conv2d], model: nn.Module, masks: Masks) -> list[tuple]:
    """Take off the masks held so far, and return them; a warning tells of those that are others."""
    known = {id(conv): masks[name] for name, conv in convs.items()}
    revived, replaced = 0, list(_holders(model))
    for conv, held in replaced:
        pruned = held.pruned.flatten(2).all(2)
        mask = known.get(id(conv))
        kept = mask.to(pruned.device) if mask is not None else torch.ones_like(pruned)
        revived += int((pruned & kept).sum())
        held.take_off(conv)
    if revived:
        warnings.warn(
            f"hold: replaces the masks held so far; {revived} kernels that they pruned stay in the "
            "new ones, and start from zero",
            stacklevel=3,
        )
    return replaced


def _holders(model: nn.Module) -> Iterable[tuple[nn.Module, Held]]:
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, Held):
                yield module, hook
