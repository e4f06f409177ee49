"""Finds dead links in a built site, and anything that a page would load from elsewhere.

python docs/check.py _docs/html
"""

from __future__ import annotations

import re
import sys
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


def main(folder: str) -> int:
    """Print the faults of the site in `folder`; the number of the exit is 1 if there are any."""
    site = Path(folder)
    if not (site / "index.html").is_file():
        print(f"no site here: {site} has no index.html", file=sys.stderr)
        return 1
    faults = faults_of(site)
    print(*faults, f"{len(list(site.rglob('*.html')))} pages, {len(faults)} faults", sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
