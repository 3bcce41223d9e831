"""What other files use says what it takes: functions have a docstring, in which each parameter has a line of its own.

    def fit_cell(height, width): '''Height and width that fill a cell.

    height: Of the image, pixels.
    ...

A function with a single parameter may say it in the sentence. Methods of a class that derives from another follow that
one's signature. So they need no docstring here.
"""

import ast
import re
from collections.abc import Iterator

from test_imports import MODULES, PACKAGE, SCRIPTS

Function = ast.FunctionDef | ast.AsyncFunctionDef
FOLLOWED = "A parameter is described as in: `name: type and shape, unit. Meaning.`"


def used_elsewhere(trees: dict[str, ast.Module]) -> set[tuple[str, str]]:
    """(module, name) of all that a file takes from another one of the repository."""
    used = set()
    for module, tree in trees.items():
        modules = {}  # what a file calls them
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                source = ".".join([*module.split(".")[: -node.level or None], *filter(None, [node.module])])
                source = source if node.level else str(node.module)
                used |= {(source, alias.name) for alias in node.names}
                modules |= {alias.asname or alias.name: f"{source}.{alias.name}" for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                used.add((modules[node.value.id], node.attr))
    return used


def public_functions(module: str, tree: ast.Module, used: set[tuple[str, str]]) -> Iterator[tuple[str, Function]]:
    for node in tree.body:
        if (module, getattr(node, "name", "_")) not in used or node.name.startswith("_"):
            continue
        if isinstance(node, Function):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.bases:
            for method in node.body:
                if isinstance(method, Function) and not method.name.startswith("_"):
                    yield f"{node.name}.{method.name}", method


def parameters_of(function: Function) -> list[str]:
    given = function.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [each.arg for each in every if each is not None and each.arg not in ("self", "cls")]


def lacks(function: Function) -> list[str]:
    """What the docstring of a function does not say."""
    text, parameters = ast.get_docstring(function), parameters_of(function)
    if text is None:
        return ["a docstring"]
    if len(parameters) < 2:
        return []
    return [name for name in parameters if not re.search(rf"^(\w+, )*{name}(, \w+)*: \S", text, re.MULTILINE)]


def faults(sources: dict[str, str]) -> list[str]:
    """sources: module -> its text. `main(argv)` of a script needs no words."""
    trees = {module: ast.parse(text) for module, text in sources.items()}
    used = used_elsewhere(trees)
    found = []
    for module, tree in trees.items():
        if module.split(".")[0] not in {PACKAGE, *SCRIPTS}:
            continue
        for name, function in public_functions(module, tree, used):
            missing = lacks(function) if name != "main" else []
            found += [f"{module}.{name} lacks {', '.join(missing)}"] if missing else []
    return found


def test_public_functions_name_their_parameters():
    assert faults({module: path.read_text(encoding="utf-8") for module, path in MODULES.items()}) == [], FOLLOWED


WRONG = '''
def bare(): ...
def prose(one, two):
    """one: A number. two: Another."""
def half(one, *, two):
    """Adds.

    one: A number.
    """
def right(one, two, *rest):
    """Adds.

    one, two: Numbers.
    rest: More of them.
    """
def unused(one, two): ...
class Sum:
    def add(self, number, weight): ...
class Derived(Sum):
    def add(self, number, weight): ...
'''


def test_what_is_missing_is_found():
    others = "from dct_qwen2vl import sums\nfrom dct_qwen2vl.sums import Derived, Sum, bare, half, right\nsums.prose"
    assert faults({"dct_qwen2vl.sums": WRONG, "benchmarks.study": others}) == [
        "dct_qwen2vl.sums.bare lacks a docstring",
        "dct_qwen2vl.sums.prose lacks two",
        "dct_qwen2vl.sums.half lacks two",
        "dct_qwen2vl.sums.Sum.add lacks a docstring",
    ]


def test_relative_imports_count_as_well():
    sources = {"dct_qwen2vl.dct.one": "def bare(): ...", "dct_qwen2vl.dct.two": "from .one import bare"}
    assert faults(sources) == ["dct_qwen2vl.dct.one.bare lacks a docstring"]
