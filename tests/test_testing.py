"""check_method: sound methods pass, from here and from outside; capabilities are what is measured."""

import math

import pytest
import torch

from umbel import algebra, method, testing
from umbel.method import Download, Each, Mean, Method, MethodError, Stack, load
from umbel.testing import NonConforming, capabilities, check_method, disclosures, privacy_table

OPTIONS = [
    ("florist", {"energy": 1.0, "adopt": "merge"}),
    ("florist", {"rank": 2}),
    ("flora_na", {"scope": "shared"}),
    ("fed_sb", {"init": "gradient"}),
    ("fed_sb", {"init": "random"}),
]


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in method.names()), *OPTIONS])
def test_every_shipped_method_does_what_it_declares(name, options):
    results = check_method(name, **options)
    assert all(result.holds is not False for result in results)
    assert sum(result.holds is True for result in results) >= 10


# Sound methods of other kinds than ours, as somebody else would write them.


class OnlyB(Method):
    """FFA-LoRA: A is common and frozen."""

    trains = ("B",)
    sends = ("B",)

    @property
    def exact(self):
        return True

    def combine(self, got, held):
        return Download(factors=got)


class ShareA(Method):
    """FedSA-LoRA: B stays at home."""

    sends = ("A",)

    def combine(self, got, held):
        return Download(factors=got)


class Stacking(Method):
    """FLoRA: merge the stack, begin afresh."""

    collect, mixed_ranks = Stack, True

    @property
    def exact(self):
        return True

    def combine(self, got, held):
        return Download(merge=(got["B"], got["A"]), reset=0)


class Residual(Method):
    """FedEx-LoRA: the means, and what they miss into the frozen weight."""

    collect = Each

    @property
    def exact(self):
        return True

    def combine(self, got, held):
        method.stacked("", got, "A")
        B, A = (sum(p * factors[name] for factors, p in got) for name in "BA")
        stack_B = torch.cat([f["B"] for f, _ in got] + [-B], 1)
        stack_A = torch.cat([p * f["A"] for f, p in got] + [A], 0)
        return Download(factors={"A": A, "B": B}, merge=(stack_B, stack_A))


class TurnB(OnlyB):
    """RoLoRA's two kinds of round."""

    def plan(self, rounds):
        return [(TurnB if i % 2 == 0 else TurnA)() for i in range(rounds)]


class TurnA(OnlyB):
    trains = ("A",)
    sends = ("A",)


@pytest.mark.parametrize("cls", [OnlyB, ShareA, Stacking, Residual, TurnB])
def test_sound_methods_from_outside_pass(cls):
    results = check_method(cls)
    assert all(result.holds is not False for result in results)
    exact = [r.holds for r in results if r.claim.startswith("the result is the mean of products")]
    assert set(exact) == ({None} if cls is ShareA else {True})


def test_a_plan_of_two_kinds_of_round_is_checked_in_both():
    assert {result.phase for result in check_method(TurnB)} == {"all", "0 (train B)", "1 (train A)"}


