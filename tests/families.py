"""Tiny random models of many families, and where each keeps its MLPs, written down by hand."""

import torch
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    GlmConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MptConfig,
    NemotronConfig,
    OlmoConfig,
    OpenAIGPTConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    RecurrentGemmaConfig,
    Starcoder2Config,
    XGLMConfig,
)

COMMON = dict(
    vocab_size=64,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GATED = (lambda layer: layer.mlp, ("gate_proj", "up_proj"), "down_proj", 1)
FUSED = (lambda layer: layer.mlp, ("gate_up_proj",), "down_proj", 2)
UP_DOWN = (lambda layer: layer.mlp, ("up_proj",), "down_proj", 1)
FC = (lambda layer: layer.mlp, ("fc1",), "fc2", 1)
FC_IN_LAYER = (lambda layer: layer, ("fc1",), "fc2", 1)
C_FC = (lambda layer: layer.mlp, ("c_fc",), "c_proj", 1)
FC_IN_OUT = (lambda layer: layer.mlp, ("fc_in",), "fc_out", 1)
DENSE_4H = (lambda layer: layer.mlp, ("dense_h_to_4h",), "dense_4h_to_h", 1)

MAMBA = dict(mamba_n_heads=4, mamba_d_head=12, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=4)
GEMMA4_LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]
GEMMA3N = dict(
    head_dim=12,
    num_hidden_layers=2,
    layer_types=["sliding_attention", "full_attention"],
    sliding_window=4,
    vocab_size_per_layer_input=64,
    hidden_size_per_layer_input=8,
    laurel_rank=4,
    num_kv_shared_layers=0,
    activation_sparsity_pattern=[0.0, 0.0],
)
GEMMA4 = dict(
    head_dim=12,
    global_head_dim=16,
    layer_types=GEMMA4_LAYERS,
    sliding_window=4,
    vocab_size_per_layer_input=64,
    hidden_size_per_layer_input=8,
    num_kv_shared_layers=0,
)

# name -> (configuration class, its own arguments, where the layers are, how an MLP is laid out)
FAMILIES = {
    "llama": (LlamaConfig, dict(intermediate_size=50), "model.layers", GATED),
    "llama_bias": (LlamaConfig, dict(intermediate_size=50, mlp_bias=True), "model.layers", GATED),
    "qwen2": (Qwen2Config, dict(intermediate_size=50), "model.layers", GATED),
    "qwen3": (Qwen3Config, dict(intermediate_size=50, head_dim=12), "model.layers", GATED),
    "gemma": (GemmaConfig, dict(intermediate_size=50, head_dim=12), "model.layers", GATED),
    "gemma2": (Gemma2Config, dict(intermediate_size=50, head_dim=12, sliding_window=4), "model.layers", GATED),
    "gemma3": (Gemma3TextConfig, dict(intermediate_size=50, head_dim=12, sliding_window=4), "model.layers", GATED),
    "cohere": (CohereConfig, dict(intermediate_size=50), "model.layers", GATED),
    "olmo": (OlmoConfig, dict(intermediate_size=50), "model.layers", GATED),
    "phi3": (Phi3Config, dict(intermediate_size=50), "model.layers", FUSED),
    "glm": (GlmConfig, dict(intermediate_size=50, head_dim=12), "model.layers", FUSED),
    "opt": (OPTConfig, dict(ffn_dim=50, word_embed_proj_dim=24), "model.decoder.layers", FC_IN_LAYER),
    "phi": (PhiConfig, dict(intermediate_size=50), "model.layers", FC),
    "xglm": (XGLMConfig, dict(ffn_dim=50, d_model=24, num_layers=3, attention_heads=2), "model.layers", FC_IN_LAYER),
    "nemotron": (NemotronConfig, dict(intermediate_size=50), "model.layers", UP_DOWN),
    "mpt": (
        MptConfig,
        dict(d_model=24, n_heads=2, n_layers=3),
        "transformer.blocks",
        (lambda layer: layer.ffn, ("up_proj",), "down_proj", 1),
    ),
    "gpt2": (GPT2Config, dict(n_inner=50), "transformer.h", C_FC),
    "starcoder2": (Starcoder2Config, dict(intermediate_size=50), "model.layers", C_FC),
    "gptj": (GPTJConfig, dict(n_inner=50, rotary_dim=4), "transformer.h", FC_IN_OUT),
    "gpt_neox": (GPTNeoXConfig, dict(intermediate_size=50), "gpt_neox.layers", DENSE_4H),
    "falcon": (FalconConfig, dict(ffn_hidden_size=50), "transformer.h", DENSE_4H),
    "bloom": (BloomConfig, {}, "transformer.h", DENSE_4H),
    # Activations with parameters of their own; layers of two kinds; buffers that the model sets in its layers; a list
    # of widths, and hidden states in four streams; widths of heads that differ by layer; layers that return lists.
    "apertus": (ApertusConfig, dict(intermediate_size=50), "model.layers", UP_DOWN),
    "bamba": (
        BambaConfig,
        dict(intermediate_size=50, attn_layer_indices=[1]) | MAMBA,
        "model.layers",
        (lambda layer: layer.feed_forward, *GATED[1:]),
    ),
    "falcon_h1": (
        FalconH1Config,
        dict(intermediate_size=50, head_dim=12, mamba_d_ssm=48) | MAMBA,
        "model.layers",
        (lambda layer: layer.feed_forward, *GATED[1:]),
    ),
    "gemma3n": (Gemma3nTextConfig, dict(intermediate_size=[50, 50]) | GEMMA3N, "model.layers", GATED),
    "gemma4": (Gemma4TextConfig, dict(intermediate_size=50) | GEMMA4, "model.layers", GATED),
    "openai_gpt": (OpenAIGPTConfig, dict(n_embd=24, n_layer=3, n_head=2, n_positions=64), "transformer.h", C_FC),
    "recurrent_gemma": (
        RecurrentGemmaConfig,
        dict(intermediate_size=100, lru_width=24, attention_window_size=4, head_dim=12)
        | dict(block_types=["recurrent", "recurrent", "attention"]),
        "model.layers",
        (lambda layer: layer.mlp_block, *GATED[1:]),
    ),
}
# Their code makes the MLP 4 times the hidden size, or half of what the configuration says.
FIXED_WIDTH = ("mpt", "bloom", "openai_gpt", "recurrent_gemma")

# Their own configuration says a width for every layer, so results with widths that differ need no code beside them.
WIDTH_BY_LAYER = ("gemma3n",)


def build(family):
    """`(model, mlps)`: a random model, with every parameter (biases and norms too) away from its initial value."""
    config_class, own, path, (owner_of, inputs, output, parts) = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**(COMMON | own))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    owners = [owner_of(layer) for layer in model.get_submodule(path)]
    return model, [([getattr(o, name) for name in inputs], getattr(o, output), parts) for o in owners]
