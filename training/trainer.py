"""Stage 3's Trainer. A finished run's folder is a complete Hub repository."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub import HfApi
from torch import nn
from torch.utils.data import Sampler
from transformers.utils import ModelOutput

from samf.data.mixture import TaskMixture
from samf.data.schema import IGNORE_INDEX
from samf.model.hub_samf import has_own_card
from samf.model.model_card import README, is_generated, write_model_card
from samf.training.arguments import MonitorArguments
from samf.training.datasets import has_text_only_records
from samf.training.flops import StepFlops, can_count, known_peak
from samf.training.image_grounding import SliceWeights, measure_gap, warn_if_not_grounded
from samf.training.launchers import (
    NO_SAMPLES,
    float32_names,
    float32_weights,
    has_volume,
    is_sharded,
    is_zero3,
    keep_float32_losses,
    touch_unread_parts,
    whole_count,
    whole_state_dict,
)
from samf.training.param_groups import PartRates, split_by_part
from samf.training.random_state import preserved_random_state
from samf.training.repository import CardSettings, check_whole, validation_losses
from samf.training.sample_generation import SampleWriter
from samf.training.sampling import RecordOrder, SetEpoch, order_seed
from samf.training.shard_order import ShardWindow
from samf.training.throughput import Throughput, drop_counts
from samf.training.trackers import show_sample
from samf.training.trainer_base import StoppableTrainer
from samf.utils.packaged import REQUIREMENTS

logger = logging.getLogger(__name__)

Batch: TypeAlias = dict[str, torch.Tensor]


class SamfTrainer(StoppableTrainer):
    """A Trainer whose folders and pushes are complete, with SAMF's model card, and whose log shows what a loss hides.

    Trainer itself overwrites README.md with a draft at the last push, and peft saves only the adapter.

    Args:
        *args: As for `StoppableTrainer`.
        card: Facts for the model card that the model doesn't know.
        rates: Learning rates by part; see `samf.training.param_groups`.
        monitor: What is measured during training.
        samples: Generates and scores answers at every evaluation; None = no answers.
        mixture: The training records of each epoch; None = all.
        sort_steps: Whether each step's records are sorted by length, so that its micro-batches need little padding.
        window: Streams the training records from shards; None = they can be read in any order.
        **kwargs: As for `StoppableTrainer`.

    Raises:
        ValueError: The arguments don't go together, or the launcher shards weights that must be whole.
    """

    def __init__(
        self,
        *args: Any,
        card: CardSettings | None = None,
        rates: Mapping[str, float] | None = None,
        monitor: MonitorArguments | None = None,
        samples: SampleWriter | None = None,
        mixture: TaskMixture | None = None,
        sort_steps: bool = False,
        window: ShardWindow | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        keep_float32_losses(self.accelerator.state)
        self._float32_names = float32_names(self.model)  # DeepSpeed will cast them
        self._float32_weights: dict[str, torch.Tensor] = {}
        self.card, self.rates, self.samples = card or {}, dict(rates or {}), samples
        self.mixture, self.sort_steps, self.window = mixture, sort_steps, window
        self.monitor = monitor or MonitorArguments()
        self.slice_weights = SliceWeights(self._base_model().config.fusion_type)
        flops = StepFlops(self.model) if can_count(self.model) else None
        self.throughput = Throughput(flops, self.monitor.peak_tflops or _known_peak(self.args.device))
        self._set_epoch: SetEpoch | None = None
        self._findings_in_step: torch.Tensor | int | None = None
        self.part_rates = PartRates()
        self.add_callback(self.part_rates)
        self._check_options()
        if self.args.push_to_hub:
            self.create_model_card()  # for the pushes during training

    def _check_options(self) -> None:
        if self.sort_steps and self.args.train_sampling_strategy != "random":
            raise ValueError(
                f"sort_steps sorts the steps of a random order, and train_sampling_strategy is "
                f"{self.args.train_sampling_strategy}: leave out one of them."
            )
        if self.window is not None and self.args.train_sampling_strategy != "random":
            raise ValueError(
                f"records of shards come in the order of shards, and train_sampling_strategy is "
                f"{self.args.train_sampling_strategy}: use random; with gradient accumulation, sort_steps reduces padding."
            )
        if not (self.is_fsdp_enabled or is_zero3(getattr(self.accelerator.state, "deepspeed_plugin", None))):
            return
        if has_text_only_records(self.train_dataset, self.eval_dataset):
            raise ValueError(
                "Some records have no volume, and this launcher shards the weights: processes whose batches use different "
                "parts of the model would wait for each other forever. Leave text-only records out (tasks, vqa_files), or "
                "start with recipes/accelerate/ddp.yaml."
            )
        if self.samples is not None:
            raise ValueError(NO_SAMPLES)

    def _base_model(self) -> nn.Module:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """Return the library's random order, or its grouping by length, in a form that keeps the epoch when resumed."""
        records = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "group_by_length") or not hasattr(records, "__len__"):
            return super()._get_train_sampler(train_dataset)
        by_length = self.sort_steps or strategy == "group_by_length"
        lengths = records[self.args.length_column_name][:] if by_length else None
        seed = order_seed(self.args)
        step = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        order = RecordOrder(len(records), seed, lengths, step, self.mixture, self.sort_steps, self.window)
        if self._set_epoch is None:
            self._set_epoch = SetEpoch(order)
            self.add_callback(self._set_epoch)
        self._set_epoch.sampler = order
        return order

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create Trainer's optimizer, with one parameter group per part where `rates` names parts."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.rates:
            split_by_part(optimizer, self.model if model is None else model, self.rates)
        return optimizer

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Take Trainer's step and count its tokens, slices and volumes.

        Args:
            model: The model as Trainer wraps it.
            inputs: A batch with its counts, which are removed.
            *args: As for Trainer.
            **kwargs: As for Trainer.
        """
        self.throughput.count(inputs)
        return super().training_step(model, inputs, *args, **kwargs)

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """Prepare inputs as Trainer does, with slice positions as int32 bits for sharded models.

        FSDP and DeepSpeed cast floating inputs. In bfloat16 the positions of neighbouring slices would be off by up to a
        tenth of their distance.
        """
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and "slice_positions" in inputs:
            inputs = {**inputs, "slice_positions": inputs["slice_positions"].float().view(torch.int32)}
        return super()._prepare_inputs(inputs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Batch], torch.Tensor | int | None]:
        """Return a step's micro-batches and its count of label tokens; also count the step's rows with known findings."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._findings_in_step = None
        if num_items is not None and self._base_model().config.finding_names:  # so on all processes or on none
            known = [batch["finding_targets"] != IGNORE_INDEX for batch in batches if "finding_targets" in batch]
            counts = [rows.any(dim=1).sum().to(self.args.device) for rows in known]
            count = torch.stack(counts).sum() if counts else torch.tensor(0, device=self.args.device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                count = self.accelerator.gather(count).sum()
            count = count.clamp(min=1)
            self._findings_in_step = int(count) if self.args.n_gpu > 1 else count  # DataParallel can't split a scalar
        return batches, num_items

    def prediction_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> tuple:
        """Take Trainer's evaluation step.

        Args:
            model: The model as Trainer wraps it.
            inputs: A batch with its counts, which are removed.
            *args: As for Trainer.
            **kwargs: As for Trainer.
        """
        drop_counts(inputs)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, ModelOutput]:
        """Compute Trainer's loss; in evaluation also add up the fusion's softmax weights, which the model computes anyway.

        Args:
            model: The model as Trainer wraps it.
            inputs: A batch with its counts, which are removed.
            return_outputs: Whether to return the model's outputs too.
            **kwargs: As for Trainer; `num_items_in_batch` is the step's count of label tokens.

        Returns:
            The loss, a scalar, or (loss, outputs).
        """
        drop_counts(inputs)
        if "num_items_in_batch" in kwargs and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            kwargs["num_items_in_batch"] = whole_count(kwargs["num_items_in_batch"])
        if model.training or self.args.prediction_loss_only:  # nobody reads logits then
            inputs = {**inputs, "skip_logits": True}
        if model.training and self._findings_in_step is not None:
            inputs = {**inputs, "num_findings_in_batch": self._findings_in_step}
        if model.training and self.is_deepspeed_enabled and not has_volume(inputs):
            loss, outputs = super().compute_loss(model, inputs, True, **kwargs)
            loss = touch_unread_parts(self.model, loss)
            return (loss, outputs) if return_outputs else loss
        if model.training or not has_volume(inputs) or "prompt_mask" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        asked = {**inputs, "output_slice_attentions": True}
        loss, outputs = super().compute_loss(model, asked, True, **kwargs)
        self.slice_weights.add(outputs.slice_attentions, inputs)
        rest = {name: value for name, value in outputs.items() if name != "slice_attentions"}
        return (loss, type(outputs)(**rest)) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does; an entry with a training loss also gets the throughput and the parts' learning rates."""
        if "loss" in logs:
            logs |= self.throughput.report(self.args.device, self._sum, self.args.world_size)
            logs |= {f"learning_rate_{part}": rate for part, rate in self.part_rates.rates.items()}
        super().log(logs, start_time)

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor.to(self.args.device), reduction="sum")

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate as Trainer does, and measure the use of the image.

        With the two validation sets of `load_datasets`, that is the loss with each patient's own volume and with another's,
        the gap between them, and the scores of sample answers; for each set, the fusion's softmax weights. Training
        continues with the random numbers that it would have had without an evaluation.

        Args:
            eval_dataset: As for Trainer; None = the trainer's own.
            ignore_keys: As for Trainer.
            metric_key_prefix: Prefix of the metrics' names.
        """
        several = isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict)
        with self.throughput.paused(), preserved_random_state():
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            if several:
                # Trainer chooses the best checkpoint by `eval_loss` unless it is told otherwise.
                own = metrics.get(f"{metric_key_prefix}_own_loss")
                more = {} if own is None else {f"{metric_key_prefix}_loss": own}
                more |= measure_gap(metrics) | self._score_samples(metric_key_prefix)
            else:
                weights = self.slice_weights.report(self.args.device, self._sum)
                more = {f"{metric_key_prefix}_{name}": value for name, value in weights.items()}
            if more:
                self.log(dict(more))
        if several and "eval_gap" in more:
            warn_if_not_grounded(self.state.log_history, self.monitor.blind_gap, self.monitor.blind_evaluations)
        return metrics | more

    def _score_samples(self, prefix: str) -> dict[str, float]:
        if self.samples is None:
            return {}
        with self.accelerator.autocast():
            scores = self.samples(self._base_model(), self.state.global_step, self._show_sample)
        return {f"{prefix}_{name}": score for name, score in scores.items()}

    def _show_sample(self, name: str, text: str, image: Path | None) -> None:
        show_sample(self.callback_handler.callbacks, self.state.global_step, name, text, image)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as Trainer does, with config.json and the code next to the adapter of a model that peft wraps.

        Sharded weights are gathered and saved whole.
        """
        with self.throughput.paused():
            readme = Path(output_dir or self.args.output_dir) / README
            card = readme.read_text(encoding="utf-8") if readme.is_file() else None
            push = getattr(self, "push_in_progress", None)
            if push is not None and (self.args.hub_always_push or readme.parent == Path(self.args.output_dir)):
                push.wait_until_done()  # or files would change while they are uploaded
            if is_sharded(self.model):
                state = whole_state_dict(self.model)  # every process takes part, the main one gets it
                if self.args.should_save or getattr(self, "is_distributed_loading_by_transformers", False):
                    self._save(str(readme.parent), state_dict=state)
            else:
                self._float32_weights = self._gather_float32_weights()
                super().save_model(output_dir, _internal_call=True)
                self._float32_weights = {}
            if self.args.should_save:
                self._complete_folder(readme, card)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _gather_float32_weights(self) -> dict[str, torch.Tensor]:
        """Gather DeepSpeed's float32 copies of the weights that it trains in another precision. Every process must call it."""
        if not self.is_deepspeed_enabled or self.model is self.model_wrapped:
            return {}
        from deepspeed.utils import safe_get_full_fp32_param

        return float32_weights(self.model, self._float32_names, safe_get_full_fp32_param)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Save as Trainer does, with trained weights in the precision in which the trainer got them."""
        super()._save(output_dir, state_dict={**state_dict, **self._float32_weights} if state_dict else state_dict)

    def _complete_folder(self, readme: Path, card: str | None) -> None:
        if hasattr(self.model, "get_base_model"):
            base = self.model.get_base_model()
            base.save_config_and_code(readme.parent)
            # peft has written a README of its own, or added its text to ours.
            readme.write_text(card or str(base.model_card()), encoding="utf-8")
        check_whole(readme.parent)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.throughput.paused():
            super()._save_checkpoint(model, trial)

    def create_model_card(self, *args: Any, tags: str | list[str] | None = None, **kwargs: Any) -> None:
        """Write README.md into the output folder, unless there or on the Hub is a card that a user wrote.

        Args:
            *args: Ignored; Trainer's.
            tags: Added to the card's tags.
            **kwargs: Ignored; Trainer's.
        """
        if not self.is_world_process_zero():
            return
        folder, revision, token = Path(self.args.output_dir), self.args.hub_revision, self.args.hub_token
        card = self._base_model().model_card(
            self.hub_model_id,
            [tags] if isinstance(tags, str) else tags or (),
            metrics=validation_losses(self.state),
            **{**self.card, "facts": {**self.card.get("facts", {}), "Steps": self.state.global_step}},
        )
        write_model_card(folder, card)
        written = is_generated((folder / README).read_text(encoding="utf-8"))
        if written and self.hub_model_id is not None and has_own_card(self.hub_model_id, revision, token):
            found = HfApi(token=token).hf_hub_download(self.hub_model_id, README, revision=revision)
            shutil.copyfile(found, folder / README)


def _known_peak(device: torch.device) -> float | None:
    return known_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def save_repository(trainer: SamfTrainer) -> None:
    """Complete the output folder: weights, code, processor, requirements, model card. Push it if the arguments say so."""
    trainer.save_state()
    if trainer.is_world_process_zero():
        shutil.copyfile(REQUIREMENTS, Path(trainer.args.output_dir) / "requirements.txt")
    trainer.create_model_card()
    trainer.save_model()
