"""Train the small FLUX that ships with clear_attn, from random weights, on a CPU.

    python examples/train_small_flux.py --output small-flux

builds the tokenizers, trains the autoencoder on drawn scenes, then trains the transformer and both text encoders by
flow matching. It saves a `FluxPipeline` in bfloat16. Everything is seeded: the same machine gives the same weights. It
takes about an hour and a half on two cores, with five minutes for the autoencoder; `--autoencoder` takes a trained one.
"""

import graphlib
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from clear_attn.demo.scenes import Scene, draw, training_scenes
from clear_attn.models._diffusers import load_pretrained

SIZE = 128  # pixels; 16 x 16 tokens after the autoencoder and the 2 x 2 packing
SHIFT = 4.0  # with so few tokens, an image's structure is decided close to pure noise
CAPTION_LENGTH = 24  # the most text tokens by default
LATENT_NOISE = 0.1  # as a share of the standard deviation of the latents
# Share of the training batches with each text length. FLUX attends to the padding of prompts, and FluxPipeline pads to
# 512 by default, so training must include long padding.
TEXT_LENGTHS = {24: 0.88, 96: 0.08, 512: 0.04}


class Phase(NamedTuple):
    """A part of the transformer's training. At its end the weights are rounded to bfloat16.

    Attributes:
        steps: of the optimizer, with a cosine schedule that ends at 0.
        learning_rate: the highest.
        image_tokens: number of tokens of each image, at random positions.
        batch_sizes: for each text length.
        jitter: largest shift of a figure, and largest change of its half side, as shares of the image's side.
    """

    steps: int
    learning_rate: float
    image_tokens: int
    batch_sizes: dict[int, int]
    jitter: float


LOOSE, NEAT = 0.02, 0.01
WHOLE = {24: 16, 96: 12, 512: 5}
PHASES = (
    Phase(5000, 2e-3, 256, WHOLE, LOOSE),
    # A quarter of each image takes a third of the time, so more images; tokens learn from text and position alone.
    Phase(1300, 1.5e-3, 64, {24: 48, 96: 28, 512: 7}, NEAT),
    Phase(500, 7e-4, 256, WHOLE, NEAT),
)


def captions_of(scene: Scene) -> list[str]:
    """Return wordings of a scene's caption; the first is the scene's own."""
    return [
        scene.caption,
        f"a {scene.color} {scene.shape} {scene.place} on a {scene.ground} ground",
        f"{scene.place}, a {scene.color} {scene.shape} on {scene.ground}",
        f"A {scene.color} {scene.shape} on a {scene.ground} ground, {scene.place}.",
    ]


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


def build_pipeline() -> FluxPipeline:
    """Return the untrained pipeline, in float32."""
    captions = [caption for scene in training_scenes() for caption in captions_of(scene)]
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
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=SIZE,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
        ),
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
            axes_dims_rope=(8, 12, 12),
        ),
    )


def draw_images(count: int, size: int, jitter: float, rng: np.random.Generator) -> tuple[list[Scene], torch.Tensor]:
    """Return scenes in random order and their images, `[count, 3, size, size]` in -1..1."""
    known = training_scenes()
    scenes = [known[index % len(known)] for index in rng.permutation(count)]
    drawn = [
        draw(scene, size, shift=tuple(rng.uniform(-jitter, jitter, 2)), half=0.23 + rng.uniform(-jitter, jitter))
        for scene in scenes
    ]
    return scenes, torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1


