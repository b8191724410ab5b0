"""The server's arithmetic: who is refused and why, the aggregation error, what absent clients are owed, state and back."""

import pytest
import torch

from umbel import wire
from umbel.method import Download, Mean, Method, MethodError, Stack, load, product
from umbel.server import Aggregated, Aggregator, LayerShape, Refused, Server, ServerError, fresh_factors

SHAPES = {"wide": LayerShape(7, 11, 3), "tall": LayerShape(10, 6, 3)}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def upload(seed, sends=("A", "B"), rank=None):
    """Random factors of every layer, of the layer's rank or another."""
    result = {}
    for i, (layer, shape) in enumerate(SHAPES.items()):
        r = rank or shape.rank
        sizes = {"A": (r, shape.d_in), "B": (shape.d_out, r), "R": (r, r), "G": (shape.d_out, shape.d_in)}
        result[layer] = {name: draw(*sizes[name], seed=1000 * seed + 10 * i + "ABRG".index(name)) for name in sends}
    return result


def server(dtype="float32"):
    return Server(SHAPES, seed=5, dtype=dtype)


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(x, second[key]) for key, x in first.items())
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, Download):
        return same(vars(first), vars(second))
    return first == second


# Who is refused


def broken(layer="tall", **changes):
    """A good upload with factors of one layer replaced; None takes a factor away."""
    result = upload(1)
    own = {**result[layer], **changes}
    result[layer] = {name: x for name, x in own.items() if x is not None}
    return result


def spoiled(name, value):
    """A good upload with one entry of one factor of the layer 'tall' changed."""
    result = upload(1)
    result["tall"][name][1, 2] = value
    return result


LAYER = "layer 'tall': client 4 "
UPLOADS = {
    "NaN": (spoiled("A", float("nan")), LAYER + "sent A with NaN"),
    "infinity": (spoiled("B", float("inf")), LAYER + "sent B with NaN, infinity"),
    "minus infinity": (spoiled("B", -float("inf")), LAYER + "sent B with NaN, infinity"),
    "numbers whose products overflow": (spoiled("A", -1e30), LAYER + "sent A with NaN, infinity or values beyond"),
    "B as A": (broken(B=draw(3, 10)), LAYER + r"sent B of shape \(3, 10\), wanted \(10, 3\)"),
    "A of another width": (broken(A=draw(3, 5)), LAYER + r"sent A of shape \(3, 5\), wanted \(3, 6\)"),
    "a vector": (broken(A=draw(6)), LAYER + r"sent A of shape \(6,\), wanted"),
    "a batch": (broken(A=draw(1, 3, 6)), LAYER + r"sent A of shape \(1, 3, 6\), wanted"),
    "ranks that differ within the layer": (broken(B=draw(10, 2)), LAYER + r"sent B of shape \(10, 2\), wanted \(10, 3\)"),
    "no B": (broken(B=None), LAYER + r"sent \['A'\], wanted \['A', 'B'\]"),
    "a factor more": (broken(R=draw(3, 3)), LAYER + r"sent \['A', 'B', 'R'\], wanted \['A', 'B'\]"),
    "a factor by another name": (broken(A=None, a=draw(3, 6)), LAYER + r"sent \['B', 'a'\], wanted"),
    "a layer less": ({"wide": upload(1)["wide"]}, r"client 4: layers missing \['tall'\], unknown \[\]"),
    "a layer more": ({**upload(1), "else": upload(1)["wide"]}, r"client 4: layers missing \[\], unknown \['else'\]"),
    "nothing": ({}, r"client 4: layers missing \['tall', 'wide'\]"),
}


def with_two(phase, changes=lambda aggregator: None):
    """What becomes of two good uploads, with something in between."""
    aggregator = Aggregator(phase, server())
    aggregator.add(0, 2, upload(0, phase.sends), {"head": draw(4)})
    changes(aggregator)
    aggregator.add(1, 1, upload(2, phase.sends), {"head": draw(4, seed=1)})
    return aggregator.done()


