import copy
import math
import pickle
from dataclasses import FrozenInstanceError

import pytest

from pisa_d2.settings import (
    CARL,
    ISR,
    BalancedL1,
    NegativeISR,
    SettingError,
    check_choice,
    check_count,
    check_flag,
    check_ioa_thresh,
    check_positive,
    check_range,
    naming_keys,
)

HUGE = 10**400  # too large for a float
NO_NUMBERS = [math.nan, math.inf, -math.inf, HUGE, -HUGE, "0.5", "", None, True, [0.5]]


def accepts(check, *args):
    try:
        check("name", *args)
    except SettingError as error:
        assert error.name == "name" and error.value is args[0]
        assert str(error) == f"name = {args[0]!r} is not allowed: {error.reason}."
        return False
    return True


# For each check: the arguments after the value, values in and out of its range, and the rule.
CHECKS = {
    "range": (check_range, (0, 1), [0, 1, 0.0, 0.5, 1.0], [-1e-9, 1.001], "in [0, 1]"),
    "from": (check_range, (-1,), [-1, 0.5, 10**300], [-1.1], "finite and at least -1"),
    "positive": (check_positive, (), [1e-300, 3, 1e308], [0, -1, -0.0], "finite and above 0"),
    "share": (check_ioa_thresh, (), [1e-9, 0.5, 1], [0, 1.1, -0.5], "above 0 and at most 1"),
    "count": (check_count, (2,), [2, 3, 10**9], [1, -5], "finite and at least 2"),
}


@pytest.mark.parametrize("kind", CHECKS)
def test_numbers_in_the_range_alone_are_accepted(kind):
    check, args, good, bad, rule = CHECKS[kind]
    assert all(accepts(check, value, *args) for value in good)
    assert not any(accepts(check, value, *args) for value in [*bad, *NO_NUMBERS])
    with pytest.raises(SettingError) as caught:
        check("name", bad[0], *args)
    assert caught.value.reason == f"it must be {rule}"


@pytest.mark.parametrize("value", [2.0, 2.5, "2"])
def test_a_count_is_a_whole_number(value):
    with pytest.raises(SettingError, match=r"num = .* is not allowed: it must be a whole number\."):
        check_count("num", value, 0)


def test_a_reason_is_added_to_the_rule():
    with pytest.raises(SettingError, match="beta = 0 .* above 0, since it is a divisor"):
        check_positive("beta", 0, ", since it is a divisor")


def test_a_flag_is_true_or_false():
    assert accepts(check_flag, True) and accepts(check_flag, False)
    assert not any(accepts(check_flag, value) for value in (0, 1, "off", None))


def test_a_choice_is_one_of_the_choices():
    assert accepts(check_choice, "a", ("a", "b"))
    assert not any(accepts(check_choice, value, ("a", "b")) for value in ("A", "", None, ["a"]))
    with pytest.raises(SettingError, match=r"'c' is not allowed: choose one of \['a', 'b'\]\."):
        check_choice("name", "c", ("a", "b"))


UNIT = ([0, 1], [-0.1, 1.1])
FROM_0 = ([0, 100.0], [-0.1, math.inf])
RANGES = {
    (ISR, "gamma"): FROM_0,
    (ISR, "beta"): UNIT,
    (ISR, "n_max"): (["shared", "class"], ["all", None]),
    (NegativeISR, "gamma"): FROM_0,
    (NegativeISR, "beta"): UNIT,
    (NegativeISR, "nms_thresh"): UNIT,
    (NegativeISR, "score_thresh"): UNIT,
    (CARL, "gamma"): FROM_0,
    (CARL, "beta"): UNIT,
    (CARL, "loss_weight"): FROM_0,
    (BalancedL1, "alpha"): ([0.0375, 1500], [0, -1, 0.037, 1501, math.nan]),
    (BalancedL1, "gamma"): ([0.0005, 20], [0, 0.0004, 20.1, math.nan]),
}


@pytest.mark.parametrize(("cls", "name"), RANGES, ids=str)
def test_a_setting_has_a_default_and_refuses_what_is_out_of_its_range(cls, name):
    good, bad = RANGES[cls, name]
    with pytest.raises(FrozenInstanceError):
        setattr(cls(), name, good[0])
    for value in good:
        assert getattr(cls(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(SettingError, match="is not allowed"):
            cls(**{name: value})


def test_an_error_names_the_config_key_inside_the_block_alone():
    with pytest.raises(SettingError) as caught, naming_keys("MODEL.PISA.ISR_P"):
        ISR(gamma=-1)
    assert str(caught.value).startswith("MODEL.PISA.ISR_P.GAMMA = -1 is not allowed: it must be ")
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    with pytest.raises(SettingError, match="^gamma = -1 is not allowed"):
        ISR(gamma=-1)
    with naming_keys("MODEL.PISA.ISR_P"):
        assert ISR(gamma=1.0).gamma == 1.0


def test_a_key_of_another_name_and_other_errors_stay_what_they_are():
    with (
        pytest.raises(SettingError, match="^MODEL.RPN.BETA_OF_L1 = 2 is not allowed"),
        naming_keys("MODEL.RPN", beta="BETA_OF_L1"),
    ):
        check_range("beta", 2, 0, 1)
    with pytest.raises(ValueError, match="^another error$"), naming_keys("MODEL.RPN"):
        raise ValueError("another error")


@pytest.mark.parametrize("make_copy", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
def test_errors_come_back_whole_from_another_process(make_copy):
    error = SettingError("gamma", -1, "it must be at least 0")
    other = make_copy(error)
    assert type(other) is SettingError and str(other) == str(error)
    assert (other.name, other.value, other.reason) == ("gamma", -1, "it must be at least 0")
