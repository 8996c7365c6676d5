"""Hooks of the docs site: the API pages, the options of the commands, and the repository's own Markdown files.

MkDocs calls the functions whose names begin with `on_`. Sources are read and never imported, so that the site builds
without torch.
"""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parents[2]
# The repository's root is the package `samf`. mkdocstrings needs a folder that holds a `samf`, and would walk through
# .venv and tests from the root itself: so each package gets a folder of links to its modules.
SEARCH_PATH = REPOSITORY / "build" / "docs-path"
# Pages that GitHub shows too, where its visitors look for them.
REPOSITORY_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
OPTIONS_PAGE = "reference/options.md"


def on_startup(command: str, dirty: bool) -> None:
    """Link the packages where mkdocstrings looks for them, before it looks."""
    _link_packages()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the modules to the navigation."""
    reference = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    pages: dict[str, list[dict[str, str]]] = {}
    for module in _modules():
        pages.setdefault(module.rpartition(".")[0], []).append({module.rpartition(".")[2]: _api_page(module)})
    reference.append({"Python modules": [{package: modules} for package, modules in pages.items()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for module in _modules():
        text = f"# `{module.rpartition('.')[2]}`\n\n`{module}`\n\n::: {module}\n"
        files.append(File.generated(config, _api_page(module), content=text))
    for name in REPOSITORY_PAGES:
        text = (REPOSITORY / name).read_text(encoding="utf-8").replace("](docs/", "](")
        for other in REPOSITORY_PAGES:
            text = text.replace(f"]({other})", f"]({other.lower()})")
        files.append(File.generated(config, name.lower(), content=text))
    files.append(File.generated(config, OPTIONS_PAGE, content=_options_page()))
    return files


def _packages() -> list[str]:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    return settings["tool"]["setuptools"]["packages"]


def _folder(package: str) -> Path:
    return REPOSITORY.joinpath(*package.split(".")[1:])


def _modules() -> list[str]:
    """Return the full names of the packages' modules, without those of the root, which are scripts."""
    return [
        f"{package}.{path.stem}"
        for package in sorted(_packages())
        if package != "samf"
        for path in sorted(_folder(package).glob("*.py"))
        if not path.stem.startswith("_")
    ]


def _api_page(module: str) -> str:
    return f"reference/api/{'/'.join(module.split('.')[1:])}.md"


def _link_packages() -> None:
    """Make `SEARCH_PATH/samf` mirror the packages by links; links to modules that are gone are removed."""
    for package in _packages():
        mirror = SEARCH_PATH.joinpath(*package.split("."))
        mirror.mkdir(parents=True, exist_ok=True)
        wanted = {path.name: path for path in _folder(package).glob("*.py")}
        for link in mirror.glob("*.py"):
            if link.name not in wanted or link.resolve() != wanted[link.name]:
                link.unlink()
        for name, path in wanted.items():
            if not (mirror / name).is_symlink():
                (mirror / name).symlink_to(path)


def _options_page() -> str:
    parts = [
        "# Options of the commands",
        "Generated from the sources. Each script also prints its options with `--help`, and those of the library's "
        "`TrainingArguments` if it trains.",
    ]
    scripts = sorted(REPOSITORY.glob("*.py"))
    modules = [_folder(module).with_suffix(".py") for module in _modules()]
    for path in (*scripts, *modules):
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        rows, shared = list(_options(tree)), _shared_arguments(tree)
        if not rows and not (shared and path in scripts):
            continue
        parts.append(f"## `{_command(path, source)}` {{#{_anchor(path)}}}")
        if shared:
            parts.append("Also takes " + ", ".join(f"[`{name}`](#{_anchor(Path(name))})" for name in shared) + ".")
        if rows:
            table = ["| option | default | meaning |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
            parts.append("\n".join(table))
    return "\n\n".join(parts) + "\n"


def _command(path: Path, source: str) -> str:
    """Return how a file with options is run; just its name if other scripts share its options."""
    name = path.relative_to(REPOSITORY)
    if len(name.parts) == 1:
        return f"python {name}"
    return f"python -m samf.{'.'.join(name.with_suffix('').parts)}" if "__main__" in source else str(name)


def _anchor(path: Path) -> str:
    parts = (path.relative_to(REPOSITORY) if path.is_absolute() else path).with_suffix("").parts
    return "-".join(parts).replace("_", "-")


def _shared_arguments(tree: ast.Module) -> list[str]:
    """Return the files whose `…Arguments` a module imports, by their paths in the repository."""
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    found = {
        f"{'/'.join(node.module.split('.')[1:])}.py"
        for node in imports
        if (node.module or "").startswith("samf.") and any(alias.name.endswith("Arguments") for alias in node.names)
    }
    files = (REPOSITORY / name for name in sorted(found))
    return [
        file.relative_to(REPOSITORY).as_posix()
        for file in files
        if file.is_file() and any(_options(ast.parse(file.read_text(encoding="utf-8"))))
    ]


def _options(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Yield name, default and help of each `add_argument` call and each field of an arguments' dataclass."""
    for node in sorted(ast.walk(tree), key=lambda node: getattr(node, "lineno", 0)):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments"):
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.value, ast.Call):
                    yield _field_option(statement)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument" and node.args:
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if isinstance(node.args[0], ast.Constant):
                default = _cell(keywords["default"]) if "default" in keywords else ""
                yield f"`{node.args[0].value}`", default, _text(keywords.get("help"))


def _field_option(statement: ast.AnnAssign) -> tuple[str, str, str]:
    keywords = {keyword.arg: keyword.value for keyword in statement.value.keywords}
    metadata = keywords.get("metadata")
    about = metadata.values[0] if isinstance(metadata, ast.Dict) and metadata.values else None
    default = keywords.get("default", keywords.get("default_factory"))
    if isinstance(default, ast.Lambda):
        default = default.body
    shown = "" if default is None or ast.unparse(default) in ("list", "None") else _cell(default)
    return f"`--{ast.unparse(statement.target)}`", shown, _text(about)


def _cell(node: ast.expr) -> str:
    return f"`{ast.unparse(node)}`".replace("|", "\\|")


def _text(node: ast.expr | None) -> str:
    """Return a help text for a table's cell; what an f-string computes is shown as its expression."""
    if node is None:
        return ""
    if isinstance(node, ast.JoinedStr):
        values = (
            str(value.value) if isinstance(value, ast.Constant) else f"`{ast.unparse(value.value)}`"
            for value in node.values
        )
        text = "".join(values)
    else:
        text = str(node.value) if isinstance(node, ast.Constant) else f"`{ast.unparse(node)}`"
    return text.replace("%%", "%").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
