"""A Hugging Face sequence classifier in this process, through torch (extra `reward`)."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

from activedpo_jax.huggingface import hub
from activedpo_jax.oracles.reward_model import Numbers, Text
from activedpo_jax.progress import progress

_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.bin")


def fetch(path: str, revision: str) -> pathlib.Path:
    """The model's directory: `path` itself, or downloaded from the Hub unless it is cached.

    Raises:
      ValueError: see `hub.fetch`.
    """
    return hub.fetch(path, revision, _PATTERNS, "a Hugging Face sequence classifier", "config.oracle")


class LocalModel:
    """A model that is loaded when it is first needed, once for all runs of a process.

    Texts are written by the tokenizer's chat template; by one that has none, as prompt and response, the two sequences
    that it joins in its own way.

    Args:
      path, revision: a directory, or a name on the Hub.
      device: torch's name of it.
      dtype: auto (float32 on a CPU, else bfloat16), float32 or bfloat16.
      batch_size: texts that go through at a time, of similar lengths.
    """

    def __init__(self, path: str, revision: str, device: str, dtype: str, batch_size: int) -> None:
        self.name = f"reward model {path}"
        self._source, self._batch_size = (path, revision, device, dtype), batch_size

    def prepare(self) -> None:
        """Loads the model.

        Raises:
          ValueError: there is no torch, or no such model; it was not trained to classify.
        """
        _load(*self._source)

    def numbers(self, texts: Sequence[Text]) -> list[Numbers]:
        """The logits of each text, in their order; texts longer than the model's context are not cut, and have none."""
        import torch

        model, tokenizer = _load(*self._source)
        inputs, limit = [encoded(tokenizer, text) for text in texts], _context(model, tokenizer)
        lengths = [len(x["input_ids"]) for x in inputs]
        found: list[Numbers] = [f"has {length} tokens, the model's context {limit}" for length in lengths]
        rows = sorted((i for i, length in enumerate(lengths) if length <= limit), key=lambda i: lengths[i])
        pad = model.config.get_text_config().pad_token_id
        # Without a padding token the model takes one text at a time.
        size = 1 if pad is None else self._batch_size
        for first in progress(range(0, len(rows), size), desc="rewarding", unit="batch"):
            batch = rows[first : first + size]
            width = max(lengths[i] for i in batch)
            # On the right: classifiers read the last token that is not padding.  The mask is among the arrays.
            arrays = {
                name: [inputs[i][name] + [pad if name == "input_ids" else 0] * (width - lengths[i]) for i in batch]
                for name in inputs[batch[0]]
            }
            with torch.inference_mode():
                logits = model(**{name: torch.tensor(x, device=model.device) for name, x in arrays.items()}).logits
            for i, row in zip(batch, logits.float().reshape(len(batch), -1).tolist(), strict=True):
                found[i] = row
        return found


def encoded(tokenizer: Any, text: Text) -> dict[str, list[int]]:
    """The token ids of a text, with one BOS at most, and what else the model reads of each token.

    Raises:
      ValueError: there is no chat template, and the prompt is chat messages.
    """
    if tokenizer.chat_template is not None:
        written = tokenizer.apply_chat_template(text.messages, tokenize=False)
        # The tokenizer puts it there itself; so do the model cards of Skywork-Reward.
        if tokenizer.bos_token is not None:
            written = written.removeprefix(tokenizer.bos_token)
        return dict(tokenizer(written, verbose=False))
    if not isinstance(text.prompt, str):
        raise ValueError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template, and the prompts are chat messages; "
            "expected a template: set config.oracle.path to a model that has one, or make the prompts plain text"
        )
    return dict(tokenizer(text.prompt, text.response, verbose=False))


def _context(model: Any, tokenizer: Any) -> int:
    """Tokens that the model can read."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(min(positions or tokenizer.model_max_length, tokenizer.model_max_length))


@functools.cache
def _load(path: str, revision: str, device: str, dtype: str) -> tuple[Any, Any]:
    try:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError as error:
        raise ValueError(
            f"config.oracle.path: a reward model needs torch ({error}): pip install 'activedpo_jax[reward]', or have "
            "vLLM serve it and set config.oracle.url"
        ) from error
    folder = fetch(path, revision)
    chosen = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype)
    if chosen is None:
        chosen = torch.float32 if device == "cpu" else torch.bfloat16
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, told = AutoModelForSequenceClassification.from_pretrained(folder, dtype=chosen, output_loading_info=True)
        model = model.to(device).eval()
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{hub.named(path, revision)}: cannot be loaded as a sequence classifier on {device!r} ({reason}); set "
            "config.oracle.path, config.oracle.revision or config.oracle.device"
        ) from error
    if missing := sorted(told["missing_keys"]):
        raise ValueError(
            f"{hub.named(path, revision)}: has no weights for {', '.join(missing[:3])}; expected a model that was "
            "trained to reward: set config.oracle.path"
        )
    return model, tokenizer
