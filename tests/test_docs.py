"""The documentation is checked like code: links, commands, examples and method pages exist and work."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from umbel import compare, method
from umbel.cli import app
from umbel.config import ConfigError, configs, for_task

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
EXAMPLES = sorted(ROOT.glob("examples/*.toml"))
BENCHMARKS = sorted(ROOT.glob("benchmarks/methods/*.toml"))
TASKS = sorted(ROOT.glob("examples/tasks/*.toml"))
RUN = configs(tomllib.loads((ROOT / "examples" / "gsm8k.toml").read_text(encoding="utf-8")))["florist"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_in_the_docs_is_one_that_umbel_has(page: Path) -> None:
    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.DOTALL) + re.findall(r"`(umbel [^`]+)`", text)
    for used in re.findall(r"(?:^|\s)umbel ([a-z]+)", "\n".join(blocks)):
        assert used in commands, used


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_in_the_docs_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for used in re.findall(r"(?:^|`|\s)make ([a-z0-9-]+)(?=`|\s*$|\s*#)", page.read_text(encoding="utf-8"), re.MULTILINE):
        assert used in targets, used


def test_every_method_has_a_page_that_names_all_its_options() -> None:
    import dataclasses

    for name in method.names():
        page = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
        for option in dataclasses.fields(method.find(name)):  # type: ignore[arg-type]
            assert f"`{option.name}`" in page, (name, option.name)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_a_configuration_that_is_accepted(example: Path) -> None:
    table = tomllib.loads(example.read_text(encoding="utf-8"))
    assert compare.read(table) if "compare" in table else configs(table)


@pytest.mark.parametrize("example", TASKS, ids=lambda path: path.name)
def test_every_example_of_a_task_is_accepted_and_has_its_place_on_the_page(example: Path) -> None:
    table = tomllib.loads(example.read_text(encoding="utf-8"))
    if "program" in table["task"]:
        with pytest.raises(ConfigError, match=r"task\.allow_code_execution = true"):
            for_task(RUN, table)
        table["task"]["allow_code_execution"] = True
    assert for_task(RUN, table).data.test
    assert f"examples/tasks/{example.name}" in (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")


def test_there_are_examples_and_pages() -> None:
    assert {"quickstart.toml", "quickstart-llm.toml", "gsm8k.toml"} <= {path.name for path in EXAMPLES}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {path.name for path in PAGES}
    assert len(TASKS) == 13


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_configuration_shown_in_the_docs_has_keys_that_exist(page: Path) -> None:
    from umbel.config import SECTIONS

    for block in re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        table = tomllib.loads(block)
        assert set(table) <= {*SECTIONS, "compare"}, block
        shown = table.get("method", [])
        for entry in shown if isinstance(shown, list) else [shown]:
            options = {key: value for key, value in entry.items() if key not in SECTIONS and key not in ("name", "label")}
            method.load(entry["name"], **options)


def test_continuous_integration_runs_the_commands_of_the_readme() -> None:
    readme, script = (ROOT / "README.md").read_text(encoding="utf-8"), (ROOT / ".ci" / "run").read_text()
    for command in ("make test", "make quickstart"):
        assert command in readme
        assert command in script


def test_every_key_of_the_configuration_is_documented_with_its_default() -> None:
    import dataclasses
    import typing

    from umbel.config import Config

    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for section, kind in typing.get_type_hints(Config).items():
        if section == "method" or not dataclasses.is_dataclass(kind):
            continue
        own = page.partition(f"## `[{section}]`")[2].partition("\n## ")[0]
        for key in dataclasses.fields(kind):
            default = key.default if key.default is not dataclasses.MISSING else key.default_factory()  # type: ignore[misc]
            shown = (
                f'"{default}"' if isinstance(default, str) else str(default).lower() if isinstance(default, bool) else default
            )
            assert f"| `{key.name}` | `{shown}` |" in own, (section, key.name)


def test_the_method_shown_to_contributors_passes_the_conformance_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from umbel.testing import check_method

    block = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    (tmp_path / "shown_to_contributors").mkdir()
    (tmp_path / "shown_to_contributors" / "my_method.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert all(result.holds is not False for result in check_method("shown_to_contributors.my_method"))


@pytest.mark.parametrize(
    ("page", "benchmark", "tables"),
    [("results", "methods", 6), ("methods/power", "methods", 2), ("performance", "merge", 7), ("network", "network", 3)],
)
def test_the_tables_of_a_page_are_those_of_the_result_files(page: str, benchmark: str, tables: int) -> None:
    script = ROOT / "benchmarks" / benchmark / "pages.py"
    spec = importlib.util.spec_from_file_location("pages", script)
    assert spec is not None
    assert spec.loader is not None
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert text.count("<!-- table:") >= tables
    assert pages.rendered(text) == text, f"run python {script.relative_to(ROOT)}"


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.stem)
def test_every_benchmark_is_a_comparison_that_can_be_run(file: Path) -> None:
    assert compare.read(tomllib.loads(file.read_text(encoding="utf-8"))).entries
