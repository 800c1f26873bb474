"""JupyterLab in a headless browser, as a student would: open a chapter, run it all, drag a slider, label drawings.

Needs Chromium (`apt install chromium`, or any build of it on the PATH); skipped without. MINIALIGN_SCREENSHOTS=FOLDER
keeps the screenshots, in the light and in the dark theme.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

sync_api = pytest.importorskip("playwright.sync_api")
ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
SETTINGS = {  # every cell in the page, whether in view or not
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
RUN_ALL = "window.jupyterapp.commands.execute('notebook:run-all-cells')"
STATE = """() => {
    const panel = window.jupyterapp.shell.currentWidget
    const cells = panel.content.widgets.filter(cell => cell.model.type === 'code')
    const outputs = cells.flatMap(cell => cell.model.outputs.toJSON())
    return {
        idle: panel.sessionContext.session?.kernel?.status === 'idle',
        ran: cells.every(cell => cell.model.executionCount !== null || cell.model.sharedModel.source.trim() === ''),
        errors: outputs.filter(output => output.output_type === 'error').map(output => output.evalue),
    }
}"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@contextmanager
def lab(folder, theme="JupyterLab Light"):
    """The address of a JupyterLab that serves `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, values in (SETTINGS | {"apputils-extension/themes": {"theme": theme}}).items():
        path = folder.parent / "settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    places = {"LAB_SETTINGS": "settings", "LAB_WORKSPACES": "workspaces", "_RUNTIME": "runtime"}
    environment = os.environ | {f"JUPYTER{name}_DIR": str(folder.parent / place) for name, place in places.items()}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser", f"--port={port}",
        "--ip=127.0.0.1", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}", "--ServerApp.port_retries=0",
    ]  # fmt: skip
    with open(folder.parent / "server.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=1)
                break
            except OSError:
                assert server.poll() is None, (folder.parent / "server.log").read_text()
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


@contextmanager
def opened(address, name):
    """A page with that notebook, its kernel ready."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1360, "height": 900})
        page.goto(f"{address}/lab/tree/{name}?reset", timeout=60_000)
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        page.wait_for_function(f"({STATE})().idle", timeout=60_000)
        yield page
        browser.close()


def run_all(page, seconds):
    page.evaluate(RUN_ALL)
    page.wait_for_timeout(500)
    page.wait_for_function(f"() => {{ const s = ({STATE})(); return s.idle && (s.ran || s.errors.length) }}",
                           timeout=1000 * seconds)  # fmt: skip
    assert page.evaluate(STATE)["errors"] == []


def screenshot(page, name):
    if folder := os.environ.get("MINIALIGN_SCREENSHOTS"):
        page.wait_for_timeout(600)
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_a_chapter_runs_and_time_can_be_scrubbed(folder, theme):
    name = "01_diffusion_as_a_policy.ipynb"
    shutil.copy(ROOT / "notebooks" / name, folder)
    with lab(folder, theme) as address, opened(address, name) as page:
        dark = theme.endswith("Dark")
        screenshot(page, f"top_{'dark' if dark else 'light'}")
        run_all(page, 180)
        pictures = page.locator(".jp-OutputArea-output img:not(.widget-html-content img)")
        texts = [picture.get_attribute("alt") for picture in pictures.all()]
        assert len(texts) >= 15 and all(text and len(text) > 10 for text in texts), texts
        slider = page.locator(".widget-hslider .noUi-handle, .widget-slider .noUi-handle").first
        slider.scroll_into_view_if_needed()
        picture = page.locator(".widget-html-content img").first
        assert picture.get_attribute("alt") == "Sixteen runs, t = 951"
        before = picture.get_attribute("src")
        slider.focus()
        for _ in range(20):
            page.keyboard.press("ArrowRight")
        page.wait_for_function("document.querySelector('.widget-html-content img').alt === 'Sixteen runs, t = 0'")
        assert picture.get_attribute("src") != before
        screenshot(page, f"scrub_{'dark' if dark else 'light'}")


def test_fifty_choices_can_be_clicked(folder):
    """The cells of chapter 50 around its labeller, with the chapter's first: drawings, labeller, best of a hundred."""
    chapter = nbformat.read(ROOT / "notebooks/50_reward_models_and_overoptimisation.ipynb", as_version=4)
    code = [cell for cell in chapter.cells if cell.cell_type == "code"]
    (at,) = (i for i, cell in enumerate(code) if "widget" in cell.metadata.get("tags", ()))
    cells = [code[0], *code[at - 1 : at + 3]]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=chapter.metadata), folder / "label.ipynb")
    with lab(folder) as address, opened(address, "label.ipynb") as page:
        run_all(page, 120)
        page.get_by_role("button", name="the left one").scroll_into_view_if_needed()
        for i in range(12):
            page.get_by_role("button", name=f"the {('left', 'right')[i % 2]} one").click()
            page.get_by_text(f"{i + 1} of 50 choices").wait_for(timeout=20_000)
        assert page.get_by_text("of your last 10 beforehand").count() == 1
        page.get_by_role("button", name="undo").click()
        page.get_by_text("11 of 50 choices").wait_for(timeout=20_000)
        page.get_by_alt_text("Best (top) and worst (bottom), 11 of your choices").wait_for(timeout=20_000)
        screenshot(page, "label")