@pytest.mark.parametrize("method", ["fedit", "florist", "flora_na"])
@pytest.mark.parametrize(("factors", "reason"), UPLOADS.values(), ids=UPLOADS)
def test_an_upload_that_does_not_fit_names_client_and_layer_and_leaves_nothing_folded(method, factors, reason):
    phase = load(method)

    def refuse(aggregator):
        with pytest.raises(Refused, match=reason):
            aggregator.add(4, 1, factors, {"head": draw(4)})
        assert aggregator.folded == [0]

    assert same(vars(with_two(phase, refuse)), vars(with_two(phase)))


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), 1e300])
def test_rows_that_are_no_weight_are_refused_and_leave_nothing_folded(weight):
    def refuse(aggregator):
        with pytest.raises(Refused, match=r"client 4 says it has .* rows, allowed: more than 0"):
            aggregator.add(4, weight, upload(1), {"head": draw(4)})

    assert same(vars(with_two(load("fedit"), refuse)), vars(with_two(load("fedit"))))


PLAIN = {
    "of another shape": ({"head": draw(5)}, "differ from the others' in name or shape"),
    "of another name": ({"tail": draw(4)}, "differ from the others' in name or shape"),
    "missing": ({}, "differ from the others' in name or shape"),
    "one more": ({"head": draw(4), "tail": draw(4)}, "differ from the others' in name or shape"),
    "with NaN": ({"head": torch.tensor([1.0, float("nan"), 0, 0])}, "parameter 'head': client 4 sent NaN"),
}


