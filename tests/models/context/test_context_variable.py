"""The context variable: how a call's context reaches attention layers that get no attention keywords."""

import copy
import gc
import threading
import weakref
from unittest import mock

import pytest
import torch
from diffusers import SD3ControlNetModel
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn
from torch.nn.functional import scaled_dot_product_attention  # the module, because tests patch its attributes
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from clear_attn.models.context import context_variable as carrier
from clear_attn.models.context.context import ClearContext
from clear_attn.models.context.context_checkpoint import ContextCheckpoint, unwrap_checkpointing, wrap_checkpointing
from tests.helpers import dummy_models, hardware
from tests.helpers.reference_model import FLUX_ATTENTION, SD3_ATTENTION

TEXT = 7
SMALL, LARGE, WIDE = (3, 6), (5, 4), (4, 7)


class MaskContext(ClearContext):
    """A context with a random mask per group: another context or group gives other numbers."""

    def __init__(self, tokens, seed):
        rng = torch.Generator().manual_seed(1000 * seed + tokens)
        self.masks = (torch.rand(2, tokens, tokens, generator=rng) < 0.5) | torch.eye(tokens, dtype=torch.bool)

    def attend(self, group, query, key, value, parameters, attention_backend):
        tokens = query.shape[2]
        value = value * parameters[0] if parameters else value
        mask = self.masks[group, :tokens, :tokens]
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return output.transpose(1, 2).flatten(2).to(query.dtype)


class Processor(nn.Module):
    """A processor that projects as diffusers' do, and attends with the published context."""

    def __init__(self, group):
        super().__init__()
        self.group = group
        self.weight = nn.Parameter(torch.ones(1))

    def attend(self, query, key, value):
        return carrier.attend_published(query, key, value, [self.weight], self.group, None)


class ChromaProcessor(Processor):
    called, heads_first = FLUX_ATTENTION

    def __call__(
        self, attn, x, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, clear_context=None
    ):
        text = encoder_hidden_states
        query, key, value = (f(x).unflatten(-1, (attn.heads, -1)) for f in (attn.to_q, attn.to_k, attn.to_v))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if text is not None:
            projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            text_query, text_key, text_value = (f(text).unflatten(-1, (attn.heads, -1)) for f in projections)
            query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        joint = self.attend(*(x.transpose(1, 2) for x in (query, key, value)))
        if text is None:
            return joint
        tokens = text.shape[1]
        return attn.to_out[1](attn.to_out[0](joint[:, tokens:])), attn.to_add_out(joint[:, :tokens])


class SD3Processor(Processor):
    called, heads_first = SD3_ATTENTION

    def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, **kwargs):
        text, tokens = encoder_hidden_states, x.shape[1]
        heads = [f(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v)]
        query, key, value = attn.norm_q(heads[0]), attn.norm_k(heads[1]), heads[2]
        if text is not None:
            projections = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            heads = [f(text).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for f in projections]
            query = torch.cat([query, attn.norm_added_q(heads[0])], dim=2)
            key = torch.cat([key, attn.norm_added_k(heads[1])], dim=2)
            value = torch.cat([value, heads[2]], dim=2)
        joint = self.attend(query, key, value)
        image = attn.to_out[1](attn.to_out[0](joint[:, :tokens]))
        if text is None:
            return image
        text = joint[:, tokens:]
        return image, text if attn.context_pre_only else attn.to_add_out(text)


