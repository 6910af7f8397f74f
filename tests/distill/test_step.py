"""One step of distillation: teacher and student, losses and gradients."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from safetensors.torch import save_file
from torch.distributed.utils import _to_kwargs
from torch.utils._pytree import tree_map

import clear_attn as clear
from clear_attn.distill import losses
from clear_attn.distill.step import Weights, distillation_losses
from clear_attn.distill.student import (
    STUDENT,
    TEACHER,
    Outputs,
    add_student,
    keywords,
    student_parameters,
    student_values,
)
from clear_attn.models import adapter_for, training_adapter_for
from clear_attn.weights.parameters import POOLED, replaced_parameters
from tests.helpers import families
from tests.helpers.reference_model import run
from tests.helpers.training_runs import training_batch


@pytest.fixture(params=[name for name, family in families.FAMILIES.items() if family.training])
def family(request):
    return families.FAMILIES[request.param]


PAPER = Weights()


def with_student(family, factor=1, backend="auto", **options):
    transformer = family.transformer()
    clear.linearize(transformer, 3, factor, weights=None, backend=backend)
    parameters = add_student(transformer, **options)
    return transformer, parameters


def perturb(parameters):
    """Change parameters by the same random values each time."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))


def as_role(role, transformer, call, outputs=None):
    return {**call, adapter_for(transformer).keywords: keywords(role, outputs)}


def trained_layers(transformer):
    """Return the layers that attend to the image, not to references alone."""
    described = adapter_for(transformer).describe_layers(transformer)
    return [name for name, layer in described.items() if layer.has_image]


def batch_for(transformer):
    batch = training_batch(transformer, (7, 12))
    rng = torch.Generator().manual_seed(4)
    return batch, torch.randn(batch.latents.shape, generator=rng), torch.tensor([0.3, 0.8])


def guidance_of(transformer):
    return 3.5 if training_adapter_for(transformer).embeds_guidance(transformer) else None


def step(transformer, weights=PAPER, matched=None, wrap=lambda module: module):
    training = training_adapter_for(transformer)
    batch, noise, sigma = batch_for(transformer)
    layers = trained_layers(transformer)
    matched = training.matched_layers(layers) if matched is None else matched
    guidance = guidance_of(transformer)
    return distillation_losses(
        wrap(transformer), training, batch, noise, sigma, weights=weights, matched=matched, guidance=guidance
    )


@pytest.mark.parametrize("factor", [1, 2])
def test_the_teacher_is_the_original_model(family, factor):
    call = family.call(family.transformer(), (9, 13))
    transformer, parameters = with_student(family, factor)
    perturb(parameters)
    torch.testing.assert_close(
        run(transformer, as_role(TEACHER, transformer, call)), run(family.transformer(), call), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("options", [{}, {"rank": 2}])
@pytest.mark.parametrize("factor", [1, 2])
def test_the_student_starts_as_the_linearized_model(family, factor, options):
    call = family.call(family.transformer(), (9, 13))
    plain = clear.linearize(family.transformer(), 3, factor, weights=None)
    transformer, _ = with_student(family, factor, **options)
    output = run(transformer, as_role(STUDENT, transformer, call))
    torch.testing.assert_close(output, run(plain, call), atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{}, {"rank": 2}])
@pytest.mark.parametrize("factor", [1, 2])
def test_what_was_trained_loads(family, factor, options, tmp_path):
    transformer, parameters = with_student(family, factor, **options)
    perturb(parameters)
    call = family.call(transformer, (9, 13))
    expected = run(transformer, as_role(STUDENT, transformer, call))
    save_file(
        {name: value.contiguous() for name, value in student_values(transformer).items()}, tmp_path / "w.safetensors"
    )
    loaded = clear.linearize(family.transformer(), 3, factor, weights=tmp_path / "w.safetensors")
    torch.testing.assert_close(run(loaded, call), expected, atol=1e-5, rtol=0)


def test_only_the_student_is_trained(family):
    transformer, parameters = with_student(family, 2)
    layers = trained_layers(transformer)
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    step(transformer).total.backward()
    optimizer.step()
    changed = {name for name, value in transformer.state_dict().items() if not torch.equal(value, before[name])}
    # SD3 discards the text of the last layer, but projections act only on image tokens.
    assert changed == student_parameters(transformer).keys()
    trained = {
        name.replace(".processor.student.", ".").replace(".local.", ".").replace("to_out_0", "to_out.0")
        for name in changed
    }
    original = family.transformer()
    assert trained == {
        *replaced_parameters({layer: original.get_submodule(layer) for layer in layers}),
        *(layer + POOLED for layer in layers),
    }


@pytest.mark.parametrize("factor", [1, 3])
def test_gradients_are_those_of_dense_attention(family, factor):
    gradients = []
    for backend in ("auto", "reference"):
        transformer, parameters = with_student(family, factor, backend)
        perturb(parameters)
        gradients.append(torch.autograd.grad(step(transformer).total, parameters))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False])
