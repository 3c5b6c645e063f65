"""What a reader sees in a real Chromium: the explorer of notebook 01, moved in JupyterLab and as an app; the site."""

import base64
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import psutil
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from traitlets.config import Config

import gpnns_utils as gu

NOTEBOOK = gu.HERE / "notebooks" / "01_search_images.ipynb"
APP = ["voila", NOTEBOOK.name, "--Voila.config_file_paths=gpnns/tools"]  # as `make app` has it
PICTURES = gu.HERE / "build" / "screenshots"
TEXT = "a yellow flower"
# What the reader does, one thing after the other, and the settings that are in force from then on.
TOUR = [
    ("start", {}),
    ("image", {"query": 700}),
    ("k", {"count": 8}),
    ("text", {"text": TEXT}),
    ("binary", {"how": "binary"}),
    ("text emptied", {"text": ""}),
]


@pytest.fixture(scope="module")
def lesson():
    """What the cells of the app define, run here: `explore` and what it works on."""
    names = {}
    with plt.rc_context():
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
            wanted = {"app", "parameters"} & set(cell.metadata.get("tags", []))
            if wanted and cell.cell_type == "code":
                exec(cell.source, names)
        yield SimpleNamespace(**names)


@pytest.fixture(scope="module")
def expected(lesson):
    """The picture that belongs to each stop of the tour."""
    settings, pictures = {"query": int(lesson.queries[0])}, {}
    for stop, change in TOUR:
        settings |= change
        pictures[stop] = lesson.explore(**settings).data
    assert len(set(pictures.values())) == len(TOUR), "each stop shows something else"
    return pictures


@pytest.fixture
def chromium(tmp_path):
    """A Chromium without a window, with an empty profile."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser, driver = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    if not (browser and driver):
        pytest.skip("Chromium and its driver are not installed (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    alone = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to run as root otherwise
    for argument in [
        "--headless",
        "--disable-gpu",
        "--disable-quic",
        "--window-size=1280,1000",
        f"--user-data-dir={tmp_path / 'chromium'}",
        *quiet,
        *alone,
    ]:
        options.add_argument(argument)
    chromium = webdriver.Chrome(options, webdriver.ChromeService(driver))
    chromium.set_script_timeout(10)
    yield chromium
    keep_picture(chromium, "last")
    chromium.quit()


@contextmanager
def serving(command, place, tmp_path):
    """A Jupyter server of this environment that touches nothing of the user's; yields its process and address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{name}_DIR": str(tmp_path / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    own |= {"IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": str(gu.HERE), "BROWSER": "true"}
    log = tmp_path / "server.log"
    program = Path(sys.executable).parent / command[0]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [program, *command[1:], f"--port={port}", "--no-browser"],
            cwd=place,
            env=os.environ | own,
            stdout=stream,
            stderr=stream,
        )
    try:
        yield process, wait_for(lambda: re.search(r"http://localhost\S+token=\w+", log.read_text()), 60, log)[0]
    finally:
        process.terminate()
        process.wait(30)


def wait_for(look, seconds, what):
    """The first answer of `look` that is true."""
    end = time.time() + seconds
    while not (answer := look()):
        assert time.time() < end, f"not within {seconds} s: {what.read_text() if isinstance(what, Path) else what}"
        time.sleep(0.2)
    return answer


# --- gestures ---


def shown(chromium):
    """The picture that the explorer shows, byte for byte as it came from the kernel; empty while there is none."""
    fetch = """
        const done = arguments[arguments.length - 1], picture = document.querySelector("img.widget-image");
        const read = blob => { const r = new FileReader(); r.onload = () => done(r.result); r.readAsDataURL(blob); };
        if (picture) fetch(picture.src).then(r => r.blob()).then(read).catch(() => done("")); else done("");
    """
    return base64.b64decode(chromium.execute_async_script(fetch).partition(",")[2])


