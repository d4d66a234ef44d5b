"""The small models that are spread over processes, by the kind of their heads, and what each needs in a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tiny_models import HIDDEN, TINY, VOCAB, tiny_llama
from torch import Tensor, nn

IMAGE = 16
_SEQUENCE_TO_SEQUENCE: dict[str, Any] = {
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "init_std": 0.2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    **{name: TINY[name] for name in ("vocab_size", "max_position_embeddings")},
    **{name: TINY[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
}


class OwnHead(nn.Linear):
    """A factor and a number a class, both learned, in a forward of the head's own."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(weight.shape[1], weight.shape[0])
        self.weight = weight
        self.factors = nn.Parameter(torch.linspace(0.5, 1.5, self.out_features))
        self.numbers = nn.Parameter(torch.linspace(-1, 1, self.out_features))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float() * self.factors.float() + self.numbers


def _with_own_head(tied: bool) -> nn.Module:
    model = tiny_llama(tie_word_embeddings=tied)
    model.lm_head = OwnHead(model.lm_head.weight)
    return model


def _with_bias(tied: bool) -> nn.Module:
    model = tiny_llama(tie_word_embeddings=tied)
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, VOCAB))
    return model


def _dory(tied: bool) -> nn.Module:
    layers = {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1, "num_hidden_layers": 3}
    config = transformers.DoryConfig(**{**TINY, "head_dim": 8, **layers, "tie_word_embeddings": tied})
    model = transformers.DoryForCausalLM(config)
    with torch.no_grad():
        model.lm_head.logit_scale.mul_(torch.linspace(0.5, 1.5, VOCAB))
    return model


def _idefics(tied: bool) -> nn.Module:
    vision = {
        "embed_dim": HIDDEN,
        "image_size": IMAGE,
        "patch_size": IMAGE // 2,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
    }
    trained = {"freeze_text_layers": False, "freeze_vision_layers": False, "alpha_initializer": "ones"}
    config = transformers.IdeficsConfig(**{**TINY, **trained, "vision_config": vision, "tie_word_embeddings": tied})
    model = transformers.IdeficsForVisionText2Text(config)
    model.model.vision_model.post_layernorm.requires_grad_(False)  # of the pooled image, at which no token looks
    return model


def _chameleon(tied: bool) -> nn.Module:
    """The words of images, whose logits are filled, lie above those of texts."""
    words = {"<image>": VOCAB + 8} | {f"IMGIMG{letter}Z": VOCAB + i for i, letter in enumerate("ABCDEFGH")}
    images = {"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1]}
    changed = {"vocab_size": VOCAB + 9, "vocabulary_map": words, "tie_word_embeddings": tied}
    config = transformers.ChameleonConfig(**{**TINY, **changed, "vq_config": {**images, "num_res_blocks": 1}})
    model = transformers.ChameleonForConditionalGeneration(config)
    model.model.vqmodel.requires_grad_(False)
    return model


def _bart(tied: bool) -> nn.Module:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BartConfig(
        **_SEQUENCE_TO_SEQUENCE, **layers, d_model=HIDDEN, decoder_start_token_id=2, tie_word_embeddings=tied
    )
    model = transformers.BartForConditionalGeneration(config)
    model.final_logits_bias.copy_(torch.linspace(-1, 1, VOCAB))
    model.model.shared.requires_grad_(tied)  # or it serves nothing
    return model


def _prophetnet(tied: bool) -> nn.Module:
    layers = {"num_encoder_layers": 1, "num_decoder_layers": 1, "num_decoder_attention_heads": 4}
    config = transformers.ProphetNetConfig(
        **_SEQUENCE_TO_SEQUENCE,
        **layers,
        num_encoder_attention_heads=4,
        hidden_size=HIDDEN,
        decoder_start_token_id=2,
        tie_word_embeddings=tied,
    )
    model = transformers.ProphetNetForConditionalGeneration(config)
    model.prophetnet.word_embeddings.requires_grad_(tied)  # or it serves nothing
    return model


@dataclass(frozen=True)
class Kind:
    """``make(tied)`` a model, the same each time. ``averages``: its loss is the mean over its own labels, of which the
    first counts as well, whatever ``num_items_in_batch`` says. ``images``: it looks at one a row."""

    make: Callable[[bool], nn.Module]
    averages: bool = False
    images: bool = False


KINDS: dict[str, Kind] = {
    "plain": Kind(lambda tied: tiny_llama(tie_word_embeddings=tied)),
    "bias": Kind(_with_bias),
    "own forward": Kind(_with_own_head),
    "dory": Kind(_dory),
    "idefics": Kind(_idefics, images=True),
    "chameleon": Kind(_chameleon),
    "bart": Kind(_bart, averages=True),
    "prophetnet": Kind(_prophetnet, averages=True),
}


def make(head: str, tied: bool) -> nn.Module:
    torch.manual_seed(0)
    model = KINDS[head].make(tied).train()
    for name, parameter in model.named_parameters():
        if name.endswith(("k_proj.bias", "key_proj.bias")):  # a softmax takes no notice of it: its gradient is noise
            parameter.requires_grad_(False)
    return model


def images(rows: int, length: int, seed: int) -> dict[str, Tensor]:
    """One random image for each of the rows, which all of its tokens look at."""
    pixels = torch.randn(rows, 1, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": pixels, "image_attention_mask": torch.ones(rows, length, 1, dtype=torch.long)}
