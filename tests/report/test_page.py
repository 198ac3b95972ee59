"""The page in a browser without a window: what it shows, and what clicks and searches do."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from stofm.report.page import Column, Page, Table, write_page

if TYPE_CHECKING:
    from pathlib import Path

#: Puts what it finds out into the page, where ``--dump-dom`` prints it.
PROBE = """
<script>
(async () => {
  const wait = (ms) => new Promise((done) => setTimeout(done, ms));
  const body = document.body, out = {};
  const map = document.getElementById("map"), umap = document.getElementById("umap");
  // Position, colour and opacity of all points, as drawn.
  const points = (gd) => gd.data.flatMap(({ x, y, marker }) =>
    Array.from(x, (one, k) => [one, y[k], marker.color, marker.opacity]));
  const mouse = (gd, [x, y], type) => {
    const { xaxis, yaxis } = gd._fullLayout, box = gd.getBoundingClientRect();
    const at = { clientX: box.left + xaxis.l2p(x) + xaxis._offset,
                 clientY: box.top + yaxis.l2p(y) + yaxis._offset };
    gd.querySelector(".nsewdrag").dispatchEvent(new MouseEvent(type, { bubbles: true, cancelable: true, ...at }));
  };
  for (let k = 0; k < 200 && !body.dataset.state; k++) await wait(50);
  out.state = body.dataset.state;
  out.legend = [...document.querySelectorAll("#legend button")].map((row) => row.innerText.trim().split(/\\s+/));
  out.first = [points(map), points(umap)];
  document.querySelector("#legend button:nth-child(2)").click();
  await wait(300);
  out.clicked = [body.dataset.highlighted, points(map), points(umap), document.getElementById("state").innerText];
  document.getElementById("clear").click();
  await wait(300);
  out.cleared = [points(map), points(umap)];
  mouse(map, CELL, "mousemove");
  await wait(400);
  out.hovered = document.getElementById("cell").innerText;
  out.rings = [...document.querySelectorAll(".ring")].map((ring) => ring.style.display);
  for (const type of ["mousedown", "mouseup", "click"]) mouse(map, CELL, type);
  await wait(600);
  out.point = [body.dataset.highlighted, points(umap)];
  const gene = document.getElementById("gene");
  gene.value = "gfap";
  gene.dispatchEvent(new Event("input"));
  await wait(400);
  out.gene = [body.dataset.color, points(map), points(umap), document.querySelector("#scale").innerText];
  gene.value = "NOSUCH";
  gene.dispatchEvent(new Event("input"));
  gene.dispatchEvent(new Event("change"));
  out.unknown = document.getElementById("state").innerText;
  document.querySelector("[data-gene=MBP]").click();
  await wait(400);
  out.marker = body.dataset.color;
  out.canvases = document.querySelectorAll("canvas").length;
  out.outside = performance.getEntriesByType("resource").map((one) => one.name);
  out.errors = window.errors;
  const pre = document.createElement("pre");
  pre.id = "found";
  pre.textContent = JSON.stringify(out);
  body.append(pre);
})();
</script>
"""
LISTEN = """<script>
window.errors = [];
window.onerror = (text) => { window.errors.push(String(text)); };
window.onunhandledrejection = (event) => { window.errors.push(String(event.reason)); };
console.error = (...text) => { window.errors.push(text.join(" ")); };
</script>"""


def browse(file: Path, folder: Path, cell: list[float]) -> dict[str, Any]:
    """Open a page, let the script probe it and point at a cell, and return what it found."""
    browsers = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    browser = next(filter(None, browsers), None)
    if browser is None:
        pytest.skip("needs Chromium (Debian: apt install chromium)")
    text = file.read_text(encoding="utf-8")
    text = text.replace("<head>", f"<head>{LISTEN}", 1).replace(
        "</body>", f"{PROBE.replace('CELL', str(cell))}</body>"
    )
    probed = folder / "probed.html"
    probed.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [
            browser, "--headless=new", "--no-sandbox", "--disable-dev-shm-usage",
            f"--user-data-dir={folder / 'profile'}", "--use-angle=swiftshader",
            "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist", "--window-size=1400,1000",
            "--virtual-time-budget=30000", "--dump-dom", probed.as_uri(),
        ],
        capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
    )  # fmt: skip
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.fixture
def page() -> Page:
    rng = np.random.default_rng(3)
    n = 61
    xy = np.stack(np.divmod(np.arange(n), 9), axis=1) * [20.0, 11.0]
    kinds = np.arange(n) % 3
    return Page(
        title="A <b>slice</b>",
        subtitle="61 cells",
        what="cells",
        names=[f"cell{i}" for i in range(n)],
        xy=xy,
        columns=[
            Column("stofm_domain", "domain", np.where(kinds == 2, -1, kinds), ["0", "</script>"],
                   ["#ff0000", "#00ff00"]),
            Column("score", "score", rng.random(n), low=0.1, high=0.8),
        ],
        genes={"GFAP": (np.arange(n) % 7).astype(np.float32), "MBP": rng.random(n, np.float32)},
        colorscale=[(k / 32, f"#{8 * k - (k == 32):02x}{0:04x}") for k in range(33)],
        none_color="#d9d9d9",
        unit="log-normalised",
        umap=rng.normal(size=(n, 2)),
        tables=[Table("Markers", ("group", "genes"), [("0", "genes:MBP GFAP"), ("1", 3.5)])],
        bar=(20.0, "20 µm"),
    )  # fmt: skip


def looks(points: list[list[Any]], xy: np.ndarray, column: int = 2) -> list[Any]:
    """Colour or opacity of each cell, found by its position."""
    drawn = {(round(x, 3), round(y, 3)): look for x, y, *look in points}
    return [drawn[round(float(x), 3), round(float(y), 3)][column - 2] for x, y in xy]


def test_the_page_in_a_browser(page: Page, tmp_path: Path) -> None:
    plotly = pytest.importorskip("plotly.offline", reason="needs plotly (stofm[report])")
    file = tmp_path / "page.html"
    file.write_text(write_page(page, plotly.get_plotlyjs()), encoding="utf-8")
    found = browse(file, tmp_path, page.xy[3].tolist())
    planes = [page.xy, page.umap.astype(np.float32)]
    assert found["errors"] == []
    assert found["state"] == "ready"
    assert found["outside"] == []
    assert found["canvases"] > 0
    assert found["legend"] == [["0", "21"], ["</script>", "20"]]
    shades = [["#ff0000", "#00ff00", "#d9d9d9"][k % 3] for k in range(61)]
    for points, xy in zip(found["first"], planes, strict=True):
        assert looks(points, xy) == shades
    # A click on a domain shows its cells in both plots, and "Show all" all of them again.
    highlighted, on_map, on_umap, state = found["clicked"]
    assert (highlighted, state) == ("20", "</script>: 20 cells")
    for points, xy in zip((on_map, on_umap), planes, strict=True):
        assert looks(points, xy) == shades
        opacity = looks(points, xy, 3)
        assert [k for k in range(61) if opacity[k] == 1] == list(range(1, 61, 3))
        assert all(point[3] == 1 for point in points[-20:])
    assert {point[3] for points in found["cleared"] for point in points} == {1}
    # A cell under the pointer is described and ringed in both; a click on it shows its domain.
    assert "cell3" in found["hovered"]
    assert "domain: 0" in found["hovered"]
    assert found["rings"] == ["block", "block"]
    highlighted, on_umap = found["point"]
    assert highlighted == "21"
    assert [look == 1 for look in looks(on_umap, planes[1], 3)] == [k % 3 == 0 for k in range(61)]
    name, on_map, on_umap, legend = found["gene"]
    assert name == "GFAP"
    for points, xy in zip((on_map, on_umap), planes, strict=True):
        grey = np.array([int(color[1:3], 16) for color in looks(points, xy)]) / 255
        np.testing.assert_allclose(grey, np.minimum(np.arange(61) % 7 / 6, 1), atol=0.04)
    assert "log-normalised" in legend
    assert found["unknown"] == "No gene NOSUCH in this page, which has 2."
    assert found["marker"] == "MBP"


def test_what_users_write_is_no_html(page: Page) -> None:
    text = write_page(page, "")
    assert "<b>slice</b>" not in text
    assert "&lt;b&gt;slice&lt;/b&gt;" in text
    assert text.count("</script>") == 3
