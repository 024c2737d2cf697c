"""Masks on a model: held in any training loop, checked, saved, and the network made small."""

import pytest
import torch
import torch.nn.functional as F

from explib import models
from explib.pruning import checkpoints, holding
from explib.pruning import masks as masking
from explib.pruning.criteria import prune
from explib.pruning.masks import Masks
from tests.conftest import image


@pytest.fixture
def masks(net) -> Masks:
    return prune(net, image(8), 0.5, "B")


def pruned_values(net, masks):
    return torch.cat([net.get_submodule(n).weight[~mask].flatten() for n, mask in masks.items()])


def steps(net, optimizer, count=4):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        images = torch.randn(6, 3, 8, 8, generator=generator)
        labels = torch.randint(0, 10, (6,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=5e-2, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.9, weight_decay=0.1),
}


class TestHold:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    @pytest.mark.parametrize("known", [True, False])
    def test_pruned_kernels_stay_zero_and_the_others_learn(self, net, masks, name, known):
        before = {n: net.get_submodule(n).weight.detach().clone() for n in masks}
        optimizer = OPTIMIZERS[name](net.parameters())
        holding.hold(net, masks, optimizer if known else None)
        steps(net, optimizer)
        assert not pruned_values(net, masks).any() and masking.held(net, masks)
        for layer, mask in masks.items():
            weight = net.get_submodule(layer).weight
            assert (weight[mask] != before[layer][mask]).flatten(1).any(1).all()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_poisoned_pruned_weights_become_zero(self, net, masks, value):
        with torch.no_grad():
            for name, mask in masks.items():
                net.get_submodule(name).weight[~mask] = value
        assert not masking.held(net, masks)
        holding.hold(net, masks)
        steps(net, OPTIMIZERS["sgd"](net.parameters()))
        assert masking.held(net, masks)
        assert all(torch.isfinite(parameter).all() for parameter in net.parameters())

    def test_gradients_that_accumulate_are_masked_too(self, net, masks):
        holding.hold(net, masks)
        for _ in range(3):
            net(torch.ones(2, 3, 8, 8)).sum().backward()
        for name, mask in masks.items():
            assert not net.get_submodule(name).weight.grad[~mask].any()
            assert net.get_submodule(name).weight.grad[mask].any()

    def test_released_kernels_learn_again(self, net, masks):
        optimizer = OPTIMIZERS["sgd"](net.parameters())
        holding.hold(net, masks)()
        holding.hold(net, masks, optimizer)()
        steps(net, optimizer)
        assert pruned_values(net, masks).any() and not masking.held(net, masks)

    def test_layers_without_a_mask_are_left_alone(self, net):
        before = net[6].weight.detach().clone()
        holding.hold(net, {"0": torch.eye(8, 3, dtype=torch.bool)})
        assert torch.equal(net[6].weight, before)

    def test_apply_scales_only_the_pruned(self, net, masks):
        before = net[6].weight.detach().clone()
        masking.apply(net, masks, 0.25)
        mask = masks["6"]
        assert torch.equal(net[6].weight[mask], before[mask])
        assert torch.equal(net[6].weight[~mask], before[~mask] * 0.25)

    def test_held_sees_a_single_element(self, net, masks):
        masking.apply(net, masks)
        assert masking.held(net, masks)
        filter_, channel = (~masks["3"]).nonzero()[0]
        with torch.no_grad():
            net[3].weight[filter_, channel, 1, 1] = 1e-30
        assert not masking.held(net, masks)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"9": torch.ones(2, 2, dtype=torch.bool)}, "'9' is no conv of this network"),
        ({"1": torch.ones(8, dtype=torch.bool)}, "'1' is no conv of this network"),
        ({"0": torch.ones(8, 3)}, r"0 has a torch.float32 mask \(8, 3\); give bool \(8, 3\)"),
        ({"0": torch.ones(3, 8, dtype=torch.bool)}, r"mask \(3, 8\); give bool \(8, 3\)"),
        ({"0": torch.zeros(8, 3, dtype=torch.bool)}, "0 would lose every kernel"),
    ],
)
def test_masks_that_do_not_fit_change_nothing(net, masks, message):
    before = net[0].weight.detach().clone()
    for call in (masking.check, masking.apply, holding.hold):
        with pytest.raises(ValueError, match=message):
            call(net, masks)
    assert torch.equal(net[0].weight, before)


def test_sparsity_is_over_all_kernels():
    masks = {"a": torch.tensor([[True, False]]), "b": torch.ones(2, 3, dtype=torch.bool)}
    assert masking.sparsity(masks) == 1 / 8
    assert masking.sparsity({}) == 0


