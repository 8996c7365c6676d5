"""Which cluster reads the volumes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

STARTED_HERE = ("local", "slurm")
_PROTOCOLS = ("tcp://", "tls://", "ws://", "wss://", "ucx://", "inproc://")


@dataclass(frozen=True)
class ClusterSettings:
    """A cluster to use or to start.

    Attributes:
        target: "local", "slurm", address of a scheduler ("tcp://host:8786"), or the JSON file that one wrote.
        options: of dask's LocalCluster or of dask-jobqueue's SLURMCluster, and `adapt`: those of its method `adapt`.
        workers: processes that read volumes, for "local".
    """

    target: str
    options: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 1

    @classmethod
    def parse(cls, target: str, options: str | None, workers: int) -> "ClusterSettings":
        """Return the settings of the command line.

        Args:
            target: value of `--cluster`.
            options: value of `--cluster_options`: a mapping as YAML or JSON, or the path of a file with one.
            workers: processes that read volumes, for "local".

        Raises:
            ValueError: the cluster can't be meant, or the options are no mapping.
        """
        if target not in STARTED_HERE and not target.endswith(".json") and not target.startswith(_PROTOCOLS):
            raise ValueError(
                f"--cluster {target}: expected {', '.join(STARTED_HERE)}, a scheduler's address (tcp://host:8786), or its file "
                "(scheduler.json)"
            )
        try:
            text = Path(options).read_text(encoding="utf-8") if options and Path(options).is_file() else options
            found = yaml.safe_load(text) if text else {}
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"--cluster_options {options}: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(
                f"--cluster_options {options}: expected a mapping, as {{n_workers: 4}}, or a file with one"
            )
        return cls(target, found, workers)
