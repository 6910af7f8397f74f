"""Small random models, built offline."""

import copy
import functools
import inspect

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    ChromaTransformer2DModel,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from clear_attn import demo

FLUX_CONFIG = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "axes_dims_rope": (4, 6, 6),
}
# That of the autoencoder and the text encoders of the pipelines.
FLUX_PIPELINE_SIZES = {"in_channels": 16, "joint_attention_dim": 32, "pooled_projection_dim": 16}
# The most that the tokenizers take.
TEXT_TOKENS = 24
FLUX2_CONFIG = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4),
}
QWEN_CONFIG = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "axes_dims_rope": (4, 6, 6),
}
CHROMA_CONFIG = {
    **{name: value for name, value in FLUX_CONFIG.items() if name != "pooled_projection_dim"},
    "approximator_num_channels": 16,
    "approximator_hidden_dim": 24,
    "approximator_layers": 1,
}
SD3_CONFIG = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 72,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}
KREA2_CONFIG = {
    "in_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "timestep_embed_dim": 16,
    "text_hidden_dim": 12,
    "num_text_layers": 3,
    "text_num_attention_heads": 2,
    "text_num_key_value_heads": 1,
    "text_intermediate_size": 20,
    "num_layerwise_text_blocks": 1,
    "num_refiner_text_blocks": 1,
    "axes_dims_rope": (2, 2, 4),
}
FLUX3_CONFIG = {
    "in_channels": 8,
    "cond_in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "timestep_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4),
}
DIT_CONFIG = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "num_embeds_ada_norm": 10,
}
Z_IMAGE_CONFIG = {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 12,
    "axes_dims": (4, 6, 6),
    "axes_lens": (256, 64, 64),
}
QWEN21_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "context_in_dim": 12,
    "axes_dims_rope": (4, 6, 6),
}


def flux_transformer(guidance=False, **changes):
    """Return a random FLUX of two double and two single blocks, 2 heads of 16."""
    torch.manual_seed(1)
    return FluxTransformer2DModel(**{**FLUX_CONFIG, "guidance_embeds": guidance, **changes}).eval()


def _tokenizers():
    """Return CLIP's and T5's tokenizer of the packaged FLUX, for texts of up to 24 tokens."""
    kinds = {"tokenizer": CLIPTokenizer, "tokenizer_2": T5TokenizerFast}
    return tuple(kind.from_pretrained(demo.path() / name, model_max_length=TEXT_TOKENS) for name, kind in kinds.items())


def _clip_config(tokenizer):
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        projection_dim=16,
        max_position_embeddings=TEXT_TOKENS,
        **ids,
    )


def _t5_config(tokenizer):
    return T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, dropout_rate=0.0)


@functools.cache
def random_flux():
    """Return a random FLUX for images of 128 px, 16 x 16 tokens, and texts of 24 tokens. Do not change it."""
    tokenizer, tokenizer_2 = _tokenizers()
    torch.manual_seed(2)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=128,
        scaling_factor=0.5,
        shift_factor=0.1,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    models = {
        "vae": vae,
        "text_encoder": CLIPTextModel(_clip_config(tokenizer)),
        "text_encoder_2": T5EncoderModel(_t5_config(tokenizer_2)),
        # The third single-stream layer is the first with an attention loss.
        "transformer": flux_transformer(**FLUX_PIPELINE_SIZES, num_single_layers=3),
    }
    for model in models.values():
        randomize(model.eval())
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0), tokenizer=tokenizer, tokenizer_2=tokenizer_2, **models
    )
    # As if loaded from a folder.
    pipe.register_to_config(_name_or_path="/models/random_flux")
    pipe.transformer.register_to_config(_name_or_path="/models/random_flux/transformer")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_pipeline():
    """Return a copy, which a test may change."""
    return copy.deepcopy(random_flux())


def image_ids(*grids):
    """Return `img_ids` of one image and, as in Kontext, of its reference images."""
    parts = []
    for number, (height, width) in enumerate(grids):
        yx = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        parts.append(torch.cat([torch.full((height * width, 1), number), yx], dim=1))
    return torch.cat(parts).float()


def _random(seed):
    rng = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=rng)


