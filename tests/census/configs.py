"""Small configs of any model type of transformers, found by the names of their fields.

A config class says what its model's sizes are called, and the names are few: this file maps them to small numbers that
fit together, walks into nested configs, and shortens lists that have an entry a layer so that every kind of layer is
kept. What does not follow from names stands in :data:`EXCEPTIONS`, one line a type.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

__all__ = ["HEADS", "HEAD_DIM", "HIDDEN", "VOCAB", "tiny_config"]

VOCAB = 211  # a prime that is no other size of a model
HIDDEN = 64
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
INNER = 80
EXPERTS = 4
TOP_K = 2
IMAGE = 32
PATCH = 8

# The first pattern that matches a field's whole name decides. A value of None keeps the default.
SIZES: tuple[tuple[str, Any], ...] = (
    (r"(pad|mask_pad)_token_id", 0),
    (r"(bos|decoder_start|cls)_token_id", 1),
    (r"(eos|sep|forced_eos|boi_eos)_token_id", 2),
    (r"(attention_|hidden_|attn_|resid_|embd_|activation_|classifier_|router_)?(dropout|pdrop|drop).*", 0.0),
    (r".*_?(dropout|pdrop|drop|droppath|layerdrop|drop_path_rate|dropout_prob|dropout_rate)(_rate|_prob)?", 0.0),
    (r"router_jitter_noise|input_jitter_noise|router_aux_loss_coef_none|summary_first_dropout|jitter_eps", 0.0),
    (r"(unpadded_|decoder_|text_)?vocab_size(_per_layer_input)?|output_vocab_size", VOCAB),
    (r"type_vocab_size|task_type_vocab_size", 2),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_length|max_target_positions|seq_len)", 128),
    (r"original_max_position_embeddings|max_source_positions|max_2d_position_embeddings|context_length", 64),
    (r"head_dim|(global|attention|swa|linear|index|d)_head_dim|kv_channels|d_kv|d_head|v_head_dim|qk_nope_head_dim"
     r"|qk_rope_head_dim|swa_v_head_dim|mamba_head_dim|mamba_d_head|linear_(key|value)_head_dim|attention_head_size"
     r"|rotary_dim|resampler_(dim_head|head_dim)|dim_head|mamba_headdim|global_head_dim", HEAD_DIM),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|laurel_rank|lora_rank|adapter_rank|hc_lowrank|gated_norm_rank", 24),
    (r".*num_(key_value|kv)_heads|n_kv_heads|num_kv_heads|num_query_groups|num_global_key_value_heads"
     r"|kv_n_heads|.*key_value_heads", KV_HEADS),
    (r"(encoder_|decoder_|swa_)?(num_)?(encoder_|decoder_|sliding_)?attention_heads|n_heads?|num_heads"
     r"|index_n_heads|swa_num_attention_heads|.*_num_attention_heads|resampler_(n_)?heads|linear_num_heads"
     r"|linear_num_(key|value)_heads|num_(en|de)coder_attention_heads", HEADS),
    (r"(mamba_num_heads|mamba_n_heads)", 8),
    (r"n_mamba_heads", 2),
    (r"state_size|ssm_state_size|mamba_d_state", 16),
    (r"(mamba_)?chunk_size|mamba_chunk_size", 8),
    (r"mamba_d_ssm|d_inner", 128),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"(num_)?experts_per_tok(en)?|num_experts_per_tok|moe_top_?k|moe_k|num_experts_per_token|top_k_experts"
     r"|moe_num_active_experts|num_selected_experts", TOP_K),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts|num_moe_experts", EXPERTS),
    (r"zero_expert_num", 2),
    (r"(n|num)_shared_experts|moe_num_shared_experts", 1),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"hidden_size|d_model|n_embd|embed_dim|emb_dim|hidden_dim|word_embed_proj_dim|embedding_dim|embedding_size"
     r"|(text|vision|audio|image_text|decoder|encoder|projector|backbone|out|merged)_hidden_size|out_hidden_size"
     r"|input_embedding_size|output_embedding_size|projection_dim|lru_width|attention_hidden_size|moe_hidden_size"
     r"|output_dim|vision_output_dim|projector_(in|out)put_dim|text_hidden_size|adapter_out_dim|hidden_size_global"
     r"|encoder_hidden_size|image_token_embed_dim|projection_hidden_(dim|size)|mm_embed_dim|backbone_hidden_size"
     r"|vocab_embed_dim|multimodal_hidden_size", HIDDEN),
    (r"hidden_size_per_layer_input", 16),
    (r".*intermediate_size.*|(encoder_|decoder_)?ffn_dim|d_ff|dff|dim_ff|n_inner|ffn_hidden_size|mlp_dim"
     r"|moe_ffn_hidden_size|expert_ffn_hidden_size|share_expert_dim|intermediate_dim|feed_forward_size"
     r"|projection_intermediate_size|aligner_ffn_mult", INNER),
    (r"image_size|img_size|crop_size|max_image_size|resolution|max_img_size", IMAGE),
    (r"patch_size", PATCH),
    (r"num_image_tokens|image_seq_length|mm_tokens_per_image|vision_soft_tokens_per_image", 16),
    (r"num_query_tokens|latent_query_num|resampler_n_latents|resampler_num_latents", 4),
    (r"(cross_attention_frequency)", 1),
    (r"sliding_window|sliding_window_size|local_attention_window_len|attention_chunk_size", 8),
    (r"window_size", IMAGE),
    (r"image_grid_pinpoints", [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE]]),
    (r"num_position_embeddings|posemb_grid_size|pos_emb_(height|width)|position_embedding_size", 16),
    (r"index_topk|index_topk_blocks", 4),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"num_nextn_predict_layers", 0),
    (r"query_pre_attn_scalar", HEAD_DIM),
    (r"deepstack_visual_indexes|fullatt_block_indexes|global_attn_indexes|intermediate_layers_indices", [0]),
    (r"num_kv_shared_layers|max_window_layers|zero_centered_none", 0),
    (r"resampler_depth|perceiver_depth", 1),
)  # fmt: skip

# Fields that a config may leave to its model, which then needs sizes that divide.
NONE_MEANS_DERIVED = ("head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts")

LAYERS = (
    r"num_(hidden_|encoder_|decoder_|global_)?layers|n_layers?|(encoder_|decoder_)?layers|depth|num_blocks"
    r"|resampler_layers|encoder_layers|decoder_layers|num_residual_layers"
)
# Lists with an entry a layer.
PER_LAYER = (
    r"(layer|mlp_layer|indexer|block)_types|layers_block_type|layer_rope_theta|no_rope_layers"
    r"|activation_sparsity_pattern|num_attention_heads_per_layer|mlp_multipliers_none|rope_scaling_layers_none"
)

_QWEN4_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}

_DOTS3 = {"qk_nope_head_dim": HEAD_DIM, "head_dim": 2 * HEAD_DIM, "index_head_dim": HEAD_DIM, "index_n_heads": HEADS,
    "swa_head_dim": 2 * HEAD_DIM, "swa_qk_nope_head_dim": HEAD_DIM, "swa_v_head_dim": HEAD_DIM, "swa_kv_lora_rank": 24,
    "swa_q_lora_rank": 24, "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS}  # fmt: skip
_IMAGE_WORDS = {"<image>": VOCAB - 1} | {f"IMGIMG{letter}Z": 160 + i for i, letter in enumerate("ABCDEFGH")}


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)} | more


_COMPASS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {kind: _mrope(2, 3, 3) for kind in ("sliding_attention", "full_attention")},
}

# What does not follow from a field's name: fields of the config, those of a nested one by a dotted name.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {(IMAGE // PATCH) ** 2: 4}},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_hash_byte_group_size": [3, 4],
        "vocab_size": 260,
        "encoder_config.vocab_size": 260,
        "decoder_config.vocab_size": 260,
        "patcher_config.vocab_size": 260,
    },
    "cohere_compass_text": _COMPASS,
    "cohere_compass": {f"text_config.{name}": value for name, value in _COMPASS.items()},
    "blip-2": {"image_token_index": VOCAB - 1},
    "instructblip": {"image_token_index": VOCAB - 1},
    "instructblipvideo": {"video_token_index": VOCAB - 1},
    "chameleon": {"vocabulary_map": _IMAGE_WORDS},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "dots1": {"routed_scaling_factor": 1.5, "n_shared_experts": 1},
    "dots3_note_text": _DOTS3,
    "dots3_note": {f"text_config.{name}": value for name, value in _DOTS3.items()}
    | {"vision_config.adapter_in_dim": HIDDEN, "audio_config.adapter_input_size": HIDDEN},
    "emu3": {"vocabulary_map": _IMAGE_WORDS},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": _mrope(3, 3, 2)},
    "glm46v": {"text_config.rope_parameters": _mrope(2, 3, 3)},
    "glm4v": {"text_config.rope_parameters": _mrope(2, 3, 3)},
    "glm4v_moe": {"text_config.rope_parameters": _mrope(1, 1, 2, partial_rotary_factor=0.5)},
    "glm5_next": {"text_config.index_kpool": 2, "text_config.qk_rope_head_dim": 0},
    "glm_ocr": {"text_config.rope_parameters": _mrope(2, 3, 3)},
    "glmga": {"text_config.rope_parameters": _mrope(2, 3, 3)},
    "hunyuan_vl": {"text_config.rope_parameters": _mrope(2, 3, 3)},
    "kosmos-2": {"latent_query_num": 4},
    "llama4": {"vision_config.intermediate_size": 4 * HIDDEN},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "mllama": {"vision_config.vision_output_dim": 2 * HIDDEN, "text_config.cross_attention_layers": [1]},
    "mistral4": {"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
        "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}},
    "udop": {"decoder_start_token_id": 1},
    "vision-encoder-decoder": {"pad_token_id": 0, "decoder_start_token_id": 1},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "paddleocr_vl": {"text_config.rope_parameters": _mrope(2, 3, 3)},
    "qwen2_5_omni_thinker": {"text_config.rope_parameters": _mrope(2, 3, 3)},
    "qwen2_5_vl": {"text_config.rope_parameters": _mrope(2, 3, 3)},
    "qwen2_vl": {"text_config.rope_parameters": _mrope(2, 3, 3)},
    "muse_spark": {"audio_config.num_hidden_layers": 4, "audio_config.hidden_sizes": [16, 16, 32, 32],
        "audio_config.depths": [1, 1, 1, 1]},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "granite4_vision": {"downsample_rate": "2/4", "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1]},
    "pix2struct": {"vision_config.patch_embed_hidden_size": 3 * PATCH**2},
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2},
    "step3p7": {"text_config.sliding_window": 8},
    "xlstm": {"chunk_size": 16},
    "gemma4": {"base:vision_config": {}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "phi4_multimodal": {"audio_config.nemo_conv_channels": 32},
    "qwen4_exp": {f"text_config.{name}": value for name, value in _QWEN4_INDEXER.items()},
    "qwen4_exp_text": _QWEN4_INDEXER,
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [4, 4],
        "axial_pos_embds_dim": [32, 32],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "roc_bert": {
        "pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB, "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4,
        "attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HIDDEN // HEADS},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4, "n_mamba_heads": 8, "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HIDDEN // HEADS},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def _by_name(name: str, value: Any) -> Any:
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            if isinstance(value, bool) or (value is None and name not in NONE_MEANS_DERIVED):
                return value
            if isinstance(size, float) and type(value) is int:
                return int(size)
            if isinstance(size, float) and not isinstance(value, (int, float)):
                return value
            if isinstance(size, int) and isinstance(value, (list, tuple)):
                if all(isinstance(each, int) for each in value):
                    return type(value)([size] * len(value))
                return value
            return size
    return value


def _layer_plan(fields: dict[str, Any]) -> tuple[int, dict[str, list[Any]]]:
    """How many layers show every kind of layer, and the lists with an entry a layer, shortened to them."""
    lists = {
        name: list(value)
        for name, value in fields.items()
        if re.fullmatch(PER_LAYER, name) and isinstance(value, (list, tuple)) and len(value) > 1
    }
    if not lists:
        return 2, {}
    longest = max(len(value) for value in lists.values())
    columns = {name: value for name, value in lists.items() if len(value) == longest}
    seen: dict[tuple[Any, ...], int] = {}
    for index in range(longest):
        seen.setdefault(tuple(str(column[index]) for column in columns.values()), index)
    kept = list(seen.values())[:5]
    while len(kept) < 2:
        kept.append(kept[-1])
    return len(kept), {name: [value[i] for i in kept] for name, value in columns.items()}


def _shrunk(config: PreTrainedConfig, exceptions: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    n_layers, lists = _layer_plan(fields)
    n_layers = exceptions.get(prefix + "n_layers", n_layers)
    lists = {name: value[:n_layers] for name, value in lists.items()}
    changes: dict[str, Any] = {}
    latent = fields.get("kv_lora_rank") is not None and "qk_rope_head_dim" in fields
    for name, value in fields.items():
        if latent and name == "num_key_value_heads":
            changes[name] = HEADS  # latent attention has as many keys as queries
        elif isinstance(value, PreTrainedConfig):
            changes[name] = type(value)(**_shrunk(value, exceptions, f"{prefix}{name}."))
        elif name in lists:
            changes[name] = lists[name]
        elif re.fullmatch(LAYERS, name) and isinstance(value, int) and not isinstance(value, bool):
            changes[name] = n_layers
        elif re.fullmatch(r".*(token_id|token_index|_id|_index)", name) and isinstance(value, int):
            changes[name] = _token(name, value)
        elif (new := _by_name(name, value)) is not value:
            changes[name] = new[:n_layers] if isinstance(new, (list, tuple)) and len(new) > 4 else new
    if isinstance(fields.get("rope_parameters"), dict):
        changes["rope_parameters"] = _rope(fields["rope_parameters"])
    if isinstance(fields.get("mrope_section"), list):
        changes["mrope_section"] = [2, 3, 3]
    for name, value in exceptions.items():
        head, _, last = name.rpartition(".")
        if head + "." * bool(head) == prefix and last != "n_layers":
            changes[last] = value
    return {name: value for name, value in changes.items() if value != "delete"}


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    shrunk = {}
    for name, value in parameters.items():
        if isinstance(value, dict):
            value = _rope(value)
        elif name == "mrope_section":
            value = [2, 3, 3]
        elif name == "original_max_position_embeddings":
            value = 64
        elif name in ("short_factor", "long_factor"):
            value = [1.0] * (HEAD_DIM // 2)
        shrunk[name] = value
    return shrunk


# Special tokens get the last ids of the vocabulary, one each, whatever the order of the configs.
_TOKENS: dict[str, int] = {}


def _token(name: str, value: int) -> int:
    if value < 0:
        return value
    for pattern, size in SIZES[:3]:
        if re.fullmatch(pattern, name):
            return size
    key = re.sub(r"_(id|index)$", "", name)
    return _TOKENS.setdefault(key, VOCAB - 1 - len(_TOKENS)) if value >= 8 else value


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A config of model_type whose model has some 10,000 to a million parameters and no dropout.

    Raises:
        KeyError: transformers has no such type.
        Exception: whatever the config class raises on sizes that do not fit together.
    """
    _TOKENS.clear()
    config_class = CONFIG_MAPPING[model_type]
    exceptions = EXCEPTIONS.get(model_type, {})
    base = {name: value for name, value in exceptions.items() if name.startswith("base:")}
    default = config_class(**{name.removeprefix("base:"): value for name, value in base.items()})
    rest = {name: value for name, value in exceptions.items() if name not in base}
    return config_class(**_shrunk(default, rest))
