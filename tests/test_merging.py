"""merging: what feeds the collectors, and what it costs. What comes out is compared with PEFT in end_to_end/test_merge_*.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import umbel
from umbel import merging, method
from umbel.method import MethodError
from umbel.peft_folder import FolderError

D_OUT, D_IN = 12, 9


def adapter(folder, layers=("q_proj", "v_proj"), rank=2, seed=0, alpha=4, **config):
    """Writes a PEFT folder by hand and returns its factors in units of ΔW."""
    draw = torch.Generator().manual_seed(seed)
    tensors, factors = {}, {}
    for name in layers:
        A, B = torch.randn(rank, D_IN, generator=draw), torch.randn(D_OUT, rank, generator=draw)
        tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
        factors[name] = {"A": A, "B": B * (alpha / rank)}
    folder.mkdir(parents=True)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(layers), **config}
    (folder / "adapter_config.json").write_text(json.dumps(about), encoding="utf-8")
    return factors


def written(folder):
    """Returns B A of every layer that a merged folder holds, which is at scale 1."""
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    names = {key.split(".lora_")[0] for key in tensors}
    return {
        name.removeprefix("base_model.model."): tensors[f"{name}.lora_B.weight"].double()
        @ tensors[f"{name}.lora_A.weight"].double()
        for name in names
    }


def test_those_methods_can_be_used_that_need_no_more_than_uploads():
    assert merging.usable() == [
        "best_rank",
        "exact",
        "fedex_lora",
        "fedit",
        "flexlora",
        "flora",
        "flora_na",
        "florist",
        "hetlora",
        "lora_fair",
    ]


@pytest.mark.parametrize("name", [name for name in method.names() if name not in merging.usable()])
def test_other_methods_are_refused_with_a_reason(name, tmp_path):
    adapter(tmp_path / "a")
    with pytest.raises(
        merging.MergeError, match=rf"method '{name}' (averages|leaves|trains|asks).*From finished adapters work: best"
    ):
        umbel.merge([tmp_path / "a"], tmp_path / "out", method=name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["fedit", "florist", "flora_na"])
def test_a_thousand_adapters_merge(name, tmp_path):
    first, second = (adapter(tmp_path / str(k), ["q_proj"], seed=k) for k in range(2))
    paths = [tmp_path / str(k % 2) for k in range(1000)]
    options = {"energy": 1.0} if name == "florist" else {"sweeps": 2} if name == "flora_na" else {}
    report = umbel.merge(paths, tmp_path / "out", method=name, options=options)
    assert len(report["clients"]) == 1000
    mean = 0.5 * sum(own["q_proj"]["B"].double() @ own["q_proj"]["A"].double() for own in (first, second))
    apart = float(torch.linalg.matrix_norm(written(tmp_path / "out")["q_proj"] - mean) / torch.linalg.matrix_norm(mean))
    assert report["layers"]["q_proj"]["error"] == pytest.approx(apart, rel=1e-3, abs=1e-6)
    if name == "florist":
        # Two thousand directions were stacked, and four are there.
        assert report["layers"]["q_proj"]["rank"] == 4
        assert apart < 2e-6


def test_an_upload_that_is_broken_in_the_middle_ends_the_merge_and_leaves_nothing(tmp_path):
    for k in range(4):
        adapter(tmp_path / str(k), [f"layers.{i}.q_proj" for i in range(40)], seed=k)
    broken = safetensors.torch.load_file(tmp_path / "3" / "adapter_model.safetensors")
    broken["base_model.model.layers.20.q_proj.lora_B.weight"][3, 1] = float("nan")
    safetensors.torch.save_file(broken, tmp_path / "3" / "adapter_model.safetensors")
    with pytest.raises(FolderError, match=r"3: layer 'layers\.20\.q_proj', B has NaN"):
        umbel.merge([tmp_path / str(k) for k in range(4)], tmp_path / "out", method="fedit")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_a_callback_that_fails_leaves_no_folder(tmp_path):
    for k in range(3):
        adapter(tmp_path / str(k), [f"layers.{i}.q_proj" for i in range(30)], seed=k)

    def stop(last, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        umbel.merge([tmp_path / str(k) for k in range(3)], tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_shared_coefficients_see_all_layers_and_need_them(tmp_path):
    for k in range(3):
        adapter(tmp_path / str(k), seed=k)
    adapter(tmp_path / "less", ["q_proj"], seed=9)
    paths = [tmp_path / str(k) for k in range(3)]
    shared = umbel.merge(paths, tmp_path / "shared", method="flora_na", options={"scope": "shared"})
    apart = umbel.merge(paths, tmp_path / "apart", method="flora_na")
    assert [row["error"] for row in apart["layers"].values()] <= [row["error"] for row in shared["layers"].values()]
    assert written(tmp_path / "shared")["q_proj"].sub(written(tmp_path / "apart")["q_proj"]).abs().max() > 1e-3
    with pytest.raises(merging.MergeError, match="needs all of them in every folder"):
        umbel.merge([*paths, tmp_path / "less"], tmp_path / "out", method="flora_na", options={"scope": "shared"})
    umbel.merge([*paths, tmp_path / "less"], tmp_path / "out", method="flora_na")


def test_a_dry_run_foretells_what_the_merge_does(tmp_path):
    paths = [tmp_path / str(k) for k in range(3)]
    for k, path in enumerate(paths):
        adapter(path, [f"layers.{i}.q_proj" for i in range(5)], rank=2 + k, seed=k)
    told = merging.plan(paths, method="flexlora")
    done = umbel.merge(paths, tmp_path / "out", method="flexlora")
    (row,) = told["layers"]
    assert (row["layers"], row["d_out"], row["d_in"], row["ranks_in"], row["rank"]) == (5, D_OUT, D_IN, [2, 4], 4)
    assert row["error"] == done["layers"]["layers.0.q_proj"]["error"]
    assert told["bytes_in"] == done["bytes_in"]
    assert told["bytes_out"] == pytest.approx(5 * 4 * (D_OUT + D_IN) * 4)
    assert told["seconds"] > 0


def test_a_method_of_somebodys_own_merges_too(tmp_path, monkeypatch):
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    source = "from umbel.method import Download, Each, Method\n\n\nclass Cut(Method):\n    collect = Each\n\n"
    source += "    def combine(self, got, held):\n        return Download(factors=dict(got[0][0]))\n"
    (package / "cut.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    factors = adapter(tmp_path / "a", seed=1)
    adapter(tmp_path / "b", seed=2)
    umbel.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", method="mine.cut")
    for name, B_A in written(tmp_path / "out").items():
        assert torch.equal(B_A, factors[name]["B"].double() @ factors[name]["A"].double())


def test_ranks_that_a_method_does_not_take_are_refused_before_anything_is_read(tmp_path):
    adapter(tmp_path / "a", rank=2)
    adapter(tmp_path / "b", rank=3)
    with pytest.raises(
        MethodError, match=r"layer 'q_proj': rank 2 in .*a, 3 in .*b\. fedit needs one rank; mixed ranks are for"
    ):
        umbel.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", method="fedit")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weights": [1.0]}, "weights: got 1, allowed: 2"),
        ({"weights": [1.0, 0.0]}, "weights: got 0.0 for"),
        ({"weights": [1.0, float("nan")]}, "weights: got nan for"),
        ({"dtype": "int8"}, "dtype: got 'int8', allowed: float32"),
        ({"rank": 0}, "rank: got 0, allowed: a whole number from 1 to 9"),
        ({"rank": 10**9}, "rank: got 1000000000, allowed"),
        ({"rank": 2.5}, "rank: got 2.5, allowed"),
        ({"weights": "12"}, "weights: got '1' for"),
        ({"options": {"energy": 0.5}}, "options energy without a method"),
    ],
)
def test_wrong_options_are_named(given, said, tmp_path):
    adapter(tmp_path / "a")
    adapter(tmp_path / "b")
    with pytest.raises(merging.MergeError, match=said):
        umbel.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", **given)


def test_nothing_to_merge_is_said(tmp_path):
    with pytest.raises(merging.MergeError, match="no adapters"):
        umbel.merge([], tmp_path / "out")
    with pytest.raises(merging.MergeError, match="got 1 states and 0 configs"):
        umbel.aggregate([{}], [])


def test_an_out_that_is_an_input_or_somebody_elses_is_left_alone(tmp_path):
    adapter(tmp_path / "a")
    before = sorted(Path(tmp_path / "a").iterdir())
    with pytest.raises(merging.MergeError, match="is or holds one of the folders to merge"):
        umbel.merge([tmp_path / "a"], tmp_path / "a")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(merging.MergeError, match="no earlier merge"):
        umbel.merge([tmp_path / "a"], tmp_path / "notes")
    assert sorted(Path(tmp_path / "a").iterdir()) == before
    assert (tmp_path / "notes" / "mine.txt").read_text(encoding="utf-8") == "mine"
    for _ in range(2):
        umbel.merge([tmp_path / "a"], tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(merging.MergeError, match=r"no earlier merge: it holds mine\.txt"):
        umbel.merge([tmp_path / "a"], tmp_path / "out")
    (tmp_path / "out" / "mine.txt").unlink()
    adapter(tmp_path / "out.partial", seed=3)
    with pytest.raises(merging.MergeError, match=r"out\.partial is in the way"):
        umbel.merge([tmp_path / "a", tmp_path / "out.partial"], tmp_path / "out")
    assert len(list((tmp_path / "out.partial").iterdir())) == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(merging.WRITTEN - {"head.safetensors"})


def test_memory_grows_neither_with_the_layers_nor_for_a_mean_with_the_clients(tmp_path):
    """Peak memory of the real command, in MB, as its own report has it."""

    def peak(clients, layers):
        paths = []
        for k in range(clients):
            paths.append(tmp_path / f"{layers}-{k}")
            if not paths[-1].exists():
                names = [f"layers.{i}.q_proj" for i in range(layers)]
                tensors = {}
                for name in names:
                    tensors[f"base_model.model.{name}.lora_A.weight"] = torch.full((64, 2000), 0.1 + k)
                    tensors[f"base_model.model.{name}.lora_B.weight"] = torch.full((2000, 64), 0.2)
                paths[-1].mkdir()
                safetensors.torch.save_file(tensors, paths[-1] / "adapter_model.safetensors")
                about = {"peft_type": "LORA", "r": 64, "lora_alpha": 64, "target_modules": names}
                (paths[-1] / "adapter_config.json").write_text(json.dumps(about), encoding="utf-8")
        command = [sys.executable, "-c", "from umbel.cli import main; main()", "merge", *map(str, paths)]
        command += ["--out", str(tmp_path / "out"), "--method", "fedit", "--no-check", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)["peak_memory_bytes"] / 1e6

    # One layer of one client is 1 MB; forty of either would be 40 MB more if they were kept.
    least = peak(2, 1)
    assert peak(40, 1) < least + 15
    assert peak(2, 40) < least + 15


def test_values_beyond_float32s_squares_and_names_that_look_like_markup_do_no_harm(tmp_path):
    for k in range(3):
        adapter(tmp_path / str(k), ["x[/b]q"], seed=k, alpha=2 * 10**14 if k else 4)
    paths = [tmp_path / str(k) for k in range(3)]
    for name in ("florist", "flexlora", "best_rank", "fedex_lora", "flora_na"):
        report = umbel.merge(paths, tmp_path / "out", method=name)
        assert 0 <= report["layers"]["x[/b]q"]["error"] < 1
    command = [
        sys.executable,
        "-c",
        "from umbel.cli import main; main()",
        "merge",
        *map(str, paths),
        "--out",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "x[/b]q" in done.stdout


def test_a_mean_of_nothing_has_no_relative_error_and_json_stays_json(tmp_path):
    state = {
        "base_model.model.q.lora_A.weight": torch.ones(1, D_IN),
        "base_model.model.q.lora_B.weight": torch.ones(D_OUT, 1),
    }
    other = {key: x * (-0.5 if "lora_B" in key else 2) for key, x in state.items()}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]}
    _, _, report = umbel.aggregate([state, other], [config, config], method="fedit")
    assert report["layers"]["q"] == {"error": None, "rank": 1, "energy": None}
    assert "the mean of the updates is zero" in report["notes"][0]
    json.loads(json.dumps(report, allow_nan=False))


def test_one_merge_at_a_time_writes_into_a_folder(tmp_path):
    for k in range(2):
        adapter(tmp_path / str(k), seed=k)
    paths = [tmp_path / str(k) for k in range(2)]
    said = []

    def meanwhile(last, done, total):
        with pytest.raises(merging.MergeError, match="another merge is writing") as refused:
            umbel.merge(paths[:1], tmp_path / "out")
        said.append(refused)

    report = umbel.merge(paths, tmp_path / "out", progress=meanwhile)
    assert len(said) == 2
    assert json.loads((tmp_path / "out" / "merge.json").read_text(encoding="utf-8"))["clients"] == report["clients"]
    umbel.merge(paths, tmp_path / "out")


def test_slips_are_said(tmp_path):
    adapter(tmp_path / "a")
    paths = [tmp_path / "a", str(tmp_path / "a") + "/"]
    assert "was given 2 times" in umbel.merge(iter(paths), tmp_path / "out")["notes"][0]
    with pytest.raises(merging.MergeError, match="wanted a list of folders"):
        umbel.merge(str(tmp_path / "a"), tmp_path / "out")
    report = umbel.merge(paths, tmp_path / "out", method="florist", weights=torch.tensor([1.0, 3.0]))
    assert report["method"] == {"name": "florist", "energy": 0.9, "adopt": "load"}
    assert {"merge", "aggregate"} <= set(dir(umbel))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("florist", {"energy": "abc"}, r"energy: got 'abc', wanted float \| None"),
        ("florist", {"energy": True}, "energy: got True"),
        ("florist", {"rank": 2.5}, r"rank: got 2\.5, wanted int \| None"),
        ("florist", {"adopt": 3}, "adopt: got 3"),
        ("hetlora", {"gamma": "x"}, "gamma: got 'x', wanted float"),
        ("./florist", {}, "no method './florist'"),
        ("", {}, "no method ''"),
    ],
)
def test_options_of_the_wrong_type_are_refused_in_a_line(name, options, said, tmp_path):
    adapter(tmp_path / "a")
    with pytest.raises(MethodError, match=said):
        umbel.merge([tmp_path / "a"], tmp_path / "out", method=name, options=options)
