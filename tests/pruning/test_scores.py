"""The score: sums of kernels, levels, and the linear relation they stand for."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from explib.pruning.scores import delta_e, levels, linear_relation, redundancy


def test_a_layer_by_hand():
    weight = torch.tensor([[[[1.0, 2], [3, -2]], [[0, 0], [0, 2]]], [[[1, -1], [0, 0]]] * 2])
    weight[1, 1] = torch.tensor([[-3.0, -1], [0, 0]])
    delta = delta_e(weight)
    assert delta.tolist() == [[4, 2], [0, -4]] and delta.dtype == torch.float64
    # scores over their maximum, 4, doubled: 2, 1, 0, -2
    # sigmoid: 0.880797, 0.731059, 0.5, 0.119203; minus 1/2, times 13: 4.95, 3.004, 0, -4.95
    assert levels(delta).tolist() == [[5, 3], [0, -5]]
    # times 4: 1.523, 0.924, 0, -1.523
    assert levels(delta, 4).tolist() == [[2, 1], [0, -2]]


def test_the_bias_is_added_to_its_filter():
    weight = torch.ones(2, 3, 1, 1)
    assert delta_e(weight, torch.tensor([0.5, -1.0])).tolist() == [[1.5] * 3, [0.0] * 3]


def slow_levels(delta, groups):
    """The formula of the method, kernel by kernel."""
    top = max(max(row) for row in delta)
    if top <= 0:
        top = max(abs(value) for row in delta for value in row) or 1.0
    return [
        [round((1 / (1 + math.exp(-2 * value / top)) - 0.5) * groups) for value in row]
        for row in delta
    ]


@st.composite
def layers(draw):
    """Weights (F, C, K, K) in steps of 1/8, whose sums are exact."""
    filters, channels, side = (draw(st.integers(1, n)) for n in (6, 6, 3))
    shape = (filters, channels, side, side)
    seed = draw(st.integers(0, 2**20))
    span = draw(st.sampled_from([1, 4, 40]))
    low = draw(st.sampled_from([-span, 0, -2 * span]))
    return np.random.default_rng(seed).integers(low, span + 1, shape) / 8


@given(layers(), st.sampled_from([1, 2, 7, 13, 100]))
def test_scores_and_levels_are_those_of_plain_python(weight, groups):
    delta = delta_e(torch.from_numpy(weight).float())
    wanted = [[sum(float(x) for x in kernel.ravel()) for kernel in row] for row in weight]
    assert delta.tolist() == wanted
    ratio = max(map(max, wanted))
    if ratio > 0 and min(map(min, wanted)) / ratio < -300:
        return
    assert levels(delta, groups).tolist() == slow_levels(wanted, groups)


@given(layers(), st.floats(0.01, 100))
def test_levels_do_not_change_with_the_scale_of_the_weights(weight, scale):
    weight = torch.from_numpy(weight)
    if abs(delta_e(weight).max()) < 1e-9:  # scaled, it is what rounding leaves, and decides
        return
    gap = (torch.sigmoid(2 * delta_e(weight) / delta_e(weight).max().clamp(1e-9)) - 0.5) * 13
    if ((gap - gap.floor() - 0.5).abs() < 1e-6).any():
        return
    assert torch.equal(levels(delta_e(weight)), levels(delta_e(weight * scale)))


@given(layers())
def test_levels_keep_the_order_of_the_scores(weight):
    delta = delta_e(torch.from_numpy(weight)).flatten()
    ordered = levels(delta[:, None]).flatten()[delta.argsort()]
    assert (ordered.diff() >= 0).all()


class TestDegenerate:
    def test_all_zero_is_one_level(self):
        assert levels(delta_e(torch.zeros(3, 4, 3, 3))).tolist() == [[0] * 4] * 3

    def test_no_positive_score_is_measured_by_the_largest_magnitude(self):
        # -4 / 4 and -1 / 4, doubled: sigmoid(-2) and sigmoid(-1/2), -4.95 and -1.59
        assert levels(torch.tensor([[-4.0, -1.0]]).double()).tolist() == [[-5, -2]]
        # 0 is not positive either
        assert levels(torch.tensor([[0.0, -4.0]]).double()).tolist() == [[0, -5]]

    @pytest.mark.parametrize("shape", [(1, 5, 3, 3), (5, 1, 3, 3), (5, 4, 1, 1), (1, 1, 1, 1)])
    def test_one_filter_one_channel_one_element(self, shape):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        delta = delta_e(weight)
        torch.testing.assert_close(delta, weight.double().sum((2, 3)), atol=1e-6, rtol=1e-6)
        assert levels(delta).shape == shape[:2]

    def test_a_far_outlier_does_not_overflow(self):
        assert levels(torch.tensor([[1e-300, -1e300]], dtype=torch.float64)).tolist() == [[5, -6]]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_weights_that_are_not_finite_name_the_layer(self, value):
        weight = torch.ones(2, 2, 3, 3)
        weight[1, 0, 2, 2] = value
        with pytest.raises(ValueError, match=r"layer1\.conv: weights hold NaN or infinite"):
            delta_e(weight, layer="layer1.conv")

    @pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
    def test_infinities_that_cancel_are_found(self):
        weight = torch.ones(1, 2, 1, 2)
        weight[0, 0, 0] = torch.tensor([float("inf"), -float("inf")])
        with pytest.raises(ValueError, match="NaN or infinite"):
            delta_e(weight)

    @pytest.mark.parametrize("scale", [1e38, 1e300])
    def test_large_finite_weights_are_not_called_infinite(self, scale):
        dtype = torch.float32 if scale < 1e39 else torch.float64
        weight = torch.full((2, 2, 1, 1), scale, dtype=dtype)
        assert levels(delta_e(weight)).tolist() == [[5, 5], [5, 5]]

    def test_what_is_no_conv_is_named(self):
        with pytest.raises(ValueError, match=r"head: weight has shape \(3, 4\)"):
            delta_e(torch.ones(3, 4), layer="head")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_type_of_weights(dtype):
    weight = torch.arange(16).reshape(2, 2, 2, 2).to(dtype)
    assert delta_e(weight).tolist() == [[6, 22], [38, 54]]


def test_scores_do_not_change_the_weights_and_carry_no_gradient():
    conv = nn.Conv2d(3, 4, 3)
    before = conv.weight.detach().clone()
    assert not delta_e(conv.weight, conv.bias).requires_grad
    assert torch.equal(conv.weight, before)


class TestLinearRelation:
    def test_a_constant_image_gives_the_score_times_its_value_in_the_interior(self):
        torch.manual_seed(0)
        conv = nn.Conv2d(1, 5, 3, padding=1, bias=False).double()
        out = conv(torch.full((1, 1, 9, 9), 2.5, dtype=torch.float64))[:, :, 1:-1, 1:-1]
        wanted = (2.5 * delta_e(conv.weight)).reshape(1, 5, 1, 1).expand_as(out)
        torch.testing.assert_close(out, wanted)

    def test_a_conv_without_padding_on_constant_channels_is_exactly_on_the_line(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 3))
        images = torch.tensor([0.5, 2.0, -1.0]).reshape(1, 3, 1, 1).expand(2, 3, 8, 8)
        delta, ratio, r2 = linear_relation(net, "0", images)
        assert delta.shape == ratio.shape == (18,)
        torch.testing.assert_close(ratio, delta, atol=1e-5, rtol=1e-5)
        assert r2 > 1 - 1e-9

    def test_dead_channels_are_left_out(self):
        images = torch.ones(2, 3, 8, 8)
        images[:, 1] = 0
        delta, _, _ = linear_relation(nn.Sequential(nn.Conv2d(3, 6, 3)), "0", images)
        assert delta.shape == (12,)

    def test_real_activations_of_a_trained_network_follow_it(self, public):
        torch.manual_seed(0)
        images = torch.randn(8, 3, 32, 32)
        _, _, r2 = linear_relation(public.model, "layer2.3.conv1", images)
        assert 0.9 < r2 <= 1


def test_redundancy_by_hand():
    scores = {"a": torch.tensor([[4.0, 4.0], [2.0, 0.0]]), "b": torch.ones(2, 3)}
    one, other = redundancy(scores)
    assert one == {"layer": "a", "kernels": 4, "redundant_pct": 50, "levels": 3}
    assert other == {"layer": "b", "kernels": 6, "redundant_pct": 100, "levels": 1}
