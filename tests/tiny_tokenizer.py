"""A small real tokenizer, byte-level BPE trained on the spot, that the tests share."""

import functools
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>", "[INST]", "[/INST]"]

# As of many chat models: a turn ends in <|im_end|> and a newline.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["assistant system user What colour is the sky today? It is blue, and the grass is green.\n\n"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return str(tokenizer.to_str())


def make_tokenizer(
    chat_template: str | None = None, bos: bool = False, eos: str | None = "</s>", space: bool = False
) -> Any:
    """The tokenizer, with a chat template or none, putting BOS or a space before texts of its own accord or not."""
    tokenizer = Tokenizer.from_str(_trained())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
        )
    extra = [t for t in SPECIAL if t not in ("<pad>", "<s>", eos)]
    names: dict[str, Any] = {"pad_token": "<pad>", "bos_token": "<s>", "additional_special_tokens": extra}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **({"eos_token": eos} if eos else {}))
    fast.chat_template = chat_template
    return fast