def test_methods_are_checked_by_module_path(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "__init__.py").write_text("")
    (tmp_path / "elsewhere" / "plain_mean.py").write_text(
        "from umbel.method import Download, Method\n\n\n"
        "class PlainMean(Method):\n    def combine(self, got, held):\n        return Download(factors=got)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert all(result.holds is not False for result in check_method("elsewhere.plain_mean"))


class Wrong(Method):
    """Claims to be exact, counts the mean half, and loses a round."""

    @property
    def exact(self):
        return True

    def plan(self, rounds):
        return [self] * (rounds - 1)

    def combine(self, got, held):
        return Download(factors={"A": got["A"], "B": got["B"] / 2})


def test_a_failure_lists_every_broken_property_with_figures():
    with pytest.raises(NonConforming) as caught:
        check_method(Wrong)
    broken = {result.claim for result in caught.value.results if result.holds is False}
    assert {
        "plan(4) has four training rounds",
        "clients that moved along one direction get the weighted mean",
        "the result is the mean of products, where the method says it is exact",
    } == broken
    assert "relative difference 0.5, allowed" in str(caught.value)
    assert str(caught.value).startswith("Wrong breaks 3 of")


class Crashing(Method):
    def combine(self, got, held):
        raise RuntimeError("out of order")


def test_a_method_that_raises_is_reported_not_propagated():
    with pytest.raises(NonConforming, match="RuntimeError: out of order"):
        check_method(Crashing)


class CrashingStart(Crashing):
    trains = ()
    sends = ("G",)


class NeverStarts(OnlyB):
    def plan(self, rounds):
        return [CrashingStart()] + [self] * rounds


def test_a_measuring_phase_that_raises_is_reported_too():
    with pytest.raises(NonConforming, match=r"phase 0 \(measure\): .*RuntimeError: out of order"):
        check_method(NeverStarts)


def test_what_capabilities_say_is_measured():
    fedit, florist, fed_sb = capabilities("fedit"), capabilities("florist"), capabilities("fed_sb")
    assert (fedit["exact"], fedit["maskable"], fedit["mixed_ranks"], fedit["server_memory"]) == (False, True, False, "constant")
    assert fedit["error"] > 0.01
    assert (florist["maskable"], florist["mixed_ranks"], florist["server_memory"]) == (False, True, "grows with clients")
    assert (fed_sb["exact"], fed_sb["maskable"], fed_sb["server_memory"]) == (True, True, "constant")
    assert fed_sb["error"] < 1e-12
    assert capabilities("florist", energy=1.0)["exact"]
    assert not capabilities("fed_sb", init="gradient")["maskable"]
    assert not capabilities("flora_na")["mixed_ranks"]


@pytest.mark.parametrize(
    ("name", "options", "up", "down", "start_up"),
    [
        ("fedit", {}, 3 * (64 + 48), 3 * (64 + 48), 0),
        ("flora_na", {}, 3 * (64 + 48), 3 * (64 + 48), 0),
        ("florist", {"rank": 2}, 3 * (64 + 48), 2 * (64 + 48), 0),
        ("fed_sb", {}, 9, 9, 64 * 48),
        ("fed_sb", {"init": "gradient"}, 9, 9, 3 * (64 + 48)),
        ("fed_sb", {"init": "random"}, 9, 9, 0),
    ],
)
def test_counted_bytes_are_the_papers_parameter_counts_and_a_header(name, options, up, down, start_up):
    found = capabilities(name, **options)
    for key, parameters in [("bytes_up", up), ("bytes_down", down), ("start_bytes_up", start_up)]:
        assert 4 * parameters <= found[key] <= 4 * parameters + (300 if parameters else 0)


def test_methods_of_another_making_are_measured_too():
    assert capabilities(Stacking)["exact"]
    assert capabilities(Stacking)["mixed_ranks"]
    assert capabilities(OnlyB)["bytes_up"] < capabilities("fedit")["bytes_up"]
    assert not capabilities(ShareA)["exact"]


def test_a_mask_is_seen_through_by_everything_but_a_sum():
    verdicts = {}
    for cls in (Mean, Each, Stack):
        phase = type("Phase", (OnlyB,), {"collect": cls, "trains": ("A", "B"), "sends": ("A", "B")})()
        _, trial = next(iter(testing.trials(phase, testing.SHAPES)))
        verdicts[cls] = testing._maskable(trial)
    assert verdicts == {Mean: True, Each: False, Stack: False}


def test_difference_is_relative_except_to_zero():
    assert testing.difference(torch.tensor([1.5]), torch.tensor([1.0])) == 0.5
    assert testing.difference(torch.tensor([0.5]), torch.tensor([0.0])) == 0.5
    assert math.isnan(testing.difference(torch.tensor([float("nan")]), torch.tensor([1.0])))


def test_invented_clients_hold_the_ideal_that_the_suite_compares_with():
    _, trial = next(iter(testing.trials(load("fedit"), testing.SHAPES)))
    clients = trial.clients()
    total = sum(c.rows for c in clients)
    naive = [sum(c.rows / total * c.factors[x]["B"] @ c.factors[x]["A"] for c in clients).flatten() for x in trial.shapes]
    assert torch.allclose(trial.ideal(clients), torch.cat(naive))
    aligned = trial.aligned()
    for layer in trial.shapes:
        _, s, _ = algebra.product_svd(
            torch.cat([c.factors[layer]["B"] for c in aligned], 1), torch.cat([c.factors[layer]["A"] for c in aligned], 0)
        )
        assert s[1] < 1e-12 * s[0]


def test_refusals_of_mixed_ranks_must_be_sentences():
    class Torchy(Method):
        collect = Each

        def combine(self, got, held):
            return Download(factors={n: sum(p * f[n] for f, p in got) for n in "AB"})

    class Curt(Torchy):
        def combine(self, got, held):
            if len({f["A"].shape for f, _ in got}) > 1:
                raise MethodError("no")
            return super().combine(got, held)

    for cls, says in [(Torchy, "RuntimeError"), (Curt, "not in a sentence")]:
        with pytest.raises(NonConforming) as caught:
            check_method(cls)
        (broken,) = [result for result in caught.value.results if result.holds is False]
        assert broken.claim == "mixed ranks are taken, or refused in a sentence"
        assert says in broken.detail


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in method.names()), *OPTIONS])
def test_what_may_be_masked_is_what_a_sum_with_masks_leaves_as_it_is(name, options):
    found = disclosures(name, **options)
    assert found["maskable"] == capabilities(name, **options)["maskable"]
    assert bool(found["why_not"]) == bool(not found["server_sees_masked"]) == (not found["maskable"])


