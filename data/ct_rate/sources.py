"""The files of one split of CT-RATE: in a folder, in an object store, or in a data set on the Hub."""

import logging
import re
from abc import ABC, abstractmethod
from pathlib import Path

from huggingface_hub import get_token, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from samf.data.ct_rate.names import LAYOUTS, Layout, VolumeName, volume_location
from samf.model.ct_download import local_path
from samf.model.ct_object_store import has_stored, stored_names

logger = logging.getLogger(__name__)

HUB_NAME = re.compile(
    r"(?:hf://datasets/|https://huggingface\.co/datasets/)?(?P<name>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[^/]+))?/?"
)


class CtRateSource(ABC):
    """The tables and volumes of one split of CT-RATE.

    Args:
        root: the folder or address of its files, for messages.
        split: "train" or "valid".
        layout: "v1" or "v2".
    """

    def __init__(self, root: str | Path, split: str, layout: Layout):
        self.root, self.split, self.layout = root, split, layout

    def table(self, folder: str, ending: str) -> Path | None:
        """Return the file `folder`/{split}_{ending}, where the split may be spelled valid or validation; None if absent."""
        stems = ("train",) if self.split == "train" else ("valid", "validation")
        files = (self.file(f"{folder}/{stem}_{ending}") for stem in stems)
        return next((file for file in files if file is not None), None)

    @abstractmethod
    def file(self, name: str) -> Path | None:
        """Return the local path of a file below the root, None if there is none."""

    @abstractmethod
    def locate(self, name: str) -> str:
        """Return the path or address of a volume; a name other than CT-RATE's is a path below the root."""

    @property
    def reports(self) -> Path | None:
        """Return the reports CSV, None if absent."""
        return self.table("radiology_text_reports", "reports.csv")

    @property
    def metadata(self) -> Path | None:
        """Return the CSV of the scanners' metadata, None if absent."""
        return self.table("metadata", "metadata.csv")

    @property
    def labels(self) -> Path | None:
        """Return the CSV of finding labels, None if absent."""
        return self.table("multi_abnormality_labels", "predicted_labels.csv")

    @property
    def vqa(self) -> Path | None:
        """Return the JSON file of questions and answers, None if absent."""
        return self.table("vqa", "vqa.json")

    @property
    def no_chest(self) -> Path | None:
        """Return the list of scans that are not of the chest, None if absent."""
        return self.file(f"metadata/no_chest_{self.split}.txt")

    def find_vqa(self, name: str | Path) -> Path:
        """Return a VQA file by its path or its name below the data set. Raises FileNotFoundError if there is none."""
        if Path(name).is_file():
            return Path(name)
        below = [str(name), f"vqa/{name}"]
        found = None if Path(name).is_absolute() else next(filter(None, map(self.file, below)), None)
        if found is None:
            raise FileNotFoundError(
                f"VQA file {name} not found; looked for {', '.join([str(name), *(f'{self.root}/{b}' for b in below)])}."
            )
        return found


def _check_split(split: str, layout: str | None) -> str:
    """Return the split as it is spelled in volumes' names. Raises ValueError for an unknown split or layout."""
    name = {"validation": "valid"}.get(split, split)
    if name not in ("train", "valid") or layout not in (None, *LAYOUTS):
        raise ValueError(f"split={split!r}, layout={layout!r}; expected 'train' or 'valid', and 'v1', 'v2' or None.")
    return name


def _layout(layout: str | None, default: Layout) -> Layout:
    return next((known for known in LAYOUTS if known == layout), default)


# --- A folder ---------------------------------------------------------------------------------------------------------


class CtRateFolder(CtRateSource):
    """A split of CT-RATE in a folder.

    Args:
        root: CT-RATE's folder, with or without its `dataset` level.
        split: "train", "valid" or "validation".
        layout: "v1" or "v2"; None takes what is there, v2 if both are.

    Raises:
        FileNotFoundError: there is neither a folder of the split's volumes nor one of tables.
        ValueError: an unknown split or layout.
    """

    def __init__(self, root: str | Path, split: str, layout: str | None = None):
        split = _check_split(split, layout)
        self._folder = self._find_root(Path(root).expanduser().absolute(), split)
        present = [name for name, folder in self._volume_folders(self._folder, split).items() if folder.is_dir()]
        super().__init__(self._folder, split, _layout(layout, "v1" if present == ["v1"] else "v2"))
        if layout is None and len(present) == 2:
            logger.info("%s holds v1 and v2 volumes of %s; reading v2 (layout='v1' reads v1).", self.root, split)

    @staticmethod
    def _volume_folders(root: Path, split: str) -> dict[str, Path]:
        return {"v1": root / split, "v2": root / f"{split}_fixed"}

    @classmethod
    def _find_root(cls, root: Path, split: str) -> Path:
        for candidate in (root, root / "dataset"):
            folders = (*cls._volume_folders(candidate, split).values(), candidate / "radiology_text_reports")
            if any(folder.is_dir() for folder in folders):
                return candidate
        raise FileNotFoundError(
            f"0 volumes under {root}: expected CT-RATE's layout, {root}[/dataset]/{split}_fixed/{split}_1/{split}_1_a/"
            f"{split}_1_a_1.nii.gz (v2) or the same below {split}/ (v1), next to radiology_text_reports/ and vqa/."
        )

    def file(self, name: str) -> Path | None:
        """Return a file below the root, None if there is none."""
        path = self._folder / name
        return path if path.is_file() else None

    def locate(self, name: str) -> str:
        """Return the path of a volume, which need not exist."""
        return str(self._folder / (volume_location(name, self.layout) if VolumeName.find(name) else name))


