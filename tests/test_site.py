"""The site of rendered notebooks: every notebook a page, no link broken, nothing that only a kernel or a network shows."""

import re
from html.parser import HTMLParser

import nbformat
import pytest
from conftest import load_module

import gpnns_utils as gu

PATHS = sorted((gu.HERE / "notebooks").glob("[0-9][0-9]_*.ipynb"))


class Page(HTMLParser):
    """The tags of a page by name, each with its attributes, and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def ids(self):
        return {attrs["id"] for _, attrs in self.tags if "id" in attrs}

    def all(self, tag, attribute):
        return [attrs[attribute] for name, attrs in self.tags if name == tag and attribute in attrs]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    writer = load_module(gu.COURSE / "gpnns" / "tools" / "pages.py")
    writer.SITE = tmp_path_factory.mktemp("site")
    (writer.SITE / "old.html").write_text("a page of an earlier site")
    writer.main()
    return {path.name: Page(path.read_text(encoding="utf-8")) for path in writer.SITE.rglob("*") if path.is_file()}


def test_every_notebook_is_a_page_and_nothing_else_is(pages):
    assert set(pages) == {"index.html", "running_the_notebooks.html"} | {f"{path.stem}.html" for path in PATHS}


def test_no_link_is_broken_and_every_page_is_reached_from_the_index_and_back(pages):
    for name, page in pages.items():
        links = [link for link in page.all("a", "href") if not re.match("https?:", link)]
        for link in links:
            file, _, anchor = link.partition("#")
            assert file in pages or not file, f"{name}: {link}"
            assert not anchor or anchor in pages[file or name].ids(), f"{name}: {link}"
        assert name == "index.html" or "index.html" in links
    assert {f"{path.stem}.html" for path in PATHS} <= set(pages["index.html"].all("a", "href"))


def test_a_link_to_what_has_no_page_leads_to_the_repository():
    pages = load_module(gu.COURSE / "gpnns" / "tools" / "pages.py")
    folder = gu.HERE / "notebooks"
    assert pages.resolve_link("02_benchmark_encoders.ipynb", folder) == "02_benchmark_encoders.html"
    assert pages.resolve_link("notebooks/02_benchmark_encoders.ipynb", gu.HERE) == "02_benchmark_encoders.html"
    solution = "solutions/01_search_images.ipynb"
    assert pages.resolve_link(solution, folder) == f"https://github.com/gpnns/gpnns/blob/main/notebooks/{solution}"
    assert (
        pages.resolve_link("https://arxiv.org", folder) == "https://arxiv.org"
        and pages.resolve_link("#a", folder) == "#a"
    )


@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_a_page_holds_its_notebooks_figures_and_formulas(pages, path):
    page = pages[f"{path.stem}.html"]
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output.get("data", {}) for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    figures = [data for data in outputs if {"image/png", "image/jpeg"} & data.keys()]
    embedded = [source for source in page.all("img", "src") if source.startswith("data:image/")]
    assert len(embedded) == len(figures)
    prose = [
        re.sub(r"^```.*?^```", "", cell.source, flags=re.M | re.S) for cell in cells if cell.cell_type == "markdown"
    ]
    formulas = [formula for text in prose for formula in re.findall(r"\$[^$\n]+\$", text)]
    assert len([tag for tag, _ in page.tags if tag == "math"]) == len(formulas)


def test_pages_need_neither_scripts_nor_a_network(pages):
    badges = ("https://colab.research.google.com/assets/", "https://kaggle.com/static/")
    for name, page in pages.items():
        assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}, name
        assert not [s for s in page.all("img", "src") if not s.startswith(("data:", *badges))], name
        assert not re.search(r"url\(.?https?:", page.text), name
