"""The project's conventions, held by tests so that nobody has to remember them."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import operator
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import stofm

if TYPE_CHECKING:
    from collections.abc import Callable

PACKAGE = Path(stofm.__file__).parent
API = Path(__file__).parents[1] / "docs" / "api"
TUTORIALS = Path(__file__).parents[1] / "tutorials"
PROJECT = Path(__file__).parents[1] / "pyproject.toml"
FILES = sorted(PACKAGE.rglob("*.py"))

#: Imports go from right to left only.
LAYERS = [
    *("_keys", "genes", "spatial", "nn", "corpus", "image", "train", "heads"),
    *("align", "perturb", "tl"),
]
#: Modules below all of these.
BASE = (
    *("_arrays", "_config", "_digests", "_files", "_lazy", "_logging", "_messages"),
    *("_settings", "_version"),
)
#: Where a library may be imported, as first part of the path below stofm/.
HOMES = {
    "anndata": {
        "_edge",
        "align",
        "corpus",
        "heads",
        "perturb",
        "im",
        "io",
        "pp",
        "tl",
        "pl",
        "datasets",
        "__main__",
        "_demo",
    },
    "torch": {"nn", "image", "train", "heads", "align", "perturb", "im", "tl", "_edge"},
    "transformers": {"nn", "image", "train"},
    "lightning_fabric": {"train"},
    "tensorboard": {"train"},
    "matplotlib": {"io", "pl", "_demo"},
}
#: What else a part of the package must not use.
FORBIDDEN = {
    **{part: {*LAYERS[1:], "_edge", "pp", "pl", "datasets"} for part in BASE},
    "_edge": {"nn", "train", "pp", "tl", "pl", "datasets"},
    "datasets": {"nn", "train", "pp", "tl", "pl"},
    "io": {"nn", "train", "heads", "pp", "tl", "pl", "datasets"},
    "metrics": {*LAYERS, "_edge", "_logging", "pp", "pl", "datasets"},
    "pp": {"train", "tl", "pl"},
    "im": {"train", "heads", "tl", "pl", "pp", "datasets"},
    "tl": {"pl"},
    "pl": {"nn", "train", "im", "tl", "pp"},
    **{layer: {"_edge", "pp", "pl", "datasets"} for layer in LAYERS[:-4]},
    "heads": {"pl", "datasets"},
    "perturb": {"pp", "pl", "datasets"},
    "align": {"pl", "datasets"},
}
#: Files that may use a part above them.
EXCEPTIONS = {
    # GeneVocabulary.fit reads AnnData itself, so that a corpus can be streamed through it.
    "genes/fitting.py": {"_edge"},
    # The only module at the edge that runs a model; pp does without it.
    "_edge/embedding.py": {"nn"},
    # They make arrays of what a user passes, for corpora and for training.
    "corpus/sources.py": {"_edge"},
    "corpus/preparation.py": {"_edge"},
    "corpus/writing.py": {"_edge"},
    # Slices are embedded by what users call too.
    "corpus/_embed.py": {"_edge", "tl"},
    "corpus/_upkeep.py": {"_edge"},
    # Cells without embeddings are embedded by what users call too.
    "heads/embeddings.py": {"tl"},
}
AREAS = ["pp", "im", "tl", "pl", "datasets", "metrics", "genes", "spatial", "nn", "corpus", "train"]
HEAVY = [
    "anndata",
    "dask",
    "igraph",
    "liana",
    "lightning_fabric",
    "matplotlib",
    "numba",
    "peft",
    "pooch",
    "scanpy",
    "sklearn",
    "squidpy",
    "tifffile",
    "torch",
    "transformers",
]
#: Extras of the package; those of its developers are none that users install.
EXTRAS = {"cluster", "communication", "image", "lora", "report", "train"}
#: Read by type checkers and by the tests.
TYPING_ONLY = {"jaxtyping"}
#: Where a library comes from, if not from a package of its name.
PROVIDERS = {"PIL": "pillow", "mpl_toolkits": "matplotlib", "sklearn": "scikit_learn"}


def _part(path: Path) -> str:
    """First part of a file's path below stofm/: a folder, or a module without its ending."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def _imported(path: Path) -> list[str]:
    """Dotted names of the modules that a file imports, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"relative import in {path}"
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def _parts_used(path: Path) -> set[str]:
    """Parts of the package that a file imports."""
    names = (name.split(".") for name in _imported(path))
    return {name[1] for name in names if name[0] == "stofm" and len(name) > 1}


def _public(area: str) -> list[str]:
    return list(importlib.import_module(f"stofm.{area}").__all__)


def _public_functions() -> list[tuple[str, Callable[..., object]]]:
    found = []
    for area in ("pp", "im", "tl", "pl", "datasets"):
        module = importlib.import_module(f"stofm.{area}")
        named = ((f"{area}.{name}", getattr(module, name)) for name in module.__all__)
        found += [(name, value) for name, value in named if inspect.isfunction(value)]
    return found


FUNCTIONS = _public_functions()
functions = pytest.mark.parametrize(
    ("name", "function"), FUNCTIONS, ids=[name for name, _ in FUNCTIONS]
)
files = pytest.mark.parametrize(
    "path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES]
)


@files
def test_imports_go_one_way(path: Path) -> None:
    part = _part(path)
    used = _parts_used(path)
    above = set(LAYERS[LAYERS.index(part) + 1 :]) if part in LAYERS else set()
    excepted = EXCEPTIONS.get(path.relative_to(PACKAGE).as_posix(), set())
    assert not (used - excepted) & (above | FORBIDDEN.get(part, set()))


@files
def test_pp_is_imported_by_its_public_names(path: Path) -> None:
    if _part(path) != "pp":
        assert not [name for name in _imported(path) if name.startswith("stofm.pp._")]


@files
def test_libraries_stay_where_they_belong(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return  # names every area, for type checkers
    libraries = {name.split(".")[0] for name in _imported(path)}
    astray = {name for name, homes in HOMES.items() if _part(path) not in homes}
    assert not libraries & astray


@files
def test_files_are_short(path: Path) -> None:
    n_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert n_lines <= 400, f"{path.name} has {n_lines} lines; split it"


@files
def test_messages_have_single_spaces(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = [one.value for one in ast.walk(tree) if isinstance(one, ast.Constant)]
    lines = [text for text in texts if isinstance(text, str) and "\n" not in text]
    assert not [line for line in lines if re.search(r"[\w.,;:)]  +(\w|$)", line)]


@functions
def test_first_parameter_is_the_data(name: str, function: Callable[..., object]) -> None:
    if name.startswith("datasets."):
        return  # they make data
    assert next(iter(inspect.signature(function).parameters)) in {"adata", "data"}


@functions
def test_at_most_three_positional_parameters(name: str, function: Callable[..., object]) -> None:
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    assert inspect.Parameter.VAR_POSITIONAL not in kinds
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) <= 3, name


@functions
def test_copy_is_off_by_default(name: str, function: Callable[..., object]) -> None:
    copy = inspect.signature(function).parameters.get("copy")
    assert copy is None or copy.default is False, name


@functions
def test_functions_live_in_a_file_of_their_name(name: str, function: Callable[..., object]) -> None:
    area, short = name.split(".")
    if area in {"pl", "datasets"}:
        return  # related plots and data sets may share a file
    assert function.__module__ == f"stofm.{area}._{short}"


@functions
def test_every_parameter_is_documented(name: str, function: Callable[..., object]) -> None:
    documented = {*_documented(function, "Parameters"), *_documented(function, "Other Parameters")}
    missing = set(inspect.signature(function).parameters) - documented
    assert not missing, f"{name} does not document {sorted(missing)}"


@functions
def test_what_few_need_stands_apart(name: str, function: Callable[..., object]) -> None:
    """A long list of parameters is in two parts, of which the first can be read at a glance."""
    n_parameters = len(inspect.signature(function).parameters)
    assert len(_documented(function, "Parameters")) <= 14, name
    assert n_parameters <= 8 or _documented(function, "Other Parameters"), name


def _documented(function: Callable[..., object], section: str) -> list[str]:
    """Names in a section of a docstring, which several may share."""
    text = inspect.getdoc(function) or ""
    _, _, lines = text.partition(f"\n\n{section}\n{'-' * len(section)}\n")
    named = re.findall(r"^(\w.*)$", lines.partition("\n\n")[0], re.MULTILINE)
    return [word.strip() for line in named for word in line.split(",")]


@functions
def test_every_function_has_an_example_and_names_related_ones(
    name: str, function: Callable[..., object]
) -> None:
    text = inspect.getdoc(function) or ""
    assert "\nExamples\n--------\n" in text, name
    _, _, related = text.partition("See Also\n--------\n")
    found = re.findall(r"^stofm\.(\S+) : ", related.partition("\n\n")[0], re.MULTILINE)
    assert found, f"{name} lacks See Also"
    for other in found:
        operator.attrgetter(other)(stofm)


@pytest.mark.parametrize("area", AREAS)
def test_public_names_exist_and_have_a_docstring(area: str) -> None:
    module = importlib.import_module(f"stofm.{area}")
    for name in _public(area):
        value = getattr(module, name)
        if callable(value):
            assert inspect.getdoc(value), f"stofm.{area}.{name} has no docstring"


@pytest.mark.parametrize("area", AREAS)
def test_public_names_are_in_the_documentation(area: str) -> None:
    if not API.is_dir():
        pytest.skip("no docs/ beside the tests")
    words = set(re.findall(r"\w+", (API / f"{area}.md").read_text(encoding="utf-8")))
    missing = sorted(set(_public(area)) - words)
    assert not missing, f"docs/api/{area}.md lacks {missing}"


def test_code_of_tutorials_fits_a_narrow_page() -> None:
    if not TUTORIALS.is_dir():
        pytest.skip("no tutorials/ beside the tests")
    long = [
        f"{page.name}: {line}"
        for page in sorted(TUTORIALS.glob("*.md"))
        for code in re.findall(r"^```.*?^```", page.read_text(encoding="utf-8"), re.M | re.S)
        for line in code.splitlines()
        if len(line) > 88
    ]
    assert not long


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("module", "needed"),
    [("stofm", []), ("stofm.tl", []), ("stofm.tl._embed", ["torch"]), ("stofm.pl", ["matplotlib"])],
)
def test_an_import_loads_nothing_heavy_that_it_does_not_need(
    module: str, needed: list[str]
) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert _run(code) == str(needed)


def test_imports_are_quick() -> None:
    # Seconds of the processor, as others may be at work on the machine.
    code = """
from time import process_time as now
times = [now()]
for module in ("stofm", "stofm.pp", "stofm.tl", "torch", "stofm.tl._embed"):
    __import__(module)
    times.append(now())
print(*times)
"""
    times = list(map(float, _run(code).split()))
    stofm_, pp, tl, torch, embed = (b - a for a, b in itertools.pairwise(times))
    assert stofm_ < 0.5
    assert pp + tl < 1.0
    assert embed < 2 * torch


def test_every_imported_library_is_declared() -> None:
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extras = [project["optional-dependencies"][name] for name in EXTRAS]
    texts = [text for part in (project["dependencies"], *extras) for text in part]
    declared = {re.split(r"[^\w-]", text)[0].replace("-", "_") for text in texts}
    imported = {name.split(".")[0] for path in FILES for name in _imported(path)}
    libraries = imported - sys.stdlib_module_names - {"stofm", *TYPING_ONLY}
    assert {PROVIDERS.get(name, name) for name in libraries} <= declared


def test_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
