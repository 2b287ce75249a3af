"What prose gets on a page: names of the package, papers and figures as links"

import os
import re

from places import CONTENTS, ROOT
from reference import exported

MENTIONS = CONTENTS["first_mentions"]
NAMES = "|".join(sorted(map(re.escape, MENTIONS), key=len, reverse=True))
PART = re.compile(
    r"(?P<fence>^(?P<marks>```+|~~~+).*?^(?P=marks)[ \t]*$)"
    r"|(?P<heading>^(?:#|>)[^\n]*$)"
    r"|(?P<math>\$\$.*?\$\$|\$[^$\n]+\$|\{[\w:]+\}`[^`]*`|<[^>\n]+>)"
    r"|(?P<link>!?\[(?:[^\[\]]|\[[^\]]*\])*\]\((?P<target>[^)\s]+)\))"
    r"|(?P<code>`(?P<name>[^`\n]+)`)"
    r"|(?P<figure>(?<![\w/])figures/(?P<drawn>[\w-]+)\.png)"
    rf"|(?P<paper>(?<![\w-])(?:{NAMES})(?![\w’'-]|\.\d))",
    re.M | re.S,
)


def eprints() -> dict:
    "arXiv number -> key of the bibliography"
    text = (ROOT / "site/references.bib").read_text(encoding="utf8")
    entries = re.split(r"^@\w+\{", text, flags=re.M)[1:]
    numbered = [(re.search(r"eprint = \{([\d.]+)\}", entry), entry) for entry in entries]
    return {found[1]: entry.partition(",")[0] for found, entry in numbered if found}


EPRINTS = eprints()


class Prose:
    "The prose of one page; what was linked once is not linked again"

    def __init__(
        self,
        page: str,  # E.g. 1_theory/flow
    ):
        self.page = page
        self.linked = set()

    def __call__(self, text: str) -> str:
        "The text with links"
        return PART.sub(self.part, text)

    def part(self, match) -> str:
        "One part of the text"
        kind = match.lastgroup
        for name in ("code", "figure", "paper", "link"):
            if match[name] is not None:
                return getattr(self, name)(match)
        return match[0] if kind else ""

    def first(self, thing: str) -> bool:
        "Whether it was not yet linked on this page"
        new = thing not in self.linked
        self.linked.add(thing)
        return new

    def code(self, match) -> str:
        "A name of the package, linked to its reference"
        name = match["name"].removesuffix("()")
        home = exported().get(name)
        telling = "_" in name or name.lower() != name
        if not home or not telling or not self.first(name):
            return match[0]
        return f"{{py:obj}}`{match['name']} <vggflow.{home}.{name}>`"

    def figure(self, match) -> str:
        "A figure that is named, linked to its page"
        name = match["drawn"]
        if not (ROOT / "figures" / f"{name}.json").is_file():
            return match[0]
        near = os.path.relpath(f"figures/{name}.md", os.path.dirname(self.page) or ".")
        return f"[figures/{name}.png]({near})"

    def paper(self, match) -> str:
        "A method or a measure, with its paper"
        key = MENTIONS[match[0]]
        return f"{match[0]} {{cite}}`{key}`" if self.first(key) else match[0]

    def link(self, match) -> str:
        "A link to a paper that the bibliography has"
        key = EPRINTS.get(match["target"].rpartition("/")[2])
        return f"{match[0]} {{cite}}`{key}`" if key and self.first(key) else match[0]
