"""Networks of any kind, run with example inputs of any kind: what is found, and how it counts."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from explib.pruning import counting
from explib.pruning.criteria import prune
from explib.pruning.layers import find_convs, prunable
from tests.conftest import image


def function(network, **modules) -> nn.Module:
    """A network of these modules whose forward is `network(self, ...)`."""
    kind = type("Network", (nn.Module,), {"forward": network})
    made = kind()
    for name, module in modules.items():
        setattr(made, name, module)
    return made


def conv(channels=3, filters=4, kernel=3) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, kernel, padding=kernel // 2)


def dense(model, example_inputs) -> int:
    return counting.macs(model, example_inputs)["dense"]


class TestExampleInputs:
    def test_a_tensor_a_tuple_a_dict_and_any_batch_count_the_same(self):
        model = function(lambda self, x, times=1: self.conv(x) * times, conv=conv())
        x = torch.zeros(2, 3, 6, 5)
        wanted = 4 * 3 * 9 * 30
        for given in (x, x[:1], (x,), (x, 2), {"x": x}, {"times": 2, "x": x}):
            assert dense(model, given) == wanted
            assert find_convs(model, given)[0].positions == 30

    def test_two_inputs_of_different_sizes(self):
        def network(self, left, right):
            return self.left(left).mean() + self.right(right).mean()

        model = function(network, left=conv(1), right=conv(2))
        inputs = torch.zeros(1, 1, 128, 64), torch.zeros(1, 2, 10, 10)
        assert [c.name for c in find_convs(model, inputs)] == ["left", "right"]
        assert dense(model, inputs) == 4 * 9 * 128 * 64 + 8 * 9 * 100
        assert dense(model, dict(zip(("left", "right"), inputs, strict=True))) == dense(
            model, inputs
        )

    def test_images_that_are_not_square_and_of_one_channel(self):
        (found,) = find_convs(conv(1), torch.zeros(1, 1, 128, 64))
        assert (found.out_h, found.out_w, found.positions) == (128, 64, 128 * 64)

    def test_one_image_without_a_batch(self):
        assert dense(conv(), torch.zeros(3, 6, 5)) == dense(conv(), torch.zeros(1, 3, 6, 5))

    def test_a_list_of_images_is_as_many_examples(self):
        model = function(lambda self, images: [self.conv(x[None]) for x in images], conv=conv())
        images = [torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)]
        assert dense(model, (images,)) == dense(model, images) == 12 * 9 * 16

    def test_patches_folded_into_the_batch_all_count(self):
        def patches(self, x):  # four 4 x 4 of an 8 x 8
            x = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5)
            return self.conv(x.flatten(0, 2))

        def frames(self, x):
            return self.conv(x.flatten(0, 1))

        assert dense(function(patches, conv=conv()), torch.zeros(2, 3, 8, 8)) == 12 * 9 * 64
        model = function(frames, conv=conv())
        clips = torch.zeros(2, 5, 3, 4, 4)
        assert dense(model, clips) == 12 * 9 * 16 * 5
        assert find_convs(model, clips)[0].positions == 5 * 16
        mask = torch.ones(4, 3, dtype=torch.bool)
        mask[0, 0] = False
        assert counting.macs(model, clips, {"conv": mask})["left"] == 11 * 9 * 16 * 5

    def test_a_batch_that_cannot_be_shared_evenly_is_refused(self):
        model = function(lambda self, x: self.conv(torch.cat([x, x[:1]])), conv=conv())
        with pytest.raises(ValueError, match="cannot be shared among 2 examples; give one example"):
            find_convs(model, torch.zeros(2, 3, 5, 5))
        assert find_convs(model, torch.zeros(1, 3, 5, 5))[0].positions == 50

    @pytest.mark.parametrize(
        ("given", "described"),
        [
            (torch.zeros(1, 1, 8, 8), r"\(1, 1, 8, 8\)"),
            ((torch.zeros(1, 3, 8, 8), 3), r"\[\(1, 3, 8, 8\), int\]"),
            ({"y": torch.zeros(1, 3, 8, 8)}, r"\{y=\(1, 3, 8, 8\)\}"),
            (32, "int"),
        ],
    )
    def test_what_a_network_does_not_take_is_one_line(self, net, given, described):
        net.train()
        for look in (find_convs, counting.macs, prune):
            message = f"^example_inputs: Sequential does not take {described} "
            with pytest.raises(ValueError, match=message) as caught:
                look(net, given)
            assert "\n" not in str(caught.value)
        assert net.training and not any(module._forward_hooks for module in net.modules())

    def test_a_network_of_fixed_size_says_what_it_was_given(self):
        model = nn.Sequential(conv(), nn.Flatten(), nn.Linear(4 * 64, 2))
        assert dense(model, image(8)) == 12 * 9 * 64 + 512
        with pytest.raises(ValueError, match=r"does not take \(1, 3, 9, 9\) \(mat1 and mat2"):
            find_convs(model, image(9))

    def test_a_network_whose_train_returns_nothing(self):
        class Silent(nn.Sequential):
            def train(self, mode=True):
                super().train(mode)

        assert dense(Silent(conv()), image(4)) == 12 * 9 * 16


class TestNorms:
    @pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.Hardswish(inplace=True)])
    def test_a_norm_behind_an_activation_in_place_is_not_the_convs(self, act):
        model = nn.Sequential(conv(), act, nn.BatchNorm2d(4))
        assert find_convs(model, image(4))[0].norm is None

    def test_an_addition_in_place_too(self):
        def network(self, x):
            y = self.conv(x)
            y += 1
            return self.norm(y)

        model = function(network, conv=conv(), norm=nn.BatchNorm2d(4))
        assert find_convs(model, image(4))[0].norm is None

    def test_inside_inference_mode(self):
        def network(self, x):
            with torch.inference_mode():
                return self.head(self.norm(self.conv(x)).flatten(1))

        model = function(network, conv=conv(), norm=nn.BatchNorm2d(4), head=nn.Linear(64, 2))
        assert find_convs(model, image(4))[0].norm == "norm"
        assert dense(model, image(4)) == 12 * 9 * 16 + 128


class TestWrapped:
    def test_names_are_those_of_the_wrapper(self, net):
        plain = find_convs(net, image(8))
        for wrapped, prefix in (
            (nn.DataParallel(net), "module."),
            (torch.compile(net), "_orig_mod."),
            (torch.compile(nn.DataParallel(net)), "_orig_mod.module."),
        ):
            found = find_convs(wrapped, image(8))
            assert [c.name for c in found] == [prefix + c.name for c in plain]
            assert found[0].norm == f"{prefix}1"
            assert dense(wrapped, image(8)) == dense(net, image(8))
            masks = prune(wrapped, image(8), 0.5)
            assert list(masks) == [prefix + name for name in prune(net, image(8), 0.5)]

    def test_a_network_compiled_in_place(self, net):
        net.compile()
        assert [c.name for c in find_convs(net, image(8))] == ["0", "3", "5", "6"]


class TestSharedWeights:
    @pytest.fixture
    def twins(self):
        first, second = conv(4), conv(4)
        second.weight = first.weight
        return nn.Sequential(first, nn.AvgPool2d(2), second)

    def test_one_mask_counted_at_both_places(self, twins):
        found = find_convs(twins, image(8, 4))
        assert [(c.name, c.shares) for c in found] == [("0", None), ("2", "0")]
        masks = prune(twins, image(8, 4), 0.5, "l1")
        assert list(masks) == ["0"] and int((~masks["0"]).sum()) == 8
        left = counting.macs(twins, image(8, 4), masks)
        assert left == {"dense": 16 * 9 * (64 + 16), "left": 8 * 9 * (64 + 16)}
        assert counting.weights(twins, masks)["left"] == 8 * 9 + 8  # with two biases of 4
        rows = counting.layer_table(found, masks, {"0": 0.5})
        assert [(row["pruned"], row["rate"]) for row in rows] == [(8, 0.5)] * 2

    def test_a_module_registered_twice_is_one(self):
        twice = conv(4)
        model = nn.Sequential(twice, nn.ReLU(), twice)
        assert [c.name for c in find_convs(model, image(8, 4))] == ["0"]
        assert dense(model, image(8, 4)) == 2 * 16 * 9 * 64


class TestWhatIsCounted:
    N = 16  # positions of a 4 x 4 map, which become a sequence of 8 features

    def dense(self, network, **modules) -> int:
        """MACs beside those of the conv in front."""

        def forward(module, x):
            return network(module, module.conv(x).flatten(2).transpose(1, 2))

        model = function(forward, conv=conv(3, 8), **modules)
        return dense(model, image(4)) - 24 * 9 * self.N

    def test_attention(self):
        n, mha = self.N, nn.MultiheadAttention(8, 2, batch_first=True)
        wanted = n * 8 * 24 + 2 * n * n * 8 + n * 8 * 8  # projections, products, output
        for need in (True, False):
            found = self.dense(
                lambda self, y, need=need: self.mha(y, y, y, need_weights=need), mha=mha
            )
            assert found == wanted
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        assert self.dense(lambda self, y: self.layer(y), layer=layer) == wanted + 2 * n * 8 * 16
        plain = self.dense(lambda _, y: F.scaled_dot_product_attention(y, y, y))
        assert plain == 2 * n * n * 8

    def test_products_in_forward(self):
        n, w, v = self.N, torch.ones(8, 5), torch.ones(8)
        assert self.dense(lambda _, y: F.linear(y, w.T)) == n * 8 * 5
        assert self.dense(lambda _, y: y @ w) == n * 8 * 5
        assert self.dense(lambda _, y: torch.einsum("ntc,nsc->nts", y, y)) == n * n * 8
        assert self.dense(lambda _, y: torch.bmm(y, y.mT)) == n * n * 8
        assert self.dense(lambda _, y: y[0] @ v) == n * 8
        assert self.dense(lambda _, y: torch.addmv(torch.ones(n), y[0], v)) == n * 8
        assert self.dense(lambda _, y: torch.dot(y[0, 0], v)) == 8
        kernel = torch.ones(2, 1, 3, 3)
        assert self.dense(lambda _, y: F.conv2d(y[:, None], kernel)) == 2 * 9 * 14 * 6

    def test_other_convs_and_recurrent_layers(self):
        n = self.N
        one = nn.Conv1d(8, 5, 3)
        assert self.dense(lambda self, y: self.c(y.mT), c=one) == 5 * 8 * 3 * (n - 2)
        up = nn.ConvTranspose2d(8, 5, 2, stride=2)
        assert self.dense(lambda self, y: self.c(y.mT.unflatten(2, (4, 4))), c=up) == 40 * 4 * n
        lstm = nn.LSTM(8, 5, batch_first=True)
        assert self.dense(lambda self, y: self.c(y), c=lstm) == n * 20 * (8 + 5)
        gru = nn.GRU(8, 5, batch_first=True)
        assert self.dense(lambda self, y: self.c(y), c=gru) == n * 15 * (8 + 5)

    def test_what_cannot_be_counted_is_named(self):
        def network(self, x):
            offset = torch.zeros(1, 18, 4, 4)
            return torchvision.ops.deform_conv2d(self.conv(x), offset, self.w, padding=1)

        model = function(network, conv=conv())
        model.w = nn.Parameter(torch.ones(2, 4, 3, 3))
        with pytest.warns(UserWarning, match=r"MACs of torchvision.deform_conv2d are not counted"):
            assert dense(model, image(4)) == 12 * 9 * 16
        model = nn.Sequential(conv(), nn.Flatten(), nn.Linear(64, 2))
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        with pytest.warns(UserWarning, match=r"MACs of quantized.linear_dynamic are not counted"):
            assert dense(model, image(4)) == 12 * 9 * 16

    def test_the_machine_is_left_as_it_was(self, net):
        def state():
            return (
                torch.backends.mha.get_fastpath_enabled(),
                torch.backends.mkldnn.enabled,
                torch.backends.cudnn.enabled,
                torch.backends.cuda.flash_sdp_enabled(),
            )

        before = state()
        dense(net, image(8))
        with pytest.raises(ValueError, match="example_inputs"):
            dense(net, image(8, 2))
        assert state() == before == (True,) * 4


class TestWhatCannotBePruned:
    @pytest.mark.parametrize(
        ("model", "why"),
        [
            (nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), "it has no convs"),
            (nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 2, 3)), "it has Conv1d"),
            (nn.Sequential(nn.ConvTranspose2d(3, 2, 3)), "it has ConvTranspose2d"),
            (torch.jit.script(nn.Sequential(conv())), "it is scripted by torch.jit"),
        ],
    )
    def test_a_network_without_convs_is_told_so(self, model, why):
        for look in (find_convs, prune):
            with pytest.raises(ValueError, match=rf"^no Conv2d of this network runs .*\({why}\)"):
                look(model, image(8))

    def test_a_quantized_network(self):
        model = nn.Sequential(torch.ao.quantization.QuantStub(), conv())
        model.qconfig = torch.ao.quantization.get_default_qconfig("x86")
        model = torch.ao.quantization.prepare(model.eval())
        model(image(8))
        model = torch.ao.quantization.convert(model)
        with pytest.raises(ValueError, match=r"no Conv2d of this network runs .*it is quantized"):
            prune(model, image(8))

    def test_grouped_convs_only(self):
        model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1, groups=2))
        assert len(find_convs(model, image(8, 4))) == 2  # and counted
        for look in (
            lambda: prune(model, image(8, 4)),
            lambda: prunable(find_convs(model, image(8, 4))),
        ):
            with pytest.raises(ValueError, match="every Conv2d of this network is grouped"):
                look()

    def test_a_conv_that_does_not_run_is_not_listed(self):
        model = function(lambda self, x: self.used(x), used=conv(), spare=conv())
        assert [c.name for c in find_convs(model, image(8))] == ["used"]
