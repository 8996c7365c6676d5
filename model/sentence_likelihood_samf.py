"""Log-likelihood of the sentences of an answer, as a function of the slices that the model is given."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from .report_samf import REPORT_QUESTION, assign_tokens, locate_tokens, split_sentences

_VOLUME_TENSORS = ("slice_planes", "slice_positions")


@dataclass(frozen=True)
class AnswerTokens:
    """A prompt with its answer as tokens, and the answer's sentences among them.

    Attributes:
        input_ids: (T,), with one placeholder per image token.
        prompt_mask: (T,) bool, the text that the fusion reads.
        spans: (start, end) characters of each sentence in `text`.
        tokens: for each sentence the indices of its tokens in `input_ids`.
        text: the answer as the tokens spell it.
    """

    input_ids: torch.Tensor
    prompt_mask: torch.Tensor
    spans: tuple[tuple[int, int], ...]
    tokens: tuple[torch.Tensor, ...]
    text: str


def tokenize_answer(
    processor: Any, features: Mapping[str, Any], answer: str, question: str = REPORT_QUESTION
) -> AnswerTokens:
    """Tokenize a question about a volume with its answer, as in training.

    Args:
        processor: a `SamfProcessor`.
        features: `slice_embeddings` (S, D), `slice_planes` and `slice_positions` (S,) of the volume.
        answer: the report or answer.
        question: what it answers.

    Raises:
        ValueError: the answer has no text.
    """
    volume, asked = {"type": "volume", "volume": dict(features)}, {"type": "text", "text": question}
    conversation = [{"role": "user", "content": [volume, asked]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True, **options)
    conversation.append({"role": "assistant", "content": [{"type": "text", "text": answer.strip()}]})
    ids = processor.apply_chat_template(conversation, **options)["input_ids"][0]
    start = _common_length(prompt["input_ids"][0], ids)
    text, kept, places = locate_tokens(processor.tokenizer, ids[start:].tolist())
    count = sum(place < len(text.rstrip()) for place in places)  # without the template's line break after the answer
    spans = split_sentences(text)
    if not spans:
        raise ValueError("The answer has no text; evidence is for the sentences of an answer.")
    found = assign_tokens(text, spans, places[:count])
    tokens = tuple(start + torch.tensor([kept[index] for index in own], dtype=torch.long) for own in found)
    known = prompt["prompt_mask"][0, :start]
    return AnswerTokens(ids, F.pad(known, (0, len(ids) - start), value=False), tuple(spans), tokens, text)


def _common_length(first: torch.Tensor, second: torch.Tensor) -> int:
    """Return how many tokens two sequences share from their beginning."""
    length = min(len(first), len(second))
    differs = (first[:length] != second[:length]).nonzero()
    return int(differs[0]) if len(differs) else length


class SentenceLikelihood:
    """Log-likelihood of each sentence of an answer, given the volume, the prompt and what precedes it.

    Args:
        model: a `SamfForConditionalGeneration` in evaluation mode.
        answer: prompt and answer.
        features: `slice_planes` and `slice_positions` (S,) of the volume, as arrays or tensors.
        batch_size: rows of one forward pass.
        before_pass: called before each forward and each backward pass.
    """

    def __init__(
        self,
        model: Any,
        answer: AnswerTokens,
        features: Mapping[str, Any],
        batch_size: int = 4,
        before_pass: Callable[[], object] | None = None,
    ):
        self.model, self.answer, self.batch_size = model, answer, batch_size
        self.before_pass = before_pass or (lambda: None)
        self.config = model.config
        self.volume = {name: torch.as_tensor(features[name]).to(model.device) for name in _VOLUME_TENSORS}
        self.slots = (answer.input_ids == self.config.image_token_id).nonzero()[:, 0]  # (I,), the placeholders

    def __call__(self, slices: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Return the log-likelihoods (B, K) of the K sentences with only some of the slices.

        A row without any slice is the prompt without a volume. With `slice_tokens` a slice that is taken away takes its
        image token along, so each row equals a forward pass over a volume that never had the slice.

        Args:
            slices: embeddings (S, D).
            keep: (B, S) bool, True = the slice is there.
        """
        parts = []
        with torch.inference_mode():
            for rows in keep.split(self.batch_size):
                parts.append(self._run(slices.expand(len(rows), -1, -1), rows.to(slices.device))[0])
        return torch.cat(parts)

    def with_weights(self, slices: torch.Tensor) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Return the log-likelihoods (K,) with all slices (S, D), and the fusion's softmax weights."""
        with torch.inference_mode():
            scores, weights = self._run(slices[None], self._all(slices), weights=True)
        return scores[0], weights

    def gradients(self, slices: torch.Tensor, start: torch.Tensor, steps: int = 4) -> torch.Tensor:
        """Return the gradients (K, S, D) of the log-likelihoods by the slice embeddings, averaged over a path.

        Where a sentence is near certain its own gradient vanishes, although its evidence is strong; the mean over the straight
        line from `start` to the slices does not (integrated gradients): times (slices − start) it adds up to the gain in
        log-likelihood. Each step takes one forward pass and one backward pass per sentence; weights get no gradient.

        Args:
            slices: embeddings (S, D).
            start: (S, D), where the path begins.
            steps: points of the path, in the middle of its parts.

        Raises:
            ValueError: the language model's kernels have no backward pass.
        """
        total = torch.zeros(())
        slices, start = slices.clone(), start.clone()  # not inference tensors
        with torch.inference_mode(False), torch.enable_grad(), frozen(self.model):
            for step in range(steps):
                leaf = torch.lerp(start, slices, (step + 0.5) / steps).requires_grad_(True)
                found = self._gradients_at(leaf)
                total = found / steps + total.to(found.device)
        return total

    def _gradients_at(self, leaf: torch.Tensor) -> torch.Tensor:
        """Return the gradients (K, S, D) at one point."""
        try:
            scores = self._run(leaf[None], self._all(leaf))[0][0]
            return torch.stack([self._backward(score, leaf) for score in scores])
        except RuntimeError as error:  # torch's "derivative for … is not implemented", "does not require grad"
            if not any(word in str(error) for word in ("derivative", "not implemented", "does not require grad")):
                raise
            raise ValueError(
                "The language model has no backward pass, which evidence needs (quantised kernels?): load the model "
                f"without quantisation. ({error})"
            ) from error

    def _backward(self, score: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        """Return the gradient (S, D) of one log-likelihood."""
        self.before_pass()
        return torch.autograd.grad(score, leaf, retain_graph=True)[0]

    @staticmethod
    def _all(slices: torch.Tensor) -> torch.Tensor:
        return torch.ones(1, len(slices), dtype=torch.bool, device=slices.device)

    def _run(
        self, slices: torch.Tensor, keep: torch.Tensor, weights: bool = False
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return log-likelihoods (B, K) and, if asked for, the fusion's softmax weights.

        Args:
            slices: (B, S, D).
            keep: (B, S) bool.
            weights: return the weights.
        """
        self.before_pass()
        rows = len(keep)
        ids, prompt_mask, removed = self._rows(keep)
        columns = torch.cat([positions[None] - removed[:, None] for positions in self.answer.tokens], dim=1) - 1
        kept = columns.unique()  # (C,), the tokens from which an answer's token is predicted
        outputs = self.model(
            input_ids=ids.to(self.model.device),
            attention_mask=(torch.arange(ids.shape[1]) < len(self.answer.input_ids) - removed[:, None])
            .long()
            .to(self.model.device),
            prompt_mask=prompt_mask.to(self.model.device),
            slice_embeddings=slices,
            slice_mask=keep,
            **{name: value.expand(rows, -1) for name, value in self.volume.items()},
            logits_to_keep=kept.to(self.model.device),
            output_slice_attentions=weights,
            use_cache=False,
        )
        logits = outputs.logits.to(torch.promote_types(outputs.logits.dtype, torch.float32))  # (B, C, vocabulary)
        places = torch.searchsorted(kept, columns).to(logits.device)  # (B, A)
        targets = ids.gather(1, columns + 1).to(logits.device)
        chosen = logits[torch.arange(rows, device=logits.device)[:, None], places]  # (B, A, vocabulary)
        scores = chosen.gather(-1, targets[..., None])[..., 0] - chosen.logsumexp(-1)
        sizes = [len(positions) for positions in self.answer.tokens]
        sums = torch.stack([part.sum(dim=1) for part in scores.split(sizes, dim=1)], dim=1)
        found = outputs.slice_attentions if weights else None
        return sums, {} if found is None else dict(found.items())

    def _rows(self, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ids and prompt masks (B, T), padded on the right, and how many placeholders each row lacks (B,)."""
        counts = keep.sum(dim=1).cpu()
        wanted = counts if self.config.fusion_type == "slice_tokens" else (counts > 0) * len(self.slots)
        ids, masks = [], []
        for count in wanted.tolist():
            stay = torch.ones(len(self.answer.input_ids), dtype=torch.bool)
            stay[self.slots[count:]] = False
            ids.append(self.answer.input_ids[stay])
            masks.append(self.answer.prompt_mask[stay])
        pad = torch.nn.utils.rnn.pad_sequence
        filler = self.config.text_config.pad_token_id or 0
        return (
            pad(ids, batch_first=True, padding_value=filler),
            pad(masks, batch_first=True, padding_value=False),
            len(self.slots) - wanted,
        )


@contextlib.contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Keep gradients away from a model's weights within a block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
