"""The parts of the small FLUX, untrained, and what makes its saved folder load in transformers 4 and 5."""

import graphlib
import itertools
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from clear_attn import demo
from clear_attn.demo.scenes import training_scenes

CAPTION_LENGTH = demo.TEXT_TOKENS  # the most text tokens by default
SHIFT = 5.0  # an image's structure is decided close to pure noise


def build_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=demo.SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def merges_of(words: Iterable[str]) -> list[tuple[str, str]]:
    """Return the merges that make one token of each word, letter by letter.

    A word's merges come before those of words that begin with two letters of its middle.
    """
    spelled = {word: (*word[:-1], f"{word[-1]}</w>") for word in sorted(words)}
    order = graphlib.TopologicalSorter[str]()
    for word, letters in spelled.items():
        middle = set(itertools.pairwise(letters[1:]))
        order.add(word)
        for other in spelled:
            if spelled[other][:2] in middle:
                order.add(other, word)
    merges = [
        ("".join(spelled[word][:end]), spelled[word][end])
        for word in order.static_order()
        for end in range(1, len(word))
    ]
    return list(dict.fromkeys(merges))


def build_tokenizers(captions: Iterable[str], length: int) -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Return CLIP's byte-pair and T5's unigram tokenizer, with one token for each word of the captions."""
    words = sorted({word for caption in captions for word in caption.replace(",", "").replace(".", "").split()})

    merges = merges_of(words)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", "<|pad|>", *alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += ["".join(merge) for merge in merges]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    with tempfile.TemporaryDirectory() as directory:
        # From files, which transformers 4 needs and transformers 5 takes.
        files = models.BPE(vocab, merges, end_of_word_suffix="</w>").save(directory)
        clip = CLIPTokenizer(*files, pad_token="<|pad|>", model_max_length=length)

    characters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -8.0)]
    pieces += [("▁" + word, -2.0) for word in words] + [(character, -10.0) for character in characters]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=2))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    t5 = T5TokenizerFast(
        tokenizer_object=unigram,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_ids=0,
        model_max_length=length,
    )
    return clip, t5


def build_pipeline(vae: AutoencoderKL) -> FluxPipeline:
    """Return the pipeline with an untrained transformer and text encoders, in float32."""
    captions = [caption for scene in training_scenes(2000) for caption in scene.captions]
    clip_tokenizer, t5_tokenizer = build_tokenizers(captions, CAPTION_LENGTH)
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=64,
        projection_dim=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CAPTION_LENGTH,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    t5 = T5Config(
        vocab_size=len(t5_tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=CLIPTextModel(clip),
        tokenizer=clip_tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=t5_tokenizer,
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=128,
            pooled_projection_dim=64,
            axes_dims_rope=(4, 14, 14),
        ),
    )


def support_transformers_4(folder: Path) -> None:
    """Rewrite what was saved of a pipeline so that transformers 4 and 5 load it.

    Transformers 4 needs the vocabulary of CLIP in files of its own, which it also saves, T5's fast tokenizer by name,
    and `text_model.` in the names of CLIP's weights, without which it leaves them random.
    """
    saved = folder / "tokenizer" / "tokenizer.json"
    if saved.exists():
        model = json.loads(saved.read_text())["model"]
        (folder / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False) + "\n")
        merges = "".join(" ".join(merge) + "\n" for merge in model["merges"])
        (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + merges)

    config_file, index_file = folder / "tokenizer_2" / "tokenizer_config.json", folder / "model_index.json"
    config = json.loads(config_file.read_text())
    config.pop("extra_special_tokens", None)
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    index = json.loads(index_file.read_text())
    index["tokenizer_2"] = ["transformers", "T5TokenizerFast"]
    index_file.write_text(json.dumps(index, indent=2) + "\n")

    weights_file = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": x for name, x in load_file(weights_file).items()}
    save_file(weights, weights_file, metadata={"format": "pt"})


def load_in_float32(folder: Path) -> None:
    """Record float32 as the dtype of the text encoders.

    Where no dtype is asked for, transformers 5 loads the recorded one, and diffusers its own models in float32.
    """
    for name in ("text_encoder", "text_encoder_2"):
        file = folder / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "float32"}, indent=2) + "\n")
