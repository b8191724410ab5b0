"""method: collectors, downloads, and finding methods by name."""

import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel import method
from umbel.method import Download, Each, Mean, MethodError, Stack


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uploads(ranks=(3, 3, 3), dtype=torch.float64):
    return [{"A": draw(r, 11, seed=k, dtype=dtype), "B": draw(7, r, seed=50 + k, dtype=dtype)} for k, r in enumerate(ranks)]


def fold(collector, factors, rows):
    for own, n in zip(factors, rows):
        collector.add(own, n)
    return collector.done()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.1, 1000), min_size=1, max_size=6))
def test_mean_is_the_weighted_mean_of_each_factor(rows):
    factors = uploads((3,) * len(rows))
    got = fold(Mean(), factors, rows)
    for name in "AB":
        naive = sum(n / sum(rows) * own[name] for n, own in zip(rows, factors))
        assert torch.allclose(got[name], naive, rtol=1e-12, atol=1e-12)


def test_mean_gives_clients_that_agree_back_to_the_last_bit():
    factors = uploads(dtype=torch.float32)[:1] * 7
    assert torch.equal(fold(Mean(), factors, range(1, 8))["A"], factors[0]["A"])


def test_mean_of_many_bfloat16_uploads_does_not_stand_still():
    ones = [{"A": torch.full((1, 1), float(i % 2), dtype=torch.bfloat16)} for i in range(2000)]
    got = fold(Mean(), ones, [1] * 2000)["A"]
    assert got.dtype == torch.bfloat16
    assert got.item() == 0.5


def test_mean_of_nothing_to_send_is_empty():
    assert fold(Mean(), [{}, {}], [1, 2]) == {}


def test_mean_leaves_uploads_alone():
    factors = uploads()
    before = [own["A"].clone() for own in factors]
    got = fold(Mean(), factors, [1, 2, 3])
    got["A"].zero_()
    assert all(torch.equal(own["A"], old) for own, old in zip(factors, before))


def test_mean_refuses_mixed_ranks_and_names_methods_that_take_them():
    with pytest.raises(
        MethodError, match=r"sent A of shape \(2, 11\), others \(3, 11\)\. .* one rank; mixed ranks are for .*florist"
    ):
        fold(Mean(), uploads((3, 2)), [1, 1])


def test_mean_refuses_other_factors_than_before():
    with pytest.raises(MethodError, match="sent A, others A, B"):
        fold(Mean(), [uploads()[0], {"A": draw(3, 11)}], [1, 1])


def test_stack_multiplies_to_the_mean_of_products_with_weights_once():
    factors, rows = uploads((1, 4, 2)), [1.0, 2.0, 5.0]
    got = fold(Stack(), factors, rows)
    assert got["B"].shape == (7, 7)
    naive = sum(n / 8 * own["B"] @ own["A"] for n, own in zip(rows, factors))
    assert torch.allclose(got["B"] @ got["A"], naive)


def test_each_keeps_the_order_and_normalizes_weights():
    factors = uploads((1, 2))
    (first, p), (second, q) = fold(Each(), factors, [1, 3])
    assert first is factors[0]
    assert second is factors[1]
    assert (p, q) == (0.25, 0.75)


def test_stacked_refuses_mixed_ranks_in_a_sentence_with_the_layer():
    each = fold(Each(), uploads((2, 3)), [1, 1])
    with pytest.raises(MethodError, match=r"layer 'q': clients sent B of shapes \(7, 2\), \(7, 3\); one rank is needed, mixed"):
        method.stacked("q", each, "B")


# What a client would do with a download, spelled out.
def follow(state, download):
    W, factors = state
    if download.reset is not None:
        factors = {"A": draw(3, 11, seed=download.reset), "B": torch.zeros(7, 3).double()}
    factors = {**factors, **download.factors}
    if download.merge is not None:
        W = W + download.merge[0] @ download.merge[1]
    return W, factors


DOWNLOADS = st.builds(
    lambda names, merge, reset, seed: Download(
        factors={name: draw(*{"A": (3, 11), "B": (7, 3)}[name], seed=seed) for name in sorted(names)},
        merge=(draw(7, 2, seed=seed + 1), draw(2, 11, seed=seed + 2)) if merge else None,
        reset=seed if reset else None,
    ),
    st.sets(st.sampled_from("AB")),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**6),
)


@settings(deadline=None, max_examples=80)
@given(st.lists(DOWNLOADS, min_size=1, max_size=8))
def test_a_client_that_sat_out_ends_where_the_others_are(downloads):
    start = draw(7, 11, seed=5), {"A": draw(3, 11, seed=6), "B": draw(7, 3, seed=7)}
    present, owed = start, Download()
    for download in downloads:
        present, owed = follow(present, download), owed.then(download)
    W, factors = follow(start, owed)
    assert torch.allclose(W, present[0], atol=1e-10)
    assert all(torch.equal(factors[name], present[1][name]) for name in "AB")
    assert owed.merge is None or owed.merge[0].shape[1] <= 7


def test_product_puts_r_between():
    B, R, A = draw(7, 3), draw(3, 3, seed=1), draw(3, 11, seed=2)
    first, second = method.product({"A": A, "B": B, "R": R})
    assert torch.allclose(first @ second, B @ R @ A)
    assert method.product({"A": A, "B": B})[0] is B


def test_every_shipped_method_is_found_by_its_file_name():
    assert {"fedit", "florist", "flora_na", "fed_sb"} <= set(method.names())
    for name in method.names():
        assert method.find(name).__name__.lower() == name.replace("_", "")


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(MethodError, match=r"no method 'florits'\. Did you mean 'florist'\? Known: "):
        method.load("florits")


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(
        MethodError, match=r"'florist' has no option 'enegry'\. Did you mean 'energy'\? Its options: energy, rank"
    ):
        method.load("florist", enegry=0.9)


def test_a_method_from_outside_is_found_by_its_module_path(tmp_path, monkeypatch):
    package = tmp_path / "somebodys_methods"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "only_first.py").write_text(
        textwrap.dedent("""
            from umbel.method import Download, Each, Method

            class OnlyFirst(Method):
                collect = Each

                def combine(self, got, held):
                    return Download(factors=got[0][0])
        """)
    )
    (package / "empty.py").write_text("")
    (package / "needy.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert type(method.load("somebodys_methods.only_first")).__name__ == "OnlyFirst"
    with pytest.raises(MethodError, match=r"module 'somebodys_methods\.empty' defines no Method class whose name is 'empty'"):
        method.find("somebodys_methods.empty")
    with pytest.raises(MethodError, match=r"importing .* failed: No module named .not_installed_anywhere"):
        method.find("somebodys_methods.needy")
    with pytest.raises(MethodError, match=r"no method 'somebodys_methods\.missing'"):
        method.find("somebodys_methods.missing")


def test_what_is_given_for_the_next_phase_is_over_when_another_download_comes():
    given = Download(factors={"A": draw(3, 11), "Q": draw(7, 3)})
    assert set(given.lasting().factors) == {"A"}
    assert set(Download().then(given).factors) == {"A", "Q"}
    assert set(given.then(Download()).factors) == {"A"}
    assert set(given.then(Download(factors={"B": draw(7, 3)})).factors) == {"A", "B"}


def test_a_method_with_a_message_of_its_own_keeps_nothing_back():
    for name in method.names():
        for phase in method.load(name).plan(2):
            assert not (phase.speaks and phase.keeps)
    assert method.load("fedsa_lora").keeps == ("B",)
    assert method.load("power").speaks
