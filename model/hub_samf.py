"""How SAMF's classes are saved and shared: folders that load as a whole, pushes with a model card.

A Hub repository carries this file beside the classes, so it imports nothing of ours but `model_card.py`.
"""

import contextlib
import copy
import json
import os
import stat
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import is_peft_available, logging

from .model_card import README, hub_id, is_generated, make_card, write_model_card

logger = logging.get_logger(__name__)

# What quantisation leaves whole: every part but the language model, and its head.
WHOLE_PARTS = ("slice_encoder", "slice_position", "aggregator", "fusion", "finding_head", "lm_head")

WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*")


class PushToHubWithCard:
    """`push_to_hub` with the library's arguments that leaves alone a card that somebody wrote.

    The library's own gives a new repository an empty form as its card, and then keeps it. Here `model_card` makes the
    card of a repository that has none, or has one that nobody has changed since it was made.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let remote code be found by its name.

        The library loads the module of a remote class without entering it in its package. dill, and so `datasets` when it
        hashes a function that uses the class, then doesn't find the class and takes it apart, without end.
        """
        super().__init_subclass__(**kwargs)
        package, _, name = cls.__module__.rpartition(".")
        if package in sys.modules and cls.__module__ in sys.modules:
            setattr(sys.modules[package], name, sys.modules[cls.__module__])

    def model_card(self, repository: str | None = None, tags: Sequence[str] = ()) -> ModelCard | None:
        """The card for what this object is; None = it is no model, and gives a repository no card."""
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
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
    ) -> CommitInfo:
        """Save into a temporary folder and upload it, as the library does.

        Args:
            repo_id: the repository's name, with or without its namespace; it is made when there is none.
            commit_message, commit_description: of the commit; the message is "Upload" and the class's name by default.
            private: whether a new repository is private.
            token: of the Hub; None = the one you are logged in with.
            revision: the branch to push to; it is made when there is none.
            create_pr: make a pull request instead of a commit.
            max_shard_size: the largest file of weights.
            tags: added to those of a generated card.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
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
            folder_path=folder,
            revision=revision,
            ignore_patterns=ignored,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            **options,
        )


def language_model_alone(quantization_config: Any) -> Any:
    """A copy of a TorchAoConfig, BitsAndBytesConfig or the like that skips all parts but the language model.

    One that names what it skips, or that isn't known to be able to, comes back as it is.
    """
    for name in ("modules_to_not_convert", "llm_int8_skip_modules"):  # bitsandbytes has the other name
        if getattr(quantization_config, name, "unknown") is None:
            quantization_config = copy.copy(quantization_config)
            setattr(quantization_config, name, [f"{prefix}{part}" for part in WHOLE_PARTS for prefix in ("", "model.")])
            break
    return quantization_config


class HubModel(PushToHubWithCard):
    """Of the models: what they save is a whole repository, an adapter's folder included."""

    def model_card(self, repository: str | None = None, tags: Sequence[str] = (), **settings: Any) -> ModelCard:
        """The card of this model or its adapter. `settings` are arguments of `make_card` that it can't know by itself."""
        adapter = self._adapter()
        parts = (self.config.vision_config, self.config.text_config)
        whole = adapter.base_model_name_or_path if adapter else self.config._name_or_path
        bases = [whole] if hub_id(whole) else [part._name_or_path for part in parts]
        settings = {"base_models": bases, "adapter": adapter is not None, **settings}
        return make_card(self.config, repository=repository, tags=tags, **settings)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """The library's, and: a model card where the folder has none, and config.json and the code beside an adapter.

        A model that peft has wrapped (`get_peft_model`) saves its adapter too: `peft_model.get_base_model()`'s
        `save_pretrained` and `push_to_hub` write a folder that loads as a whole, peft's own write the adapter alone.
        """
        names = ("repo_id", "commit_message", "create_pr", "private", "token", "revision", "tags")
        hub = {name: kwargs.pop(name) for name in names if push_to_hub and name in kwargs}
        before = _modified(save_directory)
        adapter = self._adapter()
        self._name_auto_model()
        if adapter is None or self._hf_peft_config_loaded:
            super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)
        elif is_main_process:
            self._save_wrapped_adapter(Path(save_directory), state_dict)
        if not is_main_process:
            return
        publish_weights(save_directory)
        if adapter is not None:
            self.save_config_and_code(save_directory)
            if hub_id(adapter.base_model_name_or_path) is None:
                logger.warning_once(f"Saved an adapter that others can't load yet: {_base_problem(adapter)}")
        if not (Path(save_directory) / README).exists():
            write_model_card(save_directory, self.model_card())
        if push_to_hub:
            self._check_pushable()
            written = [name for name, time in _modified(save_directory).items() if before.get(name) != time]
            repo_id = hub.pop("repo_id", None) or Path(save_directory).resolve().name
            self._push_folder(save_directory, repo_id, allow_patterns=[*written, README], **hub)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """See [`PushToHubWithCard.push_to_hub`]. Raises ValueError for an adapter whose base model isn't on the Hub."""
        self._check_pushable()
        return super().push_to_hub(repo_id, **kwargs)

    def save_config_and_code(self, folder: str | os.PathLike) -> None:
        """Write config.json with all Auto classes, and the code: what a folder needs beside weights or an adapter."""
        self._name_auto_model()
        custom_object_save(self, folder, config=self.config)
        self.config.save_pretrained(folder)

    def _name_auto_model(self) -> None:
        """Enter a whole model as AutoModel's, also where its base model was saved before or older code wrote the folder."""
        auto_map = getattr(self.config, "auto_map", None) or {}
        whole = auto_map.get("AutoModelForImageTextToText")
        if whole and whole.rpartition(".")[2] == type(self).__name__:
            auto_map["AutoModel"] = whole

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> "HubModel":
        """The library's; the folder of an adapter loads its base model, and the adapter on it.

        The library takes a folder with both config.json and adapter_config.json for a base model that has its weights
        beside its adapter.

        A `quantization_config` that doesn't name the modules to leave whole quantises the language model alone: it has
        nearly all of the weights, and the small parts before it lose more than they save.
        """
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = language_model_alone(kwargs["quantization_config"])
        base = adapter_base(pretrained_model_name_or_path)
        if base is not None:
            adapter = {"_adapter_model_path": str(pretrained_model_name_or_path)}
            kwargs["adapter_kwargs"] = {**(kwargs.get("adapter_kwargs") or {}), **adapter}
            pretrained_model_name_or_path = base
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def load_adapter(
        self, peft_model_id: str | None = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The library's, and the parts trained in full beside the adapter, which older transformers leave out."""
        info = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        if any(".modules_to_save." in key for key in info.missing_keys):
            try:
                from peft import load_peft_weights, set_peft_model_state_dict
            except ImportError as error:
                raise ImportError(f"{peft_model_id} is an adapter: pip install peft") from error
            weights = kwargs.get("adapter_state_dict")
            if weights is None:
                names = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")
                hub = {name: value for name, value in (kwargs.get("adapter_kwargs") or {}).items() if name in names}
                weights = load_peft_weights(str(peft_model_id), device="cpu", **hub)
            prefix = "base_model.model."
            if not hasattr(self, self.base_model_prefix):  # the adapter of a model with its head, on one without
                prefix += f"{self.base_model_prefix}."
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
            missing = set_peft_model_state_dict(self, weights, adapter_name or "default").missing_keys
            info.missing_keys = {key for key in info.missing_keys if key in missing}
        return info

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """torch's, which also understands the names that `save_pretrained` writes.

        The library writes the weights of some slice encoders, ViT's among them, under other names than they have in the
        model. `from_pretrained` knows that; Trainer, which resumes and fetches its best model by this method, doesn't,
        and would leave those weights as they are.
        """
        own = {name: torch.empty(tensor.shape, device="meta") for name, tensor in self.state_dict().items()}
        names = {id(tensor): name for name, tensor in own.items()}
        saved = {name: names[id(t)] for name, t in revert_weight_conversion(self, own).items() if id(t) in names}
        if any(saved.get(name, name) != name for name in state_dict):
            state_dict = {saved.get(name, name): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(state_dict, strict, assign)

    def _adapter(self) -> Any:
        """The peft configuration of the adapter in use, or None; from `add_adapter` as from `get_peft_model`."""
        configs = getattr(self, "peft_config", None) or {}
        # A merged adapter can leave its configuration behind, but no wrapped layer.
        layers = (module for module in self.modules() if hasattr(module, "base_layer")) if configs else ()
        for layer in layers:
            name = layer.active_adapter
            return configs[name if isinstance(name, str) else name[0]]
        return None

    def _save_wrapped_adapter(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        """What peft's `PeftModel.save_pretrained` writes, but its card."""
        try:
            from peft import get_peft_model_state_dict
        except ImportError as error:
            raise ImportError("This model has an adapter: pip install peft") from error
        folder.mkdir(parents=True, exist_ok=True)
        config = copy.copy(self._adapter())
        name = next(name for name, found in self.peft_config.items() if found is self._adapter())
        weights = get_peft_model_state_dict(self, state_dict, adapter_name=name)
        # Cloned, for peft may give views of shared memory, which safetensors refuses.
        weights = {f"base_model.model.{key}": value.detach().clone().contiguous() for key, value in weights.items()}
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.inference_mode = True
        config.save_pretrained(folder)

    def _check_pushable(self) -> None:
        adapter = self._adapter()
        if adapter is not None and hub_id(adapter.base_model_name_or_path) is None:
            raise ValueError(f"An adapter can't be pushed: {_base_problem(adapter)}")


def _base_problem(adapter: Any) -> str:
    base = adapter.base_model_name_or_path
    found = f"the folder {base} of this machine" if base else "not known by any name"
    return (
        f"its base model is {found}. Push the base model first, load it by its Hub id and train the adapter on that, or set "
        "peft_config[...].base_model_name_or_path to that id."
    )


def publish_weights(folder: str | os.PathLike) -> None:
    """Give a folder's safetensors files the permissions that a new file there gets.

    safetensors 0.8 makes files that only their owner can read; on a disk that several people share, others may have to.
    """
    files = [file for file in Path(folder).glob("*.safetensors") if not file.is_symlink()]
    if not files:
        return
    probe = Path(folder) / f".{uuid.uuid4().hex}.tmp"  # tells the umask, and what the folder passes on
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()
    for file in files:
        found = stat.S_IMODE(file.stat().st_mode)
        if found | mode != found:
            with contextlib.suppress(PermissionError):  # another's file, which was there before
                file.chmod(found | mode)


def adapter_base(folder: str | os.PathLike | None) -> str | None:
    """The base model of a local folder that holds an adapter and no model; None for anything else.

    A base model's folder within the adapter's, or for a run's checkpoint beside it, counts before the path that was noted:
    the whole may have been moved or copied.

    Raises:
        ImportError: it is such a folder, and peft is missing.
        ValueError: the adapter names no base model.
        FileNotFoundError: its base model was a folder that isn't there any more.
    """
    config = Path(folder or "") / "adapter_config.json"
    if folder is None or not config.is_file() or any(any(Path(folder).glob(pattern)) for pattern in WEIGHTS):
        return None
    if not is_peft_available():
        raise ImportError(f"{folder} holds an adapter: pip install peft")
    base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{config}: base_model_name_or_path is missing; set it to the base model's Hub id or folder.")
    own = Path(folder).resolve()
    name = PureWindowsPath(base).name  # the last part of either kind of path
    places = [own, own.parent] if own.name.startswith("checkpoint-") else [own]
    moved = next((place / name for place in places if (place / name / "config.json").is_file()), None)
    if moved is not None and hub_id(base) is None:
        return str(moved)
    if hub_id(base) is None and not Path(base).is_dir():
        raise FileNotFoundError(
            f"{config}: its base model is {base}, which isn't there, and neither is {own / name}. Put the base model's "
            "folder there, or set base_model_name_or_path to its new place or Hub id."
        )
    return base


def has_own_card(repo_id: str, revision: str | None = None, token: bool | str | None = None) -> bool:
    """Whether the repository on the Hub has a card that somebody wrote or changed."""
    api = HfApi(token=token)
    if not api.file_exists(repo_id, README, revision=revision):
        return False
    path = Path(api.hf_hub_download(repo_id, README, revision=revision))
    return not is_generated(path.read_text(encoding="utf-8"))


def _modified(folder: str | os.PathLike) -> Mapping[str, int]:
    """When each file of a folder was written; nothing for a folder that isn't there."""
    if not Path(folder).is_dir():
        return {}
    return {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(folder) if entry.is_file()}