class TestFiles:
    def test_masks_come_back_at_a_bit_a_kernel(self, tmp_path):
        masks = {
            "a": torch.rand(7, 9, generator=torch.Generator().manual_seed(0)) < 0.5,
            "b": torch.rand(64, 1000, generator=torch.Generator().manual_seed(1)) < 0.5,
        }
        path = checkpoints.save_masks(tmp_path / "m.safetensors", masks, {"arch": "x"})
        found, meta = checkpoints.load_masks(path)
        assert meta["arch"] == "x" and found.keys() == masks.keys()
        assert all(torch.equal(found[name], mask) for name, mask in masks.items())
        assert path.stat().st_size < 64 * 1000 / 8 + 1000

    def test_another_file_is_refused(self, tmp_path, net, masks):
        masking.apply(net, masks)
        compact = checkpoints.save(tmp_path / "c.safetensors", net, masks, {})
        with pytest.raises(ValueError, match="holds no masks"):
            checkpoints.load_masks(compact)
        with pytest.raises(ValueError, match="no compact network"):
            checkpoints.load(checkpoints.save_masks(tmp_path / "m.safetensors", masks))


class TestCompact:
    @pytest.fixture
    def vgg(self):
        torch.manual_seed(0)
        model = models.build("vgg_16_bn")
        masks = prune(model, image(32), 0.75, "B")
        masking.apply(model, masks)
        return model, masks

    def test_fp32_comes_back_bit_for_bit(self, tmp_path, net, masks):
        masking.apply(net, masks)
        path = tmp_path / "c.safetensors"
        checkpoints.save(path, net, masks, {"arch": "x"}, torch.float32)
        state, found, meta = checkpoints.load(path)
        assert meta["arch"] == "x" and state.keys() == net.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
        assert all(torch.equal(found[name], mask) for name, mask in masks.items())

    def test_fp16_keeps_three_digits_zeros_and_all_else_exactly(self, tmp_path, vgg):
        model, masks = vgg
        checkpoints.save(tmp_path / "c.safetensors", model, masks, {})
        state, _, _ = checkpoints.load(tmp_path / "c.safetensors")
        for name, tensor in model.state_dict().items():
            assert state[name].dtype == tensor.dtype
            if tensor.ndim > 1:
                torch.testing.assert_close(state[name], tensor, rtol=2**-11, atol=1e-7)
            else:
                assert torch.equal(state[name], tensor)
        again = models.build("vgg_16_bn")
        again.load_state_dict(state)
        assert masking.held(again, masks)

    def test_the_file_holds_what_is_left_only(self, tmp_path, vgg):
        model, masks = vgg
        compact = checkpoints.save(tmp_path / "c.safetensors", model, masks, {}, torch.float32)
        dense = checkpoints.save(tmp_path / "d.safetensors", model, {}, {}, torch.float32)
        gone = sum(int((~mask).sum()) * 9 * 4 for mask in masks.values())
        positions = sum(mask.numel() for mask in masks.values()) / 8
        saved = dense.stat().st_size - compact.stat().st_size
        assert abs(saved - gone + positions) < 5000
        half = checkpoints.save(tmp_path / "h.safetensors", model, masks, {})
        assert half.stat().st_size < 0.16 * dense.stat().st_size

    def test_kernels_that_do_not_match_their_places_are_named(self, tmp_path, net, masks):
        from explib.files import load_tensors, save_tensors

        masking.apply(net, masks)
        path = checkpoints.save(tmp_path / "c.safetensors", net, masks, {})
        tensors, meta = load_tensors(path)
        tensors["3.weight"] = tensors["3.weight"][1:]
        save_tensors(path, tensors, meta)
        with pytest.raises(ValueError, match=r"c\.safetensors: 3 has 23 kernels for 24 places"):
            checkpoints.load(path)

    def test_a_file_that_lacks_positions_is_a_value_error(self, tmp_path, net, masks):
        from explib.files import load_tensors, save_tensors

        masking.apply(net, masks)
        path = checkpoints.save(tmp_path / "c.safetensors", net, masks, {})
        tensors, meta = load_tensors(path)
        del tensors["3.weight.positions"]
        save_tensors(path, tensors, meta)
        with pytest.raises(ValueError, match=r"c\.safetensors"):
            checkpoints.load(path)


def test_frozen_convs_are_zeroed_and_stay(net, masks):
    net[0].weight.requires_grad_(False)
    holding.hold(net, masks)
    before = net[0].weight.clone()
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    steps(net, torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=0.1))
    assert masking.held(net, masks) and torch.equal(net[0].weight, before)


def test_a_weight_made_of_others_is_refused_and_left_alone(net, masks):
    torch.nn.utils.parametrizations.weight_norm(net[0])
    before = net[0].weight.clone()
    with pytest.raises(ValueError, match="masks: 0's weight is computed from other parameters"):
        holding.hold(net, masks)
    assert torch.equal(net[0].weight, before)
