"""The demo's tokenizer: a small byte-level BPE vocabulary learned from the training text.

Byte-level BPE starts from the 256 bytes, so it has a token for every text, and merges the most frequent
neighbours until the vocabulary is full. A small vocabulary suits a small model: each token's embedding is seen
often enough to be learned in a minute.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(text: str, size: int) -> PreTrainedTokenizerFast:
    """Learns a byte-level BPE vocabulary.

    Args:
        text: The text to learn from; deterministic, the same text gives the same vocabulary.
        size: Tokens in the vocabulary, at least 257; token 0 is ``<|endoftext|>``, which is never added to
            a text by default.

    Returns:
        A Hugging Face tokenizer which restores every text exactly.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
