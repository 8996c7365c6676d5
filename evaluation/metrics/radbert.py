"""CT-RATE's own report classifier: RadBERT with the 18 labels."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig

from samf.data.ct_rate.loader import CT_RATE_LABELS

RADBERT = "ibrahimhamamci/CT-RATE"
_RADBERT_FILE = "models/RadBertClassifier.pth"
_RADBERT_BACKBONE = "zzxslp/RadBERT-RoBERTa-4m"
# A buffer that old transformers versions saved; it holds 0, 1, 2, … and no weights.
_STALE_KEYS = ("model.embeddings.position_ids",)
_RADBERT_TOKENS = 512
_RADBERT_THRESHOLD = 0.5


class RadBertClassifier(nn.Module):
    """RadBERT with one logit for each of CT-RATE's 18 labels on its pooled output."""

    def __init__(self, config: PretrainedConfig, num_labels: int = len(CT_RATE_LABELS)):
        super().__init__()
        self.model = AutoModel.from_config(config)
        self.classifier = nn.Linear(config.hidden_size, num_labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return logits (B, 18) of input_ids and attention_mask (B, T)."""
        return self.classifier(self.model(input_ids=input_ids, attention_mask=attention_mask).pooler_output)


class RadBertLabeller:
    """CT-RATE's report classifier: reports → labels (N, 18) of 0 and 1, in the order of `CT_RATE_LABELS`.

    Args:
        checkpoint: RadBertClassifier.pth, or the Hub id of a data set that holds it (CT-RATE's own requires a login).
        backbone: Hub id or folder with the configuration and tokenizer of RadBERT; its weights are in the checkpoint.
        device: default: cpu.
        batch_size: reports per forward pass.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the checkpoint's weights aren't those of this classifier (superfluous `_STALE_KEYS` are ignored).
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike = RADBERT,
        *,
        backbone: str = _RADBERT_BACKBONE,
        device: str | None = None,
        batch_size: int = 16,
    ):
        path = find_radbert(checkpoint)
        self.tokenizer = AutoTokenizer.from_pretrained(backbone, do_lower_case=True)
        self.model = _load_radbert(path, AutoConfig.from_pretrained(backbone)).to(device or "cpu").eval()
        self.batch_size = batch_size
        self._known: dict[str, np.ndarray] = {}

    @torch.inference_mode()
    def probabilities(self, reports: Sequence[str]) -> np.ndarray:
        """Return the probability of each label, (N, 18)."""
        chunks = [np.zeros((0, self.model.classifier.out_features), dtype=np.float32)]
        device = self.model.classifier.weight.device
        for start in tqdm(range(0, len(reports), self.batch_size), desc="RadBERT", unit="batch"):
            texts = list(reports[start : start + self.batch_size])
            inputs = self.tokenizer(
                texts, padding=True, truncation=True, max_length=_RADBERT_TOKENS, return_tensors="pt"
            )
            logits = self.model(inputs["input_ids"].to(device), inputs["attention_mask"].to(device))
            chunks.append(logits.sigmoid().float().cpu().numpy())
        return np.concatenate(chunks)

    def __call__(self, reports: Sequence[str]) -> np.ndarray:
        """Return labels (N, 18) of 0 and 1; an empty report has none. Results are cached by report."""
        new = [report for report in dict.fromkeys(reports) if report.strip() and report not in self._known]
        found = (self.probabilities(new) > _RADBERT_THRESHOLD).astype(np.int64)
        self._known.update(zip(new, found, strict=True))
        none = np.zeros(self.model.classifier.out_features, dtype=np.int64)
        rows = [self._known.get(report, none) for report in reports]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(none))


def find_radbert(checkpoint: str | os.PathLike) -> Path:
    """Return the checkpoint's local path; a Hub id is downloaded.

    Raises:
        FileNotFoundError: `checkpoint` is neither a file nor a Hub id.
    """
    path = Path(checkpoint)
    if path.is_file():
        return path
    if path.suffix in (".pth", ".pt", ".bin") or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(checkpoint)):
        raise FileNotFoundError(
            f"{path}: no such file; expected RadBertClassifier.pth, or the Hub id of its data set ({RADBERT})."
        )
    return Path(hf_hub_download(str(checkpoint), _RADBERT_FILE, repo_type="dataset"))


def _load_radbert(path: Path, config: PretrainedConfig) -> RadBertClassifier:
    """Return the classifier with a checkpoint's weights.

    Raises:
        ValueError: weights are missing or superfluous, other than `_STALE_KEYS`.
    """
    model = RadBertClassifier(config)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    for key in _STALE_KEYS:
        weights.pop(key, None)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: not the weights of CT-RATE's RadBertClassifier with this backbone: {error}"
        ) from error
    return model