# --- An object store --------------------------------------------------------------------------------------------------


class CtRateStore(CtRateSource):
    """A split of CT-RATE in an object store. Tables are fetched into the cache on first use, volumes when they are read.

    Args:
        root: the address of CT-RATE's folder, with or without its `dataset` level.
        split: "train", "valid" or "validation".
        layout: "v1" or "v2"; None takes what is there, v2 if both are.

    Raises:
        FileNotFoundError: there is neither a folder of the split's volumes nor one of tables.
        DownloadError: no access or no connection.
        ValueError: an unknown split or layout.
    """

    def __init__(self, root: str, split: str, layout: str | None = None):
        split, root = _check_split(split, layout), root.rstrip("/")
        for folder in (root, f"{root}/dataset"):
            names = stored_names(folder)
            present = [name for name, part in (("v2", f"{split}_fixed"), ("v1", split)) if part in names]
            if present or "radiology_text_reports" in names:
                super().__init__(folder, split, _layout(layout, "v1" if present == ["v1"] else "v2"))
                return
        raise FileNotFoundError(
            f"{root}: expected CT-RATE's layout, {root}[/dataset]/{split}_fixed/ (v2) or {split}/ (v1), next to "
            f"radiology_text_reports/ and vqa/. For a data set in another layout, name a table and its columns: "
            f"--volume_column."
        )

    def file(self, name: str) -> Path | None:
        """Fetch a file into the cache and return its path, None if there is none.

        Raises:
            DownloadError: no access or no connection.
        """
        address = f"{self.root}/{name}"
        return local_path(address, keep_name=True) if has_stored(address) else None

    def locate(self, name: str) -> str:
        """Return the address of a volume, which need not exist."""
        return f"{self.root}/{volume_location(name, self.layout) if VolumeName.find(name) else name}"


# --- The Hub ----------------------------------------------------------------------------------------------------------


class CtRateHub(CtRateSource):
    """A split of a data set on the Hub in CT-RATE's layout, such as `ibrahimhamamci/CT-RATE` itself.

    Tables are fetched into the Hub's cache on first use. Volumes are not: `locate` returns their addresses
    (hf://datasets/…), which `read_ct` fetches one by one.

    Args:
        name: owner/name, or owner/name@revision.
        split: "train", "valid" or "validation".
        layout: "v1" or "v2"; None takes v2.

    Raises:
        ValueError: not a name of a data set, or an unknown split or layout.
    """

    def __init__(self, name: str, split: str, layout: str | None = None):
        split, match = _check_split(split, layout), HUB_NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} is not the name of a data set; expected owner/name or owner/name@revision.")
        self.name, self.revision = match["name"], match["revision"]
        at = f"@{self.revision}" if self.revision else ""
        super().__init__(f"hf://datasets/{self.name}{at}/dataset", split, _layout(layout, "v2"))

    def file(self, name: str) -> Path | None:
        """Fetch a file into the Hub's cache and return its path, None if there is none.

        Raises:
            PermissionError: the data set is gated and this account has no access; says how to get it.
            FileNotFoundError: no such data set or revision, or it can't be reached and isn't in the cache.
            ConnectionError: the Hub gives another error.
        """
        file = f"dataset/{name}"
        try:
            return Path(hf_hub_download(self.name, file, repo_type="dataset", revision=self.revision))
        except RemoteEntryNotFoundError:
            return None
        except LocalEntryNotFoundError as error:  # offline; the cache may know that there is no such file
            if try_to_load_from_cache(self.name, file, repo_type="dataset", revision=self.revision) is not None:
                return None
            raise FileNotFoundError(
                f"{self.root}/{name}: the Hub can't be reached, and the file isn't in the cache. {self._or_a_folder()}"
            ) from error
        except (HfHubHTTPError, HFValidationError) as error:
            raise self._explained(error) from error

    def locate(self, name: str) -> str:
        """Return the address of a volume, which need not exist."""
        return f"{self.root}/{volume_location(name, self.layout) if VolumeName.find(name) else name}"

    def _or_a_folder(self) -> str:
        return f"If {self.name} is meant to be a folder: there is none under {Path.cwd()}."

    def _explained(self, error: Exception) -> OSError:
        """Return an error with a remedy for an error of the Hub."""
        status = getattr(getattr(error, "response", None), "status_code", None)
        page = f"https://huggingface.co/datasets/{self.name}"
        if isinstance(error, GatedRepoError) or status == 403:
            login = "" if get_token() else "You are not logged in here. "
            return PermissionError(
                f"{self.name} is gated: its owners give access to those who accept its terms. {login}Log in at {page} and "
                f"accept the terms there; then run `hf auth login` on this machine, or set HF_TOKEN, with a token of that "
                f"account that may read gated repositories. (The Hub says: {str(error).splitlines()[0]})"
            )
        if isinstance(error, RevisionNotFoundError):
            return FileNotFoundError(f"{self.name} has no revision {self.revision!r}; see {page}/refs.")
        if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
            return FileNotFoundError(
                f"{self.name}: no data set of this name on the Hub, or a private one that this account can't see "
                f"(hf auth login). {self._or_a_folder()}"
            )
        return ConnectionError(f"{self.name}: the Hub answers {status} ({error}). Try again later.")


def is_hub_name(source: str) -> bool:
    """Return whether `source` has the form of a data set's name: owner/name, optionally with @revision or hf://datasets/."""
    return HUB_NAME.fullmatch(source) is not None
