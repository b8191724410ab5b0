"""report.merged: the tables of a merge, as a terminal shows them."""

import io

from rich.console import Console

from umbel.report import merged_table, plan_table


def shown(what):
    page = io.StringIO()
    Console(width=120, file=page).print(what)
    return page.getvalue()


def report(layers, **changed):
    return {
        "method": {"name": "florist", "energy": 0.9},
        "clients": [{"path": f"site-{k}", "weight": 1.0, "share": 1 / 3} for k in range(3)],
        "weights_from": "given",
        "notes": ["layer [bold]odd[/bold]: not in site-2 (counts as zero there)"],
        "layers": layers,
        "plain": ["classifier.weight"],
        "bytes_in": 3_000_000,
        "bytes_out": 1_000_000,
        "peak_memory_bytes": 250_000_000,
        "seconds": {"reading": 0.1, "computing": 0.2, "checking": 0.3, "writing": 0.4, "total": 1.0},
    } | changed


def rows(what):
    return [line.split() for line in shown(what).splitlines()]


def test_every_layer_has_its_row_while_they_are_few():
    told = report({"a.q": {"error": 0.31, "rank": 7, "energy": 0.904}, "a.v": {"error": 3e-9, "rank": 8, "energy": 1}})
    text = shown(merged_table(told))
    assert "florist (energy 0.9), 3 adapters" in text
    assert ["a.q", "0.31", "7", "0.9040"] in rows(merged_table(told))
    assert ["a.v", "<", "1e-7", "8", "1.0000"] in rows(merged_table(told))
    assert "weights: as given (0.333, 0.333, 0.333). in 3.00 MB, out 1.00 MB, peak memory 250 MB." in text
    assert "also averaged, not in the error: classifier.weight." in text
    assert "note: layer [bold]odd[/bold]: not in site-2" in text


def test_many_layers_are_summed_up_by_name_and_the_worst_are_named():
    layers = {
        f"layers.{i}.{name}": {"error": i / 100, "rank": 4 + i % 2, "energy": 0.9} for i in range(30) for name in ("q", "v")
    }
    layers["layers.7.v"] |= {"clients": 2, "error": 0.9}
    found = rows(merged_table(report(layers)))
    assert ["q", "×", "30", "<", "1e-7", "to", "0.29", "4", "to", "5", "0.9000"] in found
    assert ["layers.7.v", "(among", "the", "worst)", "(in", "2", "of", "3)", "0.9", "5", "0.9000"] in found
    assert sum("worst)" in row for row in found) == 5


def test_without_the_check_there_are_dashes_and_no_worst_layers():
    layers = {f"layers.{i}.q": {"error": None, "rank": 4, "energy": None} for i in range(60)}
    found = rows(merged_table(report(layers)))
    assert ["q", "×", "60", "–", "4", "–"] in found
    assert not any("worst)" in row for row in found)


def test_a_plan_says_what_would_come_out():
    row = {"layers": 4, "d_out": 64, "d_in": 32, "ranks_in": [2, 4], "rank": 8, "error": 0.5, "energy": 0.75, "example": "a.q"}
    told = {"layers": [row], "seconds": 3.0, "memory_bytes": 300_000_000}
    text = shown(plan_table({**report({}), **told}))
    assert "would merge 3 adapters by florist (energy 0.9)" in text
    assert "4 × like a.q 64 × 32 2 to 4 8 0.5 0.7500" in " ".join(text.split())
    assert "about 3.0 s and 300 MB of memory" in text
