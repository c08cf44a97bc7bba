"""The report in a real browser: no error, nothing blocked, no sideways scroll on a desk or a phone."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest

from pellucid.glass.report import render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--allow-file-access-from-files",
]  # fmt: skip
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH"),
]

WATCH = """
window.faults = [];
addEventListener("error", (event) => faults.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => faults.push(event.violatedDirective));
for (const name of ["error", "warn"]) console[name] = (...words) => faults.push(words.join(" "));
addEventListener("load", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  for (const select of document.querySelectorAll(".chooser select")) {
    select.selectedIndex = 1;
    select.dispatchEvent(new Event("change"));
  }
  for (const button of document.querySelectorAll("thead button")) button.click();
  // Reports of a blocked script arrive after the page has loaded.
  setTimeout(() => {
    const page = document.documentElement;
    const sorted = document.querySelectorAll("[aria-sort]").length;
    const found = { faults, sorted, wide: page.scrollWidth, view: page.clientWidth };
    parent.postMessage(JSON.stringify(found), "*");
  }, 500);
});
"""
# A headless window is never narrower than 500 px; a frame is as narrow as it is told to be.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><body><script>
addEventListener("message", (event) => { document.querySelector("output").append(event.data); });
</script><output></output><iframe src="report.html" style="width:{width}px;height:800px;border:0"></iframe>"""


def watched(html: str) -> str:
    """A copy for the test alone: a watching script before all others, allowed by the page's policy."""
    digest = base64.b64encode(hashlib.sha256(WATCH.encode()).digest()).decode()
    html = html.replace("script-src ", f"script-src &#x27;sha256-{digest}&#x27; ", 1)
    return html.replace("</head>", f"<script>{WATCH}</script></head>", 1)


def look(html: str, width: int, folder: Path) -> dict:
    """What the watching script saw in a view of ``width`` px."""
    (folder / "report.html").write_text(watched(html), encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.replace("{width}", str(width)), encoding="utf-8")
    command = [
        str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900",
        "--virtual-time-budget=10000", "--dump-dom", (folder / "frame.html").as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"<output>(.+?)</output>", dom)
    assert found, "the report did not load"
    return json.loads(unescape(found[1]))


CASES = {
    "two models": {},
    "without labels": {"unlabelled": "simdino", "state": "collapsing"},
    "without labels at all": {"unlabelled": "mae", "names": [], "models": 1},
    "text": {"task": "next", "depth": 6, "heads": 6},
    "one layer": {"depth": 1, "models": 1, "rising": ()},
    "deep, long names": {
        "depth": 12,
        "heads": 12,
        "grid": 14,
        "side": 64,
        "names": [f"Prunus_domestica_subspecies_{i}_from_the_northern_orchard" for i in range(25)],
    },
}


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("case", CASES)
def test_fits_and_is_silent(make_bundle: Callable[..., dict], tmp_path: Path, case: str, width: int) -> None:
    found = look(render(make_bundle(**CASES[case])), width, tmp_path)
    assert found["faults"] == []
    assert found["view"] == width
    assert found["wide"] <= width
    assert found["sorted"] > 0


def test_the_policy_stops_a_foreign_script(make_bundle: Callable[..., dict], tmp_path: Path) -> None:
    html = render(make_bundle()).replace("</main>", "<script>document.title = 'evil'</script></main>", 1)
    assert any("script-src" in fault for fault in look(html, 1280, tmp_path)["faults"])


def test_prints_every_section(make_bundle: Callable[..., dict], tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(render(make_bundle()), encoding="utf-8")
    pdf = tmp_path / "report.pdf"
    command = [
        str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={pdf}",
        (tmp_path / "report.html").as_uri(),
    ]  # fmt: skip
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    assert pdf.read_bytes().startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes())) >= 6
