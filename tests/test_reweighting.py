import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.testing import assert_close

from pisa_d2.reweighting import carl_weights, importance_weights, preserve_total

HALF = [torch.float16, torch.bfloat16]
FLOATING = [torch.float32, torch.float64]
GAMMAS = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5])
BETAS = st.sampled_from([0.0, 0.2, 0.5, 1.0])
RANKS = st.lists(st.integers(0, 30), max_size=12)


@given(RANKS, st.integers(31, 99), GAMMAS, BETAS)
def test_importance_weights_follow_the_equation(ranks, n_max, gamma, beta):
    expected = [((1 - beta) * (n_max - rank) / n_max + beta) ** gamma for rank in ranks]
    weights = importance_weights(tensor(ranks, dtype=torch.int64), n_max, gamma, beta)
    assert_close(weights, tensor(expected, dtype=torch.float32))


@given(st.lists(st.integers(0, 999), min_size=1, max_size=9), GAMMAS, BETAS)
def test_rank_0_weighs_1_and_all_weights_are_between_0_and_1(counts, gamma, beta):
    n_max = tensor(counts)
    assert_close(
        importance_weights(torch.zeros_like(n_max), n_max, gamma, beta), torch.ones(len(counts))
    )
    last = importance_weights((n_max - 1).clamp(min=0), n_max, gamma, beta)
    assert ((last >= 0) & (last <= 1)).all()


@pytest.mark.parametrize(("gamma", "beta"), [(0, 0), (0, 0.3), (0.5, 1), (2, 1), (0, 1)])
def test_gamma_0_or_beta_1_weighs_all_alike(gamma, beta):
    assert_close(importance_weights(torch.arange(9), 9, gamma, beta), torch.ones(9))


@pytest.mark.parametrize("gamma", [0.5, 1, 2])
@pytest.mark.parametrize("beta", [0, 0.2, 0.9])
def test_importance_falls_with_the_rank(gamma, beta):
    weights = importance_weights(torch.arange(500), 500, gamma, beta)
    assert (weights[1:] < weights[:-1]).all()


def test_each_rank_may_be_measured_by_a_number_of_its_own():
    ranks, n_max = tensor([0, 1, 1, 3]), tensor([1, 2, 4, 4])
    expected = tensor([1, 1 / 2, 3 / 4, 1 / 4])
    assert_close(importance_weights(ranks, n_max, 1, 0), expected)
    assert_close(importance_weights(ranks, tensor(4), 1, 0), importance_weights(ranks, 4, 1, 0))


@pytest.mark.parametrize("n_max", [1, 3])
def test_ranks_beyond_the_number_have_the_least_weight(n_max):
    weights = importance_weights(tensor([n_max, n_max + 1, 9]), n_max, gamma=0.5, beta=0.25)
    assert_close(weights, torch.full((3,), 0.5))


def test_no_ranks_have_no_weights():
    none = torch.zeros(0, dtype=torch.int64)
    for n_max in (0, none):
        assert_close(importance_weights(none, n_max, 2, 0), torch.zeros(0))


def total(weights: Tensor, losses: Tensor) -> Tensor:
    return (weights.double() * losses.double()).sum()


@given(
    st.lists(
        st.tuples(st.just(0) | st.floats(1e-6, 1), st.just(0) | st.floats(1e-4, 1e4)),
        max_size=30,
    ),
    st.sampled_from(HALF + FLOATING),
)
def test_weights_keep_the_total_and_their_ratios(rows, dtype):
    weights, losses = tensor(rows, dtype=dtype).view(-1, 2).unbind(dim=1)
    scaled = preserve_total(weights, losses)
    assert scaled.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(total(scaled, losses), losses.double().sum(), rtol=1e-6, atol=0)
    if total(weights, losses) > 0:
        ratios = scaled.double() / scaled.max(), weights.double() / weights.max()
        assert_close(*ratios, rtol=1e-6, atol=0)
    else:
        assert_close(scaled, torch.ones_like(scaled))


