import pytest
from hypothesis import given
from hypothesis import strategies as st

from explib import params as module
from explib.params import ParamError, Params, from_mapping, from_notebook, from_yaml, parse_rates

terms = st.tuples(st.sampled_from([0, 0.1, 0.25, 0.4, 0.99]), st.integers(1, 60))


@given(st.lists(terms, min_size=1, max_size=6))
def test_rates_round_trip(pairs):
    text = "+".join(f"[{rate}]*{count}" for rate, count in pairs)
    assert parse_rates(text) == [rate for rate, count in pairs for _ in range(count)]


@given(st.text(max_size=40) | st.text("[]*+.0123456789 e-", max_size=30))
def test_any_text_is_rates_or_a_parameter_error(text):
    try:
        rates = parse_rates(text)
    except ParamError as error:
        assert str(error).startswith("compress_rate: ")
    else:
        assert rates and all(0 <= rate < 1 for rate in rates)


@pytest.mark.parametrize(
    "text", ["", "0.5", "[0.5", "[1.2]", "[1.0]", "[-0.1]", "[0.5]*0", "[0.5]*-1", "[0.5]**2",
             "[0.5]+", "[nan]", "[1e-1]", "[0.5]*99999", "[0.5]*1.5", "__import__('os')"]
)  # fmt: skip
def test_bad_rates_are_refused(text):
    with pytest.raises(ParamError, match="compress_rate"):
        parse_rates(text)


def test_rate_count_is_checked_against_the_convs():
    with pytest.raises(ParamError, match="54 rates for 55 convs"):
        module.spread_rates([0.5] * 54, 55)
    assert module.spread_rates([0.5], 3) == [0.5] * 3


BAD = [
    ("arch", "resnet_57", "did you mean 'resnet_56'"),
    ("arch", 56, "give str"),
    ("dataset", "cifar100", "did you mean 'cifar10'"),
    ("pruning_way", "C", "known: 'A', 'B'"),
    ("survivors", "L1", "known: 'random', 'l1'"),
    ("epochs", 0, "1 to"),
    ("epochs", 2.5, "give int"),
    ("epochs", "3", "give int"),
    ("epochs", True, "give int"),
    ("epochs", None, "give int"),
    ("batch_size", 0, "1 to"),
    ("lr", 0.0, "out of range"),
    ("lr", float("nan"), "out of range"),
    ("lr", float("inf"), "out of range"),
    ("lr", "0.01", "give float"),
    ("momentum", 1.5, "0 to 1"),
    ("weight_decay", -1e-4, "0 to 1"),
    ("label_smoothing", 2.0, "0 to 1"),
    ("distill", -0.1, "0 to 1"),
    ("keep_floor", 1.1, "0 to 1"),
    ("groups", 0, "1 to"),
    ("start_cov", -1, "0 to"),
    ("seed", -1, "0 to"),
    ("mask_seed", 2**40, "0 to"),
    ("strict_rate", 1, "give bool"),
    ("nesterov", "yes", "give bool"),
    ("schedule", "one-shot", "did you mean 'oneshot'"),
    ("lr_schedule", "linear", "known: 'step'"),
    ("lr_decay_step", "25,15", "ascending"),
    ("lr_decay_step", "a", "epochs like 15,25"),
    ("compress_rate", "[1.2]", "0 to below 1"),
    ("compress_rate", 0.5, "give str"),
    ("name", "../x", "letters"),
    ("name", "; rm -rf ~", "letters"),
    ("job_dir", "a\0b", "NUL"),
    ("device", "gpu", "known: 'auto'"),
    ("normalization", "imagenet", "leave it empty"),
]


@pytest.mark.parametrize(("field", "value", "says"), BAD, ids=lambda value: str(value)[:20])
def test_a_wrong_value_names_its_field_and_what_would_be_right(field, value, says):
    with pytest.raises(ParamError) as caught:
        from_mapping({field: value})
    assert str(caught.value).startswith(f"{field}:") and says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_gets_the_nearest_known_one():
    with pytest.raises(ParamError, match="unknown parameter 'epoch'; did you mean 'epochs'"):
        from_mapping({"epoch": 3})


@pytest.mark.parametrize("content", [b"a: [", b"- 1\n- 2\n", b"\xff\xfe\x00", b"just words"])
def test_what_is_no_mapping_in_yaml_is_named(tmp_path, content):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ParamError, match=r"bad\.yaml") as caught:
        from_yaml(path)
    assert "\n" not in str(caught.value)


def test_a_missing_yaml_is_named(tmp_path):
    with pytest.raises(ParamError, match=r"none\.yaml: cannot be read"):
        from_yaml(tmp_path / "none.yaml")


def test_a_notebook_gives_its_variables():
    assert from_notebook({"epochs": 3, "arch": "vgg_16_bn", "x": object()}).epochs == 3


def test_what_papermill_injects_must_be_known():
    namespace = {"epochs": 3, "lrr": 1.0, "In": ["", "epochs = 10", "# Parameters\nlrr = 1.0\n"]}
    with pytest.raises(ParamError, match="unknown parameter 'lrr'; did you mean 'lr'"):
        from_notebook(namespace)


def test_integers_do_for_floats():
    assert Params(lr=1).lr == 1.0


def test_the_default_folder_follows_the_parameters():
    one = Params(epochs=3)
    assert one.replace(epochs=4).job_dir == Params(epochs=4).job_dir != one.job_dir
    assert one.replace(job_dir="x").replace(epochs=4).job_dir == "x"


def test_the_digest_ignores_where_files_are_and_nothing_else():
    assert Params(data_dir="a", results_dir="b", threads=2).digest == Params().digest
    assert Params(seed=1).digest != Params().digest


@pytest.mark.parametrize(
    ("rates", "floor"), [([0.6], 0.3), ([0.0, 0.8], 0.1), ([0.9], 0.0), ([0.95], 0.0)]
)
def test_keep_floor(rates, floor):
    assert module.keep_floor(rates) == floor
