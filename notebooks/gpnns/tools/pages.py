"""The notebooks as a site to read, with the outputs they were committed with: `python -m gpnns.tools.pages`.

Pages go to build/site: the README as index.html, how to run the notebooks, and one for each notebook. They need no
network: styles and figures lie in the pages, formulas are MathML, scripts there are none. Solutions are left out.
"""

import re
import shutil
from pathlib import Path

import nbformat
from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from gpnns.tools.run import FOLDER, NOTEBOOKS, ROOT

SITE = ROOT / "build" / "site"
REPOSITORY = "https://github.com/gpnns/gpnns/blob/main"
BACK = "[All notebooks](../README.md)"
TEXTS = {ROOT / "README.md": "index.html", FOLDER / "README.md": "running_the_notebooks.html"}

# The template of JupyterLab's export without its scripts, in one column that also fits a phone.
TEMPLATE = """{%- extends 'index.html.j2' -%}
{% block html_head_js %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block html_head_css %}
<style>
main { max-width: 58rem; margin: 0 auto; }
body.jp-Notebook { padding: 1rem; overflow-x: hidden; }
img { max-width: 100%; height: auto; }
.jp-RenderedHTMLCommon table { display: block; overflow-x: auto; margin-left: 0; }
.highlight, .jp-RenderedMarkdown pre { overflow-x: auto; } /* code keeps its lines, and scrolls */
.jp-RenderedMarkdown .highlight { margin-bottom: 1em; }
.jp-RenderedHTMLCommon code { overflow-wrap: anywhere; }
</style>
{% endblock %}
"""


class PageRenderer(IPythonRenderer):
    """Markdown whose formulas a browser shows by itself and whose links stay within the site where they can."""

    def inline_math(self, body: str) -> str:
        return convert(body)

    def block_math(self, body: str) -> str:
        return convert(body, display="block")

    def heading(self, text: str, level: int, **attrs) -> str:
        """With GitHub's anchors, which the links in the texts name: small letters, hyphens, no other punctuation."""
        html = super().heading(text, level, **attrs)
        return re.sub(r'(?<=id=")[^"]*|(?<=href="#)[^"]*', lambda name: make_anchor(name[0]), html)

    def link(self, text: str, url: str, title: str | None = None) -> str:
        return super().link(text, resolve_link(url, Path(self.path)), title)


def resolve_link(url: str, folder: Path) -> str:
    """Where a link of a file in `folder` leads on the site: a page, or the repository for what has none."""
    if re.match(r"\w+:|#", url):
        return url
    file, _, anchor = url.partition("#")
    target = (folder / file).resolve()
    if target in TEXTS:
        return TEXTS[target] + (f"#{anchor}" if anchor else "")
    return f"{target.stem}.html" if target in NOTEBOOKS else f"{REPOSITORY}/{target.relative_to(ROOT).as_posix()}"


def make_anchor(heading: str) -> str:
    """The name under which GitHub links to a heading, from its words joined by hyphens."""
    return re.sub(r"[^\w-]", "", heading.lower())


class PageExporter(HTMLExporter):
    @pass_context
    def markdown2html(self, context: dict, source: str) -> str:
        path = context["resources"]["metadata"]["path"]
        return MarkdownWithMath(PageRenderer(escape=False, embed_images=True, path=path)).render(source)


def make_page(notebook: nbformat.NotebookNode, folder: Path) -> str:
    """A notebook as HTML. What needs a kernel is left out: the picture of its state is in the cells before it."""
    notebook.metadata["title"] = notebook.cells[0].source.partition("\n")[0].lstrip("# ")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if "widget-view" not in " ".join(o.get("data", {}))]
    exporter = PageExporter(raw_template=TEMPLATE, exclude_input_prompt=True, exclude_output_prompt=True)
    return exporter.from_notebook_node(notebook, {"metadata": {"path": str(folder)}})[0]


def main() -> None:
    shutil.rmtree(SITE, ignore_errors=True)
    SITE.mkdir(parents=True)
    for path, name in TEXTS.items():
        text = nbformat.v4.new_markdown_cell(path.read_text(encoding="utf-8"))
        (SITE / name).write_text(make_page(nbformat.v4.new_notebook(cells=[text]), path.parent), encoding="utf-8")
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        notebook.cells[0].source += f"\n\n{BACK}"
        (SITE / f"{path.stem}.html").write_text(make_page(notebook, FOLDER), encoding="utf-8")
    print(f"{len(TEXTS) + len(NOTEBOOKS)} pages: {SITE / 'index.html'}")


if __name__ == "__main__":
    main()
