"""Folders that are more than one model, merged, and then opened by the library that they are for:
diffusers, sentence-transformers, transformers. What is compared is what that library computes
with, and which files it finds."""

import json
import shutil

import pytest
import torch
from conftest import save
from safetensors.torch import load_file, save_file

from frechet_merge import MergeError, load, merge
from frechet_merge.cli.commands import _place

pytest.importorskip("diffusers")


def mean_of(found, a, b):
    "Whether a state dict is the mean of two."
    return found.keys() == a.keys() and all(
        torch.allclose(found[n].double(), (a[n].double() + b[n].double())/2, atol=1e-6)
        for n in found
        if found[n].is_floating_point()
    )


def plain_mean(a, b):
    "The mean of two state dicts; numbers that cannot be rounded are the first's."
    return {n: (x + b[n])/2 if x.is_floating_point() else x for n, x in a.items()}


def files_in(folder):
    return {str(f.relative_to(folder)) for f in folder.rglob("*")}


def clip(folder, cls="CLIPTextModel", seed=0, vocab=30):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 12, "projection_dim": 16}
    config = CLIPTextConfig(vocab_size=vocab, **sizes, **heads)
    made = {c.__name__: c for c in (CLIPTextModel, CLIPTextModelWithProjection)}[cls](config)
    if folder is not None:
        made.save_pretrained(folder)
    return made


def tokens(n=28):
    "A vocabulary of CLIP."
    words = (f"{chr(97 + i%26)}{i//26 or ''}</w>" for i in range(n))
    names = ["<|startoftext|>", "<|endoftext|>", *words]
    return {t: i for i, t in enumerate(dict.fromkeys(names))}


