"""How many numbers go up and come down per client and round, against the formulas of the pages, on two layers."""

import pytest
import torch

from umbel import method, wire
from umbel.method import load

LAYERS = {"wide": (10, 14), "tall": (12, 8)}  # d_out, d_in: so that no two formulas agree by chance
R, K = 2, 3
OUT, IN = sum(m for m, _ in LAYERS.values()), sum(n for _, n in LAYERS.values())
PAIR = R * (OUT + IN)

# Per phase of two rounds and what comes before and after: numbers up, numbers down, of both layers together.
FORMULAS = {
    "fedit": [(PAIR, PAIR)] * 2,
    "ffa_lora": [(R * OUT, R * OUT)] * 2,
    "fedsa_lora": [(R * IN, R * IN)] * 2 + [(R * OUT, R * OUT)],
    "rolora": [(R * OUT, R * OUT), (R * IN, R * IN)],
    "fedex_lora": [(PAIR, K * PAIR)] * 2,
    "flora": [(PAIR, K * PAIR)] * 2,
    "flexlora": [(PAIR, PAIR)] * 2,
    "hetlora": [(PAIR, PAIR)] * 2,
    "lora_fair": [(PAIR, PAIR)] * 2,
    "fedsvd": [(R * OUT, PAIR)] * 2,
    "flora_na": [(PAIR, PAIR)] * 2,
    "florist": [(PAIR, PAIR // R * 3)] * 2,
    "best_rank": [(PAIR, PAIR)] * 2,
    "exact": [(PAIR, (K + 2) * PAIR)] * 2,
    "power": [(R * OUT, R * OUT), (R * IN, PAIR)] * 2,
    "fed_sb": [(sum(m * n for m, n in LAYERS.values()), PAIR + 2 * R**2)] + [(2 * R**2, 2 * R**2)] * 2,
    "ravan": [(0, PAIR + 2 * R**2 // 2)] + [(2 * R**2 // 2, 2 * R**2 // 2)] * 2,
}
OPTIONS = {"florist": {"rank": 3}, "ravan": {"heads": 2}}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def start(rank):
    return {layer: {"A": draw(rank, n, seed=1), "B": draw(m, rank, seed=2)} for layer, (m, n) in LAYERS.items()}


def upload(phase, held, seed):
    if phase.speaks:
        trained = {layer: {name: draw(*x.shape, seed=seed) for name, x in own.items()} for layer, own in held.items()}
        return {layer: phase.message(own, held[layer]) for layer, own in trained.items()}
    sizes = {layer: {"G": LAYERS[layer], **{name: x.shape for name, x in own.items()}} for layer, own in held.items()}
    return {layer: {name: draw(*own[name], seed=seed) for name in phase.sends} for layer, own in sizes.items()}


def numbers(tensors):
    return sum(x.numel() for x in tensors.values())


def traffic(name, **options):
    held, counted = start(R), []
    for phase in load(name, **options).plan(2):
        collectors = {layer: phase.collect() for layer in LAYERS}
        uploads = [upload(phase, held, seed=10 + k) for k in range(K)]
        for k, own in enumerate(uploads):
            for layer in LAYERS if phase.sends else ():
                collectors[layer].add(own[layer], k + 1.0)
        got = {layer: c.done() if phase.sends else {} for layer, c in collectors.items()}
        downloads = phase.combine_layers(got, held)
        counted.append((numbers(wire.pack_factors(uploads[0])), numbers(wire.pack(downloads)[1])))
        # As clients do: what they do not overwrite stays, and a pair of another rank is brought to their own.
        for layer, download in downloads.items():
            if held[layer].keys() != {"A", "B"} or download.factors.get("A", held[layer]["A"]).shape[0] == R:
                held[layer] = {**held[layer], **download.factors}
    return counted


@pytest.mark.parametrize("name", FORMULAS)
def test_the_numbers_that_travel_are_those_of_the_formula(name):
    assert traffic(name, **OPTIONS.get(name, {})) == FORMULAS[name]


def test_every_method_has_a_formula():
    assert sorted(FORMULAS) == method.names()


def test_each_further_iteration_costs_as_much_as_the_first():
    assert traffic("power", iterations=2)[:4] == [(R * OUT, R * OUT), (R * IN, R * IN), (R * OUT, R * OUT), (R * IN, PAIR)]


def test_whoever_is_asked_about_common_directions_sends_the_same_whatever_its_rank():
    first, held = load("power").plan(1)[0], start(4)
    for rank in (1, 2, 4):
        said = {layer: first.message(own, held[layer]) for layer, own in start(rank).items()}
        assert numbers(wire.pack_factors(said)) == 4 * OUT


@pytest.mark.parametrize("name", [n for n in method.names() if method.find(n).mixed_ranks and not method.find(n).whole])
def test_a_client_of_smaller_rank_sends_and_takes_less(name):
    ranks, phase = (1, 2, 4), load(name, **({"rank": 4} if name == "florist" else {}))
    held = start(max(ranks))
    collectors = {layer: phase.collect() for layer in LAYERS}
    for rank in ranks:
        own = upload(phase, start(rank), seed=rank)
        assert numbers(wire.pack_factors(own)) == rank * (OUT + IN)
        for layer in LAYERS:
            collectors[layer].add(own[layer], 1.0)
    downloads = phase.combine_layers({layer: c.done() for layer, c in collectors.items()}, held)
    for rank in ranks:
        down = numbers(wire.pack({layer: download.cut(rank) for layer, download in downloads.items()})[1])
        assert down == (sum(ranks) if name == "flora" else rank) * (OUT + IN)
