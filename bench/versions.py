"""The mean of two models, written and read by two versions of transformers.

    python bench/versions.py OTHER_PYTHON [KIND …]

OTHER_PYTHON is a Python with another transformers (4.56 was used) beside torch and what
frechet_merge needs. Both versions make two tiny random models of each kind and save them. Each
version then merges all four pairs, of which the first model is one version's and the second
either's, and both open what came out. Right is: nothing missing, nothing unexpected, and the
outputs are those of the mean that the newer transformers computes from its own state dicts.

Where a version does not read what the other saved, before any merge, no mean in that layout can be
read either: that is transformers', and the table says so.

Writes bench/results/versions.csv, a row for each kind, and versions.json."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {**TEXT, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
BERT = {k: TEXT[k] for k in TEXT if not k.startswith(("num_key", "head_dim", "bos", "eos"))}
SIGHT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
QWEN_SIGHT = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
MARKS = {
    "image_token_id": 50,
    "video_token_id": 51,
    "vision_start_token_id": 52,
    "vision_end_token_id": 53,
}


def seeing(kind, sight, text="llama", **more):
    "The config of a model with a vision tower."
    tower = {"model_type": kind, **sight}
    return {"vision_config": tower, "text_config": {"model_type": text, **TEXT}, **more}


WHISPER = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_source_positions": 20,
    "max_target_positions": 20,
    "num_mel_bins": 8,
    "pad_token_id": 0,
    "decoder_start_token_id": 3,
}
SOUND = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
DEEP = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 2,
}
PALI = {"image_token_index": 50, "projection_dim": 16, "vocab_size": 64}
# name → class, config, and the versions that make it, if not both
KINDS = {
    "llama, head tied": ("LlamaForCausalLM", {**TEXT, "tie_word_embeddings": True}),
    "llama, head of its own": ("LlamaForCausalLM", {**TEXT, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2ForCausalLM", {**TEXT, "tie_word_embeddings": True}),
    "gemma": ("GemmaForCausalLM", TEXT),
    "gemma2": ("Gemma2ForCausalLM", TEXT),
    "gemma3 text": ("Gemma3ForCausalLM", TEXT),
    "gpt2": ("GPT2LMHeadModel", GPT),
    "opt": ("OPTForCausalLM", {**BERT, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    "bert, masked": ("BertForMaskedLM", BERT),
    "bert, classifier": ("BertForSequenceClassification", {**BERT, "num_labels": 3}),
    "distilbert": ("DistilBertForMaskedLM", {"vocab_size": 64, "dim": 16, "n_heads": 2}),
    "t5, head tied": ("T5ForConditionalGeneration", {**T5, "tie_word_embeddings": True}),
    # transformers 5 makes none, and reads those of 4
    "t5, head of its own": (
        "T5ForConditionalGeneration",
        {**T5, "tie_word_embeddings": False},
        "4",
    ),
    "bart": ("BartForConditionalGeneration", {"vocab_size": 64, "d_model": 16}),
    "whisper": ("WhisperForConditionalGeneration", WHISPER),
    "wav2vec2": ("Wav2Vec2ForCTC", SOUND),
    "mixtral": ("MixtralForCausalLM", {**MOE, "num_local_experts": 4}),
    "qwen3 moe": ("Qwen3MoeForCausalLM", {**MOE, "num_experts": 4}),
    "olmoe": ("OlmoeForCausalLM", {**MOE, "num_experts": 4}),
    "deepseek v3": ("DeepseekV3ForCausalLM", {**MOE, **DEEP}),
    "gpt oss": ("GptOssForCausalLM", {**MOE, "num_local_experts": 4}),
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        seeing("qwen2_vl", {**QWEN_SIGHT, "embed_dim": 16}, "qwen2_vl_text", **MARKS),
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration",
        seeing("qwen2_5_vl", {**QWEN_SIGHT, "out_hidden_size": 16}, "qwen2_5_vl_text", **MARKS),
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        seeing("clip_vision_model", SIGHT, image_token_index=50),
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        seeing("siglip_vision_model", SIGHT, "gemma", **PALI),
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        seeing("siglip_vision_model", SIGHT, "gemma3_text", image_token_index=50),
    ),
}
SMALLER = {
    "DistilBertForMaskedLM": {"n_layers": 2, "hidden_dim": 32, "max_position_embeddings": 64},
    "BartForConditionalGeneration": {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    },
}


def config_of(kind):
    "The config of a kind, as this transformers makes it."
    import transformers

    name, given, *_ = KINDS[kind]
    cls = getattr(transformers, name)
    given = json.loads(json.dumps({**given, **SMALLER.get(name, {})}))
    if "qwen2" in kind and "vl" in kind:
        given["text_config"] |= MROPE
    return cls, cls.config_class(**given)


def outputs(model):
    "What a model answers to some numbers."
    ids = torch.tensor([[1, 5, 9, 13, 7], [1, 4, 8, 12, 3]])
    given = {"input_ids": ids}
    if "whisper" in model.config.model_type:
        sound = torch.linspace(-1, 1, 2*8*40).view(2, 8, 40)
        given = {"input_features": sound, "decoder_input_ids": ids}
    elif "wav2vec2" in model.config.model_type:
        given = {"input_values": torch.linspace(-1, 1, 400).view(2, 200)}
    elif model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    with torch.no_grad():
        return model.eval()(**given).logits.float()


def opened(kind, folder):
    "A model and what of its file did not fit."
    cls, _ = config_of(kind)
    how = {"attn_implementation": "eager", "output_loading_info": True}
    model, said = cls.from_pretrained(folder, dtype=torch.float32, **how)
    odd = [k for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if said.get(k)]
    return model, ", ".join(f"{k} {sorted(map(str, said[k]))[0]}" for k in odd)


def make(task):
    "Save a model of this version."
    cls, config = config_of(task["kind"])
    torch.manual_seed(task["seed"])
    model = cls(config)
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(torch.randn_like(x)*0.2)
    model.tie_weights()
    model.save_pretrained(task["out"])


def read(task):
    "The outputs of a folder in this version."
    model, odd = opened(task["kind"], task["folder"])
    torch.save(outputs(model), task["out"])
    return odd


def mean(task):
    "The outputs of the mean of two folders, by their state dicts."
    model, odd = opened(task["kind"], task["folders"][0])
    other, more = opened(task["kind"], task["folders"][1])
    theirs = other.state_dict()
    with torch.no_grad():
        for name, x in dict(model.state_dict()).items():
            if x.is_floating_point():
                x.copy_((x + theirs[name])/2)
                # of a tied tensor the next name changes nothing
                theirs[name].copy_(x)
    torch.save(outputs(model), task["out"])
    return odd or more


def merged(task):
    "A merge of two folders by frechet_merge, with this version."
    from frechet_merge import merge

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        merge(task["folders"], out=task["out"])
    ours = [str(w.message) for w in said if issubclass(w.category, UserWarning)]
    return "; ".join(ours)


WORK = {"make": make, "read": read, "mean": mean, "merge": merged}


def work(file):
    "Do what a file lists, and say in it what came of each."
    tasks = json.loads(Path(file).read_text())
    for task in tasks:
        try:
            task["said"] = WORK[task["do"]](task) or ""
        # the table says what a library says
        except Exception as e:
            lines = str(e).strip().splitlines() or [""]
            task["failed"] = f"{type(e).__name__}: {lines[0]}"
            if os.environ.get("VERBOSE"):
                traceback.print_exc()
    Path(file).write_text(json.dumps(tasks))


def done(python, tasks, folder):
    "Tasks, with what came of them in another process."
    file = folder/"tasks.json"
    file.write_text(json.dumps(tasks))
    env = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    subprocess.run([python, __file__, "--work", str(file)], check=True, env=env)
    return json.loads(file.read_text())


def near(file, want):
    "How far outputs are apart; None if there are none."
    if not Path(file).exists() or not Path(want).exists():
        return None
    return float((torch.load(file) - torch.load(want)).abs().max())


def verdict(task, want):
    "Right, or what is wrong, in words."
    if "failed" in task:
        return task["failed"]
    if task["said"]:
        return task["said"]
    far = near(task["out"], want)
    return "right" if far is not None and far < 1e-4 else f"{far} away"


def makers(kind):
    "The versions that make a kind of model."
    return [*KINDS[kind][2:], "54"][0]


def made_by(python, version, kinds, folder):
    "Two models of each kind that a version makes."
    own = [k for k in kinds if version in makers(k)]
    tasks = [
        {"do": "make", "kind": k, "seed": s, "out": f"{folder}/{version} {k} {s}"}
        for k in own
        for s in (0, 1)
    ]
    return done(python, tasks, folder)


def tried(pythons, kinds, folder):
    "The rows of a table."
    both = dict(zip("54", pythons))
    made = [t for v, p in both.items() for t in made_by(p, v, kinds, folder)]
    pairs = [(k, a, b) for k in kinds for a in makers(k) for b in makers(k)]
    places = {(k, a, b): [f"{folder}/{a} {k} 0", f"{folder}/{b} {k} 1"] for k, a, b in pairs}
    means = [
        {"do": "mean", "kind": k, "folders": places[k, a, b], "out": f"{folder}/mean {k} {a}{b}.pt"}
        for k, a, b in pairs
    ]
    done(pythons[0], means, folder)
    merges = {v: done(p, merging(pairs, places, v, folder), folder) for v, p in both.items()}
    reads = {v: done(p, reading(kinds, pairs, folder), folder) for v, p in both.items()}
    return [row(k, made, merges, reads, folder) for k in kinds]


def merging(pairs, places, version, folder):
    return [
        {"do": "merge", "kind": k, "folders": places[k, a, b], "pair": f"{a}{b}"}
        | {"out": f"{folder}/by {version} {k} {a}{b}"}
        for k, a, b in pairs
    ]


def reading(kinds, pairs, folder):
    "What a version is to open: what was saved, and what was merged."
    saved = [(k, f"{v} {k} 0") for k in kinds for v in makers(k)]
    ours = [(k, f"by {v} {k} {a}{b}") for k, a, b in pairs for v in "54"]
    # each version writes beside its own process, one after the other
    return [
        {"do": "read", "kind": k, "folder": f"{folder}/{f}", "name": f}
        | {"out": f"{folder}/read.{os.urandom(4).hex()}.pt"}
        for k, f in (*saved, *ours)
    ]


def unread(kind, by_name):
    "What a version does not read of the other, before any merge: versions → what it says."
    found = {}
    for of in makers(kind):
        name, other = f"{of} {kind} 0", "45"["54".index(of)]
        said = verdict(by_name[other][name], by_name[of][name]["out"])
        if said != "right":
            found[of, other] = said
    return found


def verdicts(kind, by, merges, by_name, lost, folder):
    "What came of the merges of a kind by a version, in words."
    found = []
    for task in (t for t in merges if t["kind"] == kind):
        pair = task["pair"]
        # it is written as the first is
        readers = [v for v in "54" if (pair[0], v) not in lost]
        # the mean is known to the newer one, if that reads both
        readers = [] if any((of, "5") in lost for of in pair) else readers
        for v in readers:
            said = task.get("failed")
            said = said or verdict(
                by_name[v][f"by {by} {kind} {pair}"], f"{folder}/mean {kind} {pair}.pt"
            )
            found.append(said if said == "right" else f"{pair} by {by}, read by {v}: {said}")
    return found


def row(kind, made, merges, reads, folder):
    "What came of one kind."
    bad = [t["failed"] for t in made if t["kind"] == kind and "failed" in t]
    if bad:
        return told(kind, bad, {})
    by_name = {v: {t["name"]: t for t in ts if t["kind"] == kind} for v, ts in reads.items()}
    lost = unread(kind, by_name)
    found = [verdicts(kind, by, ts, by_name, lost, folder) for by, ts in merges.items()]
    return told(kind, [x.replace(f"{folder}/", "") for some in found for x in some], lost)


def told(kind, found, lost):
    "A row of the table."
    refused = [x for x in found if "MergeError" in x]
    return {
        "kind": kind,
        "right": found.count("right"),
        "of": len(found),
        "wrong": " | ".join(x for x in found if x != "right" and x not in refused),
        "refused": refused[0] if refused else "",
        "not read before a merge": " | ".join(f"{v} reads {u}: {x}" for (u, v), x in lost.items()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", nargs="?", help="of the other transformers")
    parser.add_argument("kinds", nargs="*", help="default: all")
    parser.add_argument("--work", help="a file of tasks")
    args = parser.parse_args()
    if args.work:
        return work(args.work)
    from adapters import about, write_rows

    kinds = args.kinds or [*KINDS]
    with tempfile.TemporaryDirectory() as name:
        rows = tried((sys.executable, args.python), kinds, Path(name))
    for r in rows:
        print(f"{r['kind']:24s} {r['right']:2d} of {r['of']:2d}  {r['wrong']}{r['refused']}")
        if r["not read before a merge"]:
            print(f"{'':24s}   {r['not read before a merge']}")
    if not args.kinds:
        ask = [args.python, "-c", "import transformers; print(transformers.__version__)"]
        version = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
        said = about("python bench/versions.py OTHER_PYTHON", other_transformers=version)
        write_rows("versions", rows, said)


if __name__ == "__main__":
    main()
