"""What is missing is said in one line."""

import pytest

from explib.errors import extra


def test_a_missing_package_comes_with_the_extra_that_brings_it():
    with pytest.raises(ModuleNotFoundError) as caught, extra("slurm"):
        import not_there_at_all  # noqa: F401
    assert str(caught.value) == 'not_there_at_all is not installed; pip install "explib[slurm]"'
    assert caught.value.name == "not_there_at_all"


def test_other_errors_and_what_is_there_pass():
    with extra():
        import math
    assert math.pi > 3
    with pytest.raises(ZeroDivisionError), extra():
        1 / 0  # noqa: B018
