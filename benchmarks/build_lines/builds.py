"""The two builds: this package's folder, and that of an earlier commit in a work tree or a folder."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NOW = Path(__file__).resolve().parents[2]
# Where this package is installed in place (pip install -e), setuptools' finder gives a build the modules that it lacks from
# the installed checkout. Python runs a sitecustomize.py of PYTHONPATH at its start, also in the processes that a build starts.
WITHOUT_INSTALLED = """import sys

sys.meta_path[:] = [
    finder
    for finder in sys.meta_path
    if "samf" not in getattr(sys.modules.get(getattr(finder, "__module__", "")), "MAPPING", {})
]
"""
# As the `samf` command, which imports no models.
_CHECK = "import sys; sys.argv[0] = 'samf'; import samf; print(samf.__file__)"


class BuildError(RuntimeError):
    """A build can't be used; the message says why."""


@dataclass(frozen=True)
class Build:
    """One build.

    Attributes:
        name: "before" or "now".
        root: folder of the package.
        path: folder that has it under the name `samf`, for PYTHONPATH.
        commit: what git says about it.
    """

    name: str
    root: Path
    path: Path
    commit: str

    def environment(self, threads: int | None) -> dict[str, str]:
        """Return the environment of a process that imports this build, with OMP_NUM_THREADS unless `threads` is None."""
        paths = [str(self.path), *filter(None, [os.environ.get("PYTHONPATH")])]
        limited = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **limited}

    def check(self) -> None:
        """Compile its modules, which the first round would do otherwise, and check that a process imports them from here.

        Raises:
            BuildError: it imports another build, or none.
        """
        packages = [str(path) for path in self.root.glob("*/") if not path.name.startswith(".")]  # no .venv
        compile_all = [sys.executable, "-m", "compileall", "-qq", *packages]
        subprocess.run(compile_all, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CHECK],
            env=self.environment(None),
            cwd=self.path,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BuildError(f"{self.root}: import samf fails: {last_line(done.stderr)}")
        self.check_import(Path(done.stdout.strip()).parent)

    def check_import(self, folder: Path) -> None:
        """Check that the package that a process imported is this build's.

        Args:
            folder: of the imported package.

        Raises:
            BuildError: it is another one.
        """
        if folder.resolve() != self.root.resolve():
            raise BuildError(f"The process of the build {self.name} imported samf from {folder}, not from {self.root}.")


def last_line(text: str) -> str:
    """Return the last line of a process's messages that has something in it."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


@contextmanager
def open_builds(before: str, folder: Path) -> Iterator[list[Build]]:
    """Yield the builds "before" and "now".

    Args:
        before: folder of a package, or a commit of this repository, which is checked out and removed after the block.
        folder: for the checkout and for links to the packages.

    Raises:
        BuildError: `before` is neither, or a build can't be imported.
    """
    now = Build("now", NOW, _link(NOW, folder / "now"), _describe(NOW))
    with _opened_before(before, folder / "before") as earlier:
        for build in (earlier, now):
            (build.path / "sitecustomize.py").write_text(WITHOUT_INSTALLED, encoding="utf-8")
            build.check()
        yield [earlier, now]


@contextmanager
def _opened_before(before: str, folder: Path) -> Iterator[Build]:
    root = Path(before).expanduser()
    if (root / "__init__.py").is_file():
        root = root.resolve()
        yield Build("before", root, _link(root, folder), _describe(root))
        return
    tree = folder / "samf"
    folder.mkdir()
    try:
        # Without hooks: they are a contributor's, and may do anything after a checkout.
        hooks = f"core.hooksPath={os.devnull}"
        added = _git(NOW, "-c", hooks, "worktree", "add", "--detach", str(tree), before)
        if added.returncode:
            raise BuildError(
                f"--before {before}: neither a folder with the package (PATH/samf) nor a commit of {NOW}: "
                f"{last_line(added.stderr)}"
            )
        yield Build("before", tree, folder, _describe(tree))
    finally:
        _git(NOW, "worktree", "remove", "--force", str(tree))


def _link(root: Path, folder: Path) -> Path:
    """Return a folder with the package under the name `samf`, whatever the name of its checkout."""
    folder.mkdir()
    (folder / "samf").symlink_to(root, target_is_directory=True)
    return folder


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)


def _describe(root: Path) -> str:
    """Return the commit of a folder, and whether files differ from it; the folder's path if it is no checkout."""
    commit = _git(root, "rev-parse", "--short", "HEAD")
    if commit.returncode:
        return str(root)
    is_changed = bool(_git(root, "status", "--porcelain", "--untracked-files=no").stdout.strip())
    return commit.stdout.strip() + (" with changes" if is_changed else "")
