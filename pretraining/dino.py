"""DINO on CT slices: a student ViT predicts from every crop of a slice what its teacher predicts from the large crops.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", https://arxiv.org/abs/2104.14294, with
lightly's crops, head and loss. The teacher is the student's moving average, and the result of a run.
"""

import inspect
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

try:
    from lightly.loss import DINOLoss
    from lightly.models.modules.heads import DINOProjectionHead
    from lightly.models.utils import update_momentum
    from lightly.transforms import DINOTransform
except ImportError:
    DINOLoss = None


def _require_lightly() -> None:
    """Raise ImportError where lightly is missing; recipes can be read without it."""
    if DINOLoss is None:
        raise ImportError("DINO needs lightly: pip install 'lightly>=1.6'")


@dataclass
class DinoArguments:
    """DINO's crops, head and schedules. The weight decay starts at the Trainer's `weight_decay`."""

    local_crops: int = field(default=8, metadata={"help": "small crops of a slice, in addition to the two large ones"})
    local_crop_size: int = field(default=96, metadata={"help": "pixels per side, a multiple of the patch size"})
    global_crop_scale: list[float] = field(
        default_factory=lambda: [0.25, 1.0], metadata={"help": "area of large crops"}
    )
    local_crop_scale: list[float] = field(
        default_factory=lambda: [0.05, 0.25], metadata={"help": "area of small crops"}
    )
    horizontal_flip: float = field(
        default=0.0,
        metadata={"help": "probability; DINO's is 0.5, but an encoder trained with flips can't learn laterality"},
    )
    jitter: float = field(default=1.0, metadata={"help": "factor on DINO's jitter of brightness and contrast"})
    solarize: float = field(default=0.0, metadata={"help": "probability for the second large crop; DINO's is 0.2"})
    head_dim: int = field(default=65536, metadata={"help": "prototypes, the head's output"})
    head_hidden_dim: int = field(default=2048)
    head_bottleneck_dim: int = field(default=256)
    norm_last_layer: bool = field(default=True, metadata={"help": "keep the prototypes at unit length"})
    freeze_last_layer: float = field(default=1.0, metadata={"help": "epochs in which the prototypes aren't trained"})
    teacher_momentum: float = field(default=0.996, metadata={"help": "at the start; rises to 1 along a cosine"})
    teacher_temp_start: float = field(default=0.04)
    teacher_temp: float = field(default=0.07, metadata={"help": "after its warm-up"})
    teacher_temp_warmup: float = field(
        default=0.3, metadata={"help": "share of training over which the teacher's temperature rises"}
    )
    student_temp: float = field(default=0.1)
    center_momentum: float = field(default=0.9)
    weight_decay_end: float = field(default=0.4, metadata={"help": "reached along a cosine at the end"})


class DinoViews(Dataset):
    """The crops of slices: item (epoch, index) has `global_crops` (2, C, H, W) and `local_crops` (L, C, h, w).

    They depend on (seed, epoch, index) only.

    Args:
        slices: Gives uint8 (3, H, W).
        args: Number, sizes and augmentations of the crops.
        size: Pixels per side of the large crops.
        mean: Of each channel, for pixels from 0 to 1.
        std: Of each channel, for pixels from 0 to 1.
        seed: Of the augmentations.
    """

    def __init__(
        self, slices: Dataset, args: DinoArguments, size: int, mean: Sequence[float], std: Sequence[float], seed: int
    ):
        _require_lightly()
        self.slices, self.seed = slices, seed
        self.transform = DINOTransform(
            global_crop_size=size,
            global_crop_scale=tuple(args.global_crop_scale),
            local_crop_size=args.local_crop_size,
            local_crop_scale=tuple(args.local_crop_scale),
            n_local_views=args.local_crops,
            hf_prob=args.horizontal_flip,
            # The factor scales brightness and contrast, because lightly ignores cj_strength for the second large crop.
            cj_bright=0.8 * args.jitter,
            cj_contrast=0.8 * args.jitter,
            # Hue, saturation and grey mix the channels, which are HU windows or three times the same image.
            cj_sat=0,
            cj_hue=0,
            random_gray_scale=0,
            solarization_prob=args.solarize,
            normalize={"mean": list(mean), "std": list(std)},
        )

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = key
        pixels = np.asarray(self.slices[index])
        if pixels.ndim != 3 or pixels.shape[0] != 3:
            raise ValueError(
                f"A slice has shape {pixels.shape}; DINO's crops need three channels (channels, height, width). Use three "
                f"HU windows."
            )
        seed = int(np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0])
        numpy_state = np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            np.random.seed(seed)  # lightly's blur and solarisation draw from numpy
            views = self.transform(Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))))
        np.random.set_state(numpy_state)
        crops = {"global_crops": torch.stack(views[:2])}
        return crops | ({"local_crops": torch.stack(views[2:])} if len(views) > 2 else {})