def control(chromium, label, part):
    """A part of the control with this label."""
    return chromium.find_element(By.XPATH, f"//label[normalize-space()='{label}']/..").find_element(
        By.CSS_SELECTOR, part
    )


def type_over(field, text):
    field.click()
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(text or Keys.DELETE, Keys.ENTER)


GESTURES = {
    "start": lambda chromium: None,
    "image": lambda chromium: type_over(control(chromium, "image", ".widget-readout"), "700"),
    "k": lambda chromium: control(chromium, "k", ".noUi-handle").send_keys(Keys.ARROW_RIGHT * 3),
    "text": lambda chromium: type_over(control(chromium, "text", "input"), TEXT),
    "binary": lambda chromium: chromium.find_element(By.XPATH, "//button[normalize-space()='binary']").click(),
    "text emptied": lambda chromium: type_over(control(chromium, "text", "input"), ""),
}


def keep_picture(chromium, name):
    PICTURES.mkdir(parents=True, exist_ok=True)
    chromium.save_screenshot(str(PICTURES / f"{name}.png"))


def take_the_tour(chromium, expected, where):
    """Do what a reader does; after each gesture the picture must be the one that belongs to the settings."""
    for number, (stop, _) in enumerate(TOUR):
        GESTURES[stop](chromium)
        try:
            wait_for(lambda stop=stop: shown(chromium) == expected[stop], 30, f"the picture of '{stop}' in {PICTURES}")
        finally:
            keep_picture(chromium, f"{where}_{number}_{stop.replace(' ', '_')}")


# --- tests ---


def test_the_explorer_shows_the_nearest_images_of_its_settings(lesson):
    """The pictures that the browser is held to, against a ranking by hand."""
    embeddings, photos = lesson.embeddings, lesson.photos

    def by_hand(query, vector, left_out=None):
        scores = embeddings @ vector
        if left_out is not None:
            scores[left_out] = -np.inf
        rows = np.argsort(-scores, kind="stable")[:5]
        right = None if left_out is None else photos.labels[rows][None] == photos.labels[left_out]
        return gu.show_neighbors([query], photos, rows[None], scores[rows][None], right).data

    (text,) = gu.embed_texts(lesson.encoder, [TEXT])
    assert lesson.explore(700).data == by_hand(photos[700], embeddings[700], 700)
    assert lesson.explore(text=TEXT).data == by_hand(TEXT, text)


@pytest.mark.notebook
def test_in_jupyterlab_the_explorer_follows_its_controls(chromium, expected, tmp_path, results):
    profile, folder = results
    place = tmp_path / "place"
    place.mkdir()
    source = NOTEBOOK.read_text(encoding="utf-8").replace(
        'profile: str = \\"mini\\"', f'profile: str = \\"{profile}\\"'
    )
    (place / NOTEBOOK.name).write_text(source, encoding="utf-8")
    quiet = tmp_path / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # asks nobody on the network
    command = ["jupyter-lab", NOTEBOOK.name, *(["--allow-root"] if os.geteuid() == 0 else [])]
    with serving(command, place, tmp_path) as (_, address):
        chromium.get(address.replace("/lab?", f"/lab/tree/{NOTEBOOK.name}?"))
        press_run_all(chromium)
        wait_for(lambda: (folder / "01_search_images.json").exists(), 300, "all cells run")
        wait_for(lambda: found_by_scrolling(chromium), 60, "the explorer in the notebook")
        take_the_tour(chromium, expected, "lab")


def press_run_all(chromium):
    menu, entry = "//*[contains(@class, 'lm-MenuBar-itemLabel') and .='Run']", "//*[.='Run All Cells']"
    idle = "//*[contains(@class, 'jp-StatusBar-TextItem') and contains(., '| Idle')]"
    wait_for(lambda: chromium.find_elements(By.XPATH, idle), 60, "a notebook with a kernel")
    chromium.find_element(By.XPATH, menu).click()
    wait_for(lambda: chromium.find_elements(By.XPATH, entry), 10, "the menu Run")[0].click()


