"""Data for `zoo.py`: how small each known config attribute becomes, and what single architectures need.

`TEXT` and `TOWER` map an attribute name to its tiny value; they apply to every config class that declares it
(`TOWER` to vision/audio/codec sub-configs). An attribute whose default is None, 0 or False means "feature
off" and stays as it is, except those in `ALWAYS`. `OVERRIDES` is keyed by model_type (parent or sub-config;
by class name where there is no type) and wins over both; it is only for what the general tables cannot know.
"""

from __future__ import annotations

from typing import Any

HIDDEN = 64  # width of the text model
EXPERT = 96  # expert width: a multiple of 32 (3-bit packing), not of 64 (ragged groups)
DENSE = 128  # dense MLP width where the config tells dense and expert widths apart
EXPERTS, TOP_K = 4, 2
VOCAB = 256

ALWAYS = {"n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", "num_experts_per_tok"}

TEXT: dict[str, Any] = {
    # widths and depth
    **dict.fromkeys(["hidden_size", "d_model", "moe_hidden_size", "text_hidden_size"], HIDDEN),
    **dict.fromkeys(["num_hidden_layers", "n_layers", "num_layers", "num_decoder_layers"], 2),
    **dict.fromkeys(["encoder_layers", "decoder_layers"], 2),
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCAB),
    "hidden_size_per_layer_input": 16,
    **dict.fromkeys(["max_position_embeddings", "max_seq_len", "rel_extent"], 128),
    # experts and dense MLPs
    **dict.fromkeys(["moe_intermediate_size", "expert_ffn_hidden_size"], EXPERT),
    **dict.fromkeys(["shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"], 64),
    **dict.fromkeys(["shared_intermediate_size", "shared_experts_intermediate_size", "share_expert_dim"], 64),
    **dict.fromkeys(["dense_intermediate_size", "intermediate_size_mlp"], DENSE),
    "prefix_dense_intermediate_size": DENSE,
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], EXPERTS),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts"], TOP_K),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers", "topk_group"], 1),
    "n_group": 2,
    "router_hidden_size": 32,
    # attention
    **dict.fromkeys(["num_attention_heads", "n_heads", "num_heads", "swa_num_attention_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads", "num_sliding_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "kv_n_heads", "swa_num_key_value_heads"], 2),
    **dict.fromkeys(["head_dim", "global_head_dim", "swa_head_dim", "kv_channels", "d_kv"], 16),
    **dict.fromkeys(["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rotary_dim"], 16),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "o_lora_rank", "hc_lowrank"], 32),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "attention_chunk_size"], 8),
    **dict.fromkeys(["index_n_heads", "o_groups", "indexer_n_heads"], 2),
    **dict.fromkeys(["index_head_dim", "indexer_head_dim"], 32),
    **dict.fromkeys(["index_topk", "index_block_size", "index_kpool"], 4),
    "index_topk_blocks": 2,
    # mamba, linear attention, convolutions
    **dict.fromkeys(["mamba_d_state", "ssm_state_size"], 16),
    **dict.fromkeys(["mamba_num_heads", "mamba_n_heads"], 4),
    "mamba_head_dim": 32,
    **dict.fromkeys(["mamba_chunk_size", "chunk_size", "block_size"], 8),
    **dict.fromkeys(["n_groups", "linear_num_key_heads"], 2),
    **dict.fromkeys(["linear_num_value_heads", "linear_num_heads"], 4),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"], 16),
    # what a multimodal parent says about its projector
    **dict.fromkeys(["out_hidden_size", "projector_hidden_size", "thinker_hidden_size"], HIDDEN),
    **dict.fromkeys(["vision_hidden_size", "projection_hidden_size"], 32),
    "num_code_groups": 4,
    # multi-token prediction heads are not built by transformers' forward: off
    **dict.fromkeys(["num_mtp_layers", "num_nextn_predict_layers"], 0),
}

