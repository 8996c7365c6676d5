"""Check a data set before it is trained on: counts, patients, what splits share, files, labels and report lengths.

    samf data check /data/RAD-ChestCT --dataset rad_chest_ct --out runs/check
    samf data check reports.csv --volume_column scan --report_column findings --patient_column patient --split_column split

Files are checked by their headers; --read reads them as a whole. With --out, the folder gets check.json, check.html with its
plots as PNGs, and volumes.jsonl, from which an interrupted check resumes. Exit status: 0, 1 if there are problems, 2 for
input that can't be checked.
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samf.checking.files import CheckedFiles, FileOptions, check_files
from samf.checking.results import CheckResult, result_text
from samf.checking.splits import Split, find_overlaps, load_splits
from samf.data.source_arguments import SourceArguments
from samf.utils.files import atomic_write, write_json
from samf.utils.parallel import usable_cores
from samf.utils.recipe import parse_recipe

PROBLEMS, BAD_INPUT = 1, 2
RESULT, PAGE = "check.json", "check.html"
_TOKEN_BATCH = 1000


@dataclass
class CheckArguments(SourceArguments):
    """Arguments of samf data check."""

    data: str = field(default="", metadata={"help": "the data set; may be given first, without its flag"})
    out: str | None = field(default=None, metadata={"help": "folder for check.json, check.html, plots and results"})
    json: bool = field(default=False, metadata={"help": "write check.json to standard output instead of text"})
    check_files: bool = field(default=True, metadata={"help": "look at the volumes' files"})
    read: bool = field(default=False, metadata={"help": "read the files as a whole, not only their headers"})
    pattern: list[str] = field(
        default_factory=list, metadata={"help": "files to use in folders: names (ct.nii.gz), or paths (*/ct/*)"}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "model whose tokenizer also counts the reports' tokens, folder or Hub id"}
    )
    num_workers: int | None = field(default=None, metadata={"help": "processes that check files; default: all cores"})
    timeout: float = field(default=600.0, metadata={"help": "seconds that one volume may take; 0: no limit"})

    def __post_init__(self) -> None:
        self.check_source()
        if not self.data:
            raise ValueError("no data: samf data check FOLDER, TABLE or OWNER/NAME.")
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"num_workers is {self.num_workers}; expected at least 1.")
        if self.timeout < 0:
            raise ValueError(f"timeout is {self.timeout}; expected seconds, or 0.")

    def file_options(self) -> FileOptions:
        """Return how files are checked."""
        workers = self.num_workers or usable_cores()
        return FileOptions(self.read, workers, self.timeout or None, Path(self.out) if self.out else None)


def check(args: CheckArguments) -> CheckResult:
    """Check a data set.

    Args:
        args: name it.

    Raises:
        FileNotFoundError: there is no such data.
        ValueError: an option that the data doesn't have, or a table without a column that it needs.
    """
    splits = load_splits(args.data, args, args.pattern)
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    files: CheckedFiles | None = None
    if args.check_files:
        files = check_files([ref for split in splits.values() for ref in split.refs.values()], args.file_options())
    overlaps = find_overlaps(splits, files.copies() if files else ())
    return CheckResult(args.data, args.dataset, splits, overlaps, files, _count_tokens(splits, args.tokenizer))


def _count_tokens(splits: dict[str, Split], tokenizer: str | None) -> dict[str, list[int]]:
    if tokenizer is None:
        return {}
    from transformers import AutoTokenizer

    encode: Any = AutoTokenizer.from_pretrained(tokenizer)
    found = {}
    for name, split in splits.items():
        texts = list(split.reports.values())
        batches = [texts[start : start + _TOKEN_BATCH] for start in range(0, len(texts), _TOKEN_BATCH)]
        found[name] = [len(ids) for batch in batches for ids in encode(batch, add_special_tokens=False)["input_ids"]]
    return found


def write_result(result: CheckResult, folder: Path) -> None:
    """Write check.json, the plots and check.html into a folder."""
    from samf.checking.page import draw_plots, render

    plots = draw_plots(result)
    for name, png in plots.items():
        atomic_write(folder / name, png)
    atomic_write(folder / PAGE, render(result, plots))
    write_json(folder / RESULT, result.to_json())


def main(argv: Sequence[str] | None = None) -> int:
    """Check a data set as the command line says; return the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given and not given[0].startswith("-"):
        given = ["--data", *given]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logger, level = logging.getLogger("samf"), logging.getLogger("samf").level
    logger.setLevel(logging.ERROR)  # what loaders leave out is part of the result
    try:
        (args,) = parse_recipe(CheckArguments, given)
        result = check(args)
        if args.out:
            write_result(result, Path(args.out))
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"samf data check: {' '.join(str(error).split())}\n")
        return BAD_INPUT
    finally:
        logger.setLevel(level)
    text = json.dumps(result.to_json(), ensure_ascii=False) + "\n" if args.json else result_text(result)
    sys.stdout.write(text)
    return PROBLEMS if result.problems() else 0


if __name__ == "__main__":
    sys.exit(main())
