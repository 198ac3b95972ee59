"""Sphinx configuration; warnings are errors (see the Makefile)."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
from dataclasses import is_dataclass
from importlib.metadata import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from jupyter_cache import get_cache
from latex2mathml.converter import convert
from sphinx.domains.python import PyObject

if TYPE_CHECKING:
    from sphinx.application import Sphinx

HERE = Path(__file__).parent

# The tutorials live beside the package; the documentation is built from a copy. An unchanged file is
# not copied again, so that a second build does not run it again.
(HERE / "tutorials").mkdir(exist_ok=True)
for source in (HERE.parent / "tutorials").glob("*.md"):
    copy = HERE / "tutorials" / source.name
    if not copy.exists() or copy.read_bytes() != source.read_bytes():
        shutil.copyfile(source, copy)
for copy in (HERE / "tutorials").glob("*.md"):
    if not (HERE.parent / "tutorials" / copy.name).exists():
        copy.unlink()

# Notebook kernels inherit these: figures go into the page, progress bars don't.
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
os.environ.setdefault("TQDM_DISABLE", "1")
# With one thread each, kernels don't wait for each other on a busy machine.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(name, "1")


def content(file: Path) -> bytes:
    """What a file of the package does: of a module its code, without docstrings and comments."""
    if file.suffix != ".py":
        return file.read_bytes()
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            del node.body[0]
    return ast.dump(tree).encode()


# Outputs of notebooks are kept while neither the notebook nor the package's code changes.
digest = hashlib.sha256()
for file in sorted((HERE.parent / "src").rglob("*")):
    if file.is_file() and file.suffix != ".pyc":
        digest.update(content(file))
CACHE = HERE / "_build" / f"notebooks-{digest.hexdigest()[:12]}"
for folder in CACHE.parent.glob("notebooks-*"):
    if folder != CACHE:
        shutil.rmtree(folder)

info = metadata("stofm")
project = info["Name"]
author = "stofm contributors"
copyright = f"2026, {author}"
version = release = info["Version"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_extra", "measured", "**.ipynb_checkpoints"]

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
napoleon_google_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True

# Where the documentation is published, types of other packages become links. A build without a
# network leaves them out.
is_published = os.environ.get("READTHEDOCS") or os.environ.get("GITHUB_ACTIONS")
intersphinx_mapping = {
    name: (f"https://{address}/", None)
    for name, address in {
        "anndata": "anndata.readthedocs.io/en/stable",
        "matplotlib": "matplotlib.org/stable",
        "numpy": "numpy.org/doc/stable",
        "pandas": "pandas.pydata.org/docs",
        "python": "docs.python.org/3",
        "scanpy": "scanpy.readthedocs.io/en/stable",
        "scipy": "docs.scipy.org/doc/scipy",
        "spatialdata": "spatialdata.scverse.org/en/stable",
        "squidpy": "squidpy.readthedocs.io/en/stable",
        "torch": "docs.pytorch.org/docs/stable",
    }.items()
    if is_published
}

bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(CACHE)
nb_execution_raise_on_error = True
nb_execution_timeout = 1800
nb_merge_streams = True

html_theme = "sphinx_book_theme"
html_title = f"stofm {release}"
html_static_path = ["_static"]
# Browsers draw MathML themselves: formulae need no script from elsewhere.
html_math_renderer = "mathml"
html_extra_path = ["_extra"]
html_css_files = ["stofm.css"]
html_theme_options = {
    "home_page_in_toc": False,
    # The side bar has a search field already.
    "navbar_persistent": [],
    "show_navbar_depth": 1,
    "use_download_button": False,
    "use_fullscreen_button": False,
}


#: By function, the parameters under "Other Parameters".
others: dict[str, set[str]] = {}
parameters = PyObject.doc_field_types[0]
PyObject.doc_field_types.append(
    type(parameters)(
        "other",
        names=("other",),
        typenames=("othertype",),
        label="Other Parameters",
        typerolename=parameters.typerolename,
        can_collapse=True,
    )
)


def adapt_to_napoleon(
    app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]
) -> None:
    """Turn what napoleon would misread into something that it renders well."""
    if what in ("attribute", "property") and lines:
        # A colon in the first line would end a type.
        lines[0] = lines[0].replace(": ", " – ", 1)
    if "Other Parameters" in lines:
        section = "\n".join(lines).partition("\nOther Parameters\n")[2].partition("\n\n")[0]
        named = re.findall(r"^\w.*$", section, re.MULTILINE)
        others[name] = {word.strip() for line in named for word in line.split(",")}
    for number, line in enumerate(lines):
        # In Returns, ``adata.obsm['key']`` : type would become bold and lose its markup.
        lines[number] = re.sub(r"^(``(?:adata\.|\w+\[).*(?:``|\.\.\.)) : (?=\S)", r"\1, ", line)
        # A dataclass's attributes are its parameters; as such they get their types.
        if what == "class" and is_dataclass(obj) and line == "Attributes":
            lines[number : number + 2] = ["Parameters", "----------"]


def set_others_apart(app: Sphinx, domain: str, objtype: str, content: nodes.Element) -> None:
    """Make a list of their own of what napoleon and autodoc put among the parameters."""
    (signature, *_) = content.parent
    own = others.get(f"{signature.get('module')}.{signature.get('fullname')}", set())
    for field in content.findall(nodes.field):
        kind, _, name = field[0].astext().partition(" ")
        if kind in ("param", "type") and name in own:
            field[0][0] = nodes.Text(f"{'other' if kind == 'param' else 'othertype'} {name}")


def visit_math(translator: Any, node: nodes.math) -> None:
    translator.body.append(convert(node.astext().replace("<", r"\lt ")))
    raise nodes.SkipNode


def visit_math_block(translator: Any, node: nodes.math_block) -> None:
    formula = convert(node.astext().replace("<", r"\lt "), display="block")
    translator.body.append(f'<div class="math-block">{formula}</div>')
    raise nodes.SkipNode


def spread_notebooks(app: Sphinx, env: Any, docnames: list[str]) -> None:
    """Put other pages between the notebooks: each process reads a part of the list."""
    notebooks = [name for name in docnames if name.startswith("tutorials/") or name == "gallery"]
    others = [name for name in docnames if name not in notebooks]
    for number, name in enumerate(notebooks):
        others.insert((number * len(docnames)) // len(notebooks), name)
    docnames[:] = others
    # Processes that make the tables of a new cache at the same time disturb each other.
    get_cache(CACHE).db  # noqa: B018


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("env-before-read-docs", spread_notebooks)
    # Before napoleon, which listens with the default priority of 500.
    app.connect("autodoc-process-docstring", adapt_to_napoleon, priority=400)
    # After autodoc, which adds the types of parameters.
    app.connect("object-description-transform", set_others_apart, priority=600)
