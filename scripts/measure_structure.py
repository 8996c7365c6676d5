"""Measure the structure of a checkout: sizes, docstrings, types, import cycles and repeated lines, as one table.

python -m samf.scripts.measure_structure                 # this checkout
python -m samf.scripts.measure_structure --root OTHER    # another one, for example a worktree of an older commit
python -m samf.scripts.measure_structure --under data    # the places that the table counts, below a folder
"""

import argparse
import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from samf.evaluation.markdown import markdown_table

REPOSITORY = Path(__file__).resolve().parent.parent
_MAX_FUNCTION = 60
_MAX_FILE = 400
_MIN_PARAMETERS = 3
_REPEATED_LINES = 6
# `JsonObject` is an alias of such a mapping; counted where it annotates.
_UNTYPED = re.compile(
    r"\b(?:dict|Mapping|MutableMapping|OrderedDict)\[str, (?:Any|object)\]|(?:[:>|,] |\[)JsonObject\b(?!,$)"
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(root: Path) -> list[Path]:
    """Return the tracked Python files of a checkout, relative to its root and without tests."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=root, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listed.split() if not name.startswith("tests/") and (root / name).is_file()]


def functions(tree: ast.AST, public: bool = True) -> Iterator[tuple[Function, bool]]:
    """Yield each function of a module, and whether it is public: neither it nor what encloses it has an underscore."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, public and not node.name.startswith("_"))
        elif isinstance(node, Function):
            yield node, public and not node.name.startswith("_")
            yield from functions(node, False)
        else:
            yield from functions(node, public)


def parameters(function: Function) -> list[str]:
    """Return the names of a function's parameters without `self` and `cls`."""
    args = function.args
    found = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
    return [arg.arg for arg in found if arg.arg not in ("self", "cls")]


def _line_count(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def names_all(function: Function) -> bool:
    """Return whether a docstring names every parameter."""
    text = ast.get_docstring(function) or ""
    return all(re.search(rf"\b{re.escape(name)}\b", text) for name in parameters(function))


def imported(path: Path, tree: ast.AST, modules: set[Path]) -> set[Path]:
    """Return the files of this package that a module imports when it is loaded, not within functions.

    Args:
        path: the module, relative to the root.
        tree: its syntax tree.
        modules: all files of the package, relative to the root.
    """
    found, package = set(), list(path.parts[:-1])
    deferred = {id(n) for f in ast.walk(tree) if isinstance(f, Function) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in deferred:
            continue
        if node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
        elif (node.module or "").split(".")[0] == "samf":
            base = (node.module or "").split(".")[1:]
        else:
            continue
        target = Path(*filter(None, base))
        candidates = [target.with_suffix(".py")] if target.name else []
        candidates += [target / f"{alias.name}.py" for alias in node.names]
        found |= {candidate for candidate in candidates if candidate in modules}
    return found


def import_cycles(edges: dict[Path, set[Path]]) -> int:
    """Return the number of strongly connected components of more than one module, by Tarjan's algorithm."""
    index: dict[Path, int] = {}
    low: dict[Path, int] = {}
    stack: list[Path] = []
    cycles = 0

    def visit(module: Path) -> None:
        nonlocal cycles
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in edges[module]:
            if other not in index:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == index[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            cycles += len(component) > 1

    for module in edges:
        if module not in index:
            visit(module)
    return cycles


def repeated_lines(sources: dict[Path, str]) -> int:
    """Return how many lines of code are part of a run of six or more lines that occurs elsewhere; imports don't count."""
    places = defaultdict(list)
    for path, source in sources.items():
        numbered = [(number, line.strip()) for number, line in enumerate(source.splitlines())]
        lines = [(n, line) for n, line in numbered if len(line) > 3 and not line.startswith(("from ", "import ", "#"))]
        for start in range(len(lines) - _REPEATED_LINES + 1):
            window = lines[start : start + _REPEATED_LINES]
            places[tuple(line for _, line in window)].append([(path, number) for number, _ in window])
    return len({line for found in places.values() if len(found) > 1 for window in found for line in window})


def ruff_count(root: Path, rule: str) -> str:
    """Return the number of findings of a ruff rule outside tests."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", rule, "--output-format", "concise"]
    command += ["--config", 'lint.pydocstyle.convention="google"', "--exclude", "tests,.venv", str(root)]
    run = subprocess.run(command, capture_output=True, text=True)
    return str(sum(f" {rule} " in line for line in run.stdout.splitlines()))


def offenders(root: Path, under: str) -> list[str]:
    """Return the places below a folder or file that the table counts, one per line."""
    found = []
    for path in python_files(root):
        if not (path == Path(under) or path.is_relative_to(under)):
            continue
        source = (root / path).read_text(encoding="utf-8")
        if (count := source.count("\n")) > _MAX_FILE:
            found.append(f"{path}: {count} lines")
        for function, public in functions(ast.parse(source)):
            place, size = f"{path}:{function.lineno}: {function.name}", _line_count(function)
            if size > _MAX_FUNCTION:
                found.append(f"{place}: {size} lines")
            if public and len(parameters(function)) >= _MIN_PARAMETERS and not names_all(function):
                found.append(f"{place}: the docstring doesn't name all of {', '.join(parameters(function))}")
        for number, line in enumerate(source.splitlines(), start=1):
            if _UNTYPED.search(line):
                found.append(f"{path}:{number}: untyped mapping")
    return found


def measure(root: Path) -> list[list[str]]:
    """Return the rows of the table: a measure and its value."""
    sources = {path: (root / path).read_text(encoding="utf-8") for path in python_files(root)}
    trees = {path: ast.parse(source) for path, source in sources.items()}
    lines = {path: source.count("\n") for path, source in sources.items()}
    found = [(path, f, public) for path, tree in trees.items() for f, public in functions(tree)]
    sizes = sorted(((_line_count(f), f"{path}:{f.name}") for path, f, _ in found), reverse=True)
    wide = [f for _, f, public in found if public and len(parameters(f)) >= _MIN_PARAMETERS]
    cycles = import_cycles({path: imported(path, tree, set(trees)) for path, tree in trees.items()})
    return [
        ["lines of Python (without tests)", str(sum(lines.values()))],
        ["Python files", str(len(sources))],
        ["Python files at the root", str(sum(len(path.parts) == 1 for path in sources))],
        [f"functions over {_MAX_FUNCTION} lines", str(sum(size > _MAX_FUNCTION for size, _ in sizes))],
        ["longest function", f"{sizes[0][0]} ({sizes[0][1]})"],
        [f"files over {_MAX_FILE} lines", str(sum(count > _MAX_FILE for count in lines.values()))],
        ["longest file", "{1} ({0})".format(*max(lines.items(), key=lambda item: item[1]))],
        ["import cycles", str(cycles)],
        [
            f"public functions with {_MIN_PARAMETERS} or more parameters whose docstring names all",
            f"{sum(map(names_all, wide))} of {len(wide)} ({sum(map(names_all, wide)) / max(len(wide), 1):.0%})",
        ],
        ["summaries that aren't imperative (ruff D401)", ruff_count(root, "D401")],
        ["untyped mappings", str(sum(len(_UNTYPED.findall(source)) for source in sources.values()))],
        [f"lines repeated in runs of {_REPEATED_LINES} or more", str(repeated_lines(sources))],
    ]


def main(argv: list[str] | None = None) -> None:
    """Write the table to standard output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="checkout to measure")
    parser.add_argument("--under", help="folder or file, relative to the root: list what the table counts there")
    args = parser.parse_args(argv)
    if args.under:
        sys.stdout.write("".join(f"{line}\n" for line in offenders(args.root, args.under)))
        return
    sys.stdout.write(markdown_table(["measure", "value"], measure(args.root)) + "\n")


if __name__ == "__main__":
    main()