def flux_call(transformer, *grids, text=7, batch=1, seed=0, controlnet=False):
    """Return random arguments of a forward call."""
    random = _random(seed)
    config, tokens = transformer.config, sum(height * width for height, width in grids)
    inner = config.num_attention_heads * config.attention_head_dim
    call = {
        "hidden_states": random(batch, tokens, config.in_channels),
        "encoder_hidden_states": random(batch, text, config.joint_attention_dim),
        "pooled_projections": random(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.7),
        "img_ids": image_ids(*grids),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.full((batch,), 3.5) if config.guidance_embeds else None,
    }
    if controlnet:
        call["controlnet_block_samples"] = [random(batch, tokens, inner) for _ in range(config.num_layers)]
        call["controlnet_single_block_samples"] = [random(batch, tokens, inner)]
    return call


def flux2_transformer(guidance=False, **changes):
    """Return a random FLUX.2 of two double and two single blocks, 2 heads of 16."""
    torch.manual_seed(1)
    # Before diffusers 0.37 it was not optional.
    optional = "guidance_embeds" in inspect.signature(Flux2Transformer2DModel.__init__).parameters
    choice = {"guidance_embeds": guidance} if optional else {}
    return Flux2Transformer2DModel(**{**FLUX2_CONFIG, **choice, **changes}).eval()


def flux2_call(transformer, *grids, text=7, batch=1, seed=0, controlnet=False):
    """Return random arguments of a forward call; ids are integers, as in the pipelines."""
    random, config = _random(seed), transformer.config
    ids = torch.nn.functional.pad(image_ids(*grids), (0, 1)).long()
    ids[:, 0] *= 10
    return {
        "hidden_states": random(batch, len(ids), config.in_channels),
        "encoder_hidden_states": random(batch, text, config.joint_attention_dim),
        "timestep": torch.full((batch,), 0.7),
        "img_ids": ids.expand(batch, -1, -1),
        "txt_ids": torch.nn.functional.pad(torch.arange(text)[:, None], (3, 0)).expand(batch, -1, -1),
        "guidance": torch.full((batch,), 3.5) if config.get("guidance_embeds", True) else None,
    }


def qwen_transformer(**changes):
    """Return a random Qwen-Image of three blocks, 2 heads of 16."""
    torch.manual_seed(1)
    return QwenImageTransformer2DModel(**{**QWEN_CONFIG, **changes}).eval()


def qwen_call(transformer, *grids, text=7, batch=1, seed=0, controlnet=False, padded=(), dtype=torch.bool):
    """Return random arguments of a forward call; `padded` is the number of padding tokens of each text."""
    random, config = _random(seed), transformer.config
    tokens = sum(height * width for height, width in grids)
    call = {
        "hidden_states": random(batch, tokens, config.in_channels),
        "encoder_hidden_states": random(batch, text, config.joint_attention_dim),
        "encoder_hidden_states_mask": None,
        "timestep": torch.full((batch,), 0.7),
        "img_shapes": [[(1, *grid) for grid in grids]] * batch,
    }
    if padded:
        call["encoder_hidden_states_mask"] = (torch.arange(text) < text - torch.tensor(padded)[:, None]).to(dtype)
    if controlnet:
        inner = config.num_attention_heads * config.attention_head_dim
        call["controlnet_block_samples"] = [random(batch, tokens, inner) for _ in range(2)]
    return call


def chroma_transformer(**changes):
    """Return a random Chroma of two double and two single blocks, 2 heads of 16."""
    torch.manual_seed(1)
    return ChromaTransformer2DModel(**{**CHROMA_CONFIG, **changes}).eval()


def chroma_call(transformer, *grids, text=7, batch=1, seed=0, controlnet=False, padded=None, dtype=torch.float32):
    """Return random arguments of a forward call; `padded` is the padding of each text, by default 2 tokens."""
    random, config = _random(seed), transformer.config
    tokens = sum(height * width for height, width in grids)
    attended = torch.arange(text) < text - torch.tensor(padded or [min(2, text - 1)] * batch)[:, None]
    call = {
        "hidden_states": random(batch, tokens, config.in_channels),
        "encoder_hidden_states": random(batch, text, config.joint_attention_dim),
        "timestep": torch.full((batch,), 0.7),
        "img_ids": image_ids(*grids),
        "txt_ids": torch.zeros(text, 3),
        "attention_mask": torch.cat([attended, attended.new_ones(batch, tokens)], dim=1).to(dtype),
    }
    if controlnet:
        inner = config.num_attention_heads * config.attention_head_dim
        call["controlnet_block_samples"] = [random(batch, tokens, inner) for _ in range(config.num_layers)]
        call["controlnet_single_block_samples"] = [random(batch, tokens, inner)]
    return call


