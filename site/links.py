"Every link, picture and anchor of a built site leads somewhere"

import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SOURCES = {"a": "href", "img": "src", "script": "src", "link": "href", "source": "src"}


class Found(HTMLParser):
    "What a page links to, and the anchors that it has"

    def __init__(self):
        super().__init__()
        self.targets, self.anchors, self.without_alt = [], set(), 0

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors.add(values.get("id") or values.get("name"))
        target = values.get(SOURCES.get(tag, ""))
        if target:
            self.targets.append((tag, target))
        self.without_alt += tag == "img" and "alt" not in values


@cache
def read(page: Path) -> Found:
    "A page, read"
    found = Found()
    found.feed(page.read_text(encoding="utf8"))
    return found


def trouble(page: Path, tag: str, target: str, html: Path) -> str:
    "What is wrong with one link; '' where it leads somewhere"
    parts = urlsplit(target)
    if parts.scheme in ("http", "https"):
        return (
            ""
            if tag in ("a", "link") and "canonical" not in target
            else f"fetches {target}"
        )
    if parts.scheme:
        return "" if parts.scheme in ("mailto", "data") else f"odd link {target}"
    path = unquote(parts.path)
    there = (html / path.lstrip("/")) if path.startswith("/") else (page.parent / path)
    there = there.resolve() if path else page
    if there.is_dir():
        there = there / "index.html"
    if not there.is_file():
        return f"dead link {target}"
    anchor = unquote(parts.fragment)
    known = there.suffix != ".html" or anchor in ("", "top", *read(there).anchors)
    return "" if known else f"no such anchor {target}"


def problems(html: Path) -> list:
    "What is wrong on a built site, a line each"
    html = html.resolve()
    said = []
    for page in sorted(html.rglob("*.html")):
        name = page.relative_to(html)
        if name.parts[0] == "_static":  # parts of the theme, no pages
            continue
        found = read(page)
        faults = [trouble(page, tag, target, html) for tag, target in found.targets]
        said += [f"{name}: {fault}" for fault in dict.fromkeys(faults) if fault]
        said += [f"{name}: {found.without_alt} images without alt"] * bool(
            found.without_alt
        )
    return said


if __name__ == "__main__":
    found = problems(Path(sys.argv[1]))
    print("\n".join(found) or "every link leads somewhere")
    sys.exit(bool(found))
