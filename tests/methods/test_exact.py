"""The exact oracle against its definition, and FedEx-LoRA against it."""

import pytest
import torch

from invented import R, clients, fold, mean_of_products
from umbel.method import Each, MethodError, load


def aggregate(name, pairs, rows):
    return load(name).combine(fold(Each(), pairs, rows), {})


@pytest.mark.parametrize("K", [1, 2, 5])
def test_the_means_are_kept_and_all_that_they_miss_is_merged(K):
    pairs, rows = clients((R,) * K), [float(k + 1) for k in range(K)]
    download = aggregate("exact", pairs, rows)
    B, A = download.factors["B"], download.factors["A"]
    assert torch.allclose(B, sum(n / sum(rows) * own for (own, _), n in zip(pairs, rows)))
    assert torch.allclose(A, sum(n / sum(rows) * own for (_, own), n in zip(pairs, rows)))
    left, right = download.merge
    assert torch.allclose(left @ right, mean_of_products(pairs, rows) - B @ A, atol=1e-12)
    assert download.reset is None


def test_fedex_lora_does_the_same_in_fewer_numbers():
    pairs, rows = clients((2, 2, 2)), [1.0, 2.0, 5.0]
    ours, fedex = aggregate("exact", pairs, rows), aggregate("fedex_lora", pairs, rows)
    assert torch.equal(ours.factors["B"], fedex.factors["B"])
    assert torch.equal(ours.factors["A"], fedex.factors["A"])
    assert torch.allclose(ours.merge[0] @ ours.merge[1], fedex.merge[0] @ fedex.merge[1], atol=1e-12)
    assert fedex.merge[0].shape[1] == 4
    assert ours.merge[0].shape[1] == 8


def test_it_claims_to_be_exact_and_refuses_mixed_ranks():
    assert load("exact").exact
    with pytest.raises(MethodError, match=r"needs one rank; mixed ranks are for .*florist"):
        aggregate("exact", clients((2, 3)), [1.0, 1.0])
