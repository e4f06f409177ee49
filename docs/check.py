"""Finds dead links in a built site, anything that a page would load from elsewhere, and what does not fit on the screen.

python docs/check.py _docs/html

Whether all fits is measured in Chromium without a window, on a desk and on a phone, where there is one (`CHROMIUM` names it);
else lines of code are counted, and that is said.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# what a browser fetches by itself; a plain <a href> is only a link
LOADS = {
    "script": "src",
    "img": "src",
    "source": "src",
    "iframe": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
    "object": "data",
    "link": "href",
    "image": "href",
    "use": "href",
}
ELSEWHERE = re.compile(r"(?:https?:)?//[\w.-]+", re.I)
IN_STYLE = re.compile(r"(?:url\(|@import)\s*['\"]?\s*((?:https?:)?//[^'\")\s]+)", re.I)
IN_SCRIPT = re.compile(
    r"(?:import|importScripts|fetch)\s*\(\s*['\"`]((?:https?:)?//[^'\"`]+)|"
    r"\bfrom\s*['\"](https?://[^'\"]+)|\.(?:src|href)\s*=\s*['\"`]((?:https?:)?//[^'\"`]+)"
)
NOT_LOADED = {
    "canonical",
    "next",
    "prev",
    "search",
    "index",
    "author",
    "license",
    "alternate",
    "up",
    "contents",
}


class Page(HTMLParser):
    """The anchors of a page, its links, and what it loads."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = {""}
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)
        self.loads += IN_STYLE.findall(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in LOADS and (target := given.get(LOADS[tag])):
            idle = tag == "link" and set(given.get("rel", "").split()) <= NOT_LOADED
            (self.links if idle else self.loads).append(target)
        self.loads += [part.split()[0] for part in given.get("srcset", "").split(",") if part.strip()]


def faults_of(site: Path) -> list[str]:
    """Every fault of a site, as `page: what`: dead links and anchors, ways out, loads from elsewhere."""
    site = site.resolve()
    # the theme leaves templates in _static
    found = [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in found}
    faults = []
    for path, page in pages.items():
        here = path.relative_to(site).as_posix()
        faults += [f"{here}: loads from elsewhere: {load}" for load in page.loads if ELSEWHERE.match(load)]
        targets = [
            target
            for target in page.links + page.loads
            if not re.match(r"[a-z][a-z0-9+.-]*:|//", target, re.I)
        ]
        faults += [
            f"{here}: {what}"
            for target in dict.fromkeys(targets)
            if (what := _dead(target, path, site, pages))
        ]
    for path in sorted(site.rglob("*")):
        pattern = {".css": IN_STYLE, ".js": IN_SCRIPT, ".mjs": IN_SCRIPT}.get(path.suffix)
        for match in pattern.finditer(path.read_text(encoding="utf-8", errors="replace")) if pattern else ():
            found = next(group for group in match.groups() if group)
            faults.append(f"{path.relative_to(site).as_posix()}: loads from elsewhere: {found}")
    return faults


def _dead(target: str, path: Path, site: Path, pages: dict[Path, Page]) -> str:
    """Why a local link leads nowhere, or nothing."""
    parts = urlsplit(target)
    place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    place = place / "index.html" if place.is_dir() else place
    if not place.is_relative_to(site):
        return f"leads out of the site: {target}"
    if not place.is_file():
        return f"dead link: {target}"
    if place in pages and unquote(parts.fragment) not in pages[place].ids:
        return f"no such anchor: {target}"
    return ""


# ---------------------------------------------------------------- what fits

DESK, PHONE, TALL, LINE = 1400, 390, 20_000, 100
# loads the pages one by one into a frame of one width and writes down what is wider than its box; a table may
# scroll in its own box while its first column stays
HARNESS = """<!doctype html><meta charset="utf-8"><iframe id="f" style="border:0;width:WIDTHpx;height:900px"></iframe><pre id="found"></pre>
<script>
const pages = PAGES, frame = document.getElementById("f"), found = [];
function measure(page) {
  const d = frame.contentDocument, root = d.documentElement, main = d.querySelector("article") || d.body;
  if (root.scrollWidth > WIDTH + 1) found.push([page, "the page is " + root.scrollWidth + " px wide"]);
  if (WIDTH > 1000 && root.scrollHeight > TALL) found.push([page, "is " + root.scrollHeight + " px long"]);
  for (const e of main.querySelectorAll("mjx-container svg"))
    if (!e.closest("table") && e.getBoundingClientRect().right > main.getBoundingClientRect().right + 1) found.push([page, "a formula is cut"]);
  for (const e of main.querySelectorAll(":not(.math, .math *)")) {
    const hides = ["auto", "scroll", "hidden"].includes(frame.contentWindow.getComputedStyle(e).overflowX);
    if (!hides || e.scrollWidth <= e.clientWidth + 2 || e.clientWidth === 0 || e.closest("[hidden], details:not([open])")) continue;
    const cell = e.matches("table") || e.children.length && e.querySelector("table") ? e.querySelector("td:first-child, th:first-child") : null;
    if (cell && frame.contentWindow.getComputedStyle(cell).position === "sticky") continue;
    found.push([page, e.tagName.toLowerCase() + " of " + e.scrollWidth + " px in " + e.clientWidth + ": " + e.textContent.trim().slice(0, 60)]);
  }
}
async function all() {
  for (const page of pages) {
    await new Promise(done => { frame.onload = done; frame.src = page; });
    const math = frame.contentWindow.MathJax;
    if (math && math.startup) await math.startup.promise;
    measure(page);
  }
  document.getElementById("found").textContent = JSON.stringify(found);
  document.title = "done";
}
all();
</script>"""


def browser() -> str | None:
    """A Chromium, or None."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def measured(site: Path, chromium: str, width: int, seconds: int = 900) -> list[str]:
    """What does not fit on a screen of this width, as `page: what`."""
    pages = [path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]
    text = HARNESS.replace("PAGES", json.dumps(pages)).replace("WIDTH", str(width)).replace("TALL", str(TALL))
    harness = site / "_measure.html"
    harness.write_text(text, encoding="utf-8")
    with tempfile.TemporaryDirectory() as home:
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", f"--user-data-dir={home}",
                   f"--window-size={width + 40},1000", f"--timeout={1000 * seconds}", "--virtual-time-budget=100000000", "--dump-dom"]
        try:
            done = subprocess.run([*command, harness.resolve().as_uri()], capture_output=True, text=True, timeout=seconds)
        finally:
            harness.unlink()
    said = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.S)
    if not said:
        return [f"index.html: Chromium did not come to an end: {done.stderr.strip()[-200:]}"]
    return [f"{page}: at {width} px {unescape(what)}" for page, what in json.loads(unescape(said[1]))]


def long_lines(site: Path) -> list[str]:
    """Lines of code that are shown and longer than a column, as `page: what`."""
    found = []
    for path in sorted(site.rglob("*.html")):
        shown = re.sub(r"<details.*?</details>", "", path.read_text(encoding="utf-8"), flags=re.S)
        for block in re.findall(r'<div class="highlight[^"]*"><pre>(.*?)</pre>', shown, re.S):
            lines = unescape(re.sub(r"<[^>]+>", "", block)).splitlines()
            found += [f"{path.relative_to(site).as_posix()}: a line of {len(line)} letters: {line[:60]}" for line in lines if len(line) > LINE]
    return found


def does_not_fit(site: Path) -> list[str]:
    if chromium := browser():
        return [fault for width in (DESK, PHONE) for fault in measured(site, chromium, width)]
    print("no Chromium: widths and lengths of pages were not measured, lines of code were counted")
    return long_lines(site)


def main(folder: str) -> int:
    """Print the faults of the site in `folder`; the number of the exit is 1 if there are any."""
    site = Path(folder)
    if not (site / "index.html").is_file():
        print(f"no site here: {site} has no index.html", file=sys.stderr)
        return 1
    faults = faults_of(site) + does_not_fit(site)
    print(*faults, f"{len(list(site.rglob('*.html')))} pages, {len(faults)} faults", sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
