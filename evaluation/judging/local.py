"""A judge that is a transformers model on this machine."""

import threading
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from samf.evaluation.judging.base import ReplyError
from samf.evaluation.judging.prompts import Messages
from samf.evaluation.schema import JudgeIdentity

__all__ = ["LocalJudge"]


class LocalJudge:
    """A transformers model on this machine; greedy, one prompt at a time.

    Args:
        model: folder or Hub id.
        device: None = an accelerator if there is one.
        dtype: of the weights; "auto" = as saved.
        max_tokens: limit of a reply.
    """

    workers = 1

    def __init__(self, model: str, *, device: str | None = None, dtype: str = "auto", max_tokens: int = 64):
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self.identity: JudgeIdentity = {"model": model, "max_tokens": max_tokens, "local": True}
        self.max_tokens = max_tokens
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self.model.to(device or accelerator).eval()  # type: ignore[arg-type]  # transformers wraps `to` without its types
        self._lock = threading.Lock()

    def __call__(self, messages: Messages) -> str:
        """Return the reply's text.

        Raises:
            ReplyError: prompt and reply don't fit the model's context.
        """
        with self._lock:
            return self._generate([messages[0], *({**m, "content": self._plain(m["content"])} for m in messages[1:])])

    def _plain(self, text: str) -> str:
        """Return a user's text without this tokenizer's control tokens, which would act as those of the template."""
        added = self.tokenizer.added_tokens_decoder.values()
        names = {token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        for name in sorted(names, key=len, reverse=True):
            text = text.replace(name, " ")
        return text

    def _generate(self, messages: Messages) -> str:
        if self.tokenizer.chat_template:
            inputs = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = self.tokenizer("\n\n".join(message["content"] for message in messages), return_tensors="pt")
        inputs = inputs.to(self.model.device)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        length = inputs["input_ids"].shape[1] + self.max_tokens
        if limit is not None and length > limit:
            raise ReplyError(f"The prompt and its reply take {length} tokens; the judge's context has {limit}.")
        pad = self.tokenizer.pad_token_id
        with torch.inference_mode():
            tokens = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=self.max_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
            )
        reply: str = self.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return reply
