"""The Hub's side of a push: repository, settings, upload, tag; errors as one line that says what to do."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, errors, get_token
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported lazily
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from samf.model.model_card import README
from samf.sharing.errors import ShareError, UploadError
from samf.sharing.saved_models import Kind

Gated = Literal["auto", "manual", "off"]
GATED: tuple[Gated, ...] = ("auto", "manual", "off")
_PULL_REQUEST = "refs/pr/"
# Weights of a kind that a push replaces; what the repository has of them in addition is removed in the same commit, since
# old shards beside new ones would be loaded.
_REPLACED = {"adapter": ["adapter_model*.safetensors"]}
_REPLACED_WHOLE = ["model*.safetensors", "model.safetensors.index.json"]


@dataclass(frozen=True)
class Target:
    """Where a model is pushed to.

    Attributes:
        repo_id: repository, with or without its owner; created where there is none.
        private: whether a new repository is private; None = the owner's default.
        gated: who may download: "auto" and "manual" ask for a request, "off" doesn't; None = as it is.
        revision: branch, created where there is none, or refs/pr/N; None = main.
        create_pr: open a pull request instead of a commit.
        tag: name for the pushed commit.
        message: of the commit.
    """

    repo_id: str
    private: bool | None = None
    gated: Gated | None = None
    revision: str | None = None
    create_pr: bool = False
    tag: str | None = None
    message: str | None = None


@dataclass(frozen=True)
class Pushed:
    """A pushed commit.

    Attributes:
        repo_id: OWNER/NAME.
        revision: hash of the commit.
        url: of the commit, or of the pull request.
        branch: where it was pushed to; None = main.
    """

    repo_id: str
    revision: str
    url: str
    branch: str | None = None


def hub_api() -> HfApi:
    """Return the client of the Hub that the environment names."""
    return HfApi(library_name="samf")


def check_target(target: Target) -> None:
    """Raise ShareError where names or options can't be right, before anything is read or sent."""
    try:
        validate_repo_id(target.repo_id)
    except errors.HFValidationError as error:
        raise ShareError(f"{target.repo_id!r} can't be a repository; expected OWNER/NAME. {error}") from error
    if target.create_pr and target.revision is not None:
        raise ShareError(
            "--pr opens a pull request to main; leave out --revision. To add to one: --revision refs/pr/N."
        )
    if target.create_pr and target.tag:
        raise ShareError("--tag names a commit of the repository, and --pr makes none: tag it when it is merged.")
    if target.create_pr and target.gated:
        raise ShareError("--gated is a setting of the repository, which --pr leaves as it is.")
    if target.revision is not None and re.fullmatch("[0-9a-f]{40}", target.revision):
        raise ShareError(
            f"--revision {target.revision[:12]}… is a commit, to which nothing can be added: name a branch."
        )


@contextlib.contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn the client's errors into ShareError (something must be changed) and UploadError (trying again may help)."""
    try:
        yield
    except errors.HfHubHTTPError as error:
        message, fatal = _explain(error)
        raise (ShareError if fatal else UploadError)(f"{repo_id}: {message}") from error
    except errors.LocalTokenNotFoundError as error:
        raise ShareError(f"{repo_id}: not logged in: run hf auth login, or set HF_TOKEN.") from error
    except errors.OfflineModeIsEnabled as error:
        raise ShareError(f"{repo_id}: HF_HUB_OFFLINE is set, which forbids requests: unset it.") from error
    except (errors.HTTPError, ConnectionError, TimeoutError) as error:  # type: ignore[attr-defined]  # the client's own
        raise UploadError(f"{repo_id}: the Hub can't be reached ({error or type(error).__name__}). {_AGAIN}") from error


_AGAIN = "Run the same command again: what the Hub has already isn't sent twice."


def _explain(error: errors.HfHubHTTPError) -> tuple[str, bool]:
    """Return what an answer of the Hub means, and whether trying again is of no use."""
    status = error.response.status_code
    said = " ".join((error.server_message or "").split())
    said = f" The Hub says: {said.rstrip('.')}." if said else ""
    if status == 401:
        return f"not logged in, or the token isn't valid: run hf auth login, or set HF_TOKEN.{said}", True
    if status == 403:
        return (
            f"no right to do this.{said} The token must have write access to the owner; in an organisation your role must be "
            "write or admin. --pr proposes the change instead.",
            True,
        )
    if status == 404:
        return f"no such repository or revision, or it is hidden from you.{said}", True
    if status == 409:
        return f"somebody else changed it meanwhile.{said} {_AGAIN}", False
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        return f"too many requests{f'; wait {wait} s' if wait else ''}.{said} {_AGAIN}", False
    if status >= 500:
        return f"the Hub fails (HTTP {status}).{said} {_AGAIN}", False
    return f"refused (HTTP {status}).{said or f' {error}'}", True


