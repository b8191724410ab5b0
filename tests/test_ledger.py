"""The ledger on disk: what is in force is in force for ever, and nothing else is."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from umbel import ledger as ledgers
from umbel import privacy
from umbel.ledger import LINES, SECRET, BudgetError, Entry, Ledger, LedgerError, request_hash, rounds_left
from umbel.record import RecordError

ROWS = [{"text": f"row number {i} of the ward", "label": str(i % 2)} for i in range(40)]


def entry(data, number=1, run="r1/fedit", **other):
    standard = Entry(run, 0, number, "train", 2.0, 0.2, 5, 1.0, 1e-3, 50.0, 50.0, f"request {run} {number}", data)
    return replace(standard, **other)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger")


@pytest.fixture
def data(ledger):
    return ledger.name_data(ROWS)


def test_what_was_spent_is_read_back_by_the_next_process(ledger, data):
    for number in (1, 2, 3):
        ledger.spend(entry(data, number))
    again = Ledger(ledger.folder).entries()
    assert [own.round for own in again] == [1, 2, 3]
    assert [replace(own, time="") for own in again] == [entry(data, number) for number in (1, 2, 3)]
    assert all(own.time.endswith("+00:00") for own in again)


def test_epsilon_is_that_of_all_rounds_together(ledger, data):
    for number in (1, 2, 3):
        standing = ledger.spend(entry(data, number))
    assert standing.run_after == standing.all_after == privacy.epsilon([(2.0, 0.2, 15)], 1e-3)
    assert standing.run == privacy.epsilon([(2.0, 0.2, 10)], 1e-3)


def test_the_same_request_is_charged_once_and_has_the_same_seed(ledger, data):
    first = ledger.spend(entry(data))
    again = Ledger(ledger.folder).spend(entry(data))
    assert len(ledger.entries()) == 1
    assert again.run_after == first.run_after
    assert Ledger(ledger.folder).seed("a") == ledger.seed("a") != ledger.seed("b")


def test_another_request_for_the_same_round_is_charged_anew(ledger, data):
    ledger.spend(entry(data))
    standing = ledger.spend(entry(data, request="another"))
    assert len(ledger.entries()) == 2
    assert standing.run_after > standing.run > 0


def test_clients_of_one_run_with_a_text_in_common_pay_each_for_its_own_row(ledger):
    one, other = ledger.name_data(ROWS[:20]), ledger.name_data(ROWS[19:])
    first = ledger.spend(entry(one))
    second = ledger.spend(entry(other, client=1, request="client 1"))
    assert (second.run, second.all, second.all_after) == (0, 0, first.all_after)
    later = ledger.spend(entry(one, 2, run="r2/fedit"))  # any of its rows was one client's
    assert later.all == first.all_after


def test_a_known_request_is_answered_even_where_the_budget_is_spent(ledger, data):
    spent = ledger.spend(entry(data)).run_after
    ledger.spend(entry(data, target=spent / 2, budget=spent / 2))
    with pytest.raises(BudgetError):
        ledger.spend(entry(data, 2, target=spent, budget=spent))


def test_a_round_over_the_runs_budget_is_refused_and_nothing_is_written(ledger, data):
    target = privacy.epsilon([(2.0, 0.2, 10)], 1e-3)
    for number in (1, 2):
        ledger.spend(entry(data, number, target=target))
    before = (ledger.folder / LINES).read_bytes()
    with pytest.raises(BudgetError, match=r"round 3 is refused: this run spent ε .* at δ 0\.001, with it .*, allowed .*raise"):
        ledger.spend(entry(data, 3, target=target))
    assert (ledger.folder / LINES).read_bytes() == before


def test_another_run_on_the_same_rows_finds_the_budget_spent(ledger, data):
    total = privacy.epsilon([(2.0, 0.2, 10)], 1e-3)
    for number in (1, 2):
        ledger.spend(entry(data, number, budget=total))
    with pytest.raises(BudgetError, match="all runs on these rows"):
        Ledger(ledger.folder).spend(entry(data, run="r2/fedit", budget=total))


def test_adding_a_row_or_changing_a_label_buys_no_new_budget(ledger, data):
    total = privacy.epsilon([(2.0, 0.2, 5)], 1e-3)
    ledger.spend(entry(data, budget=total))
    more = [*ROWS, {"text": "one more", "label": "0"}]
    relabelled = [{**row, "label": "changed", "note": "n"} for row in ROWS]
    one_of_them = [{"text": "  row number 7  of the\nward", "label": "x"}, {"text": "all others are new", "label": "1"}]
    for rows in (more, relabelled, one_of_them):
        with pytest.raises(BudgetError, match="all runs on these rows"):
            ledger.spend(entry(ledger.name_data(rows), run="r2/fedit", budget=total))
    others = ledger.name_data([{"text": f"somebody else {i}"} for i in range(40)])
    assert ledger.spend(entry(others, run="r2/fedit", budget=total)).all == 0


def test_rows_are_the_same_set_in_any_order_and_are_not_in_the_folder(ledger, data):
    assert ledger.name_data(reversed(ROWS)) == data
    for path in ledger.folder.rglob("*"):
        if path.is_file():
            assert b"ward" not in path.read_bytes()
    elsewhere = Ledger(ledger.folder.with_name("other"))
    assert elsewhere.name_data(ROWS) != data  # under another secret nobody can tell that the rows are the same


def test_the_smallest_delta_counts(ledger, data):
    ledger.spend(entry(data, delta=1e-6))
    standing = ledger.spend(entry(data, 1, run="another"))
    assert (standing.delta_run, standing.delta_all) == (1e-3, 1e-6)
    assert standing.run_after == privacy.epsilon([(2.0, 0.2, 5)], 1e-3)
    assert standing.all_after == privacy.epsilon([(2.0, 0.2, 10)], 1e-6)


def test_a_kill_at_any_byte_loses_no_earlier_line_and_leaves_the_last_in_force_or_not(ledger, data, tmp_path):
    ledger.spend(entry(data, 1))
    ledger.spend(entry(data, 2))
    start = (ledger.folder / LINES).stat().st_size
    ledger.spend(entry(data, 3))
    content = (ledger.folder / LINES).read_bytes()
    for length in range(start, len(content) + 1):
        (ledger.folder / LINES).write_bytes(content[:length])
        whole = length == len(content)
        assert [own.round for own in Ledger(ledger.folder).entries()] == ([1, 2, 3] if whole else [1, 2])
        if length % 40 == 0 or whole:
            Ledger(ledger.folder).spend(entry(data, 4))
            assert [own.round for own in ledger.entries()] == ([1, 2, 3, 4] if whole else [1, 2, 4])
    for length in range(start):
        (ledger.folder / LINES).write_bytes(content[:length])
        assert [own.round for own in Ledger(ledger.folder).entries()] == list(range(1, content[:length].count(b"\n") + 1))


def test_a_disk_that_kept_a_torn_lines_length_and_not_its_bytes_is_mended(ledger, data):
    ledger.spend(entry(data, 1))
    with (ledger.folder / LINES).open("ab") as file:
        file.write(b"\0" * 300)
    ledger.spend(entry(data, 2))
    assert [own.round for own in ledger.entries()] == [1, 2]


def test_every_changed_byte_of_a_whole_line_is_refused(ledger, data):
    for number in (1, 2):
        ledger.spend(entry(data, number))
    content = (ledger.folder / LINES).read_bytes()
    last = len(content) - 1
    for place in range(last):  # the last newline is what makes the last line whole
        (ledger.folder / LINES).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(LedgerError, match="changed, or not the one that followed"):
            Ledger(ledger.folder).spend(entry(data, 3))


def test_a_missing_or_exchanged_earlier_line_is_refused(ledger, data):
    for number in (1, 2, 3):
        ledger.spend(entry(data, number))
    first, second, third = (ledger.folder / LINES).read_bytes().splitlines(keepends=True)
    for wrong in (second + third, first + third, second + first + third):
        (ledger.folder / LINES).write_bytes(wrong)
        with pytest.raises(LedgerError, match=r"ledger\.jsonl', line [12]"):
            Ledger(ledger.folder).entries()


def test_without_its_secret_or_its_rows_a_ledger_is_refused(ledger, data):
    ledger.spend(entry(data))
    (ledger.folder / SECRET).chmod(0o644)
    with pytest.raises(LedgerError, match="only their owner can read"):
        Ledger(ledger.folder).entries()
    (ledger.folder / SECRET).chmod(0o600)
    kept = (ledger.folder / "data" / data).read_bytes()
    (ledger.folder / "data" / data).write_bytes(kept[12:])
    with pytest.raises(LedgerError, match="which rows were paid for"):
        Ledger(ledger.folder).spend(entry(data, 2))
    (ledger.folder / SECRET).unlink()
    with pytest.raises(LedgerError, match=r"secret\.key is missing"):
        Ledger(ledger.folder).name_data(ROWS)


def test_a_secret_of_another_ledger_is_refused(ledger, data, tmp_path):
    ledger.spend(entry(data))
    other = Ledger(tmp_path / "other")
    other.name_data(ROWS)
    shutil.copy(other.folder / SECRET, ledger.folder / SECRET)
    with pytest.raises(LedgerError, match="line 1"):
        Ledger(ledger.folder).entries()


def test_the_secret_is_of_its_owner_alone(ledger, data):
    assert (ledger.folder / SECRET).stat().st_mode & 0o777 == 0o600
    assert len((ledger.folder / SECRET).read_bytes()) == 32


def test_the_line_is_on_disk_before_spend_returns(ledger, data, monkeypatch):
    seen = []
    real = os.fsync

    def noted(descriptor):
        real(descriptor)
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        seen.append((os.path.basename(name), (ledger.folder / LINES).stat().st_size if (ledger.folder / LINES).exists() else 0))

    monkeypatch.setattr(os, "fsync", noted)
    ledger.spend(entry(data))
    size = (ledger.folder / LINES).stat().st_size
    assert (LINES, size) in seen  # flushed with the whole line in it, …
    assert seen.index((LINES, size)) < seen.index((ledger.folder.name, size))  # … then the folder that names it


APPENDING = """
import sys
from umbel.ledger import Entry, Ledger
ledger = Ledger(__import__("pathlib").Path(sys.argv[1]))
data = ledger.name_data([{"text": "a row"}])
for number in range(1, 100_000):
    ledger.spend(Entry("r", 0, number, "train", 1e5, 0.01, 1, 1.0, 1e-3, 1e9, 1e9, f"{sys.argv[2]} {number}", data))
    print(number, flush=True)
