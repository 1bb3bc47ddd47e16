"""Names and shapes in the state dicts of the two classes that the trainer trains, from `config.json` alone.

Building the stock model tells them too, but importing transformers takes longer than the whole conversion of a large
checkpoint. A test compares this with the stock models (`tests/unit/convert/test_stock.py`).
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, TypeAlias

Shape: TypeAlias = tuple[int, ...]
Entry: TypeAlias = tuple[str, Shape]
Config: TypeAlias = dict[str, Any]


def state_dict_shapes(config: Config, preprocessor: Config) -> dict[str, Shape] | None:
    """Name and shape of every entry; None for another model, or one with parts that pre-training does not have."""
    known = {"wav2vec2": "Wav2Vec2ForPreTraining", "wav2vec2-conformer": "Wav2Vec2ConformerForPreTraining"}
    if (
        config.get("architectures") != [known.get(config.get("model_type", ""))]
        or config.get("add_adapter")
        or config.get("adapter_attn_dim")
        or preprocessor.get("feature_extractor_type") != "Wav2Vec2FeatureExtractor"
    ):
        return None
    try:
        return dict(_pretraining(config, conformer=config["model_type"] == "wav2vec2-conformer"))
    except (ArithmeticError, LookupError, TypeError, ValueError):  # a setting is left to its default, or is wrong
        return None


def _pretraining(config: Config, *, conformer: bool) -> Iterator[Entry]:
    hidden, codes = config["hidden_size"], config["num_codevectors_per_group"]
    groups, contrasted = config["num_codevector_groups"], config["proj_codevector_dim"]
    features = config["conv_dim"][-1]
    base = config["model_type"].replace("-", "_") + "."
    if config["mask_time_prob"] > 0 or config["mask_feature_prob"] > 0:
        yield base + "masked_spec_embed", (hidden,)
    yield from _feature_encoder(base + "feature_extractor.conv_layers.", config)
    yield from _norm(base + "feature_projection.layer_norm", features)
    yield from _linear(base + "feature_projection.projection", features, hidden)
    yield from _positions(base + "encoder.", config, conformer=conformer)
    yield from _norm(base + "encoder.layer_norm", hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"{base}encoder.layers.{layer}."
        yield from (_conformer_layer(name, config) if conformer else _transformer_layer(name, config))
    yield "quantizer.codevectors", (1, groups * codes, config["codevector_dim"] // groups)
    yield from _linear("quantizer.weight_proj", features, groups * codes)
    yield from _linear("project_hid", hidden, contrasted)
    yield from _linear("project_q", config["codevector_dim"], contrasted)


def _feature_encoder(name: str, config: Config) -> Iterator[Entry]:
    widths = pairwise([1, *config["conv_dim"]])
    for layer, ((before, after), kernel) in enumerate(zip(widths, config["conv_kernel"], strict=True)):
        yield f"{name}{layer}.conv.weight", (after, before, kernel)
        if config["conv_bias"]:
            yield f"{name}{layer}.conv.bias", (after,)
        if config["feat_extract_norm"] == "layer" or layer == 0:
            yield from _norm(f"{name}{layer}.layer_norm", after)


def _positions(name: str, config: Config, *, conformer: bool) -> Iterator[Entry]:
    hidden, kernel = config["hidden_size"], config["num_conv_pos_embeddings"]
    if conformer and config["position_embeddings_type"] == "rotary":
        yield name + "embed_positions.inv_freq", (hidden // config["num_attention_heads"] // 2,)
    yield name + "pos_conv_embed.conv.bias", (hidden,)
    yield name + "pos_conv_embed.conv.parametrizations.weight.original0", (1, 1, kernel)
    yield (
        name + "pos_conv_embed.conv.parametrizations.weight.original1",
        (hidden, hidden // config["num_conv_pos_embedding_groups"], kernel),
    )


def _transformer_layer(name: str, config: Config) -> Iterator[Entry]:
    hidden = config["hidden_size"]
    for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
        yield from _linear(f"{name}attention.{part}", hidden, hidden)
    yield from _norm(name + "layer_norm", hidden)
    yield from _feed_forward(name + "feed_forward.", config)
    yield from _norm(name + "final_layer_norm", hidden)


def _conformer_layer(name: str, config: Config) -> Iterator[Entry]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    for part in ("ffn1", "ffn2"):
        yield from _norm(f"{name}{part}_layer_norm", hidden)
        yield from _feed_forward(f"{name}{part}.", config)
    yield from _norm(name + "self_attn_layer_norm", hidden)
    for part in ("linear_q", "linear_k", "linear_v", "linear_out"):
        yield from _linear(f"{name}self_attn.{part}", hidden, hidden)
    if config["position_embeddings_type"] == "relative":
        yield name + "self_attn.linear_pos.weight", (hidden, hidden)
        yield name + "self_attn.pos_bias_u", (heads, hidden // heads)
        yield name + "self_attn.pos_bias_v", (heads, hidden // heads)
    yield from _norm(name + "conv_module.layer_norm", hidden)
    yield name + "conv_module.pointwise_conv1.weight", (2 * hidden, hidden, 1)
    yield name + "conv_module.depthwise_conv.weight", (hidden, 1, config["conv_depthwise_kernel_size"])
    yield from _norm(name + "conv_module.batch_norm", hidden)
    yield name + "conv_module.batch_norm.running_mean", (hidden,)
    yield name + "conv_module.batch_norm.running_var", (hidden,)
    yield name + "conv_module.batch_norm.num_batches_tracked", ()
    yield name + "conv_module.pointwise_conv2.weight", (hidden, hidden, 1)
    yield from _norm(name + "final_layer_norm", hidden)


def _feed_forward(name: str, config: Config) -> Iterator[Entry]:
    yield from _linear(name + "intermediate_dense", config["hidden_size"], config["intermediate_size"])
    yield from _linear(name + "output_dense", config["intermediate_size"], config["hidden_size"])


def _linear(name: str, inputs: int, outputs: int) -> Iterator[Entry]:
    yield name + ".weight", (outputs, inputs)
    yield name + ".bias", (outputs,)


def _norm(name: str, width: int) -> Iterator[Entry]:
    yield name + ".weight", (width,)
    yield name + ".bias", (width,)
