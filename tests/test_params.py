"""Parameters: the rate grammar, the checks of every field, YAML files and notebooks."""

import dataclasses

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from explib import registry
from explib.checks import CHOICES, RANGES, parse_steps
from explib.errors import ParamError
from explib.params import PLACES, Params, from_mapping, from_notebook, from_yaml
from explib.rates import keep_floor, parse_rates, spread_rates
from tests.conftest import ROOT

RESNET_56 = "[0.0]+[0.4]*17+[0.5]*2+[0.6]*16+[0.4]*2+[0.6]*17"


class TestRates:
    def test_a_published_string(self):
        wanted = [0.0] + [0.4] * 17 + [0.5] * 2 + [0.6] * 16 + [0.4] * 2 + [0.6] * 17
        assert parse_rates(RESNET_56) == wanted

    @pytest.mark.parametrize(
        ("text", "rates"),
        [
            ("[0]", [0.0]),
            ("[.5]", [0.5]),
            ("[0.]*2", [0.0, 0.0]),
            (" [ 0.60 ] * 2 + [0.1] ", [0.6, 0.6, 0.1]),
        ],
    )
    def test_spellings(self, text, rates):
        assert parse_rates(text) == rates

    @pytest.mark.parametrize(
        "text",
        [
            *("", "0.5", "[]", "[1.0]", "[1.2]", "[-0.1]", "[0.5]*0", "[0.5]*10001", "[0.5]*-1"),
            *("[0.5]*1.5", "[0.5]++[0.5]", "[0.5]+", "[0.5,0.6]", "[0.5][0.6]", "[nan]", "[1e-1]"),
            *("[0.99999999999999999999]", "[０.5]", "__import__('os')", "[0.5]*2*2", "2*[0.5]"),
        ],
    )
    def test_what_is_not_a_rate_is_refused(self, text):
        with pytest.raises(ParamError, match="compress_rate"):
            parse_rates(text)

    def test_the_message_names_the_offending_term(self):
        with pytest.raises(ParamError, match=r"'\[1\.2\]\*3'"):
            parse_rates("[0.1]*2+[1.2]*3")

    @given(st.text() | st.text("[]0123456789.*+ -e", max_size=30))
    @example("[0.1]*99999")
    def test_any_text_gives_rates_or_a_param_error(self, text):
        try:
            rates = parse_rates(text)
        except ParamError:
            return
        assert rates and all(type(rate) is float and 0 <= rate < 1 for rate in rates)

    @given(st.lists(st.tuples(st.integers(0, 999), st.integers(1, 60)), min_size=1, max_size=8))
    def test_what_is_written_comes_back(self, terms):
        text = "+".join(f"[{mills / 1000}]*{count}" for mills, count in terms)
        wanted = [mills / 1000 for mills, count in terms for _ in range(count)]
        assert parse_rates(text) == wanted

    def test_54_rates_for_55_convs_names_both_numbers(self):
        with pytest.raises(ParamError, match=r"54 rates for 55 convs; give 55"):
            spread_rates([0.5] * 54, 55)

    def test_a_single_rate_serves_all(self):
        assert spread_rates([0.3], 4) == [0.3] * 4
        assert spread_rates([0.1, 0.2], 2) == [0.1, 0.2]

    @pytest.mark.parametrize(
        ("rates", "floor"), [([0.1, 0.6], 0.3), ([0.4], 0.5), ([0.95], 0.0), ([0.0], 0.9)]
    )
    def test_the_published_floor(self, rates, floor):
        assert keep_floor(rates) == floor


class TestSteps:
    def test_read(self):
        assert parse_steps(" 15, 25 ") == [15, 25]
        assert parse_steps("") == []

    @pytest.mark.parametrize("text", ["25,15", "15,15", "a", "1.5", "-1", "15;25", "15,", ","])
    def test_refused(self, text):
        with pytest.raises(ParamError, match="lr_decay_step"):
            parse_steps(text)


def wrong_values():
    """(field, value) for every field: a wrong type, an unknown choice, both sides of its range."""
    for field in dataclasses.fields(Params):
        yield field.name, [1]
        yield field.name, {"a": 1}
        if field.type is str:
            yield from ((field.name, value) for value in (1, None, True))
        if field.type is int:
            yield from ((field.name, value) for value in ("1", 1.0, None, True))
        if field.type is float:
            yield from ((field.name, value) for value in ("0.1", None, False, 10**400))
            yield from ((field.name, float(value)) for value in ("nan", "inf", "-inf"))
        if field.type is bool:
            yield from ((field.name, value) for value in (1, "true", None))
        if field.name in CHOICES:
            yield field.name, "nonsense"
        if field.name in RANGES:
            low, high, closed = RANGES[field.name]
            kind = int if field.type is int or "seed" in field.name else float
            yield field.name, kind(low - 1 if closed else low)
            yield field.name, kind(high + 1)
    yield from (("keep_floor", "0.5"), ("mask_seed", 0.5), ("name", "a/b"), ("name", ".."))
    yield from (("compress_rate", "0.5"), ("lr_decay_step", "x"), ("data_dir", "a\0b"))
    yield "normalization", "imagenet"