def learning_rate(step: int, steps: int, warmup: int = 50) -> float:
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def report(name: str, step: int, steps: int, loss: torch.Tensor, started: float) -> None:
    if step % 50 == 0 or step == steps - 1:
        print(f"{name} {step}/{steps} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)


def train_autoencoder(vae: AutoencoderKL, count: int, steps: int, rng: torch.Generator) -> None:
    """Train with absolute and squared error. Noise on the latents keeps the effect of their small errors small.

    Most steps run at half the size, in a quarter of the time; scenes look the same at any size.
    """
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    drawing = np.random.default_rng(rng.initial_seed())
    small, large = (draw_images(count, size, LOOSE, drawing)[1] for size in (SIZE // 2, SIZE))
    started = time.monotonic()
    for step in range(steps):
        images = small if step < 0.86 * steps else large
        batch = images[torch.randint(len(images), (4,), generator=rng)]
        latents = vae.encode(batch).latent_dist.mode()
        noise = LATENT_NOISE * latents.detach().std() * torch.randn(latents.shape, generator=rng)
        decoded = vae.decode(latents + noise).sample
        loss = F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report("autoencoder", step, steps, loss, started)
    vae.requires_grad_(False)
    sample = torch.cat([vae.encode(batch).latent_dist.mode() for batch in large[:512].split(32)])
    spread = sample.std().item()
    vae.register_to_config(scaling_factor=1 / spread, shift_factor=sample.mean().item())
    # Set the encoder's variance to that of the noise in training.
    _, log_variance = vae.encoder.conv_out.weight.chunk(2)
    log_variance.zero_()
    vae.encoder.conv_out.bias.chunk(2)[1].fill_(2 * math.log(LATENT_NOISE * spread))


def encode_images(pipe: FluxPipeline, images: torch.Tensor) -> torch.Tensor:
    """Return packed latents `[count, tokens, channels]`, the transformer's input."""
    config = pipe.vae.config
    latents = torch.cat([pipe.vae.encode(batch).latent_dist.mode() for batch in images.split(32)])
    latents = (latents - config.shift_factor) * config.scaling_factor
    return pipe._pack_latents(latents, *latents.shape)


def train_transformer(
    pipe: FluxPipeline, scenes: list[Scene], latents: torch.Tensor, phase: Phase, rng: torch.Generator
) -> None:
    """Train transformer and text encoders by flow matching. The result is a moving average."""
    trained = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
    parameters = [parameter for module in trained for parameter in module.parameters()]
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=phase.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, phase.steps))
    shares = torch.tensor(list(TEXT_LENGTHS.values()))
    side = SIZE // (2 * pipe.vae_scale_factor)
    image_ids = pipe._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
    started = time.monotonic()
    for step in range(phase.steps):
        length = list(TEXT_LENGTHS)[int(torch.multinomial(shares, 1, generator=rng))]
        batch = phase.batch_sizes[length]
        chosen = torch.randint(len(scenes), (batch,), generator=rng)
        wordings = torch.randint(4, (batch,), generator=rng)
        captions = [captions_of(scenes[i])[wording] for i, wording in zip(chosen, wordings, strict=True)]
        text, pooled, text_ids = pipe.encode_prompt(captions, None, device="cpu", max_sequence_length=length)

        uniform = torch.rand(batch, generator=rng)
        sigma = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        clean, seen_ids = latents[chosen], image_ids
        if phase.image_tokens < clean.shape[1]:
            seen = torch.randperm(clean.shape[1], generator=rng)[: phase.image_tokens]
            clean, seen_ids = clean[:, seen], image_ids[seen]
        noise = torch.randn(clean.shape, generator=rng)
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        velocity = pipe.transformer(noisy, text, pooled, sigma, seen_ids, text_ids, return_dict=False)[0]
        loss = F.mse_loss(velocity, noise - clean)

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.998, (1 + step) / (10 + step)))
        report("transformer", step, phase.steps, loss, started)
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)


def main(
    output: Annotated[Path, typer.Option(help="Folder for the pipeline.")],
    autoencoder: Annotated[
        Path | None, typer.Option(help="A saved autoencoder to use instead of training one.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="A pipeline that was saved after a phase.")] = None,
    first_phase: Annotated[int, typer.Option(help="The phase to resume with, from 0.")] = 0,
    most_steps: Annotated[int | None, typer.Option(help="Limit the steps of each phase, for a trial.")] = None,
    autoencoder_steps: Annotated[int, typer.Option(help="Steps of the autoencoder.")] = 2100,
    images: Annotated[
        int, typer.Option(help="Number of training images, each a scene with a random shift and size.")
    ] = 4096,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    pipe = load_pretrained(FluxPipeline, resume, dtype=torch.float32) if resume else build_pipeline()
    if autoencoder:
        pipe.register_modules(vae=load_pretrained(AutoencoderKL, autoencoder, dtype=torch.float32))
    elif not resume:
        train_autoencoder(pipe.vae, images // 2, autoencoder_steps, torch.Generator().manual_seed(seed))
    # Round now as for saving, so that the transformer trains on the same latents as it gets later.
    pipe.vae.to(torch.bfloat16).to(torch.float32)
    for number, phase in enumerate(PHASES):
        if number >= first_phase:
            scenes, drawn = draw_images(images, SIZE, phase.jitter, np.random.default_rng(seed + 1))
            with torch.no_grad():
                latents = encode_images(pipe, drawn)
            steps = min(phase.steps, most_steps or phase.steps)
            phase_rng = torch.Generator().manual_seed(seed + 2 + number)
            train_transformer(pipe, scenes, latents, phase._replace(steps=steps), phase_rng)
            pipe.to(torch.bfloat16).save_pretrained(output)
            support_transformers_4(output)
            load_in_float32(output)
            pipe.to(torch.float32)
    for file in output.rglob("*.safetensors"):
        file.chmod(0o644)


if __name__ == "__main__":
    typer.run(main)