class Hooks:
    """Hooks that publish a context, keep it in the call's keywords and clear it, as the library's do."""

    def __init__(self):
        self.seed = 1
        self.contexts = []

    def enter(self, model, args, kwargs):
        wrap_checkpointing(model)
        context = MaskContext(self.tokens(kwargs), self.seed)
        self.contexts.append(weakref.ref(context))
        owner = carrier.publish(context)
        return args, {**kwargs, "joint_attention_kwargs": {"clear_context": owner}}

    def exit(self, model, args, kwargs, output):
        carrier.clear()

    @staticmethod
    def tokens(call):
        x = call["hidden_states"]
        return TEXT + (x.shape[1] if x.ndim == 3 else x.shape[2] * x.shape[3] // 4)


def chroma_call(grid, seed=0):
    return {
        **dummy_models.chroma_call(dummy_models.chroma_transformer(), grid, text=TEXT, seed=seed),
        "attention_mask": None,
    }


def sd3_call(grid, seed=0):
    call = dummy_models.sd3_call(dummy_models.sd3_transformer(), grid, text=TEXT, seed=seed)
    return {**call, "controlnet_cond": call["hidden_states"].flip(-1)}


def chroma():
    return dummy_models.chroma_transformer()


def chroma_of_two_layers():
    return dummy_models.chroma_transformer(num_layers=1, num_single_layers=1)


def sd3_controlnet():
    torch.manual_seed(1)
    model = SD3ControlNetModel(**dummy_models.SD3_CONFIG).eval()
    model._repeated_blocks = ["JointTransformerBlock"]  # diffusers names none for ControlNets
    return model


KINDS = {"chroma": (chroma, chroma_call, ChromaProcessor), "sd3_controlnet": (sd3_controlnet, sd3_call, SD3Processor)}


@pytest.fixture(params=KINDS)
def kind(request):
    torch.compiler.reset()
    yield KINDS[request.param]
    carrier.clear()
    torch.compiler.reset()


def build_original(kind):
    torch.manual_seed(3)
    model = kind[0]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def build(kind):
    """Return a model with layers that read the context variable, and with hooks."""
    model = build_original(kind)
    for layer in attention_layers(model).values():
        layer.set_processor(kind[2](group_of(layer)))
    model.hooks = Hooks()
    model.register_forward_pre_hook(lambda *args: args[0].hooks.enter(*args), with_kwargs=True)
    model.register_forward_hook(lambda *args: args[0].hooks.exit(*args), with_kwargs=True)
    return model


def attention_layers(model):
    return {name: layer for name, layer in model.named_modules() if name.split(".")[-1] in ("attn", "attn2")}


def group_of(layer):
    """Return 0 for layers with text and image, 1 for the others."""
    return int(layer.added_kv_proj_dim is None)


def outputs(model, call):
    leaves = tree_leaves(model(**call, return_dict=False))
    return torch.cat(leaves, dim=1)


def run(model, call):
    with torch.no_grad():
        return outputs(model, call)


def reference_outputs(kind, model, call, seed=1):
    """Return outputs of an original model, with the masks of a context in its attention."""
    context, processor = MaskContext(Hooks.tokens(call), seed), kind[2]
    groups = iter([group_of(layer) for layer in attention_layers(model).values()])

    def attend(query, key, value, **_):
        if not processor.heads_first:
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        output = context.attend(next(groups), query, key, value, [], None).unflatten(-1, (query.shape[1], -1))
        return output.transpose(1, 2) if processor.heads_first else output

    with mock.patch(processor.called, attend):
        return outputs(model, call)


def reference(kind, call, seed=1):
    with torch.no_grad():
        return reference_outputs(kind, build_original(kind), call, seed)


def gradients(model, calls, run_one):
    """Return gradients of all inputs and parameters, with all forward passes before the first backward pass."""
    model.zero_grad()
    calls = [{**call, "hidden_states": call["hidden_states"].clone().requires_grad_()} for call in calls]
    losses = [run_one(call).square().mean() for call in calls]
    for loss in losses:
        loss.backward()
    return [*parameter_gradients(model), *(call["hidden_states"].grad for call in calls)]


def parameter_gradients(model):
    """Return gradients of diffusers' parameters; zero if there is none, as for SD3's last text projections."""
    parameters = [x for name, x in model.named_parameters() if "processor" not in name]
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in parameters]


def reference_gradients(kind, calls):
    model = build_original(kind)
    return gradients(model, calls, lambda call: reference_outputs(kind, model, call))


def assert_close(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5 * max(1, other.abs().max().item()), rtol=1e-4)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


SLOW = {"eager": (), "aot_eager": pytest.mark.slow}  # compiled blocks take long
BACKENDS = [pytest.param(backend, marks=marks) for backend, marks in SLOW.items()]
ENABLE = {
    "default": lambda model: model.enable_gradient_checkpointing(),
    "reentrant": lambda model: model.enable_gradient_checkpointing(
        lambda block, *args: checkpoint(block, *args, use_reentrant=True)
    ),
    "never": lambda model: None,
}


each_backend_and_checkpointing = pytest.mark.parametrize(
    ("backend", "enable"),
    [
        pytest.param(backend, enable, id=f"{backend}-{name}", marks=marks)
        for backend, marks in SLOW.items()
        for name, enable in ENABLE.items()
    ],
)