@pytest.mark.parametrize(("plain", "reason"), PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("rounds", [0, 1])
def test_plain_parameters_that_do_not_fit_are_refused_and_leave_nothing_folded(plain, reason, rounds):
    own = server()
    if rounds:  # from the second round on the server knows them itself
        own.settle(with_two(load("fedit")))
    aggregator = Aggregator(load("fedit"), own)
    if not rounds:
        aggregator.add(0, 2, upload(0), {"head": draw(4)})
    with pytest.raises(Refused, match=reason):
        aggregator.add(4, 1, upload(1), plain)
    assert aggregator.folded == ([] if rounds else [0])


@pytest.mark.parametrize(("method", "sends"), [("fedit", ("A", "B")), ("fed_sb", ("R",))])
def test_a_method_that_averages_refuses_another_rank_and_says_which_is_allowed(method, sends):
    aggregator = Aggregator(load(method), server())
    with pytest.raises(Refused) as caught:
        aggregator.add(4, 1, upload(1, sends, rank=2), {})
    if method == "fedit":
        assert str(caught.value) == ("layer 'wide': client 4 sent factors of rank 2, allowed: 3")
    else:
        assert "layer 'wide': client 4 sent R of shape (2, 2), wanted (3, 3)" in str(caught.value)


def test_a_mean_of_ones_own_refuses_another_rank_too():
    class Careful(Mean):
        pass

    class Averages(Method):
        collect = Careful

        def combine(self, got, held):
            return Download(factors=got)

    with pytest.raises(Refused, match="layer 'wide': client 4 sent factors of rank 2, allowed: 3"):
        Aggregator(Averages(), server()).add(4, 1, upload(1, rank=2), {})


def test_a_method_that_takes_mixed_ranks_takes_them_up_to_the_clients_own():
    own = server()
    own.note_rank(1, "wide", 2)
    aggregator = Aggregator(load("florist", energy=1.0), own)
    aggregator.add(0, 2, upload(0, rank=3), {})
    with pytest.raises(Refused, match="layer 'wide': client 1 sent factors of rank 3, allowed: 1 to 2"):
        aggregator.add(1, 1, upload(1, rank=3), {})
    aggregator.add(2, 1, upload(1, rank=1), {})
    with pytest.raises(Refused, match="layer 'wide': client 4 sent factors of rank 12, allowed: 1 to 3"):
        aggregator.add(4, 1, upload(2, rank=12), {})
    with pytest.raises(Refused, match="layer 'wide': client 4 sent factors of rank 0, allowed: 1 to 3"):
        aggregator.add(
            4,
            1,
            {layer: {name: x[:0] if name == "A" else x[:, :0] for name, x in own.items()} for layer, own in upload(2).items()},
            {},
        )
    aggregated = aggregator.done()
    assert aggregated.rank == {"wide": 4, "tall": 4}
    assert aggregated.ranks == {0: {"wide": 3, "tall": 3}, 2: {"wide": 1, "tall": 1}}
    assert max(aggregated.error.values()) < 1e-6


def test_a_collector_that_is_stricter_than_the_server_ends_the_round_naming_client_and_layer():
    class Picky(Stack):
        def add(self, factors, weight):
            if weight == 3:
                raise MethodError("sent three rows")
            super().add(factors, weight)

    class Picks(Method):
        collect = Picky

        def combine(self, got, held):
            return Download(factors=got)

    aggregator = Aggregator(Picks(), server())
    aggregator.add(4, 3, upload(1), {})
    with pytest.raises(ServerError, match="layer 'wide': client 4 sent three rows"):
        aggregator.done()


@pytest.mark.parametrize("method", ["fedit", "florist", "flora_na", "fed_sb"])
def test_a_round_with_nobody_left_cannot_be_ended(method):
    aggregator = Aggregator(load(method), server())
    with pytest.raises(Refused):
        aggregator.add(0, 0, upload(0, load(method).sends), {})
    with pytest.raises(ServerError, match="no client is left"):
        aggregator.done()


def test_a_client_of_another_rank_is_left_out_by_every_method_that_needs_one_rank():
    for name in ("fedit", "flora_na"):
        aggregator = Aggregator(load(name), server())
        aggregator.add(0, 1, upload(0), {})
        with pytest.raises(Refused, match="client 1 sent factors of rank 2, allowed: 3"):
            aggregator.add(1, 1, upload(1, rank=2), {})
        assert aggregator.done().rank


def test_what_a_method_refuses_ends_the_round_with_its_reason():
    """Fed-SB cannot start at a rank beyond its layer; only combine sees that."""
    thin = {"thin": LayerShape(d_out=5, d_in=4, rank=5)}
    aggregator = Aggregator(next(iter(load("fed_sb").plan(1))), Server(thin, 1))
    aggregator.add(0, 1, {"thin": {"G": draw(5, 4)}}, {})
    with pytest.raises(ServerError, match="got rank 5 on a weight of 5 × 4"):
        aggregator.done()


def test_parameters_agreed_at_the_opening_cannot_be_changed_by_the_first_upload():
    aggregator = Aggregator(load("fedit"), Server(SHAPES, 1, plain_shapes={}))
    with pytest.raises(Refused, match="parameters that are not factors differ"):
        aggregator.add(0, 1, upload(0), {"injected": draw(3)})


# What a round gives


@pytest.mark.parametrize("method", ["fedit", "florist", "fed_sb"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_parameters_take_the_weighted_mean_whatever_the_method(method, dtype):
    phase, plain = load(method), [{"head": draw(4, 3, seed=k), "bias": draw(4, seed=9 + k)} for k in range(3)]
    aggregator = Aggregator(phase, server(dtype))
    for k, n in enumerate((1, 2, 5)):
        aggregator.add(k, n, upload(k, phase.sends), plain[k])
    got = aggregator.done().plain
    for name in plain[0]:
        mean = sum(n / 8 * plain[k][name].double() for k, n in enumerate((1, 2, 5)))
        assert torch.allclose(got[name].double(), mean, rtol=2e-7 if dtype == "float32" else 2**-8, atol=1e-7)
        assert torch.equal(got[name], wire.rounded(got[name], dtype))


class Holder:
    """One client's layers as dense float64 algebra: the frozen weight, what was merged into it, and the factors."""

    def __init__(self, seed=5):
        self.weight = {layer: draw(s.d_out, s.d_in, seed=77).double() for layer, s in SHAPES.items()}
        self.factors = {layer: fresh_factors(layer, s, seed) for layer, s in SHAPES.items()}

    def take(self, downloads):
        for layer, download in downloads.items():
            if download.reset is not None:
                self.factors[layer] = fresh_factors(layer, SHAPES[layer], download.reset)
            self.factors[layer] = {**self.factors[layer], **download.factors}
            if download.merge is not None:
                self.weight[layer] = self.weight[layer] + download.merge[0].double() @ download.merge[1].double()

    def effective(self):
        result = {}
        for layer, own in self.factors.items():
            middle = own["R"].double() if "R" in own else torch.eye(own["A"].shape[0]).double()
            result[layer] = self.weight[layer] + own["B"].double() @ middle @ own["A"].double()
        return result


METHODS = [
    ("fedit", {}),
    ("florist", {"energy": 0.7}),
    ("florist", {"energy": 0.7, "adopt": "merge"}),
    ("florist", {"energy": 1.0, "adopt": "merge"}),
    ("flora_na", {}),
    ("fed_sb", {"init": "sign", "eta": 1e-2}),
    ("fed_sb", {"init": "gradient"}),
]
NAMES = [" ".join([name, *map(str, options.values())]) for name, options in METHODS]


def play(own, method, rounds, before=lambda k, phase: None):
    """Runs a method's phases over random uploads; yields after each (phase, uploads, rows, aggregated)."""
    rows = (1, 2, 5)
    for k, phase in enumerate(method.plan(rounds)):
        before(k, phase)
        aggregator = Aggregator(phase, own)
        uploads = [upload(10 * k + c, phase.sends) for c in range(len(rows))]
        for c, n in enumerate(rows):
            aggregator.add(c, n, uploads[c], {"head": draw(4, seed=10 * k + c)} if phase.trains else {})
            own.took(c)
        aggregated = aggregator.done()
        own.settle(aggregated)
        yield phase, uploads, rows, aggregated


@pytest.mark.parametrize(("name", "options"), METHODS, ids=NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_aggregation_error_is_the_papers_formula_in_dense_float64(name, options, dtype):
    own, holder = server(dtype), Holder()
    for phase, uploads, rows, aggregated in play(own, load(name, **options), 3):
        before, base = holder.factors, dict(holder.weight)
        holder.take(aggregated.downloads)
        if not phase.trains:
            assert aggregated.error is None
            continue
        assert list(aggregated.error) == list(SHAPES)
        for layer in SHAPES:
            ideal = torch.zeros_like(base[layer])
            for factors, n in zip(uploads, rows):
                all_factors = {**before[layer], **factors[layer]}
                middle = all_factors["R"].double() if "R" in all_factors else torch.eye(3).double()
                ideal += n / sum(rows) * all_factors["B"].double() @ middle @ all_factors["A"].double()
            sent = holder.effective()[layer] - base[layer]
            naive = float((sent - ideal).norm() / ideal.norm())
            assert aggregated.error[layer] == pytest.approx(naive, rel=1e-5, abs=2e-7)
            merge = aggregated.downloads[layer].merge
            assert aggregated.rank[layer] == (holder.factors[layer]["A"].shape[0] if merge is None else merge[0].shape[1])
        worst = max(aggregated.error.values())
        if load(name, **options).exact:
            assert worst < (1e-6 if dtype == "float32" else 1e-2)
        else:
            assert worst > 1e-2


def test_the_error_is_not_measured_where_it_is_not_wanted():
    aggregator = Aggregator(load("fedit"), server(), measure_error=False)
    aggregator.add(0, 1, upload(0), {})
    aggregated = aggregator.done()
    assert aggregated.error is None
    assert aggregated.rank == {"wide": 3, "tall": 3}


def test_uploads_and_what_is_held_are_not_modified():
    own, uploads = server(), [upload(0), upload(1)]
    held = {layer: {name: x.clone() for name, x in factors.items()} for layer, factors in own.held.items()}
    aggregator = Aggregator(load("florist", adopt="merge"), own)
    for client, factors in enumerate(uploads):
        aggregator.add(client, 1, factors, {"head": draw(4)})
    aggregator.done()
    assert same(held, own.held)
    assert same(uploads, [upload(0), upload(1)])


def test_the_model_is_the_common_weight_less_the_frozen_one():
    for name, options in METHODS:
        own, holder = server(), Holder()
        for *_, aggregated in play(own, load(name, **options), 3):
            holder.take(aggregated.downloads)
        for layer, (B, A) in own.model().items():
            wanted = holder.effective()[layer] - Holder().weight[layer]
            assert torch.allclose(B.double() @ A.double(), wanted, atol=1e-5 * float(wanted.norm()))


def test_a_fresh_adapter_depends_on_run_seed_round_and_layer():
    own, seeds = server(), []
    for *_, aggregated in play(own, load("florist", adopt="merge"), 3):
        seeds.append({layer: download.reset for layer, download in aggregated.downloads.items()})
        assert not torch.equal(own.held["wide"]["A"][:, :6], own.held["tall"]["A"])
    other = Server(SHAPES, seed=6)
    *_, aggregated = next(play(other, load("florist", adopt="merge"), 3))
    seeds.append({layer: download.reset for layer, download in aggregated.downloads.items()})
    assert len({seed["wide"] for seed in seeds}) == 4


class Reading(dict):
    """An upload that notes which of its layers are read, and when."""

    def __init__(self, factors, told):
        super().__init__(factors)
        self.told = told

    def __getitem__(self, layer):
        self.told.append(layer)
        return super().__getitem__(layer)


@pytest.mark.parametrize(("method", "reads"), [("fedit", 2), ("florist", 2), ("flora_na", 2)])
def test_uploads_are_read_one_layer_of_all_clients_after_the_other(method, reads):
    """Once for the method, once for the error; however often the method looks at what was collected of one layer."""
    aggregator, told = Aggregator(load(method), server()), []
    for client in range(3):
        factors = upload(client)
        aggregator.fold(client, 1, Reading(factors, told), {}, aggregator.check(client, 1, factors, {}))
    assert told == []
    aggregator.done()
    assert told == [layer for _ in range(reads) for layer in SHAPES for _ in range(3)]


# Who was away


@pytest.mark.parametrize(("name", "options"), METHODS, ids=NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("away", [{2}, {1, 2}, {0, 1, 2, 3}, {1, 3}])
def test_a_client_that_was_away_ends_with_the_state_of_one_that_was_there(name, options, dtype, away):
    own, there, absent = server(dtype), Holder(seed=-99), Holder(seed=-99)

    def exchange(client, holder):
        header, tensors = wire.pack(own.owed_to(client))
        message = wire.decode(wire.encode(wire.Message(header, tensors), dtype))
        holder.take(wire.unpack(message.header, message.tensors))
        own.took(client)

    def before(k, phase):
        exchange(0, there)
        if k not in away:
            exchange(7, absent)

    for _ in play(own, load(name, **options), 5, before):
        pass
    exchange(0, there)
    exchange(7, absent)
    assert same(there.factors, absent.factors)
    assert same(own.held, there.factors)
    # Five merges are wider than a layer and are compressed on the way: equal to rounding, in the wire's dtype.
    close = 1e-6 if dtype == "float32" else 2e-2
    for layer in SHAPES:
        wanted = there.weight[layer] - Holder().weight[layer]
        assert (absent.weight[layer] - there.weight[layer]).norm() <= close * wanted.norm()


def test_a_composition_that_is_no_wider_than_the_layer_is_the_same_to_the_last_bit():
    own = server()
    for *_, aggregated in play(own, load("florist", rank=1, adopt="merge"), 5):
        last = aggregated
    kept = own.owed_to(7)["tall"]
    assert kept.merge[0].shape == (10, 5)
    assert torch.equal(kept.merge[0][:, 4:], last.downloads["tall"].merge[0])
    assert kept.reset == last.downloads["tall"].reset


def test_clients_that_left_together_share_one_composition():
    own = server()
    for k, _ in enumerate(play(own, load("florist", adopt="merge"), 4)):
        if k == 1:
            own.took(8)
            own.took(9)
    assert own.owed_to(8) is own.owed_to(9)
    assert sorted(own.owed) == [-1, 2, 3]


# State and back


@pytest.mark.parametrize(("name", "options"), METHODS, ids=NAMES)
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_server_restored_from_its_state_goes_on_to_the_same_bits(name, options, stop):
    method = load(name, **options)

    def states(own, stop_after=None):
        restored = own
        result = []
        rounds = len(list(method.plan(4)))
        game = play(_Through(lambda: restored), method, 4)
        for k in range(rounds):
            if k == stop_after:
                restored = through_the_wire(restored)
            next(game)
            result.append(restored.state())
        return result

    plain, interrupted = states(server()), states(server(), stop)
    for (header, tensors), (other_header, other_tensors) in zip(plain, interrupted, strict=True):
        assert header == other_header
        assert same(tensors, other_tensors)


def through_the_wire(own):
    header, tensors = own.state()
    message = wire.decode(wire.encode(wire.Message({"server": header}, tensors)))
    restored = Server(SHAPES, own.seed, own.dtype)
    restored.restore(message.header["server"], message.tensors)
    return restored


class _Through:
    """Whichever server is the current one."""

    def __init__(self, current):
        self._current = current

    def __getattr__(self, name):
        return getattr(self._current(), name)


def test_a_restored_server_owes_and_models_the_same():
    own = server("bfloat16")
    for _ in play(own, load("florist", adopt="merge"), 2):
        pass
    restored = through_the_wire(own)
    assert same(own.model(), restored.model())
    assert same(own.plain, restored.plain)
    for client in (0, 7):
        assert same(own.owed_to(client), restored.owed_to(client))


def test_the_product_of_a_fresh_adapter_is_zero_and_its_first_factor_is_everybodys():
    for layer, shape in SHAPES.items():
        factors = fresh_factors(layer, shape, 5)
        assert factors["A"].shape == (shape.rank, shape.d_in)
        assert factors["A"].abs().min() > 0
        B, A = product(factors)
        assert not (B @ A).any()
        assert same(factors, fresh_factors(layer, shape, 5))
        assert not torch.equal(factors["A"], fresh_factors(layer, shape, 6)["A"])


NAMES = ["florist", "flexlora", "best_rank", "flora", "fedex_lora", "flora_na", "lora_fair", "hetlora"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e12, 1e14])
def test_a_client_with_enormous_values_that_are_allowed_does_not_end_the_round(name, size):
    aggregator = Aggregator(load(name), server())
    for client in range(3):
        factors = upload(client)
        if client == 1:
            factors = {layer: {key: size * x for key, x in own.items()} for layer, own in factors.items()}
        aggregator.add(client, 10, factors, {})
    done = aggregator.done()
    assert all(torch.isfinite(x).all() for own in done.downloads.values() for x in own.factors.values())
    assert all(error >= 0 for error in (done.error or {}).values())


def test_a_basis_is_owed_to_those_of_the_last_phase_alone_and_held_until_the_next_is_over():
    own = server()
    first, last = load("power").plan(1)

    def ended(phase, who):
        aggregator = Aggregator(phase, own)
        for k in who:
            trained = {
                layer: {"A": draw(s.rank, s.d_in, seed=k), "B": draw(s.d_out, s.rank, seed=k)} for layer, s in SHAPES.items()
            }
            said = {layer: phase.message(trained[layer], own.held[layer]) for layer in SHAPES}
            aggregator.add(k, 1 + k, said, {})
            own.took(k)
        own.settle(aggregator.done())

    ended(first, [0, 1])
    assert own.in_phase() == [0, 1]
    assert set(own.held["wide"]) == {"A", "B", "Q"}
    assert set(own.owed_to(0)["wide"].factors) == {"Q"}
    assert set(own.owed_to(2)["wide"].factors) == set()
    restored = server()
    restored.restore(*own.state())
    assert restored.in_phase() == [0, 1]
    assert torch.equal(restored.owed_to(1)["tall"].factors["Q"], own.held["tall"]["Q"])
    ended(last, [0])
    assert own.in_phase() == [0]
    assert all(set(held) == {"A", "B"} for held in own.held.values())
    for client in (0, 1, 2):
        assert set(own.owed_to(client)["wide"].factors) == {"A", "B"}


def test_pairs_come_whole_where_the_method_needs_them_so():
    own = server()
    own.note_rank(1, "wide", 2)
    own.took(1)
    pair = {"A": draw(3, 11), "B": draw(7, 3)}
    own.settle(Aggregated({"wide": Download(factors=pair)}, {}, None, None, {}))
    assert own.owed_to(1)["wide"].factors["A"].shape == (2, 11)
    assert own.owed_to(1, whole=True)["wide"].factors["A"].shape == (3, 11)
