"""Imports point one way, heavy packages stay where they belong, and nothing names the machine it was written on."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "umbel"

LAYERS = [
    {"algebra"},
    {"method", "privacy"},
    # config checks a method's name and options, and nobody below needs it.
    {"methods", "config"},
    {"server", "wire", "preflight", "record", "ledger", "masking", "safetensors_file"}
    | {"peft_config", "peft_folder", "kit", "envelope"},
    {"loop", "asking", "opening", "admission", "central", "sums", "engine", "client", "superlink", "deployment"},
    {"run", "merging", "report", "testing", "traffic", "planning"},
    {"compare"},
    {"federation", "app", "offline"},
    {"cli", "cli_federation"},
]
"""From the ground up. A module imports from its own layer or from those before it."""

UPWARD = {("method", "methods")}
"""What points up all the same: method.names() lists the files of the package `methods`, and find() loads one of them."""

HOMES = {
    "flwr": {"engine/flower.py", "engine/flower_strategy.py", "app.py", "masking.py"},
    "opacus": {"privacy.py", "client"},
    "matplotlib": {"report"},
    "transformers": {"client"},
    "peft": {"client"},
    "datasets": {"client"},
    "cryptography": {"kit.py", "superlink.py", "envelope.py", "masking.py"},
    "typer": {"cli.py", "cli_federation.py"},
    "rich": {"cli.py", "report"},
}
"""Where a package may be imported: folders and files under src/umbel."""

FILES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
METHODS = sorted(path for path in FILES if path.parts[0] == "methods" and path.name != "__init__.py")
by_file = pytest.mark.parametrize("file", FILES, ids=str)
by_method = pytest.mark.parametrize("file", METHODS, ids=str)


def unit(parts):
    """The part of umbel that a module belongs to: a file or a folder of src/umbel."""
    return parts[0].removesuffix(".py") if parts else ""


@cache
def tree(file):
    return ast.parse((SOURCE / file).read_text(encoding="utf-8"))


@cache
def imported(file, of_types=True):
    """Every module that a file imports anywhere, in functions too, as a tuple of its parts."""
    result = []
    inside = [n for block in ast.walk(tree(file)) if _only_for_types(block) for n in ast.walk(block)]
    for node in ast.walk(tree(file)):
        if not of_types and node in inside:
            continue
        if isinstance(node, ast.Import):
            result += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import; write it in full"
            module = tuple(node.module.split("."))
            # `from umbel import wire` imports a module, `from umbel import __version__` does not.
            result += [(*module, alias.name) if _is_module(module, alias.name) else module for alias in node.names]
    return result


def _is_module(package, name):
    place = ROOT / "src" / Path(*package) / name
    return place.is_dir() or place.with_suffix(".py").exists()


def _only_for_types(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def ours(file):
    """The units of umbel that a file imports, other than its own."""
    return {unit(parts[1:]) for parts in imported(file) if parts[0] == "umbel"} - {"", unit(file.parts)}


def layer_of(name):
    found = [i for i, layer in enumerate(LAYERS) if name in layer]
    assert found, f"'{name}' has no place in tests/test_layers.py; say which layer it belongs to"
    return found[0]


@by_file
def test_imports_point_down_or_sideways(file):
    if file == Path("__init__.py"):
        # What it offers, `umbel.merge` and `umbel.aggregate`, is imported when first asked for.
        assert {parts[1] for parts in imported(file) if parts[0] == "umbel"} == {"merging"}
        assert not [node for node in tree(file).body if isinstance(node, ast.ImportFrom) and node.module.startswith("umbel")]
        return
    own = unit(file.parts)
    wrong = [name for name in ours(file) if layer_of(name) > layer_of(own) and (own, name) not in UPWARD]
    assert wrong == []


def test_no_part_imports_itself_through_others():
    graph = {}
    for file in FILES:
        graph.setdefault(unit(file.parts), set()).update(name for name in ours(file) if (unit(file.parts), name) not in UPWARD)
    done = []

    def visit(name, above):
        assert name not in above, f"a circle of imports: {' → '.join([*above, name])}"
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, [*above, name])
            done.append(name)

    for name in graph:
        visit(name, [])


@by_method
def test_a_method_imports_algebra_and_the_contract_and_no_other_method(file):
    assert ours(file) <= {"algebra", "method"}
    assert [parts for parts in imported(file) if parts[:2] == ("umbel", "methods")] == []


@by_method
def test_a_method_has_fewer_than_a_hundred_lines_of_code(file):
    docstrings = {
        line
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    lines = (SOURCE / file).read_text(encoding="utf-8").splitlines()
    code = [n for n, text in enumerate(lines, 1) if text.strip() and not text.strip().startswith("#") and n not in docstrings]
    assert len(code) < 100


@by_file
def test_a_package_with_a_home_is_imported_only_there(file):
    for parts in imported(file):
        homes = HOMES.get(parts[0])
        assert homes is None or homes & {str(file), file.parts[0]}, f"{parts[0]} is for {', '.join(sorted(homes))}"


@pytest.mark.parametrize("file", [f for f in FILES if f.parts[0] == "report"], ids=str)
def test_the_report_needs_files_and_no_tensors(file):
    assert {parts[0] for parts in imported(file, of_types=False)} & {"torch", "safetensors", "transformers", "peft"} == set()
    assert ours(file) == set()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("umbel.cli", ["torch", "transformers", "peft", "matplotlib", "flwr", "rich.progress", "numpy", "cryptography"]),
        # A site's checks before it dials are done at once.
        ("umbel.deployment", ["torch", "transformers", "numpy", "flwr"]),
        ("umbel.app", ["torch", "transformers", "peft"]),
        ("umbel.report", ["torch", "transformers", "matplotlib", "numpy"]),
        ("umbel.loop", ["transformers", "peft", "datasets", "matplotlib", "flwr"]),
        ("umbel.run", ["transformers", "peft", "datasets", "matplotlib", "flwr"]),
        ("umbel.testing", ["transformers", "peft", "datasets", "matplotlib", "flwr"]),
    ],
)
def test_heavy_packages_are_loaded_when_first_needed(module, absent):
    code = f"import sys, {module}; print(*(name for name in {absent!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def _texts():
    """Every file of the project that is text, but for what tools leave behind and git passes over."""
    skipped = {".git", ".venv", "__pycache__", "runs", "build", "dist", ".pytest_cache", ".ruff_cache", ".hypothesis"}
    for path in sorted(ROOT.rglob("*")):
        if path.is_file() and not skipped.intersection(path.relative_to(ROOT).parts) and ".egg-info" not in str(path):
            yield path


def test_no_file_names_a_place_on_the_machine_it_was_written_on():
    places = [f"/{name}/" for name in ("work", "root", "home", "Users")]
    found = []
    for path in _texts():
        content = path.read_bytes().decode(errors="replace")
        found += [f"{path.relative_to(ROOT)}: {place}" for place in places if place in content]
    assert found == []
