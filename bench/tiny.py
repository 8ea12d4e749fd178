"""Tiny random models of every architecture of transformers: its own default configs, shrunken.

A config is shrunken by the names of its fields (`RULES`), sub-configs and all. What does not build
then is tried again with fewer changes (`ATTEMPTS`), and a few architectures need values of their
own (`OWN`). Nothing is ever run forward: a merge asks for names, shapes and numbers only."""

import dataclasses
import math
import re

import torch

LIMIT = 30_000_000  # numbers of a model, at most

# what a field is called → its value, if the default is larger; the first that fits
COUNTS = [
    (r"vocab_size_per_layer_input$|^(text_|t2u_|unit_hifi_gan_|src_|tgt_)?vocab_size$", 96),
    (r"vocab_size|hash_byte_group_vocab|num_embeds$|num_embeddings$|codebook_size$", 64),
    (r"^(depths?|num_blocks|layers?)$|(^|_)(layers|layer|blocks|depth)$", 2),
    (r"max_position|n_positions|num_position|positions$|n_ctx$|context_length$|seq_len", 64),
    (r"num_(local_|routed_)?experts$|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok|moe_k$|moe_topk|top_k_experts|num_selected_experts", 2),
    (r"n_group$|topk_group$", 1),
    (r"(image|input|crop|pretrain_image)_size$", 64),
    (r"num_queries$|num_latents|n_latents|num_query_tokens|num_denoising|num_prompts", 8),
]
WIDTHS = [
    (r"key_value|kv_heads|num_kv|key_heads", 2),
    (r"num(_\w+)?_heads$|n_heads?$|attention_heads$|encoder_heads|resampler_heads", 4),
    (r"(head_dim|head_size|d_kv|d_head|dim_head|rotary_dim|kv_channels)$", 8),
    (r"lora_rank$|state_size$|d_state$", 8),
    (r"ffn|intermediate|d_ff$|dff$|dim_ff$|mlp_dim|feedforward|d_inner|feed_forward_size", 64),
    (r"hidden_size|hidden_dim|d_model|d_latents|n_embd|_size_global", 32),
    (r"embed_dim|embedding_(size|dim)|emb_dim|emb_size", 32),
    (r"projection_dim|projector|(^|_)dim$|_dims?$|width$|channels?$|units$", 32),
    (r"(output|latent|retrieval_vector|prediction_head|prompt|fusion|feature|reduce)_size$", 32),
]
ATTEMPTS = {"small": COUNTS + WIDTHS, "narrow": COUNTS, "as it is": []}
KEPT = re.compile(r"num_channels|in_channels|window_size|patch_size|image_channels|n_mels|mel_bins")

# architectures that need values of their own, by their model type
HEAD = {"head_dim": 8}
AHEAD = {"prediction_length": 4}
FEW = {"num_filters": 4, "hidden_size": 32}
OWN: dict[str, dict] = {
    "autoformer": AHEAD,
    "chameleon": {"vocabulary_map": {"<image>": 90}},
    "cosmos3_edge_text": {"rope_parameters": {"mrope_section": [2, 1, 1]}},
    "detr": {"encoder_attention_heads": 8, "decoder_attention_heads": 8},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "emu3": {"vocabulary_map": {"<image>": 90}},
    "esm": {"vocab_size": 33},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm5_next_text": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite_speech5_encoder": {"max_position_embeddings": 512},
    "hunyuan_v1_dense": HEAD,
    "hunyuan_v1_moe": HEAD,
    "hunyuan_vl_text": HEAD,
    "informer": AHEAD,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mimi": {"upsample_groups": 32},
    "ministral": HEAD,
    "nemotron": HEAD | {"num_key_value_heads": 4},
    "neomme_text": {"head_dim": 16},
    "time_series_transformer": AHEAD,
    "vibevoice_acoustic_tokenizer": FEW,
    "vibevoice_acoustic_tokenizer_decoder": FEW,
    "vibevoice_acoustic_tokenizer_encoder": FEW,
    "wav2vec2-bert": {"vocab_size": 33},
    "wav2vec2-conformer": {"vocab_size": 33},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
}


