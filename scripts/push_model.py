"""Upload a saved model to the Hub as a whole repository: weights, code, processor, card.

samf push runs/ao2d owner/my-samf --private
"""

import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from samf import SamfForConditionalGeneration, SamfProcessor
from samf.model.adapters_samf import active_adapter, base_problem
from samf.model.hub_samf import has_own_card
from samf.model.model_card import README, hub_id, with_repository
from samf.utils.packaged import HANDLER, REQUIREMENTS


def push_folder(
    folder: Path, repo_id: str, *, private: bool | None = None, revision: str | None = None, with_handler: bool = False
) -> str:
    """Upload a saved model and return the commit's address.

    The folder is loaded and saved again, which shows that it loads, brings the code of this version, and leaves out what a
    training left beside the model. Its own card is kept; a card on the Hub that a person wrote or changed is, too.

    Args:
        folder: of the model and its processor.
        repo_id: repository on the Hub, with or without its owner; created where there is none.
        private: whether a new repository is private; None = the owner's default.
        revision: branch, created where there is none; None = main.
        with_handler: add handler.py, by which Inference Endpoints and their like serve the model.

    Raises:
        OSError: it holds no model, or the Hub can't be reached.
        ValueError: it is an adapter whose base model isn't on the Hub.
    """
    model = SamfForConditionalGeneration.from_pretrained(folder, dtype="auto")
    adapter = active_adapter(model)
    if adapter is not None and hub_id(adapter.base_model_name_or_path) is None:
        raise ValueError(f"an adapter can't be pushed: {base_problem(adapter)}")
    processor = SamfProcessor.from_pretrained(folder)
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary)
        model.save_pretrained(whole)
        processor.save_pretrained(whole)
        shutil.copyfile(REQUIREMENTS, whole / "requirements.txt")
        if with_handler:
            shutil.copyfile(HANDLER, whole / HANDLER.name)
        card = folder / README if (folder / README).is_file() else whole / README
        (whole / README).write_text(with_repository(card.read_text(encoding="utf-8"), repo_id), encoding="utf-8")
        ignored = [README] if has_own_card(repo_id, revision) else None
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=whole,
            revision=revision,
            ignore_patterns=ignored,
            commit_message=f"Upload {type(model).__name__}",
        )
    return str(done.commit_url)
