"""A test of the tests: mistakes that were made in released code, or easily could be, are each caught by check_method."""

import pytest
import torch

from umbel import algebra
from umbel.method import Download, Each, Mean, Method, Stack, stacked
from umbel.testing import NonConforming, check_method

KNOWN = "clients that moved along one direction get the weighted mean"
EXACT = "the result is the mean of products, where the method says it is exact"
AGREE = "clients that agree count as one of them"
ORDER = "the order of arrival changes nothing"
TWICE = "n_k = 2 counts as the client sent twice"
SCALE = "factors scaled by s scale the result by s"
BITS = "the same clients in the same order give the same bits, and the global random state is left alone"


class MeanByHand(Method):
    """FedIT through `Each`, right; the mistakes below are variations of it."""

    collect = Each

    def combine(self, got, held):
        for name in "AB":
            stacked("", got, name)
        return Download(factors={name: self.mean(got, name) for name in "AB"})

    def mean(self, got, name):
        return sum(p * factors[name] for factors, p in got)


class FirstClientOnly(MeanByHand):
    """The sum of all clients after the first goes to a misspelt variable."""

    def mean(self, got, name):
        factors, p = got[0]
        return p * factors[name]


class WeightsApplied(MeanByHand):
    """p_k twice."""

    def mean(self, got, name):
        return sum(p * p * factors[name] for factors, p in got)


class WeightsForgotten(MeanByHand):
    def mean(self, got, name):
        return sum(factors[name] for factors, _ in got) / len(got)


class WeightsOnBoth(Stack):
    """p_k on B and on A of the stack."""

    def done(self):
        weights = torch.cat([torch.full((factors["A"].shape[0],), p) for factors, p in self._each.done()])
        both = super().done()
        return {"A": both["A"], "B": both["B"] * weights.to(both["B"])}


class Stacking(Method):
    collect = Stack

    @property
    def exact(self):
        return True

    def combine(self, got, held):
        return Download(merge=(got["B"], got["A"]), reset=0)


class StackedTwiceWeighted(Stacking):
    collect = WeightsOnBoth


class FirstClientTwice(Stacking):
    """A for/else appends the first block again, weighted again: M + p_0² B_0 A_0."""

    collect = Each

    def combine(self, got, held):
        blocks = [*got, ({"B": got[0][0]["B"], "A": got[0][1] * got[0][0]["A"]}, got[0][1])]
        return Download(merge=(torch.cat([f["B"] for f, _ in blocks], 1), torch.cat([p * f["A"] for f, p in blocks])), reset=0)


class Residual(MeanByHand):
    """FedEx-LoRA."""

    @property
    def exact(self):
        return True

    def combine(self, got, held):
        means = super().combine(got, held).factors
        B = torch.cat([f["B"] for f, _ in got] + [-means["B"]], 1)
        A = torch.cat([p * f["A"] for f, p in got] + [means["A"]], 0)
        return Download(factors=means, merge=self.residual(B, A))

    def residual(self, B, A):
        return B, A


class TransposedResidual(Residual):
    """Right for Conv1D, wrong for Linear: silent only where d_in = d_out, which no layer of the suite is."""

    def residual(self, B, A):
        return A.mT, B.mT


class DoubledResidual(Residual):
    """The residual at another scale than the product."""

    def residual(self, B, A):
        return 2 * B, A


class SingularValuesDropped(Method):
    """U Vh in place of U diag(s) Vh."""

    collect = Stack

    def combine(self, got, held):
        U, _, Vh = algebra.product_svd(got["B"], got["A"], rank=3)
        return Download(factors={"B": U, "A": Vh})


class SingularValuesOnBoth(Method):
    collect = Stack

    def combine(self, got, held):
        U, s, Vh = algebra.product_svd(got["B"], got["A"], rank=3)
        return Download(factors={"B": U * s, "A": s[:, None] * Vh})


