"""Layers of encoders with decoders are stacked anew, each part by itself: transformers opens the
result, and computes what the same layers compute when they are put together there by hand."""

import json

import pytest
import torch
from conftest import cli
from test_recipe_files import digest, written

from frechet_merge import MergeError, load, merge

transformers = pytest.importorskip("transformers")
T5 = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_decoder_layers=4,
          num_heads=2)
BART = dict(vocab_size=40, d_model=16, encoder_layers=3, decoder_layers=4,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
            decoder_ffn_dim=24)
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3)
FAMILIES = {
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "t5 gated": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(**T5, feed_forward_proj="gated-gelu")),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(**BART, max_position_embeddings=32, **TOKENS)),
    "whisper": lambda: transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**BART, **TOKENS, num_mel_bins=8, max_source_positions=8,
                                   max_target_positions=24, begin_suppress_tokens=[4, 5])),
}
# the layers of each part of the result, of which model
STACKS = {
    "both parts": ("a0 a1 b1 b2", "a0 a1 a2 b1 b2 b3"),
    "fewer layers": ("b2", "a0 b2"),
    "none from the first": ("b1 a2", "a1 b0 b1"),
    "the decoder alone": ("", "a0 a1 b0 b1"),
}


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path):
    "Two models of a family, in folders."
    found = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = FAMILIES[request.param]().float().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(0.3*torch.randn_like(p))
        model.tie_weights()
        model.save_pretrained(tmp_path/name)
        found[name] = model
    return found


def layers_of(model, part):
    "The list of layers of an encoder or a decoder, and what has it."
    stack = getattr(model.base_model, part)
    return (stack, "block") if hasattr(stack, "block") else (stack, "layers")


def counted(config, stacks):
    "A config of as many layers."
    config = type(config)(**config.to_dict())
    is_t5 = "num_layers" in config.to_dict()
    words = ("num_layers", "num_decoder_layers") if is_t5 else ("encoder_layers", "decoder_layers")
    for word, text in zip(words, stacks):
        if text:
            setattr(config, word, len(text.split()))
    return config


def around(made, pair, part, text):
    "What is outside of layers: before them as in the first, behind them as in the last."
    stack, name = layers_of(made, part)
    ours = {n: p for n, p in stack.named_parameters() if not n.startswith(name)}
    every = text.split() or ["a"]
    for n, p in ours.items():
        is_before = any(x in n for x in ("embed", "conv"))
        source = pair[every[0 if is_before else -1][0]]
        p.data.copy_(dict(layers_of(source, part)[0].named_parameters())[n])


def layers(made, pair, part, text):
    "The layers that were named, and in the first one what it has for all of them."
    stack, name = layers_of(made, part)
    count = len(getattr(stack, name))
    every = text.split() or [f"a{i}" for i in range(count)]
    first = getattr(*layers_of(pair[every[0][0]], part))[0].state_dict()
    for here, word in zip(getattr(stack, name), every):
        there = getattr(*layers_of(pair[word[0]], part))[int(word[1:])].state_dict()
        for n, p in here.state_dict().items():
            p.copy_(first[n] if "relative_attention_bias" in n else there[n])


def by_hand(pair, stacks):
    "A model that transformers has built of these layers."
    made = type(pair["a"])(counted(pair["a"].config, stacks)).float().eval()
    for part, text in zip(("encoder", "decoder"), stacks):
        around(made, pair, part, text)
        layers(made, pair, part, text)
    if hasattr(made.base_model, "shared"):
        theirs = pair[(stacks[1] or "a")[0]].base_model.shared
        made.base_model.shared.weight.data.copy_(theirs.weight)
    made.tie_weights()
    return made


def recipe_of(stacks, folder):
    "In mergekit's words."
    text = "merge_method: passthrough\nmodules:\n"
    for part, stack in zip(("encoder", "decoder"), stacks):
        if not stack:
            text += f"  {part}: {{models: [{{model: {folder/'a'}}}]}}\n"
            continue
        text += f"  {part}:\n    slices:\n"
        for word in stack.split():
            i = int(word[1:])
            text += f"      - sources: [{{model: {folder/word[0]}, layer_range: [{i}, {i + 1}]}}]\n"
    return text


def outputs(model):
    "What a model says of fixed inputs."
    torch.manual_seed(0)
    ids = torch.tensor([[3, 5, 7, 9, 11]])
    if model.config.model_type == "whisper":
        return model(input_features=torch.randn(1, 8, 16), decoder_input_ids=ids).logits
    return model(input_ids=ids, decoder_input_ids=ids).logits


