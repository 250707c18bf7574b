"""How Sphinx builds these pages: ``make docs``. Nothing is loaded from elsewhere."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import quoteattr

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

if TYPE_CHECKING:
    from sphinx.application import Sphinx

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "src"))

import onnxport

project = "onnxport"
author = "the onnxport developers"
project_copyright = "the onnxport developers. Apache-2.0"
version = release = onnxport.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "progress.md", "**/.*"]

myst_enable_extensions = ["colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"  # the signature and Args say it
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 72
python_display_short_literal_types = True
nitpicky = True
nitpick_ignore_regex = [
    # Bases and aliases of the standard library and of torch: their documentation is elsewhere.
    (r"py:.*", r"(torch|lightning|pyspark|os|collections|typing|builtins|pathlib)\..*"),
    (r"py:.*", r"(Any|Callable|Iterable|Mapping|Literal|Path|None|ValueError|ImportError)"),
    (r"py:.*", r"(Exception|RuntimeError|nn\.Module|optional)"),
]

html_theme = "furo"
html_title = "onnxport"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "monokai"
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True
copybutton_copy_empty_lines = False
suppress_warnings = ["config.cache"]


class Drawings(SphinxPostTransform):
    """Put each drawing into its page, so that it has the colours of the theme that is chosen."""

    default_priority = 1
    formats = ("html",)

    def run(self) -> None:
        """Replace the images of ``drawings/``."""
        for image in list(self.document.findall(nodes.image)):
            uri = str(image.get("uri", ""))
            if "drawings/" in uri and uri.endswith(".svg"):
                drawing = (HERE / uri).read_text(encoding="utf-8")
                alt = quoteattr(str(image.get("alt", "")))
                drawing = drawing.replace("<svg ", f"<svg role='img' aria-label={alt} ", 1)
                html = f"<div class='drawing'>{drawing}</div>"
                image.replace_self(nodes.raw("", html, format="html"))


def signature_of_init(
    _: Sphinx, what: str, __: str, value: object, *___: object
) -> tuple[str, None] | None:
    """Show the arguments of a class whose metaclass would show ``(*args, **kwargs)``."""
    if what != "class" or type(value) is type:
        return None
    signature = inspect.signature(value.__init__)  # type: ignore[misc]
    shown = [
        each.replace(annotation=inspect.Parameter.empty)
        for each in list(signature.parameters.values())[1:]
    ]
    plain = signature.replace(parameters=shown, return_annotation=inspect.Signature.empty)
    return str(plain), None


def list_the_others(_: Sphinx, docname: str, source: list[str]) -> None:
    """Put the pages that the start page does not name into its last list: a new one is there."""
    if docname == "index":
        pages = sorted(path.stem for path in HERE.glob("*.md"))
        named = {line.strip() for line in source[0].splitlines()} | {"index"}
        excluded = {pattern.removesuffix(".md") for pattern in exclude_patterns}
        others = [page for page in pages if page not in named | excluded]
        source[0] = source[0].replace("(other pages)", "\n".join(others))


def lead_into_the_site(_: Sphinx, docname: str, source: list[str]) -> None:
    """Measurements are pages of the site, too; elsewhere they are files of the repository."""
    up = "../" * docname.count("/")
    source[0] = re.sub(
        r"\]\((?:\.\./)+benchmarks/results/(\w+)\.md", rf"]({up}measured/\1.md", source[0]
    )


def setup(app: Sphinx) -> None:
    """Add what is ours."""
    app.add_post_transform(Drawings)
    app.connect("autodoc-process-signature", signature_of_init)
    app.connect("source-read", list_the_others)
    app.connect("env-get-outdated", lambda *_: ["index"])  # its list may be another one now
    app.connect("source-read", lead_into_the_site)