"""


def test_whatever_was_said_to_be_spent_survives_kill_9(ledger, tmp_path):
    said = 0
    for attempt in range(5):
        before = len(ledger.entries()) if ledger.exists else 0
        process = subprocess.Popen(
            [sys.executable, "-c", APPENDING, str(ledger.folder), str(attempt)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3 + 7 * attempt)]
        time.sleep(0.003 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        lines += process.stdout.readlines()
        process.stdout.close()
        process.wait()
        said = len([line for line in lines if line.endswith("\n")])
        kept = len(Ledger(ledger.folder).entries()) - before
        assert said <= kept <= said + 1
    assert said > 0


def _spend_many(folder, run, barrier):
    ledger = Ledger(folder)
    data = ledger.name_data(ROWS)
    barrier.wait()
    for number in range(1, 21):
        ledger.spend(entry(data, number, run=run, sigma=1e5))


def test_two_processes_on_one_ledger_exclude_each_other(ledger, data):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    both = [context.Process(target=_spend_many, args=(ledger.folder, run, barrier)) for run in ("r1", "r2")]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    entries = Ledger(ledger.folder).entries()
    for run in ("r1", "r2"):
        assert [own.round for own in entries if own.run == run] == list(range(1, 21))


def _hold(folder, held, go):
    with Ledger(folder)._held():
        held.set()
        go.wait()


def test_a_second_process_waits_for_so_long_and_then_says_so(ledger, data, monkeypatch):
    context = multiprocessing.get_context("spawn")
    held, go = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(ledger.folder, held, go))
    process.start()
    held.wait()
    monkeypatch.setattr(ledgers, "WAIT_SECONDS", 0.3)
    with pytest.raises(RecordError, match="in use by another umbel process"):
        ledger.spend(entry(data))
    assert ledger.entries() == []
    go.set()
    process.join()
    ledger.spend(entry(data))
    assert len(ledger.entries()) == 1


def test_how_many_rounds_are_left_is_where_the_next_one_is_refused(ledger, data):
    budget = privacy.epsilon([(2.0, 0.2, 5 * 7)], 1e-3)
    ledger.spend(entry(data, 1, budget=budget))
    left = rounds_left(ledger.entries(), ledger.entries()[-1], 1e-3, budget)
    assert left == 6
    for number in range(2, 2 + left):
        ledger.spend(entry(data, number, budget=budget))
    with pytest.raises(BudgetError):
        ledger.spend(entry(data, 99, budget=budget))
    assert rounds_left(ledger.entries(), ledger.entries()[-1], 1e-3, budget) == 0


def test_anything_that_changes_an_answer_changes_the_requests_hash():
    context = {"config": {"learning_rate": 0.1}, "data": "d"}
    own = request_hash(b"payload", b"state", context)
    assert own == request_hash(b"payload", b"state", dict(reversed(context.items())))
    others = [
        request_hash(b"payloads", b"tate", context),
        request_hash(b"payload", b"", context),
        request_hash(b"payload", b"state", {**context, "data": "e"}),
    ]
    assert len({own, *others}) == 4
