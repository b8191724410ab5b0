"""What noise costs: against an independent accountant, over the range that is used."""

import math

import pytest
from dp_accounting import dp_event, pld

from umbel import privacy
from umbel.privacy import PrivacyError, epsilon, noise_multiplier

HISTORIES = {
    "many small batches": [(1.0, 0.01, 1000)],
    "large batches": [(0.7, 0.2, 200)],
    "every row in every batch": [(5.0, 1.0, 30)],
    "two runs": [(2.0, 0.1, 100), (1.0, 0.01, 400)],
    "a start, then training": [(3.0, 0.5, 1), (0.8, 0.02, 500)],
    "a start, two runs, all rows": [(6.0, 0.3, 1), (1.5, 0.05, 300), (1.1, 0.02, 200), (20.0, 1.0, 5)],
    "hardly anything": [(1000.0, 1.0, 10)],
    "a little": [(300.0, 0.3, 60)],
    "hardly any noise": [(0.35, 0.05, 2000)],
    "all rows, little noise": [(0.6, 1.0, 30)],
    "one step": [(1.2, 0.03, 1)],
}


def independent(history, delta):
    accountant = pld.PLDAccountant(value_discretization_interval=1e-4)
    for sigma, rate, steps in history:
        accountant.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma)), steps)
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_epsilon_is_the_independent_accountants_within_one_percent_and_never_below_its_lower_bound(history, delta):
    ours, theirs = epsilon(history, delta), independent(history, delta)
    assert ours == pytest.approx(theirs, rel=0.01, abs=2e-4)
    assert ours > 0.998 * theirs - 1e-4


def test_a_single_step_on_all_rows_is_the_analytic_gaussian_mechanism():
    # Balle & Wang 2018, theorem 8: δ(ε) = Φ(1/2σ − εσ) − e^ε Φ(−1/2σ − εσ).
    def phi(x):
        return math.erfc(-x / math.sqrt(2)) / 2

    for sigma, delta in ((1.0, 1e-5), (4.0, 1e-6), (30.0, 1e-3)):
        got = epsilon([(sigma, 1.0, 1)], delta)
        assert phi(1 / (2 * sigma) - got * sigma) - math.exp(got) * phi(-1 / (2 * sigma) - got * sigma) <= delta
        less = 0.99 * got
        assert phi(1 / (2 * sigma) - less * sigma) - math.exp(less) * phi(-1 / (2 * sigma) - less * sigma) > delta


def test_epsilon_does_not_depend_on_order_or_on_how_rounds_are_counted():
    whole = epsilon([(1.0, 0.02, 300), (2.0, 0.5, 1)], 1e-5)
    assert epsilon([(2.0, 0.5, 1), *[(1.0, 0.02, 30)] * 10], 1e-5) == whole


def test_epsilon_of_nothing_is_zero_and_without_noise_infinite():
    assert epsilon([], 1e-5) == 0
    assert epsilon([(1.0, 0.5, 0), (0.0, 0.0, 7)], 1e-5) == 0
    assert epsilon([(1.0, 0.5, 3), (0.0, 0.1, 1)], 1e-5) == math.inf


def test_where_the_tight_accountant_does_not_reach_epsilon_is_larger_and_never_smaller():
    history = [(1.0, 0.01, 1000)]
    below, above = epsilon(history, 0.99e-10), epsilon(history, 1.01e-10)
    assert above < below < 1.2 * above
    assert epsilon([(0.1, 0.5, 2000)], 1e-5) > 1000  # far beyond any use, and still an answer


@pytest.mark.parametrize("wrong", [(-1.0, 0.1, 1), (1.0, 1.1, 1), (1.0, -0.1, 1), (1.0, 0.1, -1), (math.nan, 0.1, 1)])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(PrivacyError, match="allowed: σ ≥ 0"):
        epsilon([wrong], 1e-5)
    for delta in (0.0, 1.0, -1e-5):
        with pytest.raises(PrivacyError, match="allowed: 0 < δ < 1"):
            epsilon([(1.0, 0.1, 1)], delta)


@pytest.mark.parametrize("target", [0.01, 0.5, 1.0, 3.0, 8.0, 100.0])
@pytest.mark.parametrize("mechanisms", [((0.01, 1000),), ((1.0, 20),), ((0.1, 200), (0.5, 1))], ids=str)
def test_the_noise_of_a_run_meets_its_target_from_below_within_two_percent(target, mechanisms):
    sigma = noise_multiplier(target, 1e-5, mechanisms)
    reached = epsilon([(sigma, rate, steps) for rate, steps in mechanisms], 1e-5)
    assert 0.98 * target <= reached <= target


def test_noise_of_training_leaves_room_for_what_the_start_has_spent():
    start = ((noise_multiplier(0.3, 1e-5, ((0.05, 1),)), 0.05, 1),)
    assert 0.98 * 0.3 <= epsilon(start, 1e-5) <= 0.3
    sigma = noise_multiplier(3.0, 1e-5, ((0.02, 400),), start)
    assert 0.98 * 3 <= epsilon([*start, (sigma, 0.02, 400)], 1e-5) <= 3
    assert sigma >= noise_multiplier(3.0, 1e-5, ((0.02, 400),))


def test_no_noise_helps_where_the_target_is_spent():
    with pytest.raises(PrivacyError, match="is spent already"):
        noise_multiplier(1.0, 1e-5, ((0.1, 10),), ((0.5, 1.0, 1),))


def test_each_client_takes_part_as_often_as_the_draw_says():
    asked = [privacy.chosen(7, [0, 2, 5, 6], 2, number) for number in range(1, 41)]
    assert all(len(own) == 2 and own == sorted(own) for own in asked)
    for client in (0, 2, 5, 6):
        times = privacy.participations(7, 40, [0, 2, 5, 6], 2, client)
        assert times == sum(client in own for own in asked)
        assert 8 <= times <= 32
    assert privacy.participations(7, 40, [0, 2], 0, 2) == 40


def test_delta_of_more_than_one_in_n_is_refused():
    privacy.check_delta(1 / 49, 49, "rows")
    with pytest.raises(PrivacyError, match=r"got 0\.03, allowed: at most 1/n = 0\.0204 for 49 rows of client 1"):
        privacy.check_delta(0.03, 49, "rows of client 1")


def test_no_history_has_an_epsilon_below_zero():
    assert [privacy.epsilon([own], delta) for own, delta in (((30.0, 0.2, 10), 0.02), ((1e3, 0.3, 10), 1e-3))] == [0.0, 0.0]