def tokenizer(folder, words):
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder/"v.json").write_text(json.dumps(words))
    (folder/"m.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder/"v.json"), str(folder/"m.txt"))


def stable_diffusion(folder, seed=0, checker=False, prediction="epsilon", **how):
    "A tiny pipeline, as diffusers saves it."
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel

    text = clip(None, seed=seed)
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    words = tokenizer(folder.parent/f"tok{folder.name}", tokens())
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=words,
        unet=unet,
        scheduler=DDIMScheduler(prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder, **how)
    if checker:
        index = json.loads((folder/"model_index.json").read_text())
        index["safety_checker"] = ["transformers", "CLIPTextModel"]
        (folder/"model_index.json").write_text(json.dumps(index))
        clip(folder/"safety_checker", seed=seed)
    return pipe


PARTS = ("unet", "vae", "text_encoder")


def is_mean_pipeline(found, a, b):
    states = [[getattr(p, part).state_dict() for p in (found, a, b)] for part in PARTS]
    return all(mean_of(*s) for s in states)


class TestPipelines:
    "Folders of diffusers."

    def test_are_merged_part_by_part(self, tmp_path):
        from diffusers import DiffusionPipeline

        a, b = (stable_diffusion(tmp_path/n, i) for i, n in enumerate("ab"))
        m = merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o")
        found = DiffusionPipeline.from_pretrained(tmp_path/"o")
        assert type(found) is type(a) and is_mean_pipeline(found, a, b)
        assert found.tokenizer("a b").input_ids == a.tokenizer("a b").input_ids
        theirs, ours = files_in(tmp_path/"a"), files_in(tmp_path/"o")
        assert ours - theirs <= {"README.md", "frechet_merge.json"} and theirs <= ours
        assert "unet/conv_in.weight" in m.means and "unet/conv_in.weight" in load(tmp_path/"o")

    @pytest.mark.parametrize("how", [{"variant": "fp16"}, {"safe_serialization": False}])
    def test_in_variants_and_pickles(self, tmp_path, how):
        from diffusers import DiffusionPipeline

        a, b = (stable_diffusion(tmp_path/n, i, **how) for i, n in enumerate("ab"))
        merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o", allow_pickle=True)
        found = DiffusionPipeline.from_pretrained(tmp_path/"o", variant=how.get("variant"))
        assert is_mean_pipeline(found, a, b)

    def test_in_shards_of_a_variant(self, tmp_path):
        from diffusers import UNet2DConditionModel

        a, b = (stable_diffusion(tmp_path/n, i, variant="fp16") for i, n in enumerate("ab"))
        merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o", shard_size=40_000)
        unet = UNet2DConditionModel.from_pretrained(tmp_path/"o", subfolder="unet", variant="fp16")
        assert (tmp_path/"o"/"unet"/"diffusion_pytorch_model.safetensors.index.fp16.json").exists()
        assert mean_of(unet.state_dict(), a.unet.state_dict(), b.unet.state_dict())

    def test_a_part_alone(self, tmp_path):
        from diffusers import UNet2DConditionModel

        a, b = (stable_diffusion(tmp_path/n, i) for i, n in enumerate("ab"))
        one = tmp_path/"b"/"unet"
        with pytest.raises(MergeError, match="(?s)several models.*is one.*Name the part") as e:
            merge([tmp_path/"a", one], out=tmp_path/"p")
        part = str(e.value).rpartition(", as ")[2].removesuffix(".")
        assert part == str(tmp_path/"a"/"unet")
        merge([part, one], out=tmp_path/"o")
        found = UNet2DConditionModel.from_pretrained(tmp_path/"o").state_dict()
        assert mean_of(found, a.unet.state_dict(), b.unet.state_dict())

    def test_with_a_base_and_weights_by_name(self, tmp_path):
        a, b, z = (stable_diffusion(tmp_path/n, i) for i, n in enumerate("abz"))
        models = [tmp_path/"a", tmp_path/"b"]
        weights = {"unet/*": [1, 0], "*": [1, 1]}
        got = merge(models, base=tmp_path/"z", scale=0.5, weights=weights).tensors
        u = [p.unet.state_dict()["conv_in.weight"] for p in (a, b, z)]
        v = [p.vae.state_dict()["quant_conv.weight"] for p in (a, b, z)]
        torch.testing.assert_close(got["unet/conv_in.weight"], u[2] + (u[0] - u[2])/2)
        want = v[2] + ((v[0] + v[1])/2 - v[2])/2
        torch.testing.assert_close(got["vae/quant_conv.weight"], want)

    def test_with_something_left_out(self, tmp_path):
        for i, n in enumerate("ab"):
            stable_diffusion(tmp_path/n, i)
        got = merge([tmp_path/"a", tmp_path/"b"], drop=["unet/conv_in.*"]).tensors
        assert "unet/conv_in.weight" not in got and "unet/conv_out.weight" in got

    @pytest.mark.parametrize("first", [True, False])
    def test_a_checker_that_one_lacks(self, tmp_path, first):
        from diffusers import DiffusionPipeline

        a = stable_diffusion(tmp_path/"a", 0, checker=True)
        b = stable_diffusion(tmp_path/"b", 1)
        models = [tmp_path/"a", tmp_path/"b"]
        with pytest.warns(UserWarning, match="safety_checker"):
            merge(models if first else models[::-1], out=tmp_path/"o")
        assert (tmp_path/"o"/"safety_checker"/"model.safetensors").exists() is first
        if first:
            theirs = load_file(tmp_path/"a"/"safety_checker"/"model.safetensors")
            ours = load_file(tmp_path/"o"/"safety_checker"/"model.safetensors")
            assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
        else:
            assert is_mean_pipeline(DiffusionPipeline.from_pretrained(tmp_path/"o"), a, b)

    def test_a_part_of_another_class(self, tmp_path):
        stable_diffusion(tmp_path/"a", 0)
        stable_diffusion(tmp_path/"b", 1)
        index = json.loads((tmp_path/"b"/"model_index.json").read_text())
        index["text_encoder"][1] = "CLIPTextModelWithProjection"
        (tmp_path/"b"/"model_index.json").write_text(json.dumps(index))
        with pytest.raises(MergeError, match="'text_encoder' a CLIPTextModel and a CLIPTextModelW"):
            merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o")

    def test_a_part_that_one_lacks(self, tmp_path):
        stable_diffusion(tmp_path/"a", 0)
        stable_diffusion(tmp_path/"b", 1)
        shutil.rmtree(tmp_path/"b"/"vae")
        for models in ("ab", "ba"):
            with pytest.raises(MergeError, match="only one of them has weights in 'vae'"):
                merge([tmp_path/n for n in models], out=tmp_path/"o")

    def test_of_other_tokens(self, tmp_path):
        stable_diffusion(tmp_path/"a", 0)
        stable_diffusion(tmp_path/"b", 1)
        swapped = tokens() | {"a</w>": 3, "b</w>": 2}
        shutil.rmtree(tmp_path/"b"/"tokenizer")
        tokenizer(tmp_path/"w", swapped).save_pretrained(tmp_path/"b"/"tokenizer")
        with pytest.raises(MergeError, match="token number 2 for"):
            merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o")

    def test_that_predict_other_things(self, tmp_path):
        stable_diffusion(tmp_path/"a", 0)
        stable_diffusion(tmp_path/"b", 1, prediction="v_prediction")
        with pytest.warns(UserWarning, match="prediction_type = 'epsilon' and 'v_prediction'"):
            merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o")

    def test_metrics_are_of_one_part(self, tmp_path):
        stable_diffusion(tmp_path/"a", 0)
        x = {"w": torch.ones(2)}
        with pytest.raises(MergeError, match="(?s)metrics are of one.*a/text_encoder"):
            merge([tmp_path/"a", tmp_path/"a"], metrics=[x, x], out=tmp_path/"o")
        part = tmp_path/"a"/"text_encoder"
        metrics = [{n: torch.ones(y.shape) for n, y in load(part).items()}]*2
        found = merge([part, part], "curved", metrics=metrics).tensors
        assert mean_of(found, load(part), load(part))

    def test_single_files_beside_the_parts_are_named(self, tmp_path):
        for i, n in enumerate("ab"):
            stable_diffusion(tmp_path/n, i)
            for k in ("v1", "v1-ema"):
                save_file({"w": torch.ones(2)}, tmp_path/n/f"{k}.safetensors")
        with pytest.warns(UserWarning, match="v1-ema.safetensors, v1.safetensors left behind"):
            merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o")
        assert _place(str(tmp_path/"a")) == str((tmp_path/"a").resolve())
        assert set(load(tmp_path/"a"/"v1.safetensors")) == {"w"}

    def test_in_the_cache_of_the_hub(self, tmp_path):
        from diffusers import DiffusionPipeline

        a, b = (stable_diffusion(tmp_path/n, i) for i, n in enumerate("ab"))
        repo = tmp_path/"models--o--p"
        (repo/"blobs").mkdir(parents=True)
        for i, f in enumerate(sorted(f for f in (tmp_path/"a").rglob("*") if f.is_file())):
            link = repo/"snapshots"/"abc"/f.relative_to(tmp_path/"a")
            link.parent.mkdir(parents=True, exist_ok=True)
            f.rename(repo/"blobs"/f"{i:064x}")
            link.symlink_to(repo/"blobs"/f"{i:064x}")
        merge([repo, tmp_path/"b"], out=tmp_path/"o")
        assert is_mean_pipeline(DiffusionPipeline.from_pretrained(tmp_path/"o"), a, b)

    def test_of_a_transformer_and_two_encoders(self, tmp_path):
        from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
        from diffusers import FluxPipeline, FluxTransformer2DModel
        from transformers import T5Config, T5EncoderModel

        made = []
        for seed, n in enumerate("ab"):
            text = clip(None, seed=seed)
            torch.manual_seed(seed)
            flux = FluxTransformer2DModel(
                in_channels=4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=16,
                pooled_projection_dim=16,
                axes_dims_rope=(4, 4, 8),
            )
            t5 = T5Config(vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            pipe = FluxPipeline(
                scheduler=FlowMatchEulerDiscreteScheduler(),
                vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=1),
                text_encoder=text,
                tokenizer=None,
                text_encoder_2=T5EncoderModel(t5),
                tokenizer_2=None,
                transformer=flux,
            )
            pipe.save_pretrained(tmp_path/n)
            made.append(pipe)
        merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o")
        found = DiffusionPipeline.from_pretrained(tmp_path/"o", tokenizer=None, tokenizer_2=None)
        for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
            assert mean_of(*(getattr(p, part).state_dict() for p in (found, *made)))


def bert(folder, seed=0, cls="BertModel", **how):
    "A tiny BERT with a tokenizer."
    import transformers

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 20}
    config = transformers.BertConfig(vocab_size=25, **sizes, **how)
    getattr(transformers, cls)(config).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(20))]
    (folder/"vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder/"vocab.txt")).save_pretrained(folder)
    return str(folder)


def words_of(folder):
    "A tokenizer of whole words, of the library tokenizers."
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    made = Tokenizer(WordLevel({f"w{i}": i for i in range(20)} | {"[UNK]": 20}, "[UNK]"))
    made.pre_tokenizer = Whitespace()
    return made


class TestEncoders:
    "Folders of sentence-transformers."

    def merged(self, tmp_path, modules, cls=None, **how):
        "Two encoders and their mean, opened again."
        from sentence_transformers import SentenceTransformer

        cls = cls or SentenceTransformer
        made = []
        for seed, n in enumerate("ab"):
            torch.manual_seed(seed)
            made.append(cls(modules=modules(tmp_path/f"t{n}", seed)))
            for x in made[-1].parameters():
                x.data = torch.randn(x.shape)
            made[-1].save_pretrained(str(tmp_path/n), **how)
        out = merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o", allow_pickle=True).out
        found = cls(str(out))
        a, b = (m.state_dict() for m in made)
        assert mean_of(found.state_dict(), a, b)
        made[0].load_state_dict(plain_mean(a, b))
        ours, want = (torch.as_tensor(m.encode(["w1 w2", "w3"])) for m in (found, made[0]))
        if ours.is_sparse:
            ours, want = ours.to_dense(), want.to_dense()
        assert torch.allclose(ours, want, atol=1e-5)
        lost = {f for f in files_in(tmp_path/"a") - files_in(out) if not f.endswith(".bin")}
        assert not lost
        return out

    def test_a_projection_and_a_norm(self, tmp_path):
        from sentence_transformers import models as st

        def modules(folder, seed):
            parts = [st.Transformer(bert(folder, seed)), st.Pooling(16), st.Dense(16, 8)]
            return [*parts, st.LayerNorm(8)]

        self.merged(tmp_path, modules)
        config = json.loads((tmp_path/"o"/"2_Dense"/"config.json").read_text())
        assert config == json.loads((tmp_path/"a"/"2_Dense"/"config.json").read_text())

    def test_pickled(self, tmp_path):
        from sentence_transformers import models as st

        def modules(folder, seed):
            return [st.Transformer(bert(folder, seed)), st.Pooling(16), st.Dense(16, 8)]

        self.merged(tmp_path, modules, safe_serialization=False)

    def test_static_embeddings(self, tmp_path):
        from sentence_transformers import models as st

        def modules(folder, seed):
            return [st.StaticEmbedding(words_of(folder), embedding_dim=8), st.Dense(8, 4)]

        self.merged(tmp_path, modules)

    @pytest.mark.parametrize("kind", ["CNN", "LSTM"])
    def test_over_word_embeddings(self, tmp_path, kind):
        from sentence_transformers import models as st
        from sentence_transformers.sentence_transformer.modules.tokenizer import (
            WhitespaceTokenizer,
        )

        def modules(folder, seed):
            vocab = WhitespaceTokenizer([f"w{i}" for i in range(20)], stop_words=[])
            first = st.WordEmbeddings(vocab, torch.randn(20, 8).numpy())
            if kind == "CNN":
                second = st.CNN(8, 4, [1, 3])
                return [first, second, st.Pooling(second.get_sentence_embedding_dimension())]
            second = st.LSTM(8, 4)
            return [first, second, st.Pooling(second.get_sentence_embedding_dimension())]

        self.merged(tmp_path, modules)

    def test_a_router(self, tmp_path):
        from sentence_transformers import models as st

        def modules(folder, seed):
            query = [st.StaticEmbedding(words_of(folder), embedding_dim=16)]
            document = [st.Transformer(bert(folder, seed)), st.Pooling(16), st.Dense(16, 16)]
            routed = st.Router.for_query_document(query, document, default_route="document")
            return [routed, st.Normalize()]

        self.merged(tmp_path, modules)

    def test_in_which_the_transformer_has_a_folder(self, tmp_path):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers import models as st

        made = []
        for seed, n in enumerate("ab"):
            parts = [st.Transformer(bert(tmp_path/f"t{n}", seed)), st.Pooling(16), st.Dense(16, 8)]
            made.append(SentenceTransformer(modules=parts))
            made[-1].save_pretrained(str(tmp_path/n))
            # as before version 2
            first = tmp_path/n/"0_Transformer"
            first.mkdir()
            for f in [*(tmp_path/n).iterdir()]:
                if f.is_file() and "modules" not in f.name and "config_sent" not in f.name:
                    f.rename(first/f.name)
            listed = json.loads((tmp_path/n/"modules.json").read_text())
            listed[0]["path"] = "0_Transformer"
            (tmp_path/n/"modules.json").write_text(json.dumps(listed))
        out = merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o").out
        found = SentenceTransformer(str(out)).state_dict()
        assert mean_of(found, *(m.state_dict() for m in made))

    def test_sparse_encoders(self, tmp_path):
        from sentence_transformers import SparseEncoder
        from sentence_transformers.sparse_encoder import models as sparse

        def modules(folder, seed):
            body = sparse.MLMTransformer(bert(folder, seed, "BertForMaskedLM"))
            return [body, sparse.SpladePooling()]

        self.merged(tmp_path, modules, SparseEncoder)

    def test_sparse_encoders_without_inference(self, tmp_path):
        from sentence_transformers import SparseEncoder
        from sentence_transformers import models as st
        from sentence_transformers.sparse_encoder import models as sparse
        from transformers import AutoTokenizer

        def modules(folder, seed):
            document = sparse.MLMTransformer(bert(folder, seed, "BertForMaskedLM"))
            query = sparse.SparseStaticEmbedding(AutoTokenizer.from_pretrained(folder))
            routes = {"query": [query], "document": [document, sparse.SpladePooling()]}
            return [st.Router(routes, default_route="document")]

        self.merged(tmp_path, modules, SparseEncoder)

    def test_cross_encoders(self, tmp_path):
        from sentence_transformers import CrossEncoder

        pairs = [("w1", "w2"), ("w3", "w4 w5")]
        made = []
        for seed, n in enumerate("ab"):
            made.append(
                CrossEncoder(bert(tmp_path/n, seed, "BertForSequenceClassification", num_labels=1))
            )
            made[-1].save_pretrained(str(tmp_path/f"c{n}"))
        out = merge([tmp_path/"ca", tmp_path/"cb"], out=tmp_path/"o").out
        found = CrossEncoder(str(out))
        assert mean_of(found.state_dict(), *(m.state_dict() for m in made))
        a, b = (m.state_dict() for m in made)
        made[0].load_state_dict(plain_mean(a, b))
        assert found.predict(pairs) == pytest.approx(made[0].predict(pairs), abs=1e-5)

    def test_a_copy_for_inference_is_named(self, tmp_path):
        for seed, n in enumerate("ab"):
            bert(tmp_path/n, seed)
            (tmp_path/n/"onnx").mkdir()
            (tmp_path/n/"onnx"/"model.onnx").write_text("x")
            (tmp_path/n/"assets").mkdir()
            (tmp_path/n/"assets"/"more.json").write_text("{}")
        with pytest.warns(UserWarning, match="onnx/ left behind"):
            out = merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o").out
        assert (out/"assets"/"more.json").exists() and not (out/"onnx").exists()


class TestHeads:
    "BGE-M3 has two heads in pickles beside the model."

    def model(self, folder, seed, heads=("colbert_linear.pt", "sparse_linear.pt")):
        bert(folder, seed)
        torch.manual_seed(seed)
        for n in heads:
            torch.save(torch.nn.Linear(16, 3).state_dict(), folder/n)
        return folder

    def test_are_merged_under_their_names(self, tmp_path):
        a, b = (self.model(tmp_path/n, i) for i, n in enumerate("ab"))
        with pytest.raises(MergeError, match="(?s)colbert_linear.pt: is a pickle.*--allow-pickle"):
            merge([a, b], out=tmp_path/"o")
        merge([a, b], weights=[1, 3], allow_pickle=True, out=tmp_path/"o")
        for n in ("colbert_linear.pt", "sparse_linear.pt"):
            x, y, z = (torch.load(f/n, weights_only=True) for f in (a, b, tmp_path/"o"))
            torch.testing.assert_close(z["weight"], (x["weight"] + 3*y["weight"])/4)

    def test_that_one_lacks(self, tmp_path):
        a, b = self.model(tmp_path/"a", 0), self.model(tmp_path/"b", 1, ["colbert_linear.pt"])
        for models in ([a, b], [b, a]):
            with pytest.raises(MergeError, match="only one of them has 'sparse_linear.pt'"):
                merge(models, allow_pickle=True, out=tmp_path/"o")

    def test_have_no_place_in_memory(self, tmp_path):
        a, b = (self.model(tmp_path/n, i) for i, n in enumerate("ab"))
        with pytest.raises(MergeError, match="merged into a folder only"):
            merge([a, b], allow_pickle=True)


class TestNames:
    "The file that was read is the file that is written."

    @pytest.mark.parametrize(
        "file, written",
        [
            ("open_clip_model.safetensors", "open_clip_model.safetensors"),
            ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"),
            ("pytorch_model.bin", "model.safetensors"),
            ("pytorch_model.fp16.bin", "model.fp16.safetensors"),
            ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
            ("dreamer_v8.safetensors", "dreamer_v8.safetensors"),
        ],
    )
    def test_in_folders(self, tmp_path, file, written):
        said = {"architecture": "vit_tiny", "num_classes": 3}
        for i, n in enumerate("ab"):
            (tmp_path/n).mkdir()
            x = {"w": torch.full((2,), float(i))}
            torch.save(x, tmp_path/n/file) if file[-1] == "n" else save_file(x, tmp_path/n/file)
            (tmp_path/n/"config.json").write_text(json.dumps(said))
            (tmp_path/n/"open_clip_config.json").write_text("{}")
        out = merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o", allow_pickle=True).out
        assert torch.equal(load_file(out/written)["w"], torch.full((2,), 0.5))
        assert json.loads((out/"config.json").read_text()) == said
        assert (out/"open_clip_config.json").exists()

    def test_other_architectures_of_timm(self, tmp_path):
        for n in ("resnet50", "resnet50_gn"):
            save(tmp_path/n, {"w": torch.ones(2)}, {"architecture": n})
        with pytest.raises(MergeError, match="a resnet50 and a resnet50_gn"):
            merge([tmp_path/"resnet50", tmp_path/"resnet50_gn"], out=tmp_path/"o")


def test_whisper_with_all_that_it_needs(tmp_path):
    from transformers import WhisperConfig, WhisperFeatureExtractor
    from transformers import WhisperForConditionalGeneration

    made = []
    for seed, n in enumerate("ab"):
        torch.manual_seed(seed)
        sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 30}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        tokens = {"decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1}
        small = {"max_target_positions": 10, "max_source_positions": 20, "num_mel_bins": 8}
        config = WhisperConfig(**sizes, **heads, **tokens, **small, eos_token_id=2)
        config.encoder_ffn_dim = config.decoder_ffn_dim = 16
        made.append(WhisperForConditionalGeneration(config))
        made[-1].save_pretrained(tmp_path/n)
        WhisperFeatureExtractor(feature_size=8).save_pretrained(tmp_path/n)
        for f in ("normalizer.json", "generation_config.json", "processor_config.json"):
            if not (tmp_path/n/f).exists():
                (tmp_path/n/f).write_text("{}")
    out = merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o").out
    found = WhisperForConditionalGeneration.from_pretrained(out)
    assert mean_of(found.state_dict(), *(m.state_dict() for m in made))
    assert found.proj_out.weight.data_ptr() == found.model.decoder.embed_tokens.weight.data_ptr()
    assert {f.name for f in (tmp_path/"a").iterdir()} <= {f.name for f in out.iterdir()}


def test_code_and_folders_of_it_come_along(tmp_path):
    for n in "ab":
        save(tmp_path/n, {"w": torch.ones(2)}, {"model_type": "own"})
        (tmp_path/n/"layers").mkdir()
        (tmp_path/n/"layers"/"attention.py").write_text("x = 1")
        (tmp_path/n/"modeling_own.py").write_text("x = 1")
        (tmp_path/n/"global_step5").mkdir()
        (tmp_path/n/"global_step5"/"mp_rank_00_model_states.pt").write_text("x")
        (tmp_path/n/"runs").mkdir()
        (tmp_path/n/"zero_to_fp32.py").write_text("x")
    out = merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o").out
    found = {str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()}
    made = {"README.md", "frechet_merge.json", "model.safetensors", "config.json"}
    assert found == made | {"layers/attention.py", "modeling_own.py"}


class TestOtherFunctions:
    "Tensors of one shape that are not one function, or whose rows are not of one word."

    def static(self, folder, words, seed=0):
        "A sentence encoder that is a table."
        from sentence_transformers import SentenceTransformer
        from sentence_transformers import models as st
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        torch.manual_seed(seed)
        table = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
        SentenceTransformer(modules=[st.StaticEmbedding(table, embedding_dim=4)]).save_pretrained(
            str(folder)
        )
        return folder

    def test_a_table_of_other_words(self, tmp_path):
        a = self.static(tmp_path/"a", ["x", "y", "[UNK]"])
        b = self.static(tmp_path/"b", ["y", "x", "[UNK]"], 1)
        with pytest.raises(MergeError, match="token number 0 for 'x' and for 'y'"):
            merge([a, b], out=tmp_path/"o")

    @pytest.mark.parametrize("words", [["w0", "w2", "w1"], ["w0", "w1", "w3"]])
    def test_a_table_of_other_words_of_a_list(self, tmp_path, words):
        folders = []
        for n, vocab in (("a", ["w0", "w1", "w2"]), ("b", words)):
            part = tmp_path/n/"0_WordEmbeddings"
            save(part, {"emb_layer.weight": torch.randn(3, 2)})
            (part/"whitespacetokenizer_config.json").write_text(json.dumps({"vocab": vocab}))
            listed = [{"path": "0_WordEmbeddings", "type": "models.WordEmbeddings"}]
            (tmp_path/n/"modules.json").write_text(json.dumps(listed))
            folders.append(tmp_path/n)
        with pytest.raises(MergeError, match="embeddings of other words"):
            merge(folders, out=tmp_path/"o")

    def test_another_pooling_behind_a_transformer_in_a_folder(self, tmp_path):
        for n, mode in (("a", "mean"), ("b", "cls")):
            save(tmp_path/n/"0_Transformer", {"w": torch.ones(2)}, {"model_type": "toy"})
            (tmp_path/n/"1_Pooling").mkdir()
            (tmp_path/n/"1_Pooling"/"config.json").write_text(json.dumps({"pooling_mode": mode}))
            parts = ("0_Transformer", "1_Pooling")
            listed = [{"path": p, "type": f"models.{p[2:]}"} for p in parts]
            (tmp_path/n/"modules.json").write_text(json.dumps(listed))
        with pytest.raises(MergeError, match="Pooling of mean, and Pooling of cls"):
            merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o")

    def test_a_vae_of_another_scale(self, tmp_path):
        for n, scale in (("a", 0.18), ("b", 0.13)):
            said = {"_class_name": "AutoencoderKL", "scaling_factor": scale, "_name_or_path": n}
            save(tmp_path/n, {"w": torch.ones(2)}, said)
        with pytest.warns(UserWarning, match="scaling_factor = 0.18 and 0.13"):
            merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o")

    def test_another_activation_or_input_of_open_clip(self, tmp_path):
        for n, gelu in (("a", True), ("b", False)):
            save(tmp_path/n, {"w": torch.ones(2)})
            said = {"model_cfg": {"quick_gelu": gelu}, "preprocess_cfg": {"mean": [0.5]}}
            (tmp_path/n/"open_clip_config.json").write_text(json.dumps(said))
        with pytest.warns(UserWarning, match="quick_gelu = True and False"):
            merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o")

    def test_another_rate_of_sounds(self, tmp_path):
        for n, rate in (("a", 16000), ("b", 8000)):
            save(tmp_path/n, {"w": torch.ones(2)}, {"model_type": "toy"})
            (tmp_path/n/"preprocessor_config.json").write_text(json.dumps({"sampling_rate": rate}))
        with pytest.warns(UserWarning, match="sampling_rate = 16000 and 8000"):
            merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o")

    def test_several_controls(self, tmp_path):
        for i, n in enumerate("ab"):
            for part in ("controlnet", "controlnet_1"):
                save(tmp_path/n/part, {"w": torch.full((2,), float(i))})
            said = {"controlnet": ["diffusers", "MultiControlNetModel"]}
            (tmp_path/n/"model_index.json").write_text(json.dumps(said))
        merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o")
        found = load(tmp_path/"o")
        held = {n: x[0].item() for n, x in found.items()}
        assert held == {"controlnet/w": 0.5, "controlnet_1/w": 0.5}


class TestSingleFiles:
    "Checkpoints of programs that make pictures: one file, whose header says what it is."

    def test_say_of_the_function_what_all_say(self, tmp_path):
        from safetensors import safe_open

        for n in "ab":
            said = {"architecture": "stable-diffusion-v1", "prediction_type": "v", "title": n}
            meta = {f"modelspec.{k}": v for k, v in said.items()} | {"modelspec.hash_sha256": n}
            file = tmp_path/n/"m.safetensors"
            file.parent.mkdir()
            save_file({"model.diffusion_model.w": torch.ones(2)}, file, meta)
            (tmp_path/n/"own.py").write_text("of somebody")
        out = merge([tmp_path/n/"m.safetensors" for n in "ab"], out=tmp_path/"o").out
        found = safe_open(out/"model.safetensors", "pt").metadata()
        spec = {"modelspec.architecture": "stable-diffusion-v1", "modelspec.prediction_type": "v"}
        assert found == {"format": "pt", **spec}
        assert not (out/"own.py").exists()

    def test_do_not_say_what_only_one_says(self, tmp_path):
        from safetensors import safe_open

        for n in ("epsilon", "v"):
            meta = {"modelspec.prediction_type": n}
            save_file({"w": torch.ones(2)}, tmp_path/f"{n}.safetensors", meta)
        files = [tmp_path/f"{n}.safetensors" for n in ("epsilon", "v")]
        with pytest.warns(UserWarning, match="prediction_type = 'epsilon' and 'v'"):
            out = merge(files, out=tmp_path/"o").out
        assert safe_open(out/"model.safetensors", "pt").metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "file, held, library",
    [
        ("model_index.json", {"unet": ["diffusers", "UNet2DModel"]}, "diffusers"),
        ("modules.json", [], "sentence-transformers"),
        ("open_clip_config.json", {}, "open_clip"),
        ("config.json", {"architecture": "resnet18"}, "timm"),
        ("config.json", {"model_type": "bert"}, "transformers"),
    ],
)
def test_the_card_names_the_library(tmp_path, file, held, library):
    for n in "ab":
        save(tmp_path/n/"unet" if "index" in file else tmp_path/n, {"w": torch.ones(2)})
        (tmp_path/n/file).write_text(json.dumps(held))
    out = merge([tmp_path/"a", tmp_path/"b"], out=tmp_path/"o").out
    assert f"library_name: {library}\n" in (out/"README.md").read_text()
