"""The notebooks as a site to read, with the outputs they were committed with: `python notebooks/pages.py`.

Pages go to build/site: the README as index.html and one for each notebook. They need no network: styles and figures lie
in the pages, formulas are MathML, scripts there are none. Solutions are left out.
"""

import re
import shutil
from pathlib import Path

import nbformat
from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
SITE = ROOT / "build" / "site"
REPOSITORY = "https://github.com/gpnns/gpnns/blob/main"
BACK = "[All notebooks](../README.md)"

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

    def link(self, text: str, url: str, title: str | None = None) -> str:
        return super().link(text, site_link(url, Path(self.path)), title)


def site_link(url: str, folder: Path) -> str:
    """Where a link of a file in `folder` leads on the site: a page, or the repository for what has none."""
    if re.match(r"\w+:|#", url):
        return url
    target = (folder / url).resolve()
    if target == ROOT / "README.md":
        return "index.html"
    return f"{target.stem}.html" if target in notebooks() else f"{REPOSITORY}/{target.relative_to(ROOT).as_posix()}"


def notebooks() -> list[Path]:
    return sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))


class PageExporter(HTMLExporter):
    @pass_context
    def markdown2html(self, context, source: str) -> str:
        return MarkdownWithMath(
            PageRenderer(escape=False, embed_images=True, path=context["resources"]["metadata"]["path"])
        ).render(source)


def page(notebook: nbformat.NotebookNode, folder: Path) -> str:
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
    readme = nbformat.v4.new_markdown_cell((ROOT / "README.md").read_text(encoding="utf-8"))
    (SITE / "index.html").write_text(page(nbformat.v4.new_notebook(cells=[readme]), ROOT), encoding="utf-8")
    for path in notebooks():
        notebook = nbformat.read(path, as_version=4)
        notebook.cells[0].source += f"\n\n{BACK}"
        (SITE / f"{path.stem}.html").write_text(page(notebook, FOLDER), encoding="utf-8")
    print(f"{1 + len(notebooks())} pages: {SITE / 'index.html'}")


if __name__ == "__main__":
    main()