def test_gradients_under_checkpointing(family, use_reentrant):
    results = []
    for checkpointing in (False, True):
        transformer, parameters = with_student(family, 2)
        perturb(parameters)
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.train()
        found = step(transformer)
        results.append([*found, *torch.autograd.grad(found.total, parameters)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)


def test_the_losses_of_a_step(family):
    transformer, parameters = with_student(family)
    perturb(parameters)
    training = training_adapter_for(transformer)
    batch, noise, sigma = batch_for(transformer)
    layers = trained_layers(transformer)
    found = step(transformer, Weights(2.0, 3.0, 5.0), layers)
    noisy = torch.stack([(1 - s) * x + s * n for x, n, s in zip(batch.latents, noise, sigma, strict=True)])
    call = training.training_call(noisy, sigma, batch.text, guidance_of(transformer))
    outputs = {role: Outputs(layers) for role in (TEACHER, STUDENT)}

    def predict(role):
        with torch.no_grad():
            output = transformer(**as_role(role, transformer, call, outputs[role]), return_dict=False)[0]
        return training.prediction(output, call)

    student, teacher = predict(STUDENT), predict(TEACHER)
    target = training.pack(noise) - training.pack(batch.latents)
    torch.testing.assert_close(found.flow_matching, ((student - target) ** 2).mean())
    torch.testing.assert_close(found.prediction, ((student - teacher) ** 2).mean())
    attention = [
        ((outputs[STUDENT].by_layer[layer] - outputs[TEACHER].by_layer[layer]) ** 2).mean() for layer in layers
    ]
    torch.testing.assert_close(found.attention, sum(attention) / len(attention))
    torch.testing.assert_close(found.total, 2 * found.flow_matching + 3 * found.prediction + 5 * found.attention)


def test_wrappers_that_copy_the_arguments_of_a_call():
    """DDP copies them to move tensors, FSDP2 to cast them."""

    class Copies(torch.nn.Module):
        def __init__(self, module, copied):
            super().__init__()
            self.module, self.copied = module, copied

        def forward(self, **call):
            return self.module(**self.copied(call))

    transformer, parameters = with_student(families.FLUX)
    perturb(parameters)
    layers = trained_layers(transformer)
    expected = step(transformer, matched=layers)
    assert expected.attention > 0
    cast = lambda call: tree_map(lambda value: value, call)  # noqa: E731
    moved = lambda call: _to_kwargs((), call, torch.device("cpu"), False)[1][0]  # noqa: E731
    for copied in (cast, moved):
        found = step(transformer, matched=layers, wrap=functools.partial(Copies, copied=copied))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_recorded_attention_is_that_of_the_model():
    """For a single-stream layer, the output of the layer, in tile order."""
    transformer, _ = with_student(families.FLUX)
    call = families.FLUX.call(transformer, (9, 13))
    original, seen = families.FLUX.transformer(), []
    original.single_transformer_blocks[1].attn.register_forward_hook(lambda module, args, output: seen.append(output))
    run(original, call)
    layer = "single_transformer_blocks.1.attn"
    outputs = Outputs([layer])
    run(transformer, as_role(TEACHER, transformer, call, outputs))
    order = clear.TokenLayout([(9, 13)], 7).permutation
    expected = torch.cat([seen[0][:, :7], seen[0][:, 7:][:, order]], dim=1)
    torch.testing.assert_close(outputs.by_layer[layer], expected, atol=1e-5, rtol=0)


def test_packing_equals_diffusers():
    latents = torch.randn(2, 4, 6, 10)
    expected = FluxPipeline._pack_latents(latents, *latents.shape)
    assert torch.equal(training_adapter_for(families.FLUX.transformer()).pack(latents), expected)


def test_which_layers_are_compared():
    """For FLUX the ten of 57 that the reference uses, for SD3.5 every fourth."""
    layers = [f"transformer_blocks.{i}.attn" for i in range(19)]
    layers += [f"single_transformer_blocks.{i}.attn" for i in range(38)]
    chosen = training_adapter_for(families.FLUX.transformer()).matched_layers(layers)
    assert chosen == [f"single_transformer_blocks.{i}.attn" for i in range(1, 38, 4)]
    assert len(chosen) == 10
    assert training_adapter_for(families.SD3.transformer()).matched_layers(layers) == layers[::4]


def test_a_deep_copy_is_an_independent_student():
    transformer, _ = with_student(families.FLUX)
    call = families.FLUX.call(transformer, (5, 8))
    before = run(transformer, as_role(STUDENT, transformer, call))
    twin = copy.deepcopy(transformer)
    perturb(student_parameters(twin).values())
    assert torch.equal(run(transformer, as_role(STUDENT, transformer, call)), before)
    assert not torch.equal(run(twin, as_role(STUDENT, twin, call)), before)


def test_refusals():
    with pytest.raises(RuntimeError, match="only a linearized model can have a student"):
        add_student(families.FLUX.transformer())
    transformer = clear.linearize(families.FLUX.transformer(), 3, weights=None)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        add_student(transformer, rank=0)


def test_interpolation_from_the_image_to_the_noise():
    clean, noise = torch.randn(2, 3, 4, 6, 6).unbind()
    mixed = losses.interpolate(clean, noise, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(mixed[0], clean[0])
    assert torch.equal(mixed[1], noise[1])
    torch.testing.assert_close(mixed[2], 0.75 * clean[2] + 0.25 * noise[2])
    assert losses.flow_matching(noise - clean, clean, noise) == 0
    assert losses.prediction(clean, noise) == F.mse_loss(clean, noise)
    assert losses.attention({}, {}) == 0


@families.each_family(training=False)
def test_models_without_a_training_adapter(transformer):
    with pytest.raises(TypeError, match=f"a {type(transformer).__name__} cannot be distilled"):
        training_adapter_for(transformer)
