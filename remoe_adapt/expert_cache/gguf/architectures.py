"""The table of GGUF architectures: which tensors of a file make up which parameters of transformers' models, and which
of its entries make up their configuration.

Each line was held against what llama.cpp's own converter (conversion/*.py of b7100 and later) writes for a random
model of the class. An architecture that is not here, and not in transformers' own conversion mapping, is refused: its
weights may be stored in another order, which only wrong text would tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# How the tensors become the parameter; "" as they are.
ROTARY, MINUS_ONE, LATENT, ROWS = "rotary", "minus one", "latent", "rows"
LOG_NEGATED, FLAT, LINEAR_INPUTS = "log negated", "flat", "linear inputs"


@dataclass(frozen=True, slots=True)
class Rule:
    """The tensors of one parameter.

    tensors: their names in the file without "blk.N." and without ".weight" or ".bias", which they have from the
        parameter; with them where the parameter has neither.
    step: what undoes the converter: ROTARY (rows of each head in halves again instead of pairs), MINUS_ONE (norms
        that are stored as w + 1), LATENT (keys and values of latent attention in one matrix), ROWS (one after another),
        LOG_NEGATED (decays that are stored as -exp(w)), FLAT (a matrix as a vector), LINEAR_INPUTS (queries, keys,
        values and gates of linear attention, by key head).
    instead: a single tensor that files of other converters have, which is the parameter as it is.
    """

    tensors: tuple[str, ...]
    step: str = ""
    instead: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One model type of transformers as GGUF files hold it.

    top: parameters outside the layers -> tensor, by the names of modules or of parameters.
    layer: those below "layers.N.", likewise.
    config: fields of the configuration that are no entry of the file but the same for all models of the type; None
        where the file does not tell enough to make a configuration.
    entries: entry of the file without the architecture's name -> field.
    """

    top: Mapping[str, Rule]
    layer: Mapping[str, Rule]
    config: Mapping[str, Any] | None = None
    entries: Mapping[str, str] = field(default_factory=dict)


def _rules(text: str, step: str = "") -> dict[str, Rule]:
    """Lines of a parameter and its tensor."""
    pairs = (line.split() for line in text.strip().splitlines())
    return {name: Rule((tensor,), step) for name, tensor in pairs}


_TOP = _rules("""
    model.embed_tokens token_embd
    model.norm output_norm
    lm_head output
""")
_NORMS = _rules("""
    input_layernorm attn_norm
    post_attention_layernorm ffn_norm
""")
_POST_NORMS = _NORMS | _rules("post_attention_layernorm post_attention_norm")
_ATTENTION = _rules("""
    self_attn.q_proj attn_q
    self_attn.k_proj attn_k
    self_attn.v_proj attn_v
    self_attn.o_proj attn_output
""")
_ROTARY_ATTENTION = _ATTENTION | _rules("self_attn.q_proj attn_q\nself_attn.k_proj attn_k", ROTARY)
_QK_NORMS = _rules("""
    self_attn.q_norm attn_q_norm
    self_attn.k_norm attn_k_norm
""")
_LATENT_ATTENTION = _rules("""
    self_attn.q_proj attn_q
    self_attn.q_a_proj attn_q_a
    self_attn.q_a_layernorm attn_q_a_norm
    self_attn.q_b_proj attn_q_b
    self_attn.kv_a_proj_with_mqa attn_kv_a_mqa
    self_attn.kv_a_layernorm attn_kv_a_norm
    self_attn.o_proj attn_output
""") | {"self_attn.kv_b_proj": Rule(("attn_k_b", "attn_v_b"), LATENT, "attn_kv_b")}
_INDEXER = _rules("""
    self_attn.indexer.wq_b indexer.attn_q_b
    self_attn.indexer.wk indexer.attn_k
    self_attn.indexer.k_norm indexer.k_norm
    self_attn.indexer.weights_proj indexer.proj
""")
_MLP = _rules("""
    mlp.gate_proj ffn_gate
    mlp.up_proj ffn_up
    mlp.down_proj ffn_down
""")
_ROUTER = _rules("mlp.gate ffn_gate_inp")
_SHARED_EXPERT = _rules("""
    mlp.shared_expert.gate_proj ffn_gate_shexp
    mlp.shared_expert.up_proj ffn_up_shexp
    mlp.shared_expert.down_proj ffn_down_shexp
    mlp.shared_expert_gate ffn_gate_inp_shexp
""")
_SHARED_EXPERTS = _rules("""
    mlp.shared_experts.gate_proj ffn_gate_shexp
    mlp.shared_experts.up_proj ffn_up_shexp
    mlp.shared_experts.down_proj ffn_down_shexp
""")
_CORRECTION = _rules("mlp.gate.e_score_correction_bias exp_probs_b.bias")
_GROUPED = _NORMS | _MLP | _ROUTER | _CORRECTION | _SHARED_EXPERTS
_LATENT = Architecture(top=_TOP, layer=_GROUPED | _LATENT_ATTENTION)
_GRANITE = Architecture(
    top=_TOP,
    layer=_NORMS
    | _ROTARY_ATTENTION
    | _rules("block_sparse_moe.router ffn_gate_inp\nshared_mlp.output_linear ffn_down_shexp")
    | {"shared_mlp.input_linear": Rule(("ffn_gate_shexp", "ffn_up_shexp"), ROWS)},
)

