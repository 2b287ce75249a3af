"The reference: every exported name from its source, every command from its signature"

import ast
import importlib
import re
import sys
from copy import deepcopy
from functools import cache
from typing import get_args

from markup import menu, safe, table
from places import FLOORS, ROOT
from words import title

sys.path.insert(0, str(ROOT))
from vggflow.commands.options import comment_of, parameters_of, parsed_module  # noqa: E402

PACKAGE = ROOT / "vggflow"
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@cache
def modules() -> tuple:
    "Modules that export something, in the order of the book: theory.flow, ..."
    order = [floor["folder"].partition("_")[2] or floor["folder"] for floor in FLOORS]
    paths = [p for p in PACKAGE.rglob("*.py") if not p.stem.startswith("_")]
    names = [".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in paths]
    floors = [*order, "cli", "train"]
    names.sort(key=lambda name: (floors.index(name.partition(".")[0]), name))
    return tuple(name for name in names if exports(name))


@cache
def exports(module: str) -> tuple:
    "What a module says that it exports"
    tree = parsed_module(module)[0]
    said = [n.value for n in tree.body if assigned(n) == "__all__"]
    return tuple(ast.literal_eval(said[0])) if said else ()


@cache
def exported() -> dict:
    "Function or class -> its module, of every name that only one module exports"
    homes = {}
    for module in modules():
        for node in parsed_module(module)[0].body:
            if isinstance(node, Definition) and node.name in exports(module):
                homes.setdefault(node.name, []).append(module)
    return {name: found[0] for name, found in homes.items() if len(found) == 1}


def single(node: ast.AST) -> list:
    "A statement that assigns to several names, as one for each"
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    if not isinstance(target, ast.Tuple) or not isinstance(node.value, ast.Tuple):
        return [node]
    pairs = zip(target.elts, node.value.elts)
    made = [ast.Assign([name], value) for name, value in pairs]
    return [ast.copy_location(part, node) for part in made]


def assigned(node: ast.AST) -> str:
    "The name to which a statement assigns, '' where it does not"
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return targets[0].id if isinstance(targets[0], ast.Name) else ""


# ----------------------------------------------------------------------------- markdown


def code_text(node: ast.AST | None) -> str:
    "An expression of the source as code"
    if node is None:
        return ""
    return "`" + ast.unparse(node).replace("|", "\\|") + "`"


def directive(kind: str, signature: str, body: str, ticks: int = 4) -> str:
    "A directive of Sphinx's Python domain"
    return f"{'`' * ticks}{{py:{kind}}} {signature}\n{body}\n{'`' * ticks}"


# ----------------------------------------------------------------------------- names


def plain_signature(node: Definition) -> str:
    "Name and parameters with their defaults; the types stand in the table"
    arguments = arguments_of(node)
    if arguments is None:
        return node.name
    text = ast.unparse(Untyped().visit(deepcopy(arguments)))
    return f"{node.name}({re.sub(r'^(self|cls)(, )?', '', text)})"


class Untyped(ast.NodeTransformer):
    "Takes the types off parameters"

    def visit_arg(self, node):
        node.annotation = None
        return node


def constructor(node: ast.ClassDef) -> ast.AST:
    "What makes an object of a class: its __init__, or its fields"
    made = [n for n in node.body if getattr(n, "name", "") == "__init__"]
    return made[0] if made else node


def arguments_of(node: Definition) -> ast.arguments | None:
    "Parameters of a function or of a class with an __init__"
    maker = constructor(node) if isinstance(node, ast.ClassDef) else node
    return None if isinstance(maker, ast.ClassDef) else maker.args


def parameter_rows(node: Definition, comments: dict) -> list:
    "A row for each parameter: name, type, default, what its comment says"
    maker = constructor(node) if isinstance(node, ast.ClassDef) else node
    rows = []
    for name, annotation, default, (first, last), _ in parameters_of(maker):
        if name in ("self", "cls") or name.startswith("_"):
            continue
        said = safe(comment_of(comments, first, last))
        rows.append([f"`{name}`", code_text(annotation), code_text(default), said])
    return rows


def returned(node: Definition, comments: dict) -> str:
    "What a function returns"
    if isinstance(node, ast.ClassDef) or node.returns is None:
        return ""
    first = node.returns.lineno
    said = comment_of(comments, first, node.returns.end_lineno)
    if first == node.body[0].lineno:
        said = ""
    return f"*Returns* {code_text(node.returns)}{': ' + said if said else ''}"


def source_link(name: str, page: str) -> str:
    "A link to the cell of the chapter that exports a name"
    return f'<a class="source" href="../{page}.html#source-{name}">source</a>'


def body_of(node: Definition, comments: dict, page: str, named: str = "") -> str:
    "What the reference says below a signature"
    rows = parameter_rows(node, comments)
    head = ("parameter", "type", "default", "meaning")
    used = [k for k in range(4) if any(row[k] for row in rows)]
    rows = [[row[k] for k in used] for row in rows]
    says = (ast.get_docstring(node) or "").strip()
    link = source_link(named or node.name, page)
    parts = [f"{link} {says}", table(tuple(head[k] for k in used), rows)]
    parts.append(returned(node, comments))
    return "\n\n".join(part for part in parts if part)


def methods(node: ast.ClassDef, comments: dict, page: str) -> str:
    "The methods of a class that are for its users"
    shown = []
    for part in node.body:
        if not isinstance(part, ast.FunctionDef) or part.name.startswith("_"):
            continue
        marks = {ast.unparse(mark).split(".")[-1] for mark in part.decorator_list}
        kind = "property" if marks & {"property", "cached_property"} else "method"
        name = part.name if kind == "property" else plain_signature(part)
        if "setter" not in marks:
            body = body_of(part, comments, page, node.name)
            shown.append(directive(kind, name, body))
    return "\n\n".join(shown)


def entry(node: ast.AST, comments: dict, page: str) -> str:
    "One exported name"
    if isinstance(node, ast.ClassDef):
        body = body_of(node, comments, page)
        inside = methods(node, comments, page)
        return directive("class", plain_signature(node), f"{body}\n\n{inside}", 5)
    if isinstance(node, Definition):
        return directive("function", plain_signature(node), body_of(node, comments, page))
    value = ast.unparse(node.value) if node.value else ""
    said = comment_of(comments, node.lineno, node.lineno)
    short = f"`{value}`" if len(value) < 72 and "`" not in value else ""
    body = " · ".join(part for part in (short, safe(said)) if part)
    return directive("data", assigned(node), body)


def page_of_module(module: str) -> str:
    "The chapter that exports a module, e.g. 1_theory/flow"
    text = PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text()
    return re.search(r"nbs/(\S+)\.ipynb", text)[1]


def module_page(module: str) -> str:
    "The reference of one module"
    tree, comments = parsed_module(module)
    page = page_of_module(module)
    names = exports(module)
    found = {}  # where a name is added to, its first statement counts
    for node in [part for statement in tree.body for part in single(statement)]:
        found.setdefault(getattr(node, "name", "") or assigned(node), node)
    nodes = [node for name, node in found.items() if name in names]
    head = f"# {module}\n\n> {ast.get_docstring(tree) or ''}\n\n"
    head += f"```{{py:module}} vggflow.{module}\n```\n\n"
    head += f"Exported by [{title(page)}](../{page}.ipynb), which derives and tests it.\n"
    return "\n\n".join([head, *(entry(node, comments, page) for node in nodes)]) + "\n"


def module_list() -> str:
    "All modules, floor by floor"
    text = (ROOT / "site/pages/api.md").read_text(encoding="utf8")
    floors = dict.fromkeys(name.partition(".")[0] for name in modules())
    for floor in floors:
        inside = [name for name in modules() if name.partition(".")[0] == floor]
        rows = [[f"[{name}]({name}.md)", summary(name)] for name in inside]
        text += f"\n## vggflow.{floor}\n\n{table(('module', 'what it has'), rows)}\n"
    return f"{text}\n{menu(modules())}"


def summary(module: str) -> str:
    "The first line of a module"
    return safe(ast.get_docstring(parsed_module(module)[0]) or "")


# ----------------------------------------------------------------------------- commands


def option_row(parameter) -> list:
    "An option as --help says it: spelling, type, default, meaning"
    kind, about = get_args(parameter.annotation)[:2]
    spelled = about.name or (parameter.name.upper(),)
    shown = about.show_default(None) if callable(about.show_default) else ""
    off = about.negative if isinstance(about.negative, str) and about.negative else ""
    names = ", ".join(f"`{name}`" for name in (*spelled, off) if name)
    return [
        names,
        kind_text(kind),
        f"`{shown}`" if shown != "" else "",
        safe(about.help or ""),
    ]


def kind_text(kind) -> str:
    "The type of an option, in a word"
    parts = [k for k in get_args(kind) if k is not type(None)] or [kind]
    words = dict(int="integer", float="number", str="text", bool="switch", list="several")
    if str(kind).startswith("list"):
        return "several"
    names = [getattr(k, "__name__", str(k)) for k in parts]
    return " or ".join(dict.fromkeys(words.get(name, name) for name in names))


def command_page(
    name: str,  # E.g. finetune
) -> str:
    "One command with its options by group"
    cli = importlib.import_module("vggflow.cli")
    verb = cli.VERBS[name]
    groups = {}
    for parameter in cli.signature_of(verb).parameters.values():
        about = get_args(parameter.annotation)[1]
        group = getattr(about.group[0], "name", "") if about.group else ""
        groups.setdefault(group or "options", []).append(option_row(parameter))
    text = f"# vggflow {name}\n\n> {cli.docstring(verb.does)}\n"
    for group, rows in groups.items():
        head = ("option", "type", "default", "meaning")
        text += f"\n## {group.capitalize()}\n\n{table(head, rows)}\n"
    if name in cli.EXAMPLES:
        said = cli.EXAMPLES[name].partition("\n")[2]
        text += f"\n## Examples\n\n```sh\n{dedented(said)}\n```\n"
    statuses = dedented(cli.STATUSES.partition("\n")[2])
    return f"{text}\n## Exit status\n\n```text\n{statuses}\n```\n"


def dedented(text: str) -> str:
    "Lines without the two spaces before them"
    return "\n".join(line.removeprefix("  ") for line in text.splitlines())


def command_names() -> list:
    "The commands, in the order of --help"
    return list(importlib.import_module("vggflow.cli").VERBS)


def command_list() -> str:
    "All commands with what they do"
    cli = importlib.import_module("vggflow.cli")
    text = (ROOT / "site/pages/commands.md").read_text(encoding="utf8")
    verbs = cli.VERBS.items()
    rows = [[f"[vggflow {n}]({n}.md)", safe(cli.docstring(v.does))] for n, v in verbs]
    shown = table(("command", "what it does"), rows)
    return f"{text}\n{shown}\n\n{menu(command_names())}"