class ScaleForgotten(Method):
    """Divides by α/r once more on the way back, as if B did not carry it already."""

    def combine(self, got, held):
        return Download(factors={"A": got["A"], "B": got["B"] / 2.0})


class NormsForgotten(Method):
    """Sends directions without their length."""

    def combine(self, got, held):
        return Download(factors={"A": got["A"], "B": got["B"] / got["B"].norm()})


class HoardingMean(Mean):
    """Keeps what it was given beside the running mean."""

    def __init__(self):
        super().__init__()
        self.log = []

    def add(self, factors, weight):
        self.log.append({name: x.clone() for name, x in factors.items()})
        super().add(factors, weight)


class UploadsHoarded(Method):
    collect = HoardingMean

    def combine(self, got, held):
        return Download(factors=got)


ELSEWHERE = []


class LeakingMean(Mean):
    """Keeps uploads where no collector can be seen to hold them."""

    def add(self, factors, weight):
        ELSEWHERE.append(factors)
        super().add(factors, weight)


class UploadsLeaked(UploadsHoarded):
    collect = LeakingMean


class InPlace(MeanByHand):
    """Adds into the first client's own tensors."""

    def mean(self, got, name):
        total = got[0][0][name].mul_(got[0][1])
        for factors, p in got[1:]:
            total += p * factors[name]
        return total


class Noisy(MeanByHand):
    """Draws from the global generator."""

    def mean(self, got, name):
        mean = super().mean(got, name)
        return mean + 1e-9 * torch.randn_like(mean)


class RoundsToDouble(MeanByHand):
    def mean(self, got, name):
        return sum(p * factors[name].double() for factors, p in got)


class NotInvariant(Method):
    """Orders rank directions by the rows of A, which another gauge changes, before it cuts."""

    collect = Stack

    def combine(self, got, held):
        kept = got["A"].norm(dim=1).argsort(descending=True)[:4]
        return Download(factors={"B": got["B"][:, kept], "A": got["A"][kept]})


MISTAKES = [
    (FirstClientOnly, {KNOWN, ORDER}),
    (WeightsApplied, {KNOWN, AGREE, TWICE}),
    (WeightsForgotten, {KNOWN, TWICE}),
    (StackedTwiceWeighted, {KNOWN, EXACT, AGREE, TWICE}),
    (FirstClientTwice, {KNOWN, EXACT, ORDER}),
    (TransposedResidual, {KNOWN, EXACT, AGREE, ORDER, "inputs are not modified"}),
    (DoubledResidual, {EXACT}),
    (SingularValuesDropped, {KNOWN, SCALE}),
    (SingularValuesOnBoth, {KNOWN, SCALE}),
    (ScaleForgotten, {KNOWN}),
    (NormsForgotten, {KNOWN, SCALE}),
    (UploadsHoarded, {"a collector that is a mean keeps no uploads"}),
    (UploadsLeaked, {"a collector that is a mean keeps no uploads"}),
    (InPlace, {"inputs are not modified"}),
    (Noisy, {BITS}),
    (RoundsToDouble, {"the dtype that goes in comes out, and float32 is enough"}),
    (NotInvariant, {KNOWN, "another gauge (B G, G⁻¹ A) changes nothing, where factors are stacked"}),
]


@pytest.mark.parametrize(("cls", "claims"), MISTAKES, ids=[cls.__name__ for cls, _ in MISTAKES])
def test_a_planted_mistake_is_caught_by_the_properties_it_breaks(cls, claims):
    with pytest.raises(NonConforming) as caught:
        check_method(cls)
    assert claims <= {result.claim for result in caught.value.results if result.holds is False}
    ELSEWHERE.clear()


@pytest.mark.parametrize("cls", [MeanByHand, Stacking, Residual])
def test_the_methods_that_the_mistakes_vary_are_sound(cls):
    assert all(result.holds is not False for result in check_method(cls))
