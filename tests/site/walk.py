"""Every page of the built site in headless Chromium, at both widths: what is wrong.

    .venv-site/bin/python tests/site/walk.py _site/html [--kinds] [--shots DIR] [PAGE ...]

`--kinds` looks at one page of each kind; `--shots` keeps a picture of each page.
"""

import argparse
import functools
import http.server
import sys
import threading
from pathlib import Path

from axe_playwright_python.base import AXE_SCRIPT
from playwright.sync_api import sync_playwright

SIZES = {1280: (900, "light"), 390: (844, "dark")}  # width -> height, colours
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-dev-shm-usage"]
AT_ONCE = 40  # pages of one browser
KINDS = (  # one page of each kind
    *("index", "start", "paths/reader", "paths/engineer", "paths/glossary", "search"),
    *("book/index", "book/1_theory", "1_theory/value", "2_methods/related"),
    *("5_worlds/emoji", "pages/equations", "pages/gallery", "pages/results"),
    *("pages/claims", "pages/speed", "pages/sd3_guide", "results/templates"),
    *("figures/fig05", "figures/table1", "figures/modes", "experiments/trade_off"),
    *("api/index", "api/theory.flow", "commands/index", "commands/finetune"),
    *("use/changelog", "paper/bibliography", "genindex"),
)
TYPESET = "() => window.MathJax && MathJax.startup ? MathJax.startup.promise : null"
WIDER = "() => document.scrollingElement.scrollWidth - window.innerWidth"
MISSING = """() => [...document.images]
    .filter(image => image.getClientRects().length && image.naturalWidth === 0)
    .map(image => image.getAttribute('src'))"""
CUT = """() => {
    const scroller = box => !box || /auto|scroll/.test(getComputedStyle(box).overflowX)
        ? box : scroller(box.parentElement);
    const cut = formula => {
        const place = formula.getBoundingClientRect();
        const box = scroller(formula);
        const left = box ? box.getBoundingClientRect().left - box.scrollLeft : 0;
        return place.left < left - 1 || (place.right > window.innerWidth && !box);
    };
    return [...document.querySelectorAll('mjx-container')].filter(cut)
        .map(formula => formula.textContent.slice(0, 40));
}"""
AXE = """without => axe.run({include: [['html']], exclude: without}, {
    preload: false,
    runOnly: ['wcag2a', 'wcag2aa'],
    resultTypes: ['violations'],
}).then(found => found.violations.map(fault => fault.id + ' at '
    + fault.nodes.slice(0, 3).map(node => node.target.join(' ')).join(', ')
    + (fault.nodes.length > 3 ? ` and ${fault.nodes.length - 3} more` : '')))"""


def chromium() -> str | None:
    "Where the machine has Chromium"
    import shutil

    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Quiet(http.server.SimpleHTTPRequestHandler):
    "Serves a folder and says nothing"

    def log_message(self, *arguments):
        pass


def serve(folder: Path) -> http.server.ThreadingHTTPServer:
    "A server of the site on a free port of this machine"
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def faults(tab, address: str, without: list) -> list:
    "What is wrong with one page, as it is shown in a tab"
    said = []
    hear = {
        "console": lambda m: m.type == "error" and said.append(f"console: {m.text}"),
        "pageerror": lambda error: said.append(f"script: {error}"),
        "requestfailed": lambda request: said.append(f"not loaded: {request.url}"),
    }
    for name, listener in hear.items():
        tab.on(name, listener)
    tab.goto(address, wait_until="load")
    tab.evaluate(TYPESET)
    tab.wait_for_timeout(60)
    said += [f"picture missing: {source}" for source in tab.evaluate(MISSING)]
    said += [f"equation cut: {text}" for text in tab.evaluate(CUT)]
    wider = tab.evaluate(WIDER)
    said += [f"{wider} pixels wider than the window"] * (wider > 0)
    tab.evaluate(AXE_SCRIPT)
    said += [f"axe: {fault}" for fault in tab.evaluate(AXE, without)]
    for name, listener in hear.items():
        tab.remove_listener(name, listener)
    return said


def walk(html: Path, names: list, without: list, shots: Path | None = None):
    "What is wrong with the pages at every width, said as it is found"
    server = serve(html)
    site = f"http://127.0.0.1:{server.server_port}"
    with sync_playwright() as driver:
        for width, (height, colours) in SIZES.items():
            look = dict(viewport=dict(width=width, height=height), color_scheme=colours)
            for first in range(0, len(names), AT_ONCE):
                browser = driver.chromium.launch(executable_path=chromium(), args=FLAGS)
                context = browser.new_context(**look)
                context.route("**", lambda route: own(route, site))
                tab = context.new_page()
                for name in names[first : first + AT_ONCE]:
                    for fault in faults(tab, f"{site}/{name}.html", without):
                        yield f"{name} at {width}: {fault}"
                    if shots:
                        file = shots / f"{name.replace('/', '_')}-{width}.png"
                        tab.screenshot(path=file, full_page=True)
                browser.close()
    server.shutdown()


def own(route, site: str):
    "Nothing is fetched from elsewhere; what tries to is a fault"
    if route.request.url.startswith((site, "data:", "blob:")):
        route.continue_()
    else:
        route.abort()


def pages(html: Path) -> list:
    "Names of all pages"
    found = [page.relative_to(html) for page in sorted(html.rglob("*.html"))]
    shown = [page for page in found if page.parts[0] != "_static"]
    return [page.with_suffix("").as_posix() for page in shown]


def main() -> int:
    "The exit status is 1 where something is wrong"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("html", type=Path)
    parser.add_argument("page", nargs="*")
    parser.add_argument("--kinds", action="store_true")
    parser.add_argument("--shots", type=Path)
    said = parser.parse_intermixed_args()
    names = said.page or (list(KINDS) if said.kinds else pages(said.html))
    if said.shots:
        said.shots.mkdir(parents=True, exist_ok=True)
    code = (
        [] if said.kinds else [["pre"]]
    )  # its colours are those of the pages of each kind
    count = 0
    for fault in walk(said.html, names, code, said.shots):
        print(fault, flush=True)
        count += 1
    print(f"{len(names)} pages, {len(SIZES)} widths: {count or 'no'} faults")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