class DinoBranch(nn.Module):
    """A slice encoder and DINO's head on its CLS embedding.

    Args:
        encoder: The slice encoder.
        args: Sizes of the head.
    """

    def __init__(self, encoder: PreTrainedModel, args: DinoArguments):
        super().__init__()
        self.encoder = encoder
        self.head = DINOProjectionHead(
            encoder.config.hidden_size,
            args.head_hidden_dim,
            args.head_bottleneck_dim,
            args.head_dim,
            norm_last_layer=args.norm_last_layer,
        )
        # Encoders that always interpolate their positions don't have the argument.
        has_option = "interpolate_pos_encoding" in inspect.signature(encoder.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if has_option else {}

    def forward(self, *crops: torch.Tensor) -> torch.Tensor:
        """Return the prototypes' scores, (sum of N_i, head_dim), of crops (N_i, C, H_i, W_i) of one size each."""
        embeddings = [self.encoder(pixel_values=part, **self.options).last_hidden_state[:, 0] for part in crops]
        return self.head(torch.cat(embeddings))


class DinoModel(nn.Module):
    """Student and teacher. `forward` computes the student's loss; the training loop calls `update_teacher` after each step.

    Args:
        encoder: Becomes the student; the teacher starts as its copy.
        args: Sizes of the head, and temperatures.
    """

    def __init__(self, encoder: PreTrainedModel, args: DinoArguments):
        _require_lightly()
        super().__init__()
        for name, parameter in encoder.named_parameters():
            if "mask_token" in name:  # for other objectives; DDP waits for the gradient of every trained weight
                parameter.requires_grad_(False)
        self.student = DinoBranch(encoder, args)
        self.teacher = DinoBranch(deepcopy(encoder), args)
        self.teacher.load_state_dict(self.student.state_dict())  # the head's weight norm can't be deep-copied
        self.teacher.requires_grad_(False)
        self.loss = DINOLoss(
            args.head_dim,
            student_temp=args.student_temp,
            center_momentum=args.center_momentum,
            warmup_teacher_temp_epochs=1,
        )
        self.teacher_temp = args.teacher_temp

    def forward(self, global_crops: torch.Tensor, local_crops: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return {"loss": …}, the mean over slices and pairs of crops.

        Args:
            global_crops: (B, 2, C, H, W).
            local_crops: (B, L, C, h, w); None = no small crops.
        """
        large = _by_view(global_crops)  # (2·B, C, H, W)
        crops = [large] if local_crops is None else [large, _by_view(local_crops)]
        with torch.no_grad():
            teacher = self.teacher(large)  # (2·B, prototypes)
        student = self.student(*crops)  # ((2 + L)·B, prototypes)
        views = len(student) // len(global_crops)
        with torch.autocast(student.device.type, enabled=False):  # sums over all prototypes would be rounded
            return {"loss": self.loss(teacher.float().chunk(2), student.float().chunk(views), self.teacher_temp)}

    def train(self, mode: bool = True) -> "DinoModel":
        """Set the student's mode; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Set teacher = momentum · teacher + (1 - momentum) · student."""
        update_momentum(self.student, self.teacher, momentum)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Enable gradient checkpointing in the student; the teacher has no gradients."""
        self.student.encoder.gradient_checkpointing_enable(**kwargs)


def _by_view(crops: torch.Tensor) -> torch.Tensor:
    """Reorder crops (B, V, …) to (V·B, …): all slices of the first view, then of the second."""
    return crops.transpose(0, 1).flatten(0, 1)


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """Return a value that goes from `start` to `end` along half a cosine.

    Args:
        step: Optimizer steps so far.
        steps: Step at which `end` is reached.
        start: Value at step 0.
        end: Value from step `steps` on.
    """
    return end + (start - end) * (1 + math.cos(math.pi * min(step, steps) / max(steps, 1))) / 2


class DinoSchedules(TrainerCallback):
    """A callback for what changes with the steps: teacher's temperature, weight decay, frozen prototypes, and the teacher.

    Args:
        model: Student and teacher.
        args: The schedules.
    """

    def __init__(self, model: DinoModel, args: DinoArguments):
        self.model, self.args = model, args

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the teacher's temperature and the weight decay of the step.

        Args:
            args: Has the weight decay at the start.
            state: Knows the step.
            control: Unused.
            **kwargs: Hold the `optimizer`.
        """
        risen = min(1.0, state.global_step / max(1.0, self.args.teacher_temp_warmup * state.max_steps))
        self.model.teacher_temp = self.args.teacher_temp_start + risen * (
            self.args.teacher_temp - self.args.teacher_temp_start
        )
        decay = cosine(state.global_step, state.max_steps, args.weight_decay, self.args.weight_decay_end)
        for group in kwargs["optimizer"].param_groups:
            if group["weight_decay"]:  # biases and norms have none
                group["weight_decay"] = decay

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop the prototypes' gradients in the first epochs.

        Args:
            args: Unused.
            state: Knows the epoch.
            control: Unused.
            **kwargs: Unused; what Trainer passes to callbacks.
        """
        if (state.epoch or 0) < self.args.freeze_last_layer:
            for parameter in self.model.student.head.last_layer.parameters():
                parameter.grad = None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the teacher.

        Args:
            args: Unused.
            state: Knows the step.
            control: Unused.
            **kwargs: Unused; what Trainer passes to callbacks.
        """
        self.model.update_teacher(cosine(state.global_step, state.max_steps, self.args.teacher_momentum, 1.0))
