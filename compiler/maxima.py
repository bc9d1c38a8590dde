"""The largest numbers that a config.json may hold, by key."""

# Far above every released model. Each number sizes a loop or an array of the compiler, which
# would otherwise hang or overflow long before the weights are found not to fit.
INT32_MAX = 2**31 - 1
MAXIMA = {
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 4096,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "moe_intermediate_size": 2**20,
    "shared_expert_intermediate_size": 2**20,
    "num_experts": 4096,
    "num_local_experts": 4096,
    "n_routed_experts": 4096,
    "q_lora_rank": 2**16,
    "kv_lora_rank": 2**14,
    "qk_nope_head_dim": 4096,
    "qk_rope_head_dim": 4096,
    "v_head_dim": 4096,
    "linear_num_key_heads": 4096,
    "linear_num_value_heads": 4096,
    "linear_key_head_dim": 4096,
    "linear_value_head_dim": 4096,
    "linear_conv_kernel_dim": 64,
    "mamba_d_ssm": 2**18,
    "mamba_n_heads": 4096,
    "mamba_d_state": 4096,
    "mamba_d_conv": 64,
    "vocab_size": 2**24,
}