def value_for(name, value, rules):
    "A field of a config, made smaller by the first rule that fits its name."
    if isinstance(value, bool) or KEPT.search(name):
        return value
    small = next((s for pattern, s in rules if re.search(pattern, name)), None)
    if small is None:
        return value
    if isinstance(value, int):
        return min(value, small)
    if isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
        return type(value)(listed([*value], small))
    return value


def listed(values, small):
    "A list, each by the same divisor, or cut to counts."
    if small <= 4:
        return [min(v, small) for v in values]
    by = math.gcd(*values)
    while by > 1 and min(values)//by < small/4:
        by = next(d for d in range(by - 1, 0, -1) if math.gcd(*values) % d == 0)
    return [v//by for v in values]


def default_of(field):
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def class_of(spec):
    "The class of a sub-config, and what the whole gives it."
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = spec.config_class
    if not hasattr(cls, "model_type") or spec.config_class.__name__ == "AutoConfig":
        cls = CONFIG_MAPPING[spec.model_type]
    return cls, dict(spec.init_kwargs)


def shrunken(cls, rules, given=None):
    "A config of a class, small; `given` are values that the whole asks for."
    given = dict(given or {})
    own = OWN.get(cls.model_type, {}) if rules else {}
    values = {}
    for field in dataclasses.fields(cls):
        found = default_of(field)
        old = given.pop(field.name, found)
        new = value_for(field.name, old, rules)
        if new != found:
            values[field.name] = new
    values |= {k: value_for(k, v, rules) for k, v in given.items()}
    for name, spec in (cls.sub_configs_defaults or {}).items():
        sub, wanted = class_of(spec)
        if not spec.optional and name not in own:
            asked = values.get(name)
            wanted |= asked if isinstance(asked, dict) else {}
            values[name] = shrunken(sub, rules, wanted)
    return cls(**{**values, **own})


def tokens_fit(config):
    "Special tokens are of the vocabulary: a padding index must be."
    sizes = [v for k, v in config.to_dict().items() if k.endswith("vocab_size") and v]
    for key, value in [*vars(config).items()]:
        if key.endswith("token_id") and isinstance(value, int) and sizes:
            if value >= min(sizes):
                setattr(config, key, min(sizes) - 1)
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            tokens_fit(value)


def size_of(cls, config):
    "How many numbers a model has, without making them."
    with torch.device("meta"):
        model = cls(config)
    return sum(p.numel() for p in model.parameters())


def tiny(config_class, model_class):
    "A shrunken config, of which the model can be made, and how it was found; or why there is none."
    why = ""
    for attempt, rules in ATTEMPTS.items():
        try:
            config = shrunken(config_class, rules)
            tokens_fit(config)
            size = size_of(model_class, config)
        except Exception as e:
            why = why or " ".join(f"{type(e).__name__}: {e}".split())
            continue
        if size <= LIMIT:
            return config, attempt
        why = why or f"{size:,} numbers"
    return None, why


def scattered(model, seed):
    "The model with random numbers everywhere that training changes, statistics included."
    g = torch.Generator().manual_seed(seed)
    # what the library computes, and never writes
    computed = set(model._keys_to_ignore_on_save or ())
    done = set()
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if id(x) in done or not x.is_floating_point() or name in computed:
            continue
        done.add(id(x))
        if isinstance(x, torch.nn.Parameter) or TRAINED.search(name):
            with torch.no_grad():
                drawn = torch.randn(x.shape, generator=g)
                x.copy_(drawn.abs() + 0.5 if name.endswith("var") else drawn)
    return model


# buffers that training changes
TRAINED = re.compile(
    r"running_(mean|var)$|correction_bias$|expert_bias$|embed_avg$|cluster_size$|codebook"
)