@pytest.mark.parametrize("other", [{"device": "cuda"}, {"fade_epochs": 2}])
def test_sparse_training_is_refused_where_it_cannot_be(other):
    with pytest.raises(ParamError, match=r"^compile: 'sparse'.*use 'auto'"):
        Params(compile="sparse", **other)


@pytest.mark.parametrize(
    ("field", "value"), list(wrong_values()), ids=lambda value: str(value)[:24]
)
def test_a_wrong_value_is_an_error_that_names_the_field(field, value):
    with pytest.raises(ParamError, match=rf"^{field}: ") as caught:
        Params(**{field: value})
    assert "\n" not in str(caught.value)


def test_every_choice_and_every_range_is_of_a_field():
    names = {field.name for field in dataclasses.fields(Params)}
    assert set(CHOICES) | set(RANGES) | set(PLACES) <= names


@pytest.mark.parametrize("field", ["arch", "dataset", "pruning_way"])
class TestFunctionsOfOnesOwn:
    def test_are_taken_by_name_and_not_imported(self, field):
        params = Params(**{field: "no_such_package.module:function"})
        assert getattr(params, field) == "no_such_package.module:function"
        assert ":" not in params.name + params.job_dir
        assert params.replace(seed=1) == Params(**{field: getattr(params, field)}, seed=1)

    @pytest.mark.parametrize(
        "name", ["a.b", ":f", "a:", "a:b:c", "a b:f", "a:f()", "../a:f", "a/b:f", "1a:f", "a:f\n"]
    )
    def test_must_be_a_package_module_and_function(self, field, name):
        with pytest.raises(ParamError, match=rf"^{field}: .* or a package.module:function$"):
            Params(**{field: name})


def test_what_spans_convs_says_its_name(monkeypatch):
    entry = registry.Criterion("a.b:c", "mine", "#123456", whole_network=True)
    monkeypatch.setitem(registry.CRITERIA, "mine", entry)
    with pytest.raises(ParamError, match=r"^schedule: 'layerwise' is not for mine"):
        Params(pruning_way="mine", schedule="layerwise")


def test_an_unknown_choice_names_the_nearest():
    with pytest.raises(ParamError, match="did you mean 'resnet_56'"):
        Params(arch="resnet56")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("compres_rate", "compress_rate"), ("epoch", "epochs"), ("learning", "known: name, arch")],
)
def test_an_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(ParamError, match=rf"'{key}'.*{nearest}"):
        from_mapping({key: 1})


def test_a_whole_number_is_a_float_where_one_is_wanted():
    params = Params(lr=1, weight_decay=0)
    assert type(params.lr) is float and type(params.weight_decay) is float


class TestYaml:
    def write(self, folder, content):
        path = folder / "a.yaml"
        path.write_bytes(content)
        return path

    def test_values_and_changes(self, tmp_path):
        path = self.write(tmp_path, b'epochs: 3\ncompress_rate: "[0.1]"\n')
        assert from_yaml(path).epochs == 3
        assert from_yaml(path, epochs=4).epochs == 4
        assert from_yaml(path).rates == [0.1]

    def test_an_empty_file_is_all_defaults(self, tmp_path):
        assert from_yaml(self.write(tmp_path, b"")) == Params()

    @pytest.mark.parametrize(
        "content",
        [
            b"a: [1\n",
            b"- arch\n- lr\n",
            b"[]",
            b"false",
            b"resnet_56",
            b"\x00\x01\xff\xfe",
            b"\xff\xfe\x00\x00",
            b"arch: !!python/object/apply:os.system [echo]\n",
            b"epochs: 2023-13-45\n",
            b"epochs: " + b"9" * 5000,
            b"[" * 5000,
            b"epochs: 1\nepochs: 2\n",
            b"1: 2\n",
            b"lr: 1e400\n",
        ],
        ids=lambda content: repr(content[:16]),
    )
    def test_a_file_that_is_no_mapping_of_fields_is_one_line(self, tmp_path, content):
        with pytest.raises(ParamError) as caught:
            from_yaml(self.write(tmp_path, content))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(ParamError, match=r"nowhere\.yaml"):
            from_yaml(tmp_path / "nowhere.yaml")
        with pytest.raises(ParamError, match="cannot be read"):
            from_yaml(tmp_path)

    def test_an_unknown_key_names_the_file(self, tmp_path):
        with pytest.raises(ParamError, match=r"a\.yaml: unknown parameter 'eppochs'.*'epochs'"):
            from_yaml(self.write(tmp_path, b"eppochs: 1\n"))

    @pytest.mark.parametrize(
        "path", sorted((ROOT / "params").glob("*/*.yaml")), ids=lambda path: path.stem
    )
    def test_a_configuration_of_the_study_loads_and_fits_its_network(self, path):
        from explib.study import networks

        params = from_yaml(path)
        rates = networks.fresh(params).rates
        convs = {"vgg_16_bn": 13, "resnet_56": 55, "resnet_110": 109, "resnet_50": 53}
        convs["googlenet"] = 1 + 9 * 5  # all but the two reductions of each block
        assert len(rates) == convs[params.arch]


