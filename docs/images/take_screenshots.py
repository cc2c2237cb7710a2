"""Take the pictures of this folder anew, from the real pages of a real run. The README shows the same run's table.

    python docs/images/take_screenshots.py              # trains the heart disease example in a temporary home
    python docs/images/take_screenshots.py RUN          # a run that is in FEDROUNDS_HOME already
    python docs/images/take_screenshots.py RUN FOLDER   # ... and puts the pictures elsewhere

Needs the `dev` extra and Chromium: the system's, or playwright's own (`playwright install chromium`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

FOLDER = Path(__file__).resolve().parent
EXAMPLE = FOLDER.parents[1] / "examples" / "heart_disease.yaml"
FEDROUNDS = Path(sys.executable).with_name("fedrounds")
SIZE = {"width": 1400, "height": 900}

# Both pages remember their looks in the browser; MLflow opens its assistant at the first visit.
LOOKS = """
localStorage.setItem('color-scheme', '"light"');
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
"""
ROUND_LINK = "a[href*='/runs/flow-run/']"
DRAWING_MS = 4000  # graphs and charts tell nobody when they are drawn


def main(run_id: str | None = None, folder: str | Path = FOLDER) -> None:
    with _home(temporary=run_id is None):
        data = _fedrounds("show", run_id) if run_id else _fedrounds("train", str(EXAMPLE))
        with _pages() as (prefect, mlflow), sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
            )
            context = browser.new_context(viewport=SIZE, color_scheme="light", locale="en-GB")
            context.add_init_script(LOOKS)
            page = context.new_page()
            page.goto(f"{prefect}/runs/flow-run/{data['prefect_flow_run_id']}", wait_until="domcontentloaded")
            prefect_run(page, Path(folder))
            prefect_round(page, Path(folder))
            page.goto(f"{mlflow}/#/runs/{data['mlflow_run_id']}", wait_until="domcontentloaded")
            mlflow_metrics(page, Path(folder))
            browser.close()


def prefect_run(page: Page, folder: Path) -> None:
    """The training's flow run: its rounds along the time, zoomed in until their names can be read, and as a list."""
    page.get_by_text("Subflow Runs", exact=True).click()
    page.locator(ROUND_LINK, has_text="round-").first.wait_for()
    page.wait_for_timeout(DRAWING_MS)
    _zoom(page, at=(0.01, 0.35), notches=7)
    _save(page, folder / "prefect-run.png")


def prefect_round(page: Page, folder: Path) -> None:
    """One round's flow run: its stages along the time, each a task."""
    page.locator(ROUND_LINK, has_text="round-").first.click()
    page.get_by_text("Parent Run").wait_for()
    page.get_by_text("Task Runs", exact=True).click()
    page.wait_for_timeout(DRAWING_MS)
    _zoom(page, at=(0.5, 0.47), notches=1)
    _save(page, folder / "prefect-round.png")


def mlflow_metrics(page: Page, folder: Path) -> None:
    """The run's charts, one section for each group of metrics; those that are flat lines here are folded."""
    page.set_viewport_size({"width": 1400, "height": 1260})
    page.get_by_role("button", name="Toggle sidebar").click()
    page.get_by_text("Model metrics").first.click()
    sections = page.locator(".du-bois-light-collapse-header")
    sections.first.wait_for()
    for name in ("baseline", "best", "clients", "communication"):
        sections.filter(has_text=name).first.click()
    page.mouse.move(0, 0)
    page.wait_for_timeout(DRAWING_MS)
    _save(page, folder / "mlflow-metrics.png")


def _zoom(page: Page, at: tuple[float, float], notches: int) -> None:
    box = page.locator("canvas").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + at[0] * box["width"], box["y"] + at[1] * box["height"])
    for _ in range(notches):
        page.mouse.wheel(0, -120)
        page.wait_for_timeout(100)
    page.mouse.move(0, 0)
    page.wait_for_timeout(DRAWING_MS)


def _save(page: Page, path: Path) -> None:
    page.screenshot(path=path)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def _fedrounds(*arguments: str) -> dict[str, Any]:
    answer = subprocess.run([FEDROUNDS, *arguments, "--json"], check=True, stdout=subprocess.PIPE)
    data: dict[str, Any] = json.loads(answer.stdout)["data"]
    return data


@contextlib.contextmanager
def _home(*, temporary: bool) -> Iterator[None]:
    if not temporary:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="fedrounds-screenshots-", ignore_cleanup_errors=True) as folder:
        os.environ["FEDROUNDS_HOME"] = folder
        yield


@contextlib.contextmanager
def _pages() -> Iterator[tuple[str, str]]:
    """The addresses of Prefect and MLflow, served by `fedrounds up` meanwhile."""
    process = subprocess.Popen(
        [FEDROUNDS, "up"], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    try:
        addresses: dict[str, str] = {}
        assert process.stdout is not None
        for line in process.stdout:
            name, _, rest = line.partition(" ")
            addresses[name] = rest.strip()
            if {"Prefect", "MLflow"} <= addresses.keys():
                break
        yield addresses["Prefect"], addresses["MLflow"]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


if __name__ == "__main__":
    main(*sys.argv[1:])
