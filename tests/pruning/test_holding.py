"""Masks held whatever the loop: seen at what is really convolved, not at a parameter."""

import copy
import io
import itertools
import random
import weakref
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from explib.pruning import checkpoints, holding
from explib.pruning import masks as masking
from explib.pruning.criteria import prune
from tests.conftest import image, make_net


class Convolved(TorchFunctionMode):
    """The weight that each conv of a network gives to F.conv2d, by its name; of several the sum."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.weights, self._now, self._hooks = {}, None, []
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                hook = module.register_forward_pre_hook(lambda m, i, name=name: self.enter(name))
                self._hooks.append(hook)

    def enter(self, name):
        self._now = name

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.conv2d:
            before = self.weights.get(self._now, 0)
            self.weights[self._now] = args[1].detach().abs() + before
        return func(*args, **(kwargs or {}))

    def remove(self):
        for hook in self._hooks:
            hook.remove()


def convolved(model, inputs) -> dict[str, torch.Tensor]:
    with torch.no_grad(), Convolved(model) as seen:
        model(inputs)
    seen.remove()
    return seen.weights


def leaks(model, masks, inputs) -> list[str]:
    """Convs in which a pruned kernel is convolved, though it is not zero."""
    weights = convolved(model, inputs)
    assert masks.keys() <= weights.keys()
    return [name for name, mask in masks.items() if weights[name][~mask].any()]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(c, 6, 3, padding=1) for c in (3, 6, 6))
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 10)
        self.b.weight = self.a.weight  # one weight for two

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.norm(self.b(self.a(x).relu()))
        return self.head(x.mean((2, 3)))


class Wide(nn.Sequential):
    def __init__(self):
        twice = nn.Conv2d(4, 4, (3, 1), padding=(1, 0), bias=False)
        super().__init__(
            nn.Conv2d(3, 4, 5, stride=2, padding=2, padding_mode="circular"),
            *(twice, nn.ReLU(), twice, nn.GroupNorm(2, 4)),  # a module in two places
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 10)),
        )


NETWORKS = [make_net, Residual, Wide]
BEFORE_NORMS = {"5.bias", "6.bias", "b.bias"}
"""What a norm takes away again: their gradients are 0 but for rounding."""


class Centralizing(torch.optim.Optimizer):
    """Each subclass says what an update is, of a gradient and the weight."""

    def __init__(self, params, lr=0.05, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def update(self, grad, weight):
        return grad - grad.mean(tuple(range(1, grad.ndim)), keepdim=True) if grad.ndim > 1 else grad

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    kept = self.state[p].setdefault("average", torch.zeros_like(p))
                    kept.mul_(group["momentum"]).add_(self.update(p.grad, p))
                    p.data.add_(kept, alpha=-group["lr"])  # past the version counter
        return loss


class Orthogonal(Centralizing):
    def update(self, grad, weight):
        if grad.ndim < 2:
            return grad
        u, _, v = torch.linalg.svd(grad.flatten(1) + 1e-3, full_matrices=False)
        return (u @ v).view_as(grad)


class Sign(Centralizing):
    def update(self, grad, weight):
        return torch.where(grad < 0, -1.0, 1.0)  # zero has a sign here


class Averaging(Centralizing):
    def update(self, grad, weight):
        return grad + 0.1 * (weight - weight.mean())


class Dividing(Centralizing):
    def update(self, grad, weight):
        if grad.ndim < 4:
            return grad
        return grad / grad.flatten(2).norm(dim=2)[:, :, None, None]  # 0 / 0


class Lookahead(torch.optim.Optimizer):
    """A wrapper as timm has it: it does not call Optimizer.__init__."""

    def __init__(self, params):
        self.inner = torch.optim.SGD(params, 0.05, momentum=0.9)
        self.param_groups, self.defaults = self.inner.param_groups, {}
        self.state = self.inner.state
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self.slow = [torch.randn_like(p) for g in self.param_groups for p in g["params"]]

    def step(self, closure=None):
        loss = self.inner.step(closure)
        for slow, p in zip(
            self.slow, (p for g in self.param_groups for p in g["params"]), strict=True
        ):
            slow.lerp_(p.data, 0.5)
            p.data.copy_(slow)
        return loss


class Unknown:
    """No torch.optim.Optimizer at all."""

    def __init__(self, params):
        self.params = list(params)

    def step(self, closure=None):
        if closure is not None:
            closure()
        for p in self.params:
            if p.grad is not None:
                p.data -= 0.05 * (p.grad - p.grad.mean() + 0.01)

    def zero_grad(self):
        for p in self.params:
            p.grad = None


OPTIMIZERS = {
    "ASGD": lambda p: torch.optim.ASGD(p, 0.05, weight_decay=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, weight_decay=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.05, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, weight_decay=0.1, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, weight_decay=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, weight_decay=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
    "NAdam": lambda p: torch.optim.NAdam(p, weight_decay=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "Rprop": torch.optim.Rprop,
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "SGD fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "centralizing": Centralizing,
    "orthogonal": Orthogonal,
    "sign": Sign,
    "averaging": Averaging,
    "dividing by zero": Dividing,
    "lookahead": Lookahead,
    "unknown": Unknown,
}
LEFT_OUT = {"Optimizer", "SparseAdam", "Muon"}  # none; of sparse gradients; of matrices only


def test_the_optimizers_of_torch_are_all_there():
    known = {name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type)}
    assert known - LEFT_OUT <= set(OPTIMIZERS)


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return (
        torch.randn(4, 3, 8, 8, generator=generator),
        torch.randint(0, 10, (4,), generator=generator),
    )


def loss_of(model, number: int) -> torch.Tensor:
    images, labels = batch(number)
    return F.cross_entropy(model(images), labels)


def backward(model, optimizer, number):
    optimizer.zero_grad()
    loss_of(model, number).backward()
    optimizer.step(*closure_if_needed(model, optimizer, number))


def closure_if_needed(model, optimizer, number):
    return [_closure(model, optimizer, number)] if isinstance(optimizer, torch.optim.LBFGS) else []


def _closure(model, optimizer, number):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, number)
        loss.backward()
        return loss

    return closure


def closure(model, optimizer, number):
    optimizer.step(_closure(model, optimizer, number))


def by_hand(model, optimizer, number):
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss_of(model, number), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient + 0.01
    optimizer.step(*closure_if_needed(model, optimizer, number))


def centralized(model, optimizer, number):
    optimizer.zero_grad()
    loss_of(model, number).backward()
    for parameter in model.parameters():
        parameter.grad.sub_(parameter.grad.mean() + 0.01)
    optimizer.step(*closure_if_needed(model, optimizer, number))


def accumulated(model, optimizer, number):
    optimizer.zero_grad()
    for more in range(3):
        loss_of(model, number + more).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step(*closure_if_needed(model, optimizer, number))


def scaled(model, optimizer, number):
    if isinstance(optimizer, Unknown | torch.optim.LBFGS | Lookahead):
        return backward(model, optimizer, number)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, number)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return None


ORDERS = ["hold first", "optimizer first", "momentum first", "given"]
LOOPS = [backward, closure, by_hand, centralized, accumulated, scaled]


def masked(build) -> tuple[nn.Module, masking.Masks]:
    torch.manual_seed(0)
    model = build()
    return model, prune(model, image(8), 0.5, "random")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_loop_in_every_order(name):
    for number, (loop, order) in enumerate(itertools.product(LOOPS, ORDERS)):
        build = NETWORKS[(number + number // 4) % 3]
        model, masks = masked(build)
        if order == "hold first":
            holding.hold(model, masks)
        optimizer = OPTIMIZERS[name](model.parameters())
        if order == "given" and name == "unknown":
            continue
        if order in ("momentum first", "given"):
            loop(model, optimizer, 100)
        if order != "hold first":
            holding.hold(model, masks, *[optimizer] * (order == "given"))
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        for number in range(2):
            loop(model, optimizer, number)
            where = (build.__name__, loop.__name__, order, number)
            if name not in ("unknown", "lookahead"):  # those are seen to when a conv computes
                assert masking.held(model, masks), where
            assert not leaks(model, masks, batch(0)[0]), where
        still = {k for k, p in model.named_parameters() if torch.equal(before[k], p)}
        assert still <= BEFORE_NORMS, (build.__name__, loop.__name__, order, still)


def copied(model, optimizer):
    return copy.deepcopy(model), None


def pickled(model, optimizer):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False), None


def assigned(model, optimizer):
    """New parameters, foreign values in all kernels."""
    state = {k: torch.randn_like(v) if v.ndim > 1 else v for k, v in model.state_dict().items()}
    shared = {id(v): state[k] for k, v in model.state_dict(keep_vars=True).items()}
    state = {k: shared[id(v)] for k, v in model.state_dict(keep_vars=True).items()}
    model.load_state_dict(state, assign=True)
    return model, None


def loaded(model, optimizer):
    model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()})
    return model, optimizer


def data_replaced(model, optimizer):
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.1
    return model, optimizer


def moved(model, optimizer):
    return model.to(memory_format=torch.channels_last), optimizer


def frozen_and_back(model, optimizer):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model(batch(0)[0])
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model, optimizer


def resumed(model, optimizer):
    return model, "resumed"


CHANGES = [copied, pickled, assigned, loaded, data_replaced, moved, frozen_and_back, resumed]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_becomes_of_the_model(change):
    draw = random.Random(change.__name__)
    for build, name, given in itertools.product(
        NETWORKS, ["SGD", "Adam", "centralizing", "LBFGS", "unknown"], [False, True]
    ):
        if (given and name == "unknown") or (change is moved and name == "LBFGS"):
            continue  # LBFGS takes no gradients with channels last
        model, masks = masked(build)
        optimizer = OPTIMIZERS[name](model.parameters())
        holding.hold(model, masks, *[optimizer] * given)
        loop = draw.choice(LOOPS)
        loop(model, optimizer, 0)
        model, kept = change(model, optimizer)
        if kept == "resumed" and name != "unknown":
            new = OPTIMIZERS[name](model.parameters())
            new.load_state_dict(optimizer.state_dict())
            optimizer = new
        elif kept is None:
            optimizer = OPTIMIZERS[name](model.parameters())
        assert not leaks(model, masks, batch(0)[0]), (build, name, given)
        for number in range(2):
            loop = draw.choice(LOOPS)
            loop(model, optimizer, number)
            assert not leaks(model, masks, batch(0)[0]), (build, name, given, loop)
            assert masking.held(model, masks)


class TestHooks:
    def test_a_replica_of_data_parallel_is_held_too(self):
        model, masks = masked(make_net)
        holding.hold(model, masks)
        conv, twin = model[3], model[3]._replicate_for_data_parallel()
        twin.weight = (conv.weight + 1.0).clone()  # no parameter, as there
        twin.bias = conv.bias
        twin(torch.zeros(1, 8, 4, 4)).sum().backward()
        assert not twin.weight[~masks["3"]].any() and twin.weight[masks["3"]].all()
        wrapped = nn.DataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
        for number in range(2):
            centralized(wrapped, optimizer, number)
            assert masking.held(model, masks)

    def test_what_is_saved_is_held(self):
        model, masks = masked(make_net)
        holding.hold(model, masks)
        for name in masks:
            model.get_submodule(name).weight.data.add_(1.0)
        state = model.state_dict()
        assert not any(state[f"{name}.weight"][~mask].any() for name, mask in masks.items())

    def test_gradients_and_momentum_do_not_know_pruned_kernels(self):
        model, masks = masked(make_net)
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        backward(model, optimizer, 0)
        holding.hold(model, masks, optimizer)
        for name, mask in masks.items():
            weight = model.get_submodule(name).weight
            assert not optimizer.state[weight]["momentum_buffer"][~mask].any()
        backward(model, optimizer, 1)
        holding.hold(model, masks)
        optimizer.zero_grad()
        loss_of(model, 2).backward()
        for name, mask in masks.items():
            grad = model.get_submodule(name).weight.grad
            assert not grad[~mask].any() and grad[mask].any()

    def test_masks_on_momentum_then_saved_and_loaded_is_the_same_network(self, tmp_path):
        model, masks = masked(make_net)
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        backward(model, optimizer, 0)
        holding.hold(model, masks)
        backward(model, optimizer, 1)
        path = checkpoints.save(tmp_path / "m.safetensors", model, masks, {}, torch.float32)
        again = make_net(1)
        again.load_state_dict(checkpoints.load(path)[0])
        images, _ = batch(0)
        assert torch.equal(again.eval()(images), model.eval()(images))

    def test_an_optimizer_of_another_model_touches_nothing(self):
        model, masks = masked(make_net)
        holding.hold(model, masks)
        weight = model[3].weight
        weight.data.add_(1.0)
        other = make_net(1)
        backward(other, torch.optim.SGD(other.parameters(), 0.1), 0)
        assert weight[~masks["3"]].any() and model(image(8)).isfinite().all()
        assert not weight[~masks["3"]].any()

    def test_released_is_released_for_good(self):
        model, masks = masked(Residual)
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        twin = copy.deepcopy(model)
        for undo in (holding.hold(model, masks, optimizer), holding.hold(model, masks)):
            undo()
        holding.hold(twin, masks)
        holding.release(twin)
        for own in (model, twin):
            backward(own, torch.optim.SGD(own.parameters(), 0.1), 0)
            assert set(leaks(own, masks, batch(0)[0])) == set(masks)
            assert not any(m._forward_pre_hooks for m in own.modules())
            assert not any(m._state_dict_pre_hooks for m in own.modules())

    def test_undone_is_as_it_was_before(self):
        """A loop that holds masks itself leaves those that its user holds."""
        model, masks = masked(Residual)
        first = holding.hold(model, masks)
        optimizer = Averaging(model.parameters())
        second = holding.hold(model, masks, optimizer)
        backward(model, optimizer, 0)
        second()
        backward(model, optimizer, 1)
        assert masking.held(model, masks)
        assert all(len(m._forward_pre_hooks) <= 1 for m in model.modules())
        first()
        backward(model, optimizer, 2)
        assert set(leaks(model, masks, batch(0)[0])) == set(masks)

    def test_a_model_that_is_gone_is_forgotten(self):
        model, masks = masked(make_net)
        holding.hold(model, masks)
        gone = weakref.ref(model[0]._forward_pre_hooks.popitem()[1])
        assert gone() is None or gone() in holding._everywhere
        kept = weakref.ref(model[3])
        del model
        assert kept() is None

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_recorded_graphs_hold_the_network_alone(self):
        model, masks = masked(make_net)
        holding.hold(model, masks)
        images, _ = batch(0)
        graph = str(torch.jit.trace(model.eval(), images).inlined_graph)
        assert "bitwise" not in graph and "_convolution" in graph
        exported = torch.export.export(model.eval(), (images,))
        torch.testing.assert_close(exported.module()(images), model(images))
        assert "bitwise" not in str(exported.graph)

    def test_a_compiled_network_is_held_by_its_optimizer(self):
        model, masks = masked(Residual)
        compiled = torch.compile(model, backend="eager")
        holding.hold(model, masks)
        optimizer = Averaging(compiled.parameters())
        for number in range(2):
            backward(compiled, optimizer, number)
            assert masking.held(model, masks)

    def test_functional_calls_of_torch_are_held(self):
        model, masks = masked(make_net)
        holding.hold(model, masks)
        given = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        torch.func.functional_call(model, given, batch(0)[0])
        assert not any(given[f"{name}.weight"][~mask].any() for name, mask in masks.items())


class TestHoldAgain:
    def test_the_same_masks_again_are_no_news(self, recwarn):
        model, masks = masked(make_net)
        for _ in range(2):
            holding.hold(model, masks)
        assert len(recwarn) == 0
        convs = [m for m in model if isinstance(m, nn.Conv2d)]
        assert [len(conv._forward_pre_hooks) for conv in convs] == [1, 1, 0, 1]

    def test_other_masks_replace_them_and_say_what_is_zero_already(self):
        model, masks = masked(make_net)
        holding.hold(model, masks)
        others = {name: mask.flip(0) for name, mask in masks.items()}
        others.pop("0")
        revived = sum(int((others[n] & ~masks[n]).sum()) for n in others) + int((~masks["0"]).sum())
        with pytest.warns(UserWarning, match=f"replaces .*; {revived} kernels .* start from zero"):
            holding.hold(model, others)
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        for number in range(2):
            backward(model, optimizer, number)
            assert not leaks(model, others, batch(0)[0])
        assert leaks(model, {"0": masks["0"]}, batch(0)[0]) == ["0"]

    def test_the_undoing_of_the_first_leaves_the_second(self):
        model, masks = masked(make_net)
        undo = holding.hold(model, masks)
        holding.hold(model, masks)
        undo()
        backward(model, Averaging(model.parameters()), 0)
        assert masking.held(model, masks)


class Standardizing(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Scaling(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, 2 * self.weight, self.bias, self.stride, self.padding)


class Matrix(nn.Conv2d):
    def forward(self, x):
        columns = F.unfold(x, self.kernel_size, padding=self.padding)
        return (self.weight.flatten(1) @ columns).unflatten(2, x.shape[2:])


class Modulated(nn.Conv2d):
    def forward(self, x, style):
        return F.conv2d(x, self.weight * style)


class TestComputedWeights:
    def one(self, kind) -> tuple[nn.Module, masking.Masks]:
        torch.manual_seed(0)
        mask = torch.rand(6, 3) < 0.5
        return nn.Sequential(kind(3, 6, 3, padding=1)), {"0": mask}

    @pytest.mark.parametrize(
        "make",
        [
            nn.utils.parametrizations.weight_norm,
            nn.utils.parametrizations.spectral_norm,
            nn.utils.parametrizations.orthogonal,
            pytest.param(
                nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")
            ),
            nn.utils.spectral_norm,
        ],
    )
    @pytest.mark.parametrize("call", [holding.hold, masking.apply, masking.check])
    def test_reparametrized(self, make, call):
        model, masks = self.one(nn.Conv2d)
        make(model[0])
        model(image(8))
        with pytest.raises(ValueError, match=r"^masks: 0's weight is computed from other param"):
            call(model, masks)

    @pytest.mark.parametrize("call", [holding.hold, masking.apply])
    def test_a_conv_that_standardizes_is_named(self, call):
        model, masks = self.one(Standardizing)
        before = model[0].weight.detach().clone()
        with pytest.raises(
            ValueError,
            match=r"^masks: 0, a Standardizing, convolves something else than",
        ):
            call(model, masks)
        assert torch.equal(model[0].weight, before)

    def test_a_conv_that_cannot_be_run_by_itself_is_named(self):
        model, masks = self.one(Modulated)
        with pytest.raises(ValueError, match=r"^masks: 0, a Modulated, cannot be run by itself"):
            holding.hold(model, masks)

    @pytest.mark.parametrize("kind", [Scaling, Matrix])
    def test_a_conv_of_ones_own_in_which_zeros_stay_zeros_is_held(self, kind):
        model, masks = self.one(kind)
        holding.hold(model, masks)
        optimizer = Averaging(model.parameters())
        for _ in range(2):
            model(torch.ones(2, 3, 8, 8)).sum().backward()
            optimizer.step()
        assert masking.held(model, masks)
        images = torch.zeros(3, 3, 8, 8)
        for channel in range(3):
            images[channel, channel] = 1
        out = model(images) - model(torch.zeros(1, 3, 8, 8))
        assert torch.equal((out != 0).flatten(2).any(2).T, masks["0"])

    def test_computed_later_is_told_when_it_runs(self):
        for make in (nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm):
            model, masks = self.one(nn.Conv2d)
            holding.hold(model, masks)
            make(model[0])
            with pytest.raises(RuntimeError, match="masks: 0's weight has become one that is comp"):
                model(image(8))

    def test_hooks_of_torch_prune_are_taken_over(self):
        model, masks = self.one(nn.Conv2d)
        nn.utils.prune.random_unstructured(model[0], "weight", 0.3)
        model(image(8))
        elements = model[0].weight_mask.bool()
        optimizer = Averaging(model.parameters())
        with pytest.warns(UserWarning, match=r"torch.nn.utils.prune's hooks on 0 are removed"):
            holding.hold(model, masks)
        for _ in range(2):
            model(torch.ones(2, 3, 8, 8)).sum().backward()
            optimizer.step()
        weight = convolved(model, image(8))["0"]
        assert not weight[~masks["0"]].any() and not weight[~elements].any()
        assert weight[masks["0"][:, :, None, None] & elements].all()


class TestWhatDoesNotFit:
    def test_an_optimizer_that_trains_none_of_it(self):
        model, masks = masked(make_net)
        optimizer = torch.optim.SGD(make_net(1).parameters(), 0.1)
        with pytest.raises(ValueError, match=r"^optimizer: has no weight of a masked conv, 0 for"):
            holding.hold(model, masks, optimizer)

    @pytest.mark.parametrize("given", [0.1, "sgd", make_net(1).parameters()])
    def test_what_is_no_optimizer(self, given):
        model, masks = masked(make_net)
        before = model.state_dict()["0.weight"].clone()
        with pytest.raises(TypeError, match=r"^optimizer: \w+; give a torch.optim.Optimizer, or"):
            holding.hold(model, masks, given)
        assert torch.equal(model.state_dict()["0.weight"], before)

    def test_masks_of_a_wrapper_are_told_their_names(self):
        model, masks = masked(make_net)
        wrapped = prune(nn.DataParallel(model), image(8), 0.5, "random")
        for call, own, given, name in (
            (holding.hold, model, wrapped, "'module.0' is no conv of this network; here it is '0'"),
            (
                holding.hold,
                nn.DataParallel(model),
                masks,
                "'0' is no conv .* here it is 'module.0'",
            ),
        ):
            with pytest.raises(ValueError, match=name):
                call(own, given)
        holding.hold(nn.DataParallel(model), wrapped)
        backward(model, Averaging(model.parameters()), 0)
        assert masking.held(model, masks)

    def test_two_masks_for_one_weight(self):
        model, masks = masked(Residual)
        assert list(masks) == ["stem", "a"]
        holding.hold(model, masks | {"b": masks["a"].clone()})
        with pytest.raises(ValueError, match="b has the weight of a; give one mask for both"):
            holding.hold(model, masks | {"b": ~masks["a"]})

    def test_numpy_masks_simply_work(self, tmp_path):
        model, masks = masked(make_net)
        arrays = {name: mask.numpy() for name, mask in masks.items()}
        for array in arrays.values():
            array.flags.writeable = False
        holding.hold(model, arrays)
        assert masking.held(model, arrays) and not masking.leaks(model, arrays)
        assert masking.sparsity(arrays) == masking.sparsity(masks)
        path = checkpoints.save_masks(tmp_path / "m.safetensors", arrays)
        assert all(
            torch.equal(checkpoints.load_masks(path)[0][n], mask) for n, mask in masks.items()
        )
        checkpoints.save(tmp_path / "c.safetensors", model, arrays, {})
        with pytest.raises(ValueError, match="0 has a list; give bool"):
            holding.hold(model, {"0": [True]})


class TestMasksOf:
    def test_a_network_knows_its_own(self):
        model, masks = masked(Residual)
        masking.apply(model, masks)
        found = masking.masks_of(model)
        assert list(found) == list(masks)
        assert all(torch.equal(found[name], mask) for name, mask in masks.items())
        assert masking.masks_of(Residual()) == {}

    def test_layers_of_zeros_only_are_none(self):
        model, _ = masked(make_net)
        nn.init.zeros_(model[3].weight)
        assert masking.masks_of(model) == {}
