"""Models made on the spot, so small that an engine starts in seconds: random weights, SmolLM2's tokenizer, heads for two ranks.

What they say means nothing; but they say something else as soon as one page of their KV is another's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from kvtier.engines.models import packaged_model

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 4, 128, 4, 2, 32
PAGE_BYTES = LAYERS * 2 * 128 * KV_HEADS * HEAD_DIM * 4
"""Of a block of 128 tokens in fp32."""
_SPREAD = 0.2
"""Standard deviation of the weights: enough for attention to look at single tokens."""
_TARGETS = {"q_proj": HEADS * HEAD_DIM, "k_proj": KV_HEADS * HEAD_DIM, "v_proj": KV_HEADS * HEAD_DIM}


def tiny_llama(folder: Path) -> Path:
    """A causal language model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(packaged_model())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=_SPREAD,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["LlamaForCausalLM"],
    )
    return _saved(LlamaForCausalLM, config, folder, tokenizer)


def tiny_adapter(folder: Path, seed: int, rank: int = 8) -> Path:
    """A LoRA adapter of `tiny_llama` as PEFT writes it."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(LAYERS):
        for name, width in _TARGETS.items():
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{module}.lora_A.weight"] = torch.randn(rank, HIDDEN, generator=generator) * _SPREAD
            weights[f"{module}.lora_B.weight"] = torch.randn(width, rank, generator=generator) * _SPREAD
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "bias": "none",
        "target_modules": [*_TARGETS],
    }
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


def tiny_blip(folder: Path) -> Path:
    """A model that sees one image of 56 x 56 pixels, as 16 tokens before the text. (LLaVA in vLLM needs torchvision.)"""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, OPTConfig
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(packaged_model())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = tokenizer.convert_tokens_to_ids("<image>")
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": _SPREAD}
    text = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=1024,
        init_std=_SPREAD,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        architectures=["OPTForCausalLM"],
    )
    config = Blip2Config(
        vision_config=small | {"image_size": 56, "patch_size": 14},
        qformer_config=small | {"encoder_hidden_size": 64, "vocab_size": 100},
        text_config=text.to_dict(),
        num_query_tokens=16,
        image_token_index=image,
        architectures=["Blip2ForConditionalGeneration"],
    )
    pixels = BlipImageProcessorPil(size={"height": 56, "width": 56})
    processor = Blip2Processor(image_processor=pixels, tokenizer=tokenizer, num_query_tokens=16)
    return _saved(Blip2ForConditionalGeneration, config, folder, processor)


def _saved(model_class: Any, config: Any, folder: Path, *others: Any) -> Path:
    torch.manual_seed(0)
    model = model_class(config)
    if hasattr(model, "query_tokens"):
        torch.nn.init.normal_(model.query_tokens)  # else all zero, and every image looks alike
    model.save_pretrained(folder)
    for other in others:
        other.save_pretrained(folder)
    return folder
