"""Tiny random models of every family, made by transformers from a config; and what is done to them here."""

from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import BPE

SHAPES = dict(vocab_size=61, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
              linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
DENSE = {**SHAPES, "intermediate_size": 40, "head_dim": 16}
EXPERTS = {**SHAPES, "head_dim": 16, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 24,
           "num_experts": 5, "num_experts_per_tok": 2}
OLMO = {**SHAPES, "intermediate_size": 40, "pad_token_id": 0, "eos_token_id": 1, "linear_value_head_dim": 12}
NO_ROPE = {"rope_theta": None, "rope_type": "default"}
TURNED = {"rope_theta": 1e7, "rope_type": "default", "partial_rotary_factor": 0.5}
ONE_TO_ONE = {"num_key_value_heads": 4, "linear_num_key_heads": 4}
ONE_TO_FOUR = {"num_key_value_heads": 1, "linear_num_key_heads": 1}
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
TIED, BIASED = {"tie_word_embeddings": True}, {"attention_bias": True}
CASES = {  # by name: config class, model class, what differs from the family's shapes, whose heads are 1:2
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", DENSE),
    "qwen3_5 tied 1:4": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM",
                         {**DENSE, **ONE_TO_FOUR, **TIED, "rope_parameters": TURNED}),
    "qwen3_5 1:1": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM",
                    {**DENSE, **ONE_TO_ONE, **TWO_LAYERS, "linear_value_head_dim": 12}),
    "qwen3_5 biased": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {**DENSE, **TWO_LAYERS, **BIASED}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", EXPERTS),
    "qwen3_5_moe tied 1:1": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM",
                             {**EXPERTS, **ONE_TO_ONE, **TWO_LAYERS, **TIED}),
    "qwen3_5_moe biased 1:4": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM",
                               {**EXPERTS, **ONE_TO_FOUR, **TWO_LAYERS, **BIASED}),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", EXPERTS),
    "qwen3_next not normalised tied 1:1": ("Qwen3NextConfig", "Qwen3NextForCausalLM",
                                           {**EXPERTS, **ONE_TO_ONE, **TIED, "norm_topk_prob": False,
                                            "num_experts_per_tok": 3}),
    "qwen3_next biased 1:4": ("Qwen3NextConfig", "Qwen3NextForCausalLM",
                              {**EXPERTS, **ONE_TO_FOUR, **TWO_LAYERS, **BIASED, "linear_value_head_dim": 12}),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", OLMO),
    "olmo_hybrid no rope 1:1": ("OlmoHybridConfig", "OlmoHybridForCausalLM",
                                {**OLMO, **ONE_TO_ONE, "rope_parameters": NO_ROPE, "linear_allow_neg_eigval": False}),
    "olmo_hybrid tied biased 1:4": ("OlmoHybridConfig", "OlmoHybridForCausalLM",
                                    {**OLMO, **ONE_TO_FOUR, **TWO_LAYERS, **TIED, **BIASED}),
}

SEEDS = {"qwen3_5 tied 1:4": 1, "qwen3_5_moe": 1, "qwen3_next": 5, "qwen3_next not normalised tied 1:1": 2}
"""Where it is not 0: a seed whose logits move by less than 1e-5 when every weight moves by a rounding of float32. With
seed 0 they move by 0.8e-5 to 2.1e-5, and no two programs in float32 need come nearer to each other than that."""


def made(case, dtype=torch.float32):
    """A model whose weights are large enough that every part of it shows in the logits."""
    config, model, changes = CASES[case]
    torch.manual_seed(SEEDS.get(case, 0))
    network = getattr(transformers, model)(getattr(transformers, config)(**changes))
    with torch.no_grad():
        for name, value in network.named_parameters():
            if "norm" in name or name.endswith("bias"):
                value += 0.3 * torch.randn_like(value)
            elif value.dim() > 1:
                value.copy_(0.2 * torch.randn_like(value))
    return network.to(dtype).eval()


def saved(network, folder: Path, **options) -> Path:
    """The model as transformers writes it, with a tokenizer beside it."""
    network.save_pretrained(folder, **options)
    letters = {chr(97 + index): index for index in range(26)}
    Tokenizer(BPE(vocab=letters, merges=[])).save(str(folder / "tokenizer.json"))
    return folder


def opened(folder: Path):
    """A folder of ours as transformers opens it; it has to take every tensor and to miss none."""
    network, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True)  # fmt: skip
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return network.eval()


def tokens_of(network, rows=2, length=13):
    """Random tokens."""
    return np.random.default_rng(0).integers(2, network.config.vocab_size, (rows, length))


@torch.no_grad()
def outputs(network, tokens, **more):
    """(logits, hidden states by layer) of transformers, in float32."""
    found = network(torch.tensor(tokens), output_hidden_states=True, use_cache=False, **more)
    return found.logits.float().numpy(), [state.float().numpy() for state in found.hidden_states]