class HeavyOnes(OnlyB):
    """Its collector is a mean of somebody's own, with weights of its own."""

    class Squares(Mean):
        def add(self, factors, weight):
            super().add(factors, weight**2)

    collect, by_rows = Squares, False


class Weighed(OnlyB):
    by_rows = False


class Sketch(Method):
    """Sends what no client holds before: a product with what it was sent."""

    trains, sends = ("A", "B"), ("Y",)

    def combine(self, got, held):
        return Download(factors={"B": got["Y"]})


def test_what_methods_of_somebodys_own_allow_follows_from_their_phases():
    assert disclosures(OnlyB)["units"] == ["example", "client"]
    assert disclosures(ShareA)["keeps"] == ["B"]
    assert disclosures(Stacking)["why_not"].startswith("has the server stack every client's own A and B")
    assert "all d_out × d_in numbers of a layer" in disclosures(Stacking)["why_not_client"]
    for strange, said in ((HeavyOnes, "look at every client's own B (Squares)"), (Weighed, "by more than rows")):
        found = disclosures(strange)
        assert (found["maskable"], found["units"]) == (False, ["example"])
        assert said in found["why_not"]
    assert not capabilities(HeavyOnes)["maskable"]
    assert method.blind_sum(Sketch()) == ""
    assert "sends Y, which clients do not hold before" in method.bounded_sum(Sketch())


def test_what_is_measured_before_training_is_told_and_needs_rows_of_nobody():
    assert disclosures("fed_sb")["start_reads"] == "rows (G)"
    assert disclosures("fed_sb", init="gradient")["sends"]["start"] == {"A": 144, "B": 192}
    assert disclosures("fed_sb", init="random")["start_reads"] == "no rows"
    start = load("fed_sb")
    assert "measures a gradient (G) on every client's rows" in method.bounded_sum(start)
    assert method.bounded_sum(start, public=True) == method.bounded_sum(load("fed_sb", init="random")) == ""
    # A stacked gradient cannot be masked, and on rows of nobody it need not be hidden.
    stacked = load("fed_sb", init="gradient")
    assert "has the server stack" in method.blind_sum(stacked)
    assert method.bounded_sum(stacked, public=True) == ""


def test_rounds_that_send_different_factors_are_told_apart():
    assert disclosures("rolora")["sends"] == {"training": {"B": 192}, "other rounds": {"A": 144}}
    (_, row) = privacy_table({"fedsa_lora": disclosures("fedsa_lora")})
    assert row[1:3] == ["A 144; gather B 192", "B and head"]
