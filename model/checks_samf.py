"""Checks of the model's inputs: each raises an error that says what was found, what was expected and what to do."""

from collections.abc import Callable, Iterable
from typing import cast

import torch
from transformers.utils import logging
from transformers.utils.generic import TransformersKwargs
from transformers.utils.import_utils import is_torchdynamo_exporting, torch_compilable_check

from .configuration_samf import SamfConfig
from .constants_samf import IGNORE_INDEX
from .inputs_samf import PromptInputs, VolumeInputs

logger = logging.get_logger(__name__)

# Arguments that forward passes on to the language model without TransformersKwargs listing them.
_PASSED_ON = {"cache", "past_key_values", "use_cache", "cache_position", "return_dict", "output_router_logits"}


def check(condition: torch.Tensor, message: str | Callable[[], str], compiled_message: str | None = None) -> None:
    """Raise an error unless all of `condition` holds, without a graph break.

    Args:
        condition: bool, of any shape.
        message: the text, or a function that returns it.
        compiled_message: the text in a compiled graph, which can't format numbers. None = `message`, then a string.

    Raises:
        ValueError: in eager mode and while exporting.
        RuntimeError: in a compiled graph.
    """
    if torch.compiler.is_compiling() and not is_torchdynamo_exporting():
        torch._assert_async(condition.all(), compiled_message or cast(str, message))
    else:
        torch_compilable_check(condition, message)


# --- Volumes ----------------------------------------------------------------------------------------------------------


def check_pixels(pixel_values: torch.Tensor) -> None:
    """Raise ValueError unless pixel_values has five dimensions."""
    if pixel_values.ndim != 5:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}; expected (volumes, slices, channels, height, width)."
        )


def check_slice_places(planes: torch.Tensor | None, positions: torch.Tensor | None) -> None:
    """Raise ValueError unless planes and positions come together, and positions in float32.

    bfloat16 would move a slice by a tenth of the distance to its neighbour.
    """
    if (planes is None) != (positions is None):
        given, missing = (
            ("slice_planes", "slice_positions") if positions is None else ("slice_positions", "slice_planes")
        )
        raise ValueError(f"{given} came without {missing}. Pass both, as the processor returns them, or neither.")
    if positions is not None and positions.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"slice_positions are {positions.dtype}, too coarse to tell neighbouring slices apart. Keep them float32 "
            "(the processor's outputs do under .to(device, dtype)), or pass the bits: positions.float().view(torch.int32)."
        )


def check_slice_shapes(slices: torch.Tensor, **given: torch.Tensor | None) -> None:
    """Raise ValueError unless all that is given of slices (B, S, D) is (B, S).

    Broadcasting would show one volume to every prompt.

    Args:
        slices: slice embeddings (B, S, D).
        given: tensors by the names of their arguments.
    """
    for name, value in given.items():
        if value is not None and value.shape != slices.shape[:2]:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected (volumes, slices), here {tuple(slices.shape[:2])}, "
                "with padding where a volume has fewer slices."
            )


# --- Prompts ----------------------------------------------------------------------------------------------------------


def check_inputs(prompt: PromptInputs, volume: VolumeInputs) -> None:
    """Raise ValueError unless there is one kind of text, or a volume only."""
    has_ids, has_embeds = prompt.input_ids is not None, prompt.inputs_embeds is not None
    has_volume = volume.pixel_values is not None or volume.slice_embeddings is not None
    if (has_ids and has_embeds) or not (has_ids or has_embeds or has_volume):
        raise ValueError("Pass exactly one of input_ids and inputs_embeds, or only a volume.")


def check_placeholders(config: SamfConfig, image_mask: torch.Tensor, slice_mask: torch.Tensor) -> None:
    """Raise an error unless each prompt has as many placeholders as its volume has image tokens, none without a volume.

    Args:
        config: for the number of image tokens.
        image_mask: (B, T) bool, True = placeholder.
        slice_mask: (B, S) bool, True = a slice.
    """
    if image_mask.shape[0] != slice_mask.shape[0]:
        raise ValueError(
            f"{slice_mask.shape[0]} volumes for {image_mask.shape[0]} prompts; give one volume for each prompt, and an "
            "all-False row of slice_mask for a prompt without one."
        )
    expected = slice_mask.to(image_mask.device).sum(dim=1)
    if config.fusion_type != "slice_tokens":
        expected = (expected > 0) * config.num_image_tokens
    found = image_mask.sum(dim=1)
    check(
        found == expected,
        lambda: (
            f"Image features and image tokens do not match: the prompts hold {found.tolist()} placeholder tokens "
            f"(id {config.image_token_id}), the volumes give {expected.tolist()}. Let the processor expand the "
            "placeholder, and don't truncate its output. (Placeholders after the end of prompt_mask don't count: "
            "pad it with the ids.)"
        ),
        "Image features and image tokens do not match: the volumes don't have as many image tokens as the prompts placeholders",
    )


