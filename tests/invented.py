"""Invented clients for the oracle tests of methods; d_in ≠ d_out ≠ r, so that a transposition cannot hide."""

import torch

D_OUT, D_IN, R = 9, 13, 3


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clients(ranks, seed=0):
    """Returns (B_k, A_k) of clients of these ranks."""
    return [(draw(D_OUT, r, seed=seed + 10 * k), draw(r, D_IN, seed=seed + 10 * k + 5)) for k, r in enumerate(ranks)]


def mean_of_products(pairs, rows):
    """Returns Σ p_k B_k A_k, formed densely."""
    return sum(n / sum(rows) * B @ A for (B, A), n in zip(pairs, rows))


def fold(collector, pairs, rows):
    """Returns what a collector makes of the clients' factors."""
    for (B, A), n in zip(pairs, rows):
        collector.add({"B": B, "A": A}, n)
    return collector.done()