def found_by_scrolling(chromium):
    """Whether the explorer's picture is on the page; JupyterLab draws a cell only when it comes near the window."""
    scroll = "document.querySelector('.jp-WindowedPanel-outer').scrollBy(0, -400)"
    found = chromium.find_elements(By.CSS_SELECTOR, "img.widget-image")
    if found:
        chromium.execute_script("arguments[0].scrollIntoView({block: 'center'})", found[0])
    else:
        chromium.execute_script(scroll)
    return found


@pytest.mark.notebook
def test_as_an_app_the_explorer_stands_alone_and_follows_its_controls(chromium, expected, tmp_path):
    with serving(APP, NOTEBOOK.parent, tmp_path) as (_, address):
        chromium.get(address)
        wait_for(lambda: shown(chromium), 120, "the explorer")
        take_the_tour(chromium, expected, "app")
        text = chromium.find_element(By.TAG_NAME, "body").text
        assert text.startswith("How does a vector find the same thing?"), text
        assert "Six searches" not in text and "import" not in text and len(text) < 500, text
        pictures = chromium.find_elements(By.CSS_SELECTOR, "#rendered_cells img")
        assert len(pictures) == 1, "no figure of the lesson"


def test_an_app_keeps_injected_parameters_and_other_notebooks_stay_whole():
    settings = {"get_config": Config}
    exec((gu.COURSE / "gpnns" / "tools" / "voila.py").read_text(encoding="utf-8"), settings)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    injected = nbformat.v4.new_code_cell("images = 'mine'", metadata={"tags": ["injected-parameters"]})
    at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells.insert(at + 1, injected)
    preparing, *texts, showing = settings["serve_app_alone"](None, notebook, "").cells
    assert preparing.source.index('images: str = "mini"') < preparing.source.index(injected.source)
    assert texts[0].source.startswith("# ") and showing.source == "gu.live_picture(explore, controls)"
    other = nbformat.read(NOTEBOOK.parent / "02_benchmark_encoders.ipynb", as_version=4)
    assert len(settings["serve_app_alone"](None, other, "").cells) > 20


@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desk"])
def test_the_site_fits_its_window(chromium, width):
    subprocess.run([sys.executable, "-m", "gpnns.tools.pages"], check=True)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    chromium.execute_cdp_cmd("Network.enable", {})
    chromium.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["http*"]})  # a reader without network
    wider = """
        return [...document.querySelectorAll("main *")].filter(part => !part.closest("table, pre, math")
            && part.getBoundingClientRect().right > innerWidth + 1).map(part => part.outerHTML.slice(0, 200))
    """
    missing = "return [...document.images].filter(i => i.src.startsWith('data:') && !i.naturalWidth).length"
    for page in sorted((gu.HERE / "build" / "site").glob("*.html")):
        chromium.get(page.as_uri())
        keep_picture(chromium, f"site_{width}_{page.stem}")
        assert chromium.execute_script(wider) == [], page.name
        assert chromium.execute_script(missing) == 0, page.name


@pytest.mark.notebook
def test_the_app_is_for_this_machine_and_asks_for_its_token(tmp_path):
    with serving(APP, NOTEBOOK.parent, tmp_path) as (process, address):
        listening = psutil.Process(process.pid).net_connections()
        assert {place.laddr.ip for place in listening if place.status == "LISTEN"} <= {"127.0.0.1", "::1"}
        bare, token = address.split("?token=")
        for wrong in ("", "?token=" + token[::-1]):
            answer = urllib.request.urlopen(bare + wrong)
            assert "/login" in answer.url and "explore" not in answer.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{bare}voila/files/{NOTEBOOK.name}")
        answer = urllib.request.urlopen(urllib.request.Request(bare, headers={"Authorization": f"token {token}"}))
        assert answer.url == bare and "How does a vector find the same thing?" in answer.read().decode()
