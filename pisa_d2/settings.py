"""
Settings of the method. Defaults are the published values, and constructors check the values.

Errors name the constructor's argument, or the key of the config, see :func:`naming_keys`.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any


class SettingError(ValueError):
    """
    A value that is not allowed.

    Attributes:
        name: the argument, or the config key.
        value: the value.
        reason: the rule that it breaks.
    """

    def __init__(self, name: str, value: Any, reason: str) -> None:
        super().__init__(f"{name} = {value!r} is not allowed: {reason}.")
        self.name = name
        self.value = value
        self.reason = reason

    def __reduce__(self) -> tuple:  # the default would pickle the message alone
        return type(self), (self.name, self.value, self.reason)


@contextmanager
def naming_keys(node: str, **keys: str) -> Iterator[None]:
    """
    Make errors name config keys instead of arguments.

    Args:
        node: the config node of the keys, such as "MODEL.PISA.CARL".
        keys: the keys that are not the argument's name in capitals, by argument.
    """
    try:
        yield
    except SettingError as error:
        key = keys.get(error.name, error.name.upper())
        raise SettingError(f"{node}.{key}", error.value, error.reason) from None


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_range(name: str, value: Any, low: float, high: float = math.inf) -> None:
    """
    Check that ``value`` is a finite number in [low, high].

    Raises:
        SettingError: it is not.
    """
    # The largest float instead of infinity, since an integer can exceed it.
    if not _is_number(value) or not low <= value <= min(high, sys.float_info.max):
        allowed = f"in [{low:g}, {high:g}]" if high < math.inf else f"finite and at least {low:g}"
        raise SettingError(name, value, f"it must be {allowed}")


def check_positive(name: str, value: Any, reason: str = "") -> None:
    """
    Check that ``value`` is a finite number above 0.

    Raises:
        SettingError: it is not; ``reason`` is added to the message.
    """
    if not _is_number(value) or not 0 < value <= sys.float_info.max:
        raise SettingError(name, value, f"it must be finite and above 0{reason}")


def check_ioa_thresh(name: str, value: Any) -> None:
    """
    Check that ``value`` is a number in (0, 1].

    Raises:
        SettingError: it is not.
    """
    if not _is_number(value) or not 0 < value <= 1:
        raise SettingError(name, value, "it must be above 0 and at most 1")


def check_count(name: str, value: Any, low: int) -> None:
    """
    Check that ``value`` is a whole number of at least ``low``.

    Raises:
        SettingError: it is not.
    """
    if not isinstance(value, Integral):
        raise SettingError(name, value, "it must be a whole number")
    check_range(name, value, low)


def check_flag(name: str, value: Any) -> None:
    """
    Check that ``value`` is True or False, and not "off", for example, which would mean True.

    Raises:
        SettingError: it is neither.
    """
    if not isinstance(value, bool):
        raise SettingError(name, value, "it must be True or False")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """
    Check that ``value`` is one of ``choices``.

    Raises:
        SettingError: it is not.
    """
    if value not in choices:
        raise SettingError(name, value, f"choose one of {list(choices)}")


@dataclass(frozen=True)
class ISR:
    """
    Importance-based sample reweighting of positives (ISR-P), see
    :func:`pisa_d2.reweighting.importance_weights`.

    Attributes:
        gamma: at least 0; 0 gives all samples the same weight.
        beta: the least importance, in [0, 1].
        n_max: the divisor of ranks: "shared", the number of positives of the largest class, as
            published; or "class", each class's own number.

    Raises:
        SettingError: a value is out of range.
    """

    gamma: float = 2.0
    beta: float = 0.0
    n_max: str = "shared"

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, 0)
        check_range("beta", self.beta, 0, 1)
        check_choice("n_max", self.n_max, ("shared", "class"))


@dataclass(frozen=True)
class NegativeISR:
    """
    Importance-based sample reweighting of negatives (ISR-N).

    Attributes:
        gamma: at least 0; 0 gives all samples the same weight.
        beta: the least importance, in [0, 1].
        nms_thresh: IoU above which the regressed boxes of negatives form a group, in [0, 1].
        score_thresh: negatives whose highest foreground probability is above it are ranked, in
            [0, 1].

    Raises:
        SettingError: a value is out of range.
    """

    gamma: float = 0.5
    beta: float = 0.0
    nms_thresh: float = 0.5
    score_thresh: float = 0.05

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, 0)
        check_range("beta", self.beta, 0, 1)
        check_range("nms_thresh", self.nms_thresh, 0, 1)
        check_range("score_thresh", self.score_thresh, 0, 1)


@dataclass(frozen=True)
class CARL:
    """
    The classification-aware regression loss, see :func:`pisa_d2.reweighting.carl_weights`.

    Attributes:
        gamma: the exponent, at least 0 (k in the paper).
        beta: the least value before the exponent, in [0, 1] (b in the paper).
        loss_weight: factor of the whole loss, at least 0.

    Raises:
        SettingError: a value is out of range.
    """

    gamma: float = 1.0
    beta: float = 0.2
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, 0)
        check_range("beta", self.beta, 0, 1)
        check_range("loss_weight", self.loss_weight, 0)


@dataclass(frozen=True)
class BalancedL1:
    """
    The shape of balanced L1, see :func:`pisa_d2.box_losses.balanced_l1_loss`.

    Attributes:
        alpha: scales the gradient of small errors, above 0.
        gamma: the gradient of large errors, in [alpha / 1000, 40 alpha].

    Raises:
        SettingError: a value is out of range.
    """

    alpha: float = 0.5
    gamma: float = 1.5

    def __post_init__(self) -> None:
        check_positive("alpha", self.alpha)
        # float32 must be able to compute the loss with b = exp(gamma / alpha) - 1.
        check_range("gamma", self.gamma, self.alpha / 1000, 40 * self.alpha)
