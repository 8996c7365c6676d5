"""Options that several commands have."""

from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option(
        envvar="SAMF_MODEL",
        help="Folder or Hub id of the model. Default: the demo model of the package, which knows phantoms only.",
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the Hub.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")]
Quantize = Annotated[str | None, typer.Option(help="int4 or int8: a smaller and faster language model on a CPU.")]
