"""First-order Taylor scores against differences of the loss, and the masks made of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import explib
from explib.errors import ParamError
from explib.training.taylor import taylor_scores


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    ).double()  # fmt: skip


def batches(count: int = 2) -> list[tuple]:
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 3, 8, 8, generator=draw, dtype=torch.float64), torch.arange(6) % 3)
        for _ in range(count)
    ]


def test_a_score_is_the_square_of_what_shrinking_the_kernel_does_to_the_loss():
    model, given, step = network(), batches(), 1e-5
    found = taylor_scores(model, given, ["0", "3"])
    assert [tuple(own.shape) for own in found.values()] == [(4, 3), (5, 4)]
    model.eval()

    def loss(batch) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model(batch[0]), batch[1]))

    for name, index in (("0", (2, 1)), ("3", (4, 0))):
        kernel = model.get_submodule(name).weight.data[index]
        whole, effects = kernel.clone(), []
        for batch in given:
            kernel.copy_(whole * (1 + step))
            more = loss(batch)
            kernel.copy_(whole * (1 - step))
            effects.append((more - loss(batch)) / (2 * step))
            kernel.copy_(whole)
        wanted = sum(effect**2 for effect in effects) / len(effects)
        assert found[name][index].item() == pytest.approx(wanted, rel=1e-4)


def test_the_kernels_of_least_score_go_and_the_model_stays_as_it_was():
    model = network()
    model[0].weight.requires_grad_(False)  # frozen
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = batches()[0][0]
    masks = explib.prune(model, images, 0.4, "taylor", batches=batches())
    scores = taylor_scores(model, batches(), ["0", "3"])
    assert int((~masks["0"]).sum()) == 4 and int((~masks["3"]).sum()) == 8  # int(0.4 * 12), of 20
    for name, mask in masks.items():
        assert scores[name][~mask].max() <= scores[name][mask].min()
    assert model.training and not model[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_batches_or_with_none_it_says_so():
    model, images = network(), batches()[0][0]
    with pytest.raises(ParamError, match="batches: criterion 'taylor' needs the loss; give"):
        explib.prune(model, images, 0.4, "taylor")
    with pytest.raises(ValueError, match="batches: empty"):
        explib.prune(model, images, 0.4, "taylor", batches=[])
    for images_, labels, message in (
        (images[:, :2], torch.arange(6) % 3, "batches: .* to have 3 channels, but got 2"),
        (images, torch.arange(6), "batches: .*[Tt]arget"),
        (images * float("nan"), torch.arange(6) % 3, "batches: the loss is nan; give finite"),
    ):
        with pytest.raises(ValueError, match=message):
            explib.prune(model, images, 0.4, "taylor", batches=[(images_, labels)])
    with pytest.raises(ParamError, match="batches: is not for criterion"):
        explib.prune(model, images, 0.4, "l1", batches=batches())