def test_no_gradient_flows_through_the_weights():
    weights = tensor([0.5, 1.0], requires_grad=True)
    losses = tensor([2.0, 3.0], requires_grad=True)
    scaled = preserve_total(weights, losses)
    assert not scaled.requires_grad
    (scaled * losses).sum().backward()
    assert_close(losses.grad, scaled)
    assert weights.grad is None


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan, 3e38])
def test_losses_that_no_factor_fits_weigh_all_alike(value):
    weights = tensor([1.0, 0.5, 0.25])
    assert_close(preserve_total(weights, torch.full((3,), value)), torch.ones(3))
    if not math.isfinite(value):
        assert_close(preserve_total(weights, tensor([1.0, value, 2.0])), torch.ones(3))


def test_weighted_losses_that_overflow_weigh_all_alike():
    assert_close(preserve_total(tensor([3e38, 1.0]), tensor([2.0, 1.0])), torch.ones(2))


def test_a_factor_that_is_beyond_the_weights_type_weighs_all_alike():
    losses = tensor([1e-8, 1e300], dtype=torch.float64)
    assert_close(preserve_total(tensor([1.0, 0.0]), losses), torch.ones(2))


def test_losses_that_only_samples_of_no_weight_have_weigh_all_alike():
    assert_close(preserve_total(tensor([1.0, 0.0]), tensor([0.0, 5.0])), torch.ones(2))


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_losses_and_products_do_not_underflow(dtype):
    weights, losses = tensor([1e-3, 1e-4], dtype=dtype), tensor([6e-8, 6e-8], dtype=dtype)
    assert losses.all()
    scaled = preserve_total(weights, losses)
    assert_close(total(scaled, losses), losses.double().sum(), rtol=1e-6, atol=0)
    assert_close(scaled / scaled[0], weights.float() / weights[0].float())


def test_half_precision_totals_do_not_overflow():
    weights, losses = tensor([0.5, 1, 1, 1]), torch.full((4,), 6e4, dtype=torch.float16)
    assert_close(total(preserve_total(weights, losses), losses), losses.double().sum())


def test_no_losses_have_no_weights():
    assert_close(preserve_total(torch.zeros(0), torch.zeros(0)), torch.zeros(0))


def carl_gradient(probs: Tensor, losses: Tensor, gamma: float, beta: float) -> Tensor:
    probs = probs.detach().clone().requires_grad_()
    (carl_weights(probs, gamma, beta) * losses).sum().backward()
    assert probs.grad is not None
    return probs.grad


@st.composite
def probs_and_losses(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    rows = draw(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 10)), min_size=1, max_size=12))
    return tuple(tensor(rows, dtype=torch.float64).unbind(dim=1))


