"""One process under a launcher: call scripts with arguments that must be refused, and write what they said.

refusals.py OUTPUT.json CASES.json      # {name: [script, argument, …]}
"""

import json
import os
import sys
from pathlib import Path

from samf import pretrain_encoder, train, warmup_aggregator

SCRIPTS = {script.__name__.rpartition(".")[2]: script for script in (pretrain_encoder, train, warmup_aggregator)}


def said_by(script: str, arguments: list[str]) -> str:
    """Return the message of the ValueError that the script's main function raises."""
    try:
        SCRIPTS[script].main.__wrapped__(arguments)  # without the decorator, which would end the process group
    except ValueError as error:
        return str(error)
    return "it ran to its end"


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    said = {name: said_by(script, arguments) for name, (script, *arguments) in cases.items()}
    if os.environ.get("RANK", "0") == "0":
        Path(sys.argv[1]).write_text(json.dumps(said), encoding="utf-8")
