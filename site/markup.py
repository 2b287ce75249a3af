"Markdown made from data: tables and menus"


def table(
    head: tuple,
    rows: list,  # Of cells, one for each name of the head
) -> str:
    "A table; '' without rows"
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def menu(
    pages: list,  # As they are called from the page that lists them
) -> str:
    "What Sphinx makes its menus from; the page itself does not show it"
    listed = "\n".join(pages)
    return f"```{{toctree}}\n:hidden:\n:maxdepth: 1\n\n{listed}\n```\n"


def safe(text: str) -> str:
    "Words that hold no sign of Markdown, for a cell of a table"
    for sign in "|*<[]":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