def open_repository(api: HfApi, target: Target, kind: Kind) -> str:
    """Create the repository or compare an existing one with the options; return its whole name.

    Args:
        api: the client.
        target: where to push to.
        kind: what will be pushed.

    Raises:
        ShareError: not logged in, no rights, or the repository is another than the options say.
        UploadError: the Hub can't be reached.
    """
    if api.token is None and get_token() is None:
        raise ShareError(f"{target.repo_id}: not logged in: run hf auth login, or set HF_TOKEN.")
    with hub_errors(target.repo_id):
        repo_id = target.repo_id if "/" in target.repo_id else f"{api.whoami()['name']}/{target.repo_id}"
        try:
            info = api.model_info(repo_id)
        except errors.RepositoryNotFoundError:
            if target.create_pr:
                raise
            api.create_repo(repo_id, private=target.private, exist_ok=True)  # exist_ok: somebody else was faster
            info = api.model_info(repo_id)
    if target.private is not None and bool(info.private) != target.private:
        found, wanted = ("private", "public") if info.private else ("public", "private")
        raise ShareError(
            f"{repo_id}: exists and is {found}, not {wanted}. Change it in its settings on the Hub, or leave out --{wanted}."
        )
    _check_kind(repo_id, {file.rfilename for file in info.siblings or ()}, kind)
    with hub_errors(repo_id):
        if target.gated is not None:
            api.update_repo_settings(repo_id, gated=False if target.gated == "off" else target.gated)
        if target.revision is not None and not target.revision.startswith(_PULL_REQUEST):
            api.create_branch(repo_id, branch=target.revision, exist_ok=True)
    return repo_id


def _check_kind(repo_id: str, files: set[str], kind: Kind) -> None:
    """Refuse an adapter in a whole model's repository, and the other way round: only one of them would be loaded."""
    is_adapter = "adapter_config.json" in files
    is_whole = any(name.startswith("model") and name.endswith((".safetensors", ".index.json")) for name in files)
    if (kind == "adapter" and is_whole and not is_adapter) or (kind != "adapter" and is_adapter and not is_whole):
        found = "an adapter" if is_adapter else "a whole model"
        raise ShareError(
            f"{repo_id}: holds {found}, which {kind} weights would hide. Push to a repository of their own."
        )


def hub_card(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    """Return the card that the Hub has; None = there is none."""
    disable_progress_bars()
    try:
        with hub_errors(repo_id):
            if not api.file_exists(repo_id, README, revision=revision):
                return None
            path = api.hf_hub_download(repo_id, README, revision=revision)
    finally:
        enable_progress_bars()
    with open(path, encoding="utf-8", newline="") as file:  # with its own line ends
        return file.read()


def upload(api: HfApi, repo_id: str, folder: Path, target: Target, kind: Kind, title: str) -> Pushed:
    """Upload a folder in one commit; what the Hub has already isn't sent again.

    `upload_folder` is what resumes: with hf_xet, chunks that the Hub has are left out; without, whole files, which stay on the
    Hub even if the commit never came. (`upload_large_folder` is gone from huggingface_hub 2.)

    Args:
        api: the client.
        repo_id: the repository.
        folder: what to upload.
        target: branch, pull request and message.
        kind: what is uploaded; other weights of this kind are removed from the repository.
        title: of the commit where `target` has none.

    Raises:
        ShareError: the Hub refuses.
        UploadError: the upload broke.
    """
    try:
        with hub_errors(repo_id):
            done = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=target.revision,
                create_pr=target.create_pr,
                commit_message=target.message or title,
                delete_patterns=_REPLACED.get(kind, _REPLACED_WHOLE),
            )
    except (RuntimeError, OSError) as error:  # without hf_xet around the client's error, with it hf_xet's own
        cause = error.__cause__ or error
        if isinstance(cause, errors.HfHubHTTPError):
            message, fatal = _explain(cause)
            raise (ShareError if fatal else UploadError)(f"{repo_id}: {message}") from error
        raise UploadError(f"{repo_id}: the upload broke ({cause or type(cause).__name__}). {_AGAIN}") from error
    url = done.pr_url or done.commit_url
    branch = done.pr_revision if target.create_pr else target.revision
    return Pushed(repo_id, done.oid, str(url), branch)


def tag_commit(api: HfApi, pushed: Pushed, tag: str) -> None:
    """Give the pushed commit a tag.

    Raises:
        ShareError: another commit has it.
    """
    try:
        with hub_errors(pushed.repo_id):
            api.create_tag(pushed.repo_id, tag=tag, revision=pushed.revision)
    except UploadError as error:
        with hub_errors(pushed.repo_id):
            tags = {found.name: found.target_commit for found in api.list_repo_refs(pushed.repo_id).tags}
        if tags.get(tag) == pushed.revision:
            return
        if tag in tags:
            raise ShareError(
                f"{pushed.repo_id}: pushed as {pushed.revision}, but the tag {tag} names {tags[tag][:12]} already. Choose "
                "another tag; nothing will be sent twice."
            ) from error
        raise