def check_no_placeholders(image_token_id: int, image_mask: torch.Tensor, others: Iterable[str]) -> None:
    """Raise an error if a prompt without a volume has placeholders.

    Args:
        image_token_id: the placeholder's id.
        image_mask: (B, T) bool, True = placeholder.
        others: names of the further arguments of `forward`, one of which may be misspelt.
    """

    def message() -> str:
        unknown = sorted(set(others) - TransformersKwargs.__optional_keys__ - _PASSED_ON)
        also = f" (forward got {', '.join(unknown)}, which it doesn't know)" if unknown else ""
        return (
            f"Image features and image tokens do not match: the prompts hold {image_mask.sum(dim=1).tolist()} "
            f"placeholder tokens (id {image_token_id}), but no volume came with them{also}. Pass all that the processor "
            "returns, pixel_values too (TRL's trainers do so for a data set whose `images` column names the volumes), or "
            "leave the placeholder out of a prompt without a volume."
        )

    check(
        ~image_mask.any(),
        message,
        "Image features and image tokens do not match: placeholder tokens, but no volume",
    )


def check_placeholder_row(rows: int | None, image_token_id: int) -> None:
    """Raise ValueError if the placeholder has no embedding; torch would only report an index out of range."""
    if rows is not None and image_token_id >= rows:
        raise ValueError(
            f"config.image_token_id is {image_token_id}, but the language model embeds {rows} tokens. Call "
            "resize_token_embeddings, or choose a placeholder among its tokens."
        )


def check_resize(config: SamfConfig, rows: int, new_rows: int | None) -> None:
    """Raise ValueError if a resize would drop the placeholder's row, and warn if it drops others.

    Args:
        config: for the placeholder's id.
        rows: rows of the input embeddings.
        new_rows: rows after the resize; None = unchanged.
    """
    if new_rows is None or new_rows >= rows:
        return
    if new_rows <= config.image_token_id:
        raise ValueError(
            f"resize_token_embeddings({new_rows}) would cut off the image placeholder's row {config.image_token_id}. The "
            f"model has {rows} rows: it needs no resize for fewer tokens."
        )
    logger.warning(
        "resize_token_embeddings(%d) cuts off %d of %d rows. A tokenizer with fewer tokens than the model has rows needs "
        "no resize.",
        new_rows,
        rows - new_rows,
        rows,
    )


def check_text_is_known(config: SamfConfig, prompt: PromptInputs, training: bool, length: int, cached: int) -> None:
    """Raise ValueError if the fusion's text would have to be guessed.

    In training the answer is among the tokens, and a non-empty cache hides the tokens before the volume.

    Args:
        config: for the fusion's text scope.
        prompt: the inputs of `forward`.
        training: whether the model is in training mode.
        length: number of tokens T of the prompts.
        cached: number of tokens in the cache.
    """
    scope, mask = config.fusion_text_scope, prompt.prompt_mask
    if training and mask is None and prompt.labels is None and scope == "prompt":
        raise ValueError(
            "A training forward with a volume got neither labels nor prompt_mask: the fusion would read the answer, "
            "which leaks into the image tokens. Pass prompt_mask (B, T), True on the prompt's tokens: the processor "
            "returns it for a conversation or a text with an answer in it. Losses that are computed outside the model "
            "(label_smoothing_factor, compute_loss_func, preference and reward training) remove the labels and need it. "
            "For inference call model.eval()."
        )
    if cached and prompt.prefix_ids is None and (mask is None or mask.shape[1] != length):
        raise ValueError(
            f"The cache holds {cached} tokens before the volume, and the fusion reads the whole prompt's text: pass "
            "their ids as prefix_ids (generate() does, given the whole sequence), or a prompt_mask for only these "
            f"{length} tokens."
        )


# --- Findings ---------------------------------------------------------------------------------------------------------


def check_findings_are_trained(training: bool) -> None:
    """Raise ValueError in training: with a text and no labels, the loss is computed outside the model."""
    if training:
        raise ValueError(
            "finding_targets came with a text and no labels: a loss that is computed outside the model "
            "(label_smoothing_factor, compute_loss_func) would drop the findings' loss. Leave that out, or remove "
            "finding_targets from the batch, or train the findings on volumes without a text."
        )


def check_finding_targets(
    names: list[str], targets: torch.Tensor, has_volume: bool, slice_mask: torch.Tensor | None
) -> None:
    """Raise an error if targets don't fit the findings head, or are known for a row without a volume.

    Args:
        names: `config.finding_names`.
        targets: (B, L), 0, 1 or -100 for unknown.
        has_volume: whether the batch has a volume at all.
        slice_mask: (B, S) bool; a row that is all False has none.
    """
    if not names or targets.ndim != 2 or targets.shape[1] != len(names):
        raise ValueError(
            f"finding_targets has shape {tuple(targets.shape)}, and config.finding_names has {len(names)} names: a model "
            "with a findings head takes (volumes, names), one without takes none."
        )
    known = targets != IGNORE_INDEX
    check((targets == 0) | (targets == 1) | ~known, "finding_targets holds other values than 0, 1 and -100.")
    present = torch.ones_like(known[:, :1]) if has_volume else torch.zeros_like(known[:, :1])
    if slice_mask is not None:
        present = present & slice_mask.to(known.device).bool().any(dim=1, keepdim=True)
    check(present | ~known, "finding_targets holds 0 or 1 for a prompt without a volume; give -100 for it.")