def compile_blocks(transformer, **options):
    """Compile blocks one by one, even if diffusers names no repeated blocks for the model."""
    transformer._repeated_blocks = transformer._repeated_blocks or [type(transformer.transformer_blocks[0]).__name__]
    transformer.compile_repeated_blocks(fullgraph=True, **options)


def sd3_transformer(dual=True, **changes):
    """Return a random SD3.5 of three blocks, the first with dual attention, the last without a text output; or SD3."""
    without = {} if dual else {"dual_attention_layers": (), "qk_norm": None}
    torch.manual_seed(1)
    return SD3Transformer2DModel(**{**SD3_CONFIG, **without, **changes}).eval()


def sd3_call(transformer, grid, text=7, batch=1, seed=0, controlnet=False):
    """Return random arguments of a forward call."""
    random, config = _random(seed), transformer.config
    height, width = grid
    inner = config.num_attention_heads * config.attention_head_dim
    call = {
        "hidden_states": random(batch, config.in_channels, 2 * height, 2 * width),
        "encoder_hidden_states": random(batch, text, config.joint_attention_dim),
        "pooled_projections": random(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 700.0),
    }
    if controlnet:
        call["block_controlnet_hidden_states"] = [random(batch, height * width, inner) for _ in range(2)]
    return call


def dit_transformer(**changes):
    """Return a random DiT of three blocks with learned variance, 2 heads of 16, that drops no labels in training."""
    torch.manual_seed(1)
    transformer = DiTTransformer2DModel(**{**DIT_CONFIG, **changes}).eval()
    for block in transformer.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0
    return transformer


def dit_call(transformer, grid, text=0, batch=1, seed=0, controlnet=False):
    """Return random arguments of a forward call; the image is square, with the first side of the grid."""
    random, config = _random(seed), transformer.config
    side = config.patch_size * grid[0]
    return {
        "hidden_states": random(batch, config.in_channels, side, side),
        "timestep": torch.arange(batch) * 100 + 50,
        "class_labels": torch.arange(batch) + 3,
    }