@given(probs_and_losses(), GAMMAS, BETAS)
def test_carl_weights_follow_the_equation_and_have_mean_1(sample, gamma, beta):
    probs = sample[0]
    values = [((1 - beta) * p + beta) ** gamma for p in probs.tolist()]
    weights = carl_weights(probs, gamma, beta)
    expected = [v * len(values) / sum(values) for v in values]
    assert_close(weights, tensor(expected, dtype=torch.float64))
    assert_close(weights.mean(), tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", FLOATING)
def test_carl_gradient_of_the_worked_example(dtype):
    probs, losses = tensor([0.9, 0.5, 0.1], dtype=dtype), tensor([0.1, 0.5, 1.0], dtype=dtype)
    expected = tensor([-0.364, 0.169, 0.836], dtype=dtype)
    assert_close(carl_gradient(probs, losses, gamma=1, beta=0.2), expected, rtol=0, atol=5e-4)


@given(probs_and_losses(), GAMMAS, BETAS)
def test_carl_gradient_is_that_of_the_formula(sample, gamma, beta):
    probs, losses = sample
    base = (1 - beta) * probs + beta
    values = base**gamma
    mean = (values * losses).sum() / values.sum()
    # For gamma 1 this is n (1 - beta) / sum(v) * (L - mean).
    slope = gamma * base ** (gamma - 1) * (1 - beta)
    expected = len(probs) * slope / values.sum() * (losses - mean)
    assert_close(carl_gradient(probs, losses, gamma, beta), expected)


@pytest.mark.parametrize("gamma", [0.5, 1, 2])
@pytest.mark.parametrize("beta", [0, 0.2])
def test_carl_gradient_is_that_of_finite_differences(gamma, beta):
    probs = tensor([0.9, 0.5, 0.1, 0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: carl_weights(p, gamma, beta), probs)


@pytest.mark.parametrize("gamma", [0.5, 1, 2])
@pytest.mark.parametrize("beta", [0, 0.2, 0.8])
def test_carl_raises_the_score_of_boxes_better_than_the_weighted_mean(gamma, beta):
    generator = torch.Generator().manual_seed(0)
    probs, losses = torch.rand(2, 50, generator=generator, dtype=torch.float64)
    weights = carl_weights(probs, gamma, beta)
    mean = (weights * losses).sum() / weights.sum()
    raised = carl_gradient(probs, losses, gamma, beta) < 0
    assert_close(raised, losses < mean)


@pytest.mark.parametrize(("gamma", "beta"), [(0, 0), (0, 0.2), (1, 1), (2, 1)])
def test_carl_with_gamma_0_or_beta_1_is_the_plain_box_loss(gamma, beta):
    probs = tensor([0.0, 0.1, 0.5, 1.0])
    assert_close(carl_weights(probs, gamma, beta), torch.ones(4))
    assert_close(carl_gradient(probs, torch.arange(4.0), gamma, beta), torch.zeros(4))


@pytest.mark.parametrize("gamma", [0.5, 1, 2])
@pytest.mark.parametrize("probs", [[1e-30], [1e-15], [0.0, 0.0], [1e-20, 1e-21]])
def test_carl_without_beta_stands_the_smallest_probabilities(probs, gamma):
    probs = tensor(probs)
    losses = torch.arange(1.0, len(probs) + 1)
    assert_close(carl_weights(probs, gamma, 0).mean(), tensor(1.0))
    gradient = carl_gradient(probs.requires_grad_(), losses, gamma, 0)
    assert gradient.isfinite().all()
    if len(probs) == 1:  # a single weight is always 1
        assert_close(gradient, torch.zeros(1))


@pytest.mark.parametrize("gamma", [0.3, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("probs", [[0.0], [0.0, 0.0, 0.0], [0.0, 0.5, 1.0]])
@pytest.mark.parametrize("dtype", HALF + FLOATING)
def test_probability_0_with_beta_0_has_finite_weight_and_gradient(probs, gamma, dtype):
    values = tensor(probs, dtype=dtype)
    assert carl_weights(values, gamma, 0).isfinite().all()
    losses = torch.arange(1.0, len(probs) + 1)
    assert carl_gradient(values, losses, gamma, 0).isfinite().all()


@pytest.mark.parametrize("dtype", HALF)
def test_carl_weighs_half_precision_in_float32(dtype):
    probs = torch.full((3000,), 1 / 3, dtype=dtype)
    probs[::2] = 1e-3
    weights = carl_weights(probs, 1, 0.2)
    assert_close(weights, carl_weights(probs.float(), 1, 0.2))
    losses = torch.linspace(0, 1, 3000)
    expected = carl_gradient(probs.float(), losses, 1, 0.2)
    assert_close(carl_gradient(probs, losses, 1, 0.2), expected.to(dtype))


def test_no_probabilities_have_no_carl_weights_but_a_graph():
    probs = torch.zeros(0, requires_grad=True)
    weights = carl_weights(probs, 1, 0.2)
    assert_close(weights, torch.zeros(0))
    weights.sum().backward()
    assert_close(probs.grad, torch.zeros(0))
