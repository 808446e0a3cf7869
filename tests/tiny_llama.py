"""A model small enough for the tests of commands."""

from __future__ import annotations

from pathlib import Path

import torch


def save_tiny_llama(folder: Path) -> None:
    """A random Llama with grouped queries and a byte tokenizer, as transformers saves them."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = {symbol: index for index, symbol in enumerate(["<end>", *alphabet])}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=tokens, merges=[]))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<end>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