def randomize(transformer, seed=6):
    """Add random values to every parameter: those that start at zero, such as gates and modulations, hide errors."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return transformer


def krea2_transformer(**changes):
    """A random Krea 2 of three blocks, 4 query heads of 8 that share 2 key heads."""
    torch.manual_seed(1)
    return randomize(diffusers.Krea2Transformer2DModel(**{**KREA2_CONFIG, **changes}).eval())


def krea2_call(transformer, grid, text=7, batch=1, seed=0, controlnet=False, padded=(), dtype=torch.bool):
    """Keywords of a forward call with random values; `padded` tells how much of each text is padding."""
    random, config, (height, width) = _random(seed), transformer.config, grid
    call = {
        "hidden_states": random(batch, height * width, config.in_channels),
        "encoder_hidden_states": random(batch, text, config.num_text_layers, config.text_hidden_dim),
        "timestep": torch.full((batch,), 0.7),
        "position_ids": torch.cat([torch.zeros(text, 3), image_ids(grid)]),
        "encoder_attention_mask": None,
    }
    if padded:
        call["encoder_attention_mask"] = (torch.arange(text) < text - torch.tensor(padded)[:, None]).to(dtype)
    return call


def flux3_transformer(**changes):
    """Return a random FLUX.3 with two blocks of each kind, with 2 heads of 16 channels."""
    torch.manual_seed(1)
    return randomize(diffusers.Flux3Transformer2DModel(**{**FLUX3_CONFIG, **changes}).eval())


def flux3_call(transformer, grid, *references, text=7, batch=1, seed=0, controlnet=False):
    """Return the arguments of a forward call, with random values."""
    random, config = _random(seed), transformer.config

    def ids(number, height, width):
        yx = torch.cartesian_prod(torch.arange(height), torch.arange(width)) * 0.5
        return torch.nn.functional.pad(torch.cat([yx, torch.full((height * width, 1), number)], dim=1), (1, 0)).float()

    call = {
        "hidden_states": random(batch, grid[0] * grid[1], config.in_channels),
        "encoder_hidden_states": random(batch, text, config.joint_attention_dim),
        "timestep": torch.full((batch,), 0.7),
        "img_ids": ids(0, *grid),
        "txt_ids": torch.nn.functional.pad(torch.arange(text)[:, None], (3, 0)).float(),
        "image_cond_hidden_states": None,
        "image_cond_ids": None,
        "target_timestep": torch.full((batch,), 0.6) if config.flow_map else None,
    }
    if references:
        call["image_cond_ids"] = torch.cat([ids(-1 - i, *reference) for i, reference in enumerate(references)])
        call["image_cond_hidden_states"] = random(batch, len(call["image_cond_ids"]), config.cond_in_channels)
    return call


def z_image_transformer(**changes):
    """A random Z-Image of one refining and two joint layers, 2 heads of 16."""
    torch.manual_seed(1)
    transformer = randomize(diffusers.ZImageTransformer2DModel(**{**Z_IMAGE_CONFIG, **changes}).eval())
    with torch.no_grad():
        transformer.all_final_layer["2-1"].linear.weight.mul_(0.2)  # so that outputs are about 1
    return transformer


def z_image_call(transformer, grid, text=7, batch=1, seed=0, controlnet=False, padded=None):
    """Keywords of a forward call with random values; `padded` tells how much shorter than `text` each caption is."""
    random, config = _random(seed), transformer.config
    lengths = [text - each for each in padded or [0] * batch]
    call = {
        "x": [random(config.in_channels, 1, 2 * grid[0], 2 * grid[1]) for _ in range(batch)],
        "t": torch.full((batch,), 0.3),
        "cap_feats": [random(length, config.cap_feat_dim) for length in lengths],
    }
    if controlnet:
        tokens = sum(32 * -(-each // 32) for each in (grid[0] * grid[1], max(lengths)))
        call["controlnet_block_samples"] = {layer: random(batch, tokens, config.dim) for layer in (0, 1)}
    return call


def qwen21_transformer(**changes):
    """Return a random Qwen-Image 2.1 of three blocks, 2 heads of 16."""
    torch.manual_seed(1)
    return randomize(diffusers.QwenImage21Transformer2DModel(**{**QWEN21_CONFIG, **changes}).eval())


def qwen21_call(transformer, grid, *conditions, text=7, batch=1, seed=0, padded=(), dtype=torch.bool, controlnet=False):
    """Return random arguments of a forward call, with condition images between text tokens.

    `padded` is the number of padding tokens of each text. Columns are rounded up to a multiple of four.
    """
    random, config = _random(seed), transformer.config
    shapes = [(1, height, width + -width % 4) for height, width in (*conditions, grid)]
    *before, target = (height * width for _, height, width in shapes)
    # A token of text before each condition image, and the others after them.
    slots = [[False, *[True] * (tokens // 4)] for tokens in before]
    slots = [slot for each in slots for slot in each] + [False] * max(1, text - len(before))
    attended = torch.arange(len(slots)) < len(slots) - torch.tensor(padded or [0] * batch)[:, None]
    return {
        "hidden_states": random(batch, sum(before) + target, config.in_channels),
        "encoder_hidden_states": random(batch, len(slots), config.context_in_dim),
        "timestep": torch.full((batch,), 0.7),
        "img_shapes": [shapes] * batch,
        "img_mask": torch.tensor([slots + [True] * (target // 4)] * batch),
        "encoder_hidden_states_mask": attended.to(dtype) if padded else None,
    }


@functools.cache
def small_sd3():
    """Return a random SD3.5 for up to 32 x 32 tokens, with the tokenizers of the random FLUX. Do not change it."""
    parts = random_flux().components
    torch.manual_seed(2)
    clip, t5 = _clip_config(parts["tokenizer"]), _t5_config(parts["tokenizer_2"])
    pipe = StableDiffusion3Pipeline(
        transformer=sd3_transformer(joint_attention_dim=32, pooled_projection_dim=32, num_layers=4),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts["vae"],
        text_encoder=CLIPTextModelWithProjection(clip),
        tokenizer=parts["tokenizer"],
        text_encoder_2=CLIPTextModelWithProjection(clip),
        tokenizer_2=parts["tokenizer"],
        text_encoder_3=T5EncoderModel(t5),
        tokenizer_3=parts["tokenizer_2"],
    )
    pipe.tokenizer_max_length = parts["tokenizer"].model_max_length
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3_pipeline():
    """Return a copy, which a test may change."""
    return copy.deepcopy(small_sd3())
