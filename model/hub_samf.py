"""Save and share SAMF's classes: folders that load without this package, and pushes with a model card."""

import contextlib
import copy
import os
import stat
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from .adapters_samf import (
    active_adapter,
    adapter_base,
    base_problem,
    base_revision,
    load_full_parts,
    save_wrapped_adapter,
)
from .configuration_samf import SamfConfig
from .model_card import README, CardSettings, hub_id, is_generated, make_card, write_model_card
from .pipeline_samf import CUSTOM_PIPELINES  # so the library copies the pipeline's code with the model's
from .quantization_samf import register as register_quantization
from .workarounds_samf import own_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _ModelBase
else:
    _ModelBase = object  # the models inherit PreTrainedModel themselves

logger = logging.get_logger(__name__)

# What quantisation leaves as it is: every part except the language model's layers.
_WHOLE_PARTS = ("slice_encoder", "slice_position", "aggregator", "fusion", "finding_head", "lm_head")
_HUB_OPTIONS = ("repo_id", "commit_message", "create_pr", "private", "token", "revision", "tags")


class PushToHubWithCard:
    """`push_to_hub` with the library's arguments, which never overwrites a model card that a person wrote or changed.

    The library's own puts an empty form into a new repository, and then keeps it. Here `model_card` makes the card of a
    repository that has none, or whose card is generated and unchanged.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the module of remote code in its package.

        The library loads the module of a remote class without doing so. dill, and so `datasets` when it hashes a function
        that uses the class, then doesn't find the class by name and pickles it by value, without end.
        """
        super().__init_subclass__(**kwargs)
        package, _, name = cls.__module__.rpartition(".")
        if package in sys.modules and cls.__module__ in sys.modules:
            setattr(sys.modules[package], name, sys.modules[cls.__module__])

    def model_card(self, repository: str | None = None, tags: Sequence[str] = ()) -> ModelCard | None:
        """Return the card of this object; None = it is no model, and its repository gets no card.

        Args:
            repository: the repository's Hub id.
            tags: added to those of the card.
        """
        return None

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> CommitInfo:
        """Save into a temporary folder and upload it, as the library does.

        Args:
            repo_id: the repository's name, with or without its namespace; created if it doesn't exist.
            commit_message: None = "Upload" and the class's name.
            commit_description: the commit's description.
            private: whether a new repository is private.
            token: of the Hub; None = the one you are logged in with.
            revision: the branch to push to; created if it doesn't exist.
            create_pr: open a pull request instead of a commit.
            max_shard_size: the largest file of weights.
            tags: added to those of a generated card.
        """
        with tempfile.TemporaryDirectory() as folder:
            cast(Any, self).save_pretrained(folder, max_shard_size=max_shard_size)
            return self._push_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                tags=tags or (),
                create_pr=create_pr,
                commit_message=commit_message,
                commit_description=commit_description,
            )

    def _push_folder(
        self,
        folder: str | os.PathLike,
        repo_id: str,
        *,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        tags: Sequence[str] = (),
        commit_message: str | None = None,
        **options: Any,
    ) -> CommitInfo:
        """Upload a folder that this object was saved in; `options` are further ones of `HfApi.upload_folder`."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        ignored = None
        if has_own_card(repo_id, revision, token):
            ignored = [README]
        elif (card := self.model_card(repo_id, tags)) is not None:
            write_model_card(folder, card)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=Path(folder),
            revision=revision,
            ignore_patterns=ignored,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            **options,
        )


def restrict_to_language_model(quantization_config: Any) -> Any:
    """Return a copy of a quantisation configuration that skips all parts except the language model.

    A configuration that already names what it skips, or has no known setting for it, is returned as it is.

    Args:
        quantization_config: a TorchAoConfig, BitsAndBytesConfig or the like.
    """
    for name in ("modules_to_not_convert", "llm_int8_skip_modules"):  # bitsandbytes has the other name
        if getattr(quantization_config, name, "unknown") is None:
            quantization_config = copy.copy(quantization_config)
            skipped = [f"{prefix}{part}" for part in _WHOLE_PARTS for prefix in ("", "model.")]
            setattr(quantization_config, name, skipped)
            break
    return quantization_config


class HubModel(PushToHubWithCard, _ModelBase):
    """Mixin of the models: what they save is a whole repository, also an adapter's folder."""

    config: SamfConfig

    def model_card(
        self, repository: str | None = None, tags: Sequence[str] = (), **settings: Unpack[CardSettings]
    ) -> ModelCard:
        """Return the card of this model or its adapter.

        Args:
            repository: the repository's Hub id.
            tags: added to those of the card.
            **settings: further arguments of `make_card`, which the model doesn't know itself.
        """
        adapter = active_adapter(self)
        parts = (self.config.vision_config, self.config.text_config)
        whole = self.config._name_or_path if adapter is None else adapter.base_model_name_or_path
        known: CardSettings = {
            "base_models": [whole] if hub_id(whole) else [part._name_or_path for part in parts],
            "adapter": adapter is not None,
        }
        known.update(settings)
        return make_card(self.config, repository=repository, tags=tags, **known)

    def save_pretrained(  # type: ignore[override]  # further arguments are in kwargs
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as the library does, with a model card, and for an adapter with config.json and the code.

        A model that peft has wrapped (`get_peft_model`) saves its adapter too: `peft_model.get_base_model()`'s
        `save_pretrained` and `push_to_hub` write a folder that loads as a whole; peft's own write only the adapter.

        Args:
            save_directory: created if it doesn't exist; a model card that is already there is kept.
            is_main_process: whether this process writes.
            state_dict: the weights to save; None = the model's.
            push_to_hub: upload the files that were written.
            **kwargs: as in the library; with `push_to_hub` also `repo_id` and the other arguments of a push.

        Raises:
            ValueError: `push_to_hub` of an adapter whose base model isn't on the Hub.
        """
        hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if push_to_hub and name in kwargs}
        before = _modified(save_directory)
        adapter = active_adapter(self)
        with own_class(self):
            self._name_auto_model()
            if adapter is None or self._hf_peft_config_loaded:
                super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
            elif is_main_process:
                save_wrapped_adapter(self, Path(save_directory), state_dict)
        if not is_main_process:
            return
        publish_weights(save_directory)
        if adapter is not None:
            self.save_config_and_code(save_directory)
            if hub_id(adapter.base_model_name_or_path) is None:
                logger.warning_once(f"Saved an adapter that others can't load yet: {base_problem(adapter)}")
        if not (Path(save_directory) / README).exists():
            write_model_card(save_directory, self.model_card())
        if push_to_hub:
            self._check_pushable()
            written = [name for name, time in _modified(save_directory).items() if before.get(name) != time]
            repo_id = hub.pop("repo_id", None) or Path(save_directory).resolve().name
            self._push_folder(save_directory, repo_id, allow_patterns=[*written, README], **hub)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:  # type: ignore[override]
        """Push as [`PushToHubWithCard.push_to_hub`] does.

        Args:
            repo_id: the repository's name.
            **kwargs: its further arguments.

        Raises:
            ValueError: this is an adapter whose base model isn't on the Hub.
        """
        self._check_pushable()
        return super().push_to_hub(repo_id, **kwargs)

    def save_config_and_code(self, folder: str | os.PathLike) -> None:
        """Write config.json with all Auto classes, and the code: what a folder needs in addition to weights."""
        with own_class(self):
            self._name_auto_model()
            custom_object_save(self, folder, config=self.config)  # type: ignore[arg-type]  # takes a configuration too
            self.config.save_pretrained(folder)

    def _name_auto_model(self) -> None:
        """Enter a whole model as AutoModel's class, also in a configuration of its base model or of older code.

        So is the report pipeline, which `transformers.pipeline` finds by the configuration.
        """
        auto_map = getattr(self.config, "auto_map", None) or {}
        whole = auto_map.get("AutoModelForImageTextToText")
        if whole and whole.rpartition(".")[2] == type(self).__name__:
            auto_map["AutoModel"] = whole
            self.config.custom_pipelines = CUSTOM_PIPELINES

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> "HubModel":
        """Load a model as the library does; from an adapter's folder, its base model with the adapter.

        The library takes a folder with both config.json and adapter_config.json for a base model whose weights are in
        the folder too.

        A `quantization_config` that doesn't name the modules to skip quantises only the language model: it has nearly all
        of the weights, and the small parts before it lose more than they save.

        Args:
            pretrained_model_name_or_path: Hub id or folder of a model or an adapter.
            *args: as in the library.
            **kwargs: as in the library.

        Raises:
            ImportError: the folder holds an adapter, and peft is missing.
            ValueError: the adapter names no base model.
            FileNotFoundError: the adapter's base model was a folder that no longer exists.
        """
        register_quantization()
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = restrict_to_language_model(kwargs["quantization_config"])
        base = adapter_base(pretrained_model_name_or_path)
        if base is not None:
            adapter = {"_adapter_model_path": str(pretrained_model_name_or_path)}
            kwargs["adapter_kwargs"] = {**(kwargs.get("adapter_kwargs") or {}), **adapter}
            if (revision := base_revision(pretrained_model_name_or_path, base)) is not None:
                kwargs.setdefault("revision", revision)
            pretrained_model_name_or_path = base
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def load_adapter(
        self, peft_model_id: str | None = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load an adapter as the library does, with the parts trained in full, which older transformers leave out.

        Args:
            peft_model_id: Hub id or folder of the adapter.
            adapter_name: its name in the model; None = "default".
            *args: as in the library.
            **kwargs: as in the library.
        """
        info = cast(Any, super().load_adapter(peft_model_id, adapter_name, *args, **kwargs))
        if any(".modules_to_save." in key for key in info.missing_keys):
            weights, options = kwargs.get("adapter_state_dict"), kwargs.get("adapter_kwargs") or {}
            missing = load_full_parts(self, peft_model_id, adapter_name or "default", weights, options)
            info.missing_keys = {key for key in info.missing_keys if key in missing}
        return info

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights as torch does, also under the names that `save_pretrained` writes.

        The library saves the weights of some slice encoders, ViT's among them, under other names than they have in the
        model. `from_pretrained` translates them; Trainer, which resumes and reloads its best model by this method,
        doesn't, and would leave those weights unchanged.

        Args:
            state_dict: weights by either kind of name.
            strict: as in torch.
            assign: as in torch.
        """
        own = {name: torch.empty(tensor.shape, device="meta") for name, tensor in self.state_dict().items()}
        names = {id(tensor): name for name, tensor in own.items()}
        saved = {name: names[id(t)] for name, t in revert_weight_conversion(self, own).items() if id(t) in names}
        if any(saved.get(name, name) != name for name in state_dict):
            state_dict = {saved.get(name, name): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(state_dict, strict, assign)

    def _check_pushable(self) -> None:
        adapter = active_adapter(self)
        if adapter is not None and hub_id(adapter.base_model_name_or_path) is None:
            raise ValueError(f"An adapter can't be pushed: {base_problem(adapter)}")


def publish_weights(folder: str | os.PathLike) -> None:
    """Give a folder's safetensors files the permissions that a new file there gets.

    safetensors 0.8 makes files that only their owner can read, which is wrong on a shared disk.
    """
    files = [file for file in Path(folder).glob("*.safetensors") if not file.is_symlink()]
    if not files:
        return
    probe = Path(folder) / f".{uuid.uuid4().hex}.tmp"  # shows the umask and the permissions that the folder passes on
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()
    for file in files:
        found = stat.S_IMODE(file.stat().st_mode)
        if found | mode != found:
            with contextlib.suppress(PermissionError):  # another user's file, which was there before
                file.chmod(found | mode)


def has_own_card(repo_id: str, revision: str | None = None, token: bool | str | None = None) -> bool:
    """Return whether a repository on the Hub has a card that a person wrote or changed.

    Args:
        repo_id: the repository's Hub id.
        revision: branch, tag or commit; None = main.
        token: of the Hub; None = the one you are logged in with.
    """
    api = HfApi(token=token)
    if not api.file_exists(repo_id, README, revision=revision):
        return False
    path = Path(api.hf_hub_download(repo_id, README, revision=revision))
    return not is_generated(path.read_text(encoding="utf-8"))


def _modified(folder: str | os.PathLike) -> dict[str, int]:
    """Return when each file of a folder was written, in nanoseconds; nothing for a folder that doesn't exist."""
    if not Path(folder).is_dir():
        return {}
    return {path.name: path.stat().st_mtime_ns for path in Path(folder).iterdir() if path.is_file()}