@pytest.mark.parametrize("what", STACKS)
def test_transformers_computes_with_the_layers_that_were_named(pair, tmp_path, what):
    code, _, err = cli("run", written(tmp_path, recipe_of(STACKS[what], tmp_path)), tmp_path/"o")
    assert code == 0, err
    model, info = type(pair["a"]).from_pretrained(tmp_path/"o", output_loading_info=True)
    assert not any(info.values()), info
    hand = by_hand(pair, STACKS[what])
    theirs = dict(hand.named_parameters())
    assert {*dict(model.named_parameters())} == {*theirs}
    for name, p in model.named_parameters():
        assert torch.equal(p, theirs[name]), name
    with torch.no_grad():
        assert torch.equal(outputs(model), outputs(hand))
    code, _, err = cli("run", tmp_path/"o", tmp_path/"again")
    assert code == 0 and digest(tmp_path/"o") == digest(tmp_path/"again"), err


def test_stacks_of_parts_are_averaged(pair, tmp_path):
    "The mean of two stacks is the stack of means, layer by layer."
    a, b = tmp_path/"a", tmp_path/"b"
    stacks = [f"{x}[encoder=0:2]|{x}[encoder=1:3]|{x}[decoder=:]" for x in (a, b)]
    found = merge(stacks, weights=[1, 3]).tensors
    left, right = map(load, stacks)
    assert {*found} == {*left} == {*right}
    for name in found:
        torch.testing.assert_close(found[name], (left[name] + 3*right[name])/4)


def test_slices_without_a_part(pair, tmp_path):
    "The remedy is run as it is printed."
    with pytest.raises(MergeError, match="several lists of layers") as e:
        load(f"{tmp_path/'a'}[0:2]")
    named = str(e.value).split("each part, ")[1].partition(";")[0]
    lead = "decoder.block." if hasattr(pair["a"].base_model.encoder, "block") else "decoder.layers."
    kept = {n.split(lead)[1].partition(".")[0] for n in load(named) if lead in n}
    assert kept == {"0"}
    text = f"slices: [{{sources: [{{model: {tmp_path/'a'}, layer_range: [0, 2]}}]}}]\n"
    text += "merge_method: passthrough\n"
    code, _, err = cli("run", written(tmp_path, text), tmp_path/"o")
    assert code == 1 and "give slices to each of its modules" in err, err
    code, _, err = cli("run", written(tmp_path, recipe_of(STACKS["fewer layers"], tmp_path)),
                       tmp_path/"o")
    assert code == 0, err


def test_configs_of_old_count_the_decoder_with_the_encoder(tmp_path):
    "A T5 whose config names one number means it of both, until one of them changes."
    shape = {**T5, "num_decoder_layers": 3}
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(transformers.T5Config(**shape)).save_pretrained(
        tmp_path/"a")
    file = tmp_path/"a"/"config.json"
    said = json.loads(file.read_text())
    del said["num_decoder_layers"]
    file.write_text(json.dumps(said))
    name = f"{tmp_path/'a'}[encoder=0:2]|{tmp_path/'a'}[decoder=:]"
    assert cli("merge", name, "-o", tmp_path/"o")[0] == 0
    model, info = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path/"o", output_loading_info=True)
    assert not any(info.values())
    assert (len(model.encoder.block), len(model.decoder.block)) == (2, 3)


def test_what_numbers_layers_elsewhere_is_named(tmp_path):
    torch.manual_seed(0)
    FAMILIES["whisper"]().save_pretrained(tmp_path/"a")
    (tmp_path/"a"/"generation_config.json").write_text('{"alignment_heads": [[3, 0]]}')
    with pytest.warns(UserWarning, match="alignment_heads are of the layers"):
        load(f"{tmp_path/'a'}[encoder=:]|{tmp_path/'a'}[decoder=0:2]")


def test_a_decoder_of_other_tokens_is_refused(tmp_path):
    "Its rows would be counted by the first model's config, and read by its tokenizer."
    for name, count in ("a", 40), ("b", 44), ("c", 40):
        config = transformers.T5Config(**{**T5, "vocab_size": count})
        transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path/name)
        token = "cat" if name == "c" else "dog"
        tokens = {"model": {"vocab": {"the": 0, token: 1}}}
        (tmp_path/name/"tokenizer.json").write_text(json.dumps(tokens))
    a, b, c = (tmp_path/name for name in "abc")
    with pytest.raises(MergeError, match="a has 40 rows of tokens, and .*b 44"):
        load(f"{a}[encoder=:]|{b}[decoder=0:2]")
    # of the encoder nobody's rows are written
    load(f"{a}[encoder=0:2]|{b}[encoder=1:3]|{a}[decoder=:]")
    with pytest.warns(UserWarning, match="token number 1 is 'dog' in .*a, .* and 'cat' in .*c,"):
        load(f"{a}[encoder=:]|{c}[decoder=:]")
