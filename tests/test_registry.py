"""Names and functions: what can be registered, looked up and imported, and what is refused."""

import subprocess
import sys

import pytest

from explib import registry
from explib.errors import ParamError
from explib.registry import CRITERIA

pytestmark = pytest.mark.usefixtures("registered")


def peak(layer):
    return layer.weight.abs().amax((2, 3))


def other(layer):
    return layer.weight.sum((2, 3))


class TestBuiltIn:
    @pytest.mark.parametrize(
        ("field", "name"), [(f, n) for f, entries in registry.BY_FIELD.items() for n in entries]
    )
    def test_every_function_is_there(self, field, name):
        entry = registry.BY_FIELD[field][name]
        for function in (entry.function, getattr(entry, "rate_groups", None)):
            assert function is None or callable(registry.load(function, field))

    def test_labels_and_colours_are_told_apart(self):
        labels = [
            registry.criterion(way).named(survivors) for way, survivors in registry.variants()
        ]
        assert len(set(labels)) == len(labels) == 11
        assert labels[0] == "random kernels" and labels[2] == "A, random survivors"
        assert len({entry.colour for entry in CRITERIA.values()}) == len(CRITERIA)
        assert not {entry.colour for entry in CRITERIA.values()} & set(registry._OTHERS)

    def test_nothing_heavy_is_imported_to_read_parameters(self):
        code = "import sys, explib.params as p; p.Params(); print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "False", done.stderr


class TestRegister:
    def test_a_criterion(self):
        registry.register_criterion("peak", peak, label="largest weight", colour="#123456")
        entry = registry.criterion("peak")
        assert (entry.function, entry.named("l1")) == (peak, "largest weight")
        assert entry.colour == "#123456" and registry.variants()[-1] == ("peak", "")

    def test_by_default_its_label_is_its_name_and_its_colour_follows_from_it(self):
        registry.register_criterion("peak", peak)
        entry = registry.criterion("peak")
        assert entry.label == "peak" and entry.colour in registry._OTHERS
        assert entry.colour == registry._colour("peak")

    def test_one_with_redundant_sets_stands_there_with_both_survivors(self):
        registry.register_criterion("mine", "explib.pruning.ways:way_b", redundant_sets=True)
        assert {("mine", "random"), ("mine", "l1")} < set(registry.variants())
        assert registry.criterion("mine").named("l1") == "mine, L1 survivors"

    def test_the_same_again_is_no_error_and_takes_the_new_facts(self):
        registry.register_criterion("peak", peak)
        registry.register_criterion("peak", peak, label="Peak")
        assert registry.criterion("peak").label == "Peak"

    @pytest.mark.parametrize(
        ("name", "function", "label", "message"),
        [
            ("B", peak, "", "'B' is registered with another function; give another name"),
            ("peak", lambda layer: 0, "", "'peak' is registered with another function"),
            ("mine", other, "L1 kernels", "mine: 'l1' has the label 'L1 kernels'; give another"),
            ("a b", other, "", "'a b' cannot be registered; give letters, digits"),
            ("mine", "no path", "", "mine: 'no path' is no function; give one, or package.module:"),
        ],
    )
    def test_what_cannot_be(self, name, function, label, message):
        registry.register_criterion("peak", peak)
        with pytest.raises(ParamError, match=f"^{message}"):
            registry.register_criterion(name, function, label=label)

    def test_a_network_and_a_data_set(self):
        registry.register_network("mine", "a.b:build", image_size=48, num_classes=3)
        registry.register_dataset("mine", "a.b:load", label="Mine", size=(3, (1, 48, 48)))
        assert registry.network("mine").image_size == 48
        assert registry.dataset("mine").size == (3, (1, 48, 48))
        assert not registry.dataset("mine").fixed


class TestByPath:
    def test_it_has_an_entry_without_being_imported(self):
        entry = registry.criterion("no_such.module:peak")
        assert entry.label == entry.function == "no_such.module:peak"
        assert entry.colour == registry.criterion("no_such.module:peak").colour

    @pytest.mark.parametrize(
        ("source", "name", "message"),
        [
            (None, "f", r"module MODULE cannot be imported \(ModuleNotFoundError: .*PYTHONPATH"),
            ("1 / 0", "f", r"module MODULE cannot be imported \(ZeroDivisionError: division"),
            ("raise SyntaxError('a\\nb')", "f", r"cannot be imported \(SyntaxError: a b\)"),
            ("def peak(layer): pass", "paek", "module MODULE has no paek; did you mean 'peak'?"),
            ("x = 1", "f", "module MODULE has no f; give the name of a function in it"),
            ("f = 3", "f", "is a int; give a function"),
        ],
    )
    def test_what_cannot_be_imported_is_one_line(
        self, tmp_path, monkeypatch, source, name, message
    ):
        module = f"mine_{abs(hash((source, name)))}"
        if source is not None:
            (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ParamError, match=message.replace("MODULE", module)) as caught:
            registry.load(f"{module}:{name}", "arch")
        assert str(caught.value).startswith(f"arch: '{module}:{name}'")
        assert "\n" not in str(caught.value)

    def test_a_module_of_a_package_is_found(self, tmp_path, monkeypatch):
        (tmp_path / "my_package").mkdir()
        (tmp_path / "my_package/parts.py").write_text("def f(layer):\n    return 7\n")
        monkeypatch.syspath_prepend(tmp_path)
        assert registry.load("my_package.parts:f", "arch")(None) == 7


def test_of_what_a_file_holds_only_registered_names_are_taken():
    registry.stored("arch", "resnet_56", "a.safetensors")
    for name in ("os:getcwd", "lenet", [], None, 3):
        with pytest.raises(ValueError, match=r"^a.safetensors: its arch is .*; known: vgg_16_bn"):
            registry.stored("arch", name, "a.safetensors")