TOWER: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "audio_hidden_size", "decoder_dim"], 32),
    **dict.fromkeys(["adapter_input_size", "adapter_in_dim"], 32),
    **dict.fromkeys(["num_hidden_layers", "depth", "num_layers", "encoder_layers"], 1),
    **dict.fromkeys(["num_attention_heads", "num_heads", "num_key_value_heads"], 2),
    "encoder_attention_heads": 2,
    **dict.fromkeys(["intermediate_size", "encoder_ffn_dim", "mlp_dim", "projection_hidden_dim"], 64),
    **dict.fromkeys(["projection_intermediate_size", "moe_intermediate_size"], 64),
    **dict.fromkeys(["out_hidden_size", "output_dim", "text_hidden_size", "adapter_out_dim"], HIDDEN),
    **dict.fromkeys(["projector_output_dim", "vision_output_dim", "projector_input_dim"], HIDDEN),
    **dict.fromkeys(["head_dim", "downsample_hidden_size", "output_proj_dims"], 16),
    **dict.fromkeys(["n_mel_bins", "num_mel_bins"], 16),
    "image_size": 28,
    "patch_size": 14,
    "num_position_embeddings": 16,
    "position_embedding_size": 64,
    **dict.fromkeys(["pos_emb_height", "pos_emb_width", "posemb_grid_size"], 4),
    **dict.fromkeys(["num_local_experts", "num_experts", "n_routed_experts"], EXPERTS),
    "num_experts_per_tok": TOP_K,
    **dict.fromkeys(["vocab_size", "codebook_size"], VOCAB),
    "max_position_embeddings": 128,
}

_MROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SAM = {
    "image_size": 64,
    "patch_size": 16,
    "window_size": 2,
    "global_attn_indexes": [0],
    "output_channels": 32,
    "downsample_channels": [32, 32],
}

_GEMMA_VISION = {  # some versions have no default tower, but cannot build the model without one
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 64,
    "head_dim": 16,
    "position_embedding_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    # attributes that the architecture needs but its config class does not default
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1},
    "hunyuan_v1_moe": {"head_dim": 16, "num_key_value_heads": 2},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 64},
    # MoE is off by default
    "gemma4_text": {
        "enable_moe_block": True,
        "top_k_experts": TOP_K,
        "moe_intermediate_size": EXPERT,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 16,
    },
    "diffusion_gemma_text": {"top_k_experts": TOP_K, "moe_intermediate_size": EXPERT, "global_head_dim": 16},
    # which layer is what
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "unlimited_ocr_text": {"mlp_layer_types": ["dense", "sparse"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {f"{kind}_layer_{x}": n for kind in ("attn", "expert") for x, n in (("period", 2), ("offset", 1))},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "partial_rotary_factor": 0.5,
    },
    "step3p5": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
    # rotary sections must add up to half of the rotated dimensions
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [EXPERT, 64],
        "rope_parameters": {**_MROPE, "mrope_section": [3, 3, 2]},
    },
    "glm4v_moe_text": {
        "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5},
    },
    # other sizes
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "diffusion_gemma": {"canvas_length": 16, "vision_config": _GEMMA_VISION},
    "dots3_note_text": {
        **{f"swa_{x}": 4 for x in ("num_attention_heads", "num_key_value_heads")},
        **{f"swa_{x}": 32 for x in ("q_lora_rank", "kv_lora_rank", "head_dim")},
        **{f"swa_{x}": 16 for x in ("qk_nope_head_dim", "v_head_dim")},
    },
    "longcat_flash": {"zero_expert_num": 2},
    "zaya": {"num_experts_per_tok": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    # towers
    "deepseek_ocr2_sam_vision_model": _SAM,
    "unlimited_ocr_sam_vision_model": _SAM,
    "dots3_note_vision_encoder": {"num_hidden_layers": 2, "pyramid_num_routed": [-1, EXPERTS]},
    "inkling_audio": {"n_mel_bins": 2},
    "radio": {"image_size": 32, "patch_size": 16, "max_img_size": 64},
    "muse_spark_audio": {"num_hidden_layers": 2, "patch_sizes": [4, 2], "hidden_sizes": [16, 16], "depths": [1, 1]},
}

# Types that are found but cannot be built as a tiny text MoE, with the reason.
NOT_BUILT: dict[str, str] = {
    "gemma4_assistant": "speculative drafter: no experts, and it needs the main model's KV cache",
}