def compile_blocks(model, backend):
    if backend != "eager":
        model.compile_repeated_blocks(fullgraph=True, backend=backend)


def test_equals_the_original_model_with_the_same_mask(kind):
    model = build(kind)
    for grid in (SMALL, LARGE):
        call = kind[1](grid)
        expected = reference(kind, call)
        torch.testing.assert_close(run(model, call), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
        assert (reference(kind, call, seed=2) - expected).abs().max() > 1e-3 * expected.abs().max()


def count_graphs(model, calls):
    """Compile the blocks and return how many graphs there are after each call."""
    torch.compiler.reset()
    compile_blocks(model, "aot_eager")
    before, counts = graphs(), []
    for call in calls:
        run(model, call)
        counts.append(graphs() - before)
    return counts


@pytest.mark.slow
def test_blocks_are_compiled_as_often_as_in_the_original_model(kind):
    """They are not compiled again for each layer, each context or a third size."""
    calls = [kind[1](grid) for grid in (SMALL, LARGE, SMALL, WIDE)]
    counts = count_graphs(build(kind), calls)
    assert counts == count_graphs(build_original(kind), calls)
    assert counts[1] == counts[-1]


def check_run_time(kind, backend, turns):
    model = build(kind)
    compile_blocks(model, backend)
    for grid, seed in turns:
        call = kind[1](grid)
        model.hooks.seed = seed
        before = graphs()
        expected = reference(kind, call, seed)
        torch.testing.assert_close(run(model, call), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    assert graphs() == before  # another context of the same shapes compiles nothing


@pytest.mark.slow
def test_compiled_blocks_read_the_context_at_run_time(kind):
    check_run_time(kind, "aot_eager", [(SMALL, 1), (LARGE, 1), (SMALL, 2), (LARGE, 2), (WIDE, 3), (SMALL, 1)])


@each_backend_and_checkpointing
def test_gradients_with_two_sizes_in_flight(kind, backend, enable):
    calls = [kind[1](SMALL, seed=1), kind[1](LARGE, seed=2), kind[1](SMALL, seed=3)]
    expected = reference_gradients(kind, calls)
    model = build(kind).train()
    compile_blocks(model, backend)
    enable(model)  # after the hooks were installed
    assert_close(gradients(model, calls, lambda call: outputs(model, call)), expected)
    gc.collect()
    assert [context() for context in model.hooks.contexts] == [None] * 3


@pytest.mark.parametrize("enable", ENABLE.values(), ids=ENABLE)
def test_backward_in_another_thread(kind, enable):
    """Autograd does this for a GPU: the thread has no context variable, or that of another call."""
    calls = [kind[1](SMALL, seed=1), kind[1](LARGE, seed=2)]
    expected = reference_gradients(kind, calls)
    model = build(kind).train()
    enable(model)

    def backward(loss):
        with carrier.published(MaskContext(TEXT + 20, seed=9)):
            loss.backward()

    inputs = [call["hidden_states"].requires_grad_() for call in calls]
    for call in calls:
        thread = threading.Thread(target=backward, args=(outputs(model, call).square().mean(),))
        thread.start()
        thread.join()
    assert_close([*parameter_gradients(model), *(x.grad for x in inputs)], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_threads_at_once(kind, backend):
    model = build(kind)
    compile_blocks(model, backend)
    calls = [kind[1](grid) for grid in (SMALL, LARGE, WIDE)]
    expected = [run(model, call) for call in calls]
    barrier, wrong = threading.Barrier(3), []

    def work(start):
        for turn in range(6):
            which = (start + turn) % 3
            barrier.wait(60)
            if not torch.allclose(run(model, calls[which]), expected[which], atol=1e-5):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for call, output in zip(calls, expected, strict=True):
        torch.testing.assert_close(output, reference(kind, call), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(kind, backend, mode):
    model = build(kind)
    compile_blocks(model, backend)
    call = kind[1](SMALL)
    with mode():
        output = outputs(model, call)
        gc.disable()  # reference counting must suffice
        try:
            outputs(model, call)
            alive = model.hooks.contexts[-1]()
        finally:
            gc.enable()
    assert alive is None
    expected = reference(kind, call)
    torch.testing.assert_close(output.clone(), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@each_backend_and_checkpointing
def test_a_context_lives_as_long_as_its_graph(kind, backend, enable):
    model = build(kind).train()
    compile_blocks(model, backend)
    enable(model)
    call = kind[1](SMALL)
    call["hidden_states"].requires_grad_()
    output = outputs(model, call)
    assert carrier.current() is None
    (context,) = model.hooks.contexts
    assert context() is not None
    del output
    gc.collect()
    assert context() is None


def block_inputs(kind, call):
    """Return the inputs of the second block."""
    model, inputs = build_original(kind), []
    block = model.transformer_blocks[1]
    block.register_forward_pre_hook(lambda block, *inputs_: inputs.append(inputs_), with_kwargs=True)
    run(model, call)
    return inputs[0]


@each_backend_and_checkpointing
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_call_leaves_nothing_behind(kind, backend, error, enable):
    model = build(kind)
    compile_blocks(model, backend)
    enable(model)
    call = kind[1](SMALL)
    args, kwargs = block_inputs(kind, call)
    try:
        with mock.patch.object(MaskContext, "attend", side_effect=error):
            outputs(model, call)
    except error:
        pass
    else:
        pytest.fail("the call was not interrupted")
    gc.collect()
    assert carrier.current() is None
    assert model.hooks.contexts[0]() is None
    with pytest.raises(RuntimeError, match="called outside a call of its linearized transformer"), torch.no_grad():
        model.transformer_blocks[1](*args, **kwargs)
    expected = reference(kind, call)
    torch.testing.assert_close(run(model, call), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("enable", ENABLE.values(), ids=ENABLE)
def test_an_interrupted_backward_pass_leaves_nothing_behind(kind, enable):
    model = build(kind).train()
    enable(model)
    output = outputs(model, kind[1](SMALL))
    with mock.patch.object(MaskContext, "attend", side_effect=KeyboardInterrupt):
        try:
            output.sum().backward()
        except KeyboardInterrupt:
            pass
        else:
            pytest.fail("the backward pass was not interrupted")
    assert carrier.current() is None
    del output
    # autograd keeps the rest of its queue until the next backward pass of the thread
    torch.zeros(1, requires_grad=True).sum().backward()
    gc.collect()
    assert model.hooks.contexts[0]() is None


def test_deep_copies_and_unwrapping(kind):
    model = build(kind).train()
    model.enable_gradient_checkpointing()
    function = model._gradient_checkpointing_func
    calls = [kind[1](SMALL), kind[1](LARGE)]
    expected = reference_gradients(kind, calls)
    assert_close(gradients(model, calls, lambda call: outputs(model, call)), expected)
    twin = copy.deepcopy(model)
    twin.hooks.seed = 2
    assert_close(gradients(model, calls, lambda call: outputs(model, call)), expected)
    with torch.no_grad():
        other = reference(kind, calls[0], seed=2)
    torch.testing.assert_close(run(twin, calls[0]), other, atol=1e-5 * other.abs().max().item(), rtol=0)
    unwrap_checkpointing(model)
    assert model._gradient_checkpointing_func is function
    assert isinstance(twin._gradient_checkpointing_func, ContextCheckpoint)
    twin.disable_gradient_checkpointing()
    run(twin, calls[0])
    assert twin._gradient_checkpointing_func is checkpoint


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(kind, backend):
    """Compiled code and the backward pass run with autocast off; attention must still use it."""
    calls = [kind[1](SMALL, seed=1), kind[1](LARGE, seed=2)]
    dtypes = []
    attend = MaskContext.attend

    def spy(context, group, query, key, value, parameters, attention_backend):
        dtypes.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return attend(context, group, query, key, value, parameters, attention_backend)

    model = build(kind).train()
    compile_blocks(model, backend)

    def run_one(call):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return outputs(model, call).float()

    with mock.patch.object(MaskContext, "attend", spy):
        found = gradients(model, calls, run_one)
    assert set(dtypes) == {torch.bfloat16}
    for one, other in zip(found, reference_gradients(kind, calls), strict=True):
        assert (one - other).norm() < 0.1 * other.norm() + 1e-4


def test_the_whole_model_compiled_under_checkpointing(kind):
    calls = [kind[1](SMALL, seed=1), kind[1](SMALL, seed=2)]
    expected = reference_gradients(kind, calls)
    model = build(kind).train()
    model.enable_gradient_checkpointing()
    compiled = torch.compile(model, backend="aot_eager")
    assert_close(gradients(model, calls, lambda call: outputs(compiled, call)), expected)


@pytest.mark.slow
@hardware.needs_compiler
def test_inductor():
    """Only the smallest model, because compiling takes long; the operator alone has more cases."""
    torch.compiler.reset()
    kind = chroma_of_two_layers, chroma_call, ChromaProcessor
    calls = [kind[1](SMALL, seed=1), kind[1](LARGE, seed=2)]
    expected = reference_gradients(kind, calls)
    model = build(kind).train()
    compile_blocks(model, "inductor")
    model.enable_gradient_checkpointing()
    assert_close(gradients(model, calls, lambda call: outputs(model, call)), expected)
    check_run_time(kind, "inductor", [(SMALL, 1), (SMALL, 2)])


def random_heads(heads, tokens=6):
    return torch.randn(2, tokens, heads, 8).transpose(1, 2)


@pytest.mark.parametrize("needed", [(0,), (1, 2), (3,), (0, 1, 2, 3), ()])
@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("inductor", marks=hardware.needs_compiler)])
def test_gradients_of_the_inputs_that_need_one(needed, backend):
    torch.compiler.reset()
    tensors = [random_heads(4), random_heads(2), random_heads(2), torch.rand(1)]
    for index in needed:
        tensors[index].requires_grad_()
    context = MaskContext(6, seed=1)

    def attend(query, key, value, weight):
        return carrier.attend_published(query, key, value, [weight], 0, None)

    function = attend if backend == "eager" else torch.compile(attend, backend=backend, fullgraph=True)
    with carrier.published(context):
        output = function(*tensors)
    expected = context.attend(0, *tensors[:3], tensors[3:], None)
    torch.testing.assert_close(output, expected)
    assert output.requires_grad == bool(needed)
    if needed:
        inputs = [tensors[index] for index in needed]
        grad = torch.randn_like(output)
        assert_close(torch.autograd.grad(output, inputs, grad), torch.autograd.grad(expected, inputs, grad))


def test_hooks_that_copy_saved_tensors():
    tensors = [random_heads(4).requires_grad_() for _ in range(3)]

    def attend(*qkv):
        return carrier.attend_published(*qkv, [], 0, None)

    context = MaskContext(6, seed=1)
    copies = torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x)
    with carrier.published(context), copies:
        output = attend(*tensors)
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(*tensors)
    expected = torch.autograd.grad(context.attend(0, *tensors, [], None).sum(), tensors)
    assert_close(torch.autograd.grad(output.sum(), tensors), expected)
    with pytest.raises(RuntimeError, match=r"a hook on saved tensors .* the call's context was lost"):
        compiled.sum().backward()


def test_operator_contracts():
    query, key, value = (random_heads(heads).requires_grad_() for heads in (4, 2, 2))
    args = query, key, value, [torch.rand(1, requires_grad=True)], 0, None
    context = MaskContext(6, seed=1)
    with carrier.published(context):
        torch.library.opcheck(torch.ops.clear_attn.attend.default, (*args, None))
        torch.library.opcheck(torch.ops.clear_attn.attend.default, (query, key, value, [], 1, "native", None))
    # Not of attend_backward: opcheck clones its inputs, and a cloned handle has no context.


def test_publishing_nests_and_is_weak():
    outer, inner = MaskContext(4, 1), MaskContext(5, 1)
    assert carrier.current() is None
    owner = carrier.publish(outer)
    with carrier.published(inner):
        assert carrier.current() is inner
    assert carrier.current() is outer
    del owner  # as an exception does; a graph may still have the context
    assert carrier.current() is None
    again = carrier.publish(inner)
    carrier.clear()
    assert again.context is inner
    assert carrier.current() is None


def test_tensors_of_an_interrupted_call_can_be_kept(kind):
    """A tensor with a graph keeps its context for the backward pass, but no layer can read it."""
    model, kept = build(kind), []
    model.transformer_blocks[0].register_forward_hook(lambda *args: kept.append(args[-1]))
    interrupt = mock.Mock(side_effect=KeyboardInterrupt)
    model.transformer_blocks[1].register_forward_pre_hook(interrupt)
    try:
        outputs(model, kind[1](SMALL))
    except KeyboardInterrupt:
        interrupt.reset_mock()
    assert carrier.current() is None
    assert model.hooks.contexts[0]() is not None
    sum(x.square().mean() for x in kept.pop()).backward()
    gc.collect()
    assert model.hooks.contexts[0]() is None