# Every configuration: entry of the file -> field.
_ENTRIES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_used_count": "num_experts_per_tok",
}
_NUM_EXPERTS = _ENTRIES | {"expert_count": "num_experts"}
_LOCAL_EXPERTS = _ENTRIES | {"expert_count": "num_local_experts"}
_MOE_SIZE = {"expert_feed_forward_length": "moe_intermediate_size"}
_HEAD_SIZE = {"attention.key_length": "head_dim"}

# By `config.model_type` of the text model.
ARCHITECTURES: dict[str, Architecture] = {
    "afmoe": Architecture(
        top=_TOP,
        layer=_POST_NORMS
        | _ATTENTION
        | _QK_NORMS
        | _MLP
        | _SHARED_EXPERTS
        | _rules("""
            self_attn.gate_proj attn_gate
            pre_mlp_layernorm ffn_norm
            post_mlp_layernorm post_ffw_norm
            mlp.router.gate ffn_gate_inp
            mlp.expert_bias exp_probs_b.bias
        """),
    ),
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "dots1": Architecture(top=_TOP, layer=_GROUPED | _ATTENTION | _QK_NORMS),
    "ernie4_5_moe": Architecture(
        top=_TOP,
        layer=_NORMS
        | _ATTENTION
        | _MLP
        | _ROUTER
        | _SHARED_EXPERTS
        | _rules("mlp.gate.moe_statics.e_score_correction_bias exp_probs_b.bias"),
    ),
    "exaone_moe": Architecture(top=_TOP, layer=_GROUPED | _ATTENTION | _QK_NORMS),
    "gemma4_text": Architecture(
        top=_TOP
        | _rules("""
            model.embed_tokens_per_layer per_layer_token_embd
            model.per_layer_model_projection per_layer_model_proj
            model.per_layer_projection_norm per_layer_proj_norm
        """),
        layer=_POST_NORMS
        | _ATTENTION
        | _QK_NORMS
        | _MLP
        | _rules("""
            layer_scalar layer_output_scale.weight
            pre_feedforward_layernorm ffn_norm
            pre_feedforward_layernorm_2 pre_ffw_norm_2
            post_feedforward_layernorm post_ffw_norm
            post_feedforward_layernorm_1 post_ffw_norm_1
            post_feedforward_layernorm_2 post_ffw_norm_2
            per_layer_input_gate inp_gate
            per_layer_projection proj
            post_per_layer_input_norm post_norm
            router.proj ffn_gate_inp
            router.scale ffn_gate_inp.scale
            router.per_expert_scale ffn_down_exps.scale
        """),
    ),
    "glm4_moe": Architecture(top=_TOP, layer=_GROUPED | _ATTENTION | _QK_NORMS | _POST_NORMS),
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": Architecture(top=_TOP, layer=_GROUPED | _LATENT_ATTENTION | _INDEXER),
    "gpt_oss": Architecture(
        top=_TOP,
        layer=_POST_NORMS | _ATTENTION | _rules("self_attn.sinks attn_sinks.weight\nmlp.router ffn_gate_inp"),
        config={"rope_scaling": {"truncate": False}},
        entries=_LOCAL_EXPERTS | _HEAD_SIZE | {"attention.sliding_window": "sliding_window"},
    ),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "hunyuan_v1_moe": Architecture(
        top=_TOP,
        layer=_NORMS
        | _ATTENTION
        | _rules("""
            self_attn.query_layernorm attn_q_norm
            self_attn.key_layernorm attn_k_norm
            mlp.gate.wg ffn_gate_inp
            mlp.shared_mlp.gate_proj ffn_gate_shexp
            mlp.shared_mlp.up_proj ffn_up_shexp
            mlp.shared_mlp.down_proj ffn_down_shexp
        """),
    ),
    "jamba": Architecture(
        top=_TOP | _rules("model.final_layernorm output_norm"),
        layer=_ATTENTION
        | _rules("mamba.A_log ssm_a", LOG_NEGATED)
        | _rules("""
            input_layernorm attn_norm
            pre_ff_layernorm ffn_norm
            feed_forward.gate_proj ffn_gate
            feed_forward.up_proj ffn_up
            feed_forward.down_proj ffn_down
            feed_forward.router ffn_gate_inp
            mamba.D ssm_d
            mamba.conv1d ssm_conv1d
            mamba.in_proj ssm_in
            mamba.x_proj ssm_x
            mamba.dt_proj ssm_dt
            mamba.out_proj ssm_out
            mamba.dt_layernorm ssm_dt_norm
            mamba.b_layernorm ssm_b_norm
            mamba.c_layernorm ssm_c_norm
        """),
    ),
    "lfm2_moe": Architecture(
        top=_rules("""
            model.embed_tokens token_embd
            model.embedding_norm token_embd_norm
            lm_head output
        """),
        layer=_ATTENTION
        | _rules("""
            operator_norm attn_norm
            ffn_norm ffn_norm
            self_attn.out_proj attn_output
            self_attn.q_layernorm attn_q_norm
            self_attn.k_layernorm attn_k_norm
            conv.conv shortconv.conv
            conv.in_proj shortconv.in_proj
            conv.out_proj shortconv.out_proj
            feed_forward.w1 ffn_gate
            feed_forward.w2 ffn_down
            feed_forward.w3 ffn_up
            feed_forward.gate ffn_gate_inp
            feed_forward.expert_bias exp_probs_b.bias
        """),
    ),
    "mimo_v2_flash": Architecture(
        top=_TOP,
        layer=_NORMS | _ATTENTION | _MLP | _ROUTER | _CORRECTION | _rules("self_attn.sinks attn_sinks.weight"),
    ),
    "minimax_m2": Architecture(
        top=_TOP,
        layer=_NORMS | _ATTENTION | _QK_NORMS | _ROUTER | _rules("mlp.e_score_correction_bias exp_probs_b.bias"),
    ),
    "mixtral": Architecture(
        top=_TOP,
        layer=_NORMS | _ROTARY_ATTENTION | _ROUTER,
        config={},
        entries=_LOCAL_EXPERTS | {"rope.dimension_count": "head_dim"} | _HEAD_SIZE,
    ),
    "nemotron_h": Architecture(
        top=_rules("""
            model.embeddings token_embd
            model.norm_f output_norm
            lm_head output
        """),
        layer=_rules("mixer.A_log ssm_a", LOG_NEGATED)
        | _rules("mixer.norm ssm_norm", FLAT)
        | _rules("mixer.q_proj attn_q\nmixer.k_proj attn_k", ROTARY)
        | _rules("""
            norm attn_norm
            mixer.D ssm_d
            mixer.dt_bias ssm_dt.bias
            mixer.conv1d ssm_conv1d
            mixer.in_proj ssm_in
            mixer.out_proj ssm_out
            mixer.v_proj attn_v
            mixer.o_proj attn_output
            mixer.up_proj ffn_up
            mixer.down_proj ffn_down
            mixer.gate ffn_gate_inp
            mixer.gate.e_score_correction_bias exp_probs_b.bias
            mixer.shared_experts.up_proj ffn_up_shexp
            mixer.shared_experts.down_proj ffn_down_shexp
        """),
    ),
    "olmoe": Architecture(
        top=_TOP,
        layer=_NORMS | _ATTENTION | _QK_NORMS | _ROUTER,
        # llama.cpp never makes the weights of the chosen experts add up to one for this architecture.
        config={"norm_topk_prob": False},
        entries=_NUM_EXPERTS | {"attention.clamp_kqv": "clip_qkv"},
    ),
    "phimoe": Architecture(top=_TOP, layer=_NORMS | _ATTENTION | _rules("mlp.router ffn_gate_inp")),
    "qwen2_moe": Architecture(
        top=_TOP,
        layer=_NORMS | _ATTENTION | _MLP | _ROUTER | _SHARED_EXPERT,
        config={"norm_topk_prob": False},
        entries=_NUM_EXPERTS | _MOE_SIZE | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    ),
    "qwen3_moe": Architecture(
        top=_TOP,
        layer=_NORMS | _ATTENTION | _QK_NORMS | _MLP | _ROUTER,
        # It always does for this one.
        config={"norm_topk_prob": True},
        entries=_NUM_EXPERTS | _MOE_SIZE | _HEAD_SIZE,
    ),
    "qwen3_next": Architecture(
        top=_TOP | _rules("model.norm output_norm", MINUS_ONE),
        layer=_ATTENTION
        | _MLP
        | _ROUTER
        | _SHARED_EXPERT
        | _rules("linear_attn.A_log ssm_a", LOG_NEGATED)
        | {"linear_attn.in_proj_qkvz": Rule(("attn_qkv", "attn_gate"), LINEAR_INPUTS)}
        | _rules(
            """
            input_layernorm attn_norm
            post_attention_layernorm post_attention_norm
            self_attn.q_norm attn_q_norm
            self_attn.k_norm attn_k_norm
            """,
            MINUS_ONE,
        )
        | _rules("""
            linear_attn.dt_bias ssm_dt.bias
            linear_attn.conv1d ssm_conv1d
            linear_attn.in_proj_ba ssm_ba
            linear_attn.norm ssm_norm
            linear_attn.out_proj ssm_out
        """),
    ),
}