class TestNotebook:
    def test_takes_the_variables_named_like_fields(self):
        params = from_notebook({"epochs": 2, "arch": "vgg_16_bn", "something": object()})
        assert (params.epochs, params.arch) == (2, "vgg_16_bn")

    def test_injected_parameters_count(self):
        cells = ["", "epochs = 1", "# Parameters\nepochs = 5\nlr = 0.1\n"]
        params = from_notebook({"In": cells, "epochs": 5, "lr": 0.1})
        assert (params.epochs, params.lr) == (5, 0.1)

    def test_an_injected_parameter_that_the_notebook_lacks_is_an_error(self):
        cells = ["", "# Parameters\nepoch = 5\n"]
        with pytest.raises(ParamError, match=r"notebook: unknown parameter 'epoch'.*'epochs'"):
            from_notebook({"In": cells, "epoch": 5})


class TestJobDir:
    def test_the_default_follows_a_change(self):
        params = Params()
        other = params.replace(epochs=3)
        assert other.job_dir != params.job_dir and other == Params(epochs=3)
        assert params.replace(results_dir="x").job_dir.startswith("x/runs/digits/")

    def test_a_given_one_stays(self):
        assert Params(job_dir="here").replace(epochs=3).job_dir == "here"


def test_whole_epochs_are_one_run_however_they_are_written():
    assert Params(epochs=5.0) == Params(epochs=5)
    assert Params(epochs=5.0).asdict()["epochs"] == 5 and type(Params(epochs=5.0).epochs) is int
    assert Params(epochs=0.1).epochs == 0.1


@pytest.mark.parametrize("field", PLACES)
def test_places_do_not_change_the_digest(field):
    value = {"threads": 3, "workers": 3, "data_url": "https://elsewhere"}.get(field, "elsewhere")
    assert Params(**{field: value}).digest == Params().digest


@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(Params) if f.name not in PLACES]
)
def test_everything_else_changes_the_digest(field):
    base = Params(dataset="imagenet" if field == "image_size" else "cifar10")
    now = getattr(base, field)
    others = {
        **{name: next(c for c in choices if c != now) for name, choices in CHOICES.items()},
        **{"normalization": "imagenet", "compress_rate": "[0.2]", "keep_floor": 0.5, "name": "x"},
        **{"resume": "x", "resume_mask": "x", "lr_decay_step": "3"},
    }
    other = others.get(field, not now if isinstance(now, bool) else None)
    if other is None:
        other = now / 2 if isinstance(now, float) and now else now + 1
    assert other != now
    changes = {"normalization": ""} if field == "dataset" else {}
    assert base.replace(**{field: other}, **changes).digest != base.digest


def test_kernels_cannot_fade_for_longer_than_there_are_epochs():
    assert Params(epochs=2, fade_epochs=2).fade_epochs == 2
    for epochs, most in ((1, 1), (0.5, 0), (2.5, 2)):
        message = (
            f"^fade_epochs: {most + 1}, but there are {epochs} epochs, .* give at most {most}$"
        )
        with pytest.raises(ParamError, match=message):
            Params(epochs=epochs, fade_epochs=most + 1)


def test_filters_have_no_first_conv():
    with pytest.raises(ParamError, match=r"^start_cov: 2 is not for filters"):
        Params(pruning_way="filters", start_cov=2)


def test_numbers_that_yaml_takes_for_words(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("lr: 1e-2\nweight_decay: 5e-4\n")
    assert (from_yaml(path).lr, from_yaml(path).weight_decay) == (0.01, 0.0005)
    for text in ("1", "0.1", "nan", "1e", "e5"):
        with pytest.raises(ParamError, match=r"lr: .* is a str; give float"):
            Params(lr=text)


@pytest.mark.parametrize(
    ("line", "quoted"),
    [("compile: on", "on"), ("compress_rate: 0.5", r"\[0.5\]"), ("lr_decay_step: 15", "15,25")],
)
def test_what_yaml_does_not_take_for_a_word_is_to_be_quoted(tmp_path, line, quoted):
    path = tmp_path / "x.yaml"
    path.write_text(line)
    with pytest.raises(ParamError, match=f'give str, in quotes, like "{quoted}"$'):
        from_yaml(path)


def test_normalization_follows_the_data_set_unless_it_was_chosen():
    assert Params(dataset="cifar10").replace(dataset="imagenet").normalization == "imagenet"
    assert Params(dataset="cifar10").replace(dataset="digits").normalization == ""
    chosen = Params(dataset="cifar10", normalization="imagenet")
    assert chosen.replace(seed=1).normalization == "imagenet"
