"""Checks on several ranks: python -m tests.helpers.rank_checks RANKS:CHECK[,CHECK...] ...

Ranks are forked, so that they share the imports. Every check runs on every rank. An error of a rank ends the checks of
its job, and its traceback is printed at the end.
"""

import copy
import datetime
import functools
import os
import socket
import sys
import tempfile
import time
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from diffusers import FirstBlockCacheConfig, QwenImagePipeline
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

import clear_attn as clear
from clear_attn.cascade import Stage
from clear_attn.models import adapter_for
from clear_attn.parallel import weights_digest
from clear_attn.parallel.communication_volume import count_volume
from clear_attn.patching.target import entry_hook_of
from clear_attn.tools.bench import measure
from tests.helpers import dummy_models, dummy_pipelines, families
from tests.helpers.reference_model import run
from tests.matrix.rows import PRESENT

TIMEOUT = 12  # seconds
CPU = torch.device("cpu")


def split(transformer, window=3, factor=1, mesh=None, backend="auto"):
    clear.linearize(transformer, window, factor, weights=None, backend=backend)
    return clear.parallelize(transformer, mesh)


def check_equal(family, grids, window, factor, variant=None, backend="tiled", schedule=None, **options):
    """Check that the ranks compute the same numbers as a single process, if the installed diffusers has the model."""
    if family not in families.FAMILIES.values():
        return
    transformer = family.transformer(**(variant or {}))
    call = family.call(transformer, *grids, **options)
    clear.linearize(transformer, window, factor, schedule=schedule, weights=None, backend="tiled")
    expected = run(transformer, call)
    clear.linearize(transformer, window, factor, schedule=schedule, weights=None, backend=backend)
    clear.parallelize(transformer)
    for _ in range(2):
        output = run(transformer, call)  # without the text of Qwen-Image 2.1
        torch.testing.assert_close(output, expected[:, -output.shape[1] :], atol=1e-5, rtol=0)
    clear.restore(transformer)
    assert not clear.is_linearized(transformer)
    assert not adapter_for(transformer).output_layer(transformer)._forward_hooks


def equal():
    height = 8 * dist.get_world_size() - 3  # one tile row for each rank
    check_equal(families.FLUX, [(height - 4, 11)], 3, 1, controlnet=True)  # the last tile row has one row of tokens
    check_equal(families.FLUX, [(height, 11)], 20, 1, batch=2)
    check_equal(families.FLUX, [(height + 9, 13)], 5, 4, controlnet=True, backend="reference")
    check_equal(families.FLUX, [(height + 30, 5)], 9, 5)  # shards of several tile rows, of different sizes
    check_equal(families.FLUX, [(height, 7), (13, 9)], 6, 3)
    check_equal(families.FLUX, [(height, 7), (2, 3)], 6, 1)
    check_equal(families.SD3, [(height + 4, 9)], 4, 4, batch=2, controlnet=True)
    check_equal(families.SD3, [(height, 9)], 9, 1, variant={"dual": False})


def equal_in_all_families():
    """Check all models that the installed diffusers has, and a schedule."""
    height = 8 * dist.get_world_size() - 3
    layers = clear.Schedule(dense_layers=["transformer_blocks.1"], windows={"transformer_blocks.0": 9})
    check_equal(families.FLUX, [(height, 7), (5, 9)], 4, 2, schedule=layers)
    check_equal(families.SD3, [(height, 9)], 4, 2, schedule=clear.Schedule(dense_above_sigma=0.5))
    check_equal(families.SD3, [(height, 9)], 4, 2, schedule=clear.Schedule(windows_by_sigma=((0.5, 9), (0.2, 6))))
    check_equal(families.FLUX2, [(height, 7), (9, 5)], 6, 2)
    check_equal(families.QWEN, [(height, 7), (9, 5)], 6, 2, batch=2)
    check_equal(families.CHROMA, [(height, 7)], 6, 2, batch=2)
    check_equal(families.KREA2, [(height, 7)], 6, 2, batch=2, padded=(0, 3))
    check_equal(families.FLUX3, [(height, 7)], 6, 2, batch=2)
    check_equal(families.FLUX3, [(height, 7), (9, 5), (2, 3)], 6, 2)  # ranks without tokens of a reference
    check_equal(families.Z_IMAGE, [(height, 7)], 6, 2, batch=2, controlnet=True)
    check_equal(families.Z_IMAGE, [(height + 9, 8)], 3, 1, batch=2, text=40, padded=(0, 35))
    check_equal(families.QWEN21, [(height, 8)], 6, 2, batch=2, padded=(0, 3))
    check_equal(families.QWEN21, [(height, 8), (4, 6), (3, 4)], 6, 1)


def equal_with_cached_keys():
    """Check Qwen-Image 2.1 with the keys and values before the image cached in one call and used in the next."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    transformer = dummy_models.qwen21_transformer()
    call = dummy_models.qwen21_call(transformer, (8 * dist.get_world_size() + 5, 8), (4, 6), batch=2, padded=(0, 3))
    clear.linearize(transformer, 3, 2, weights=None, backend="tiled")
    expected = run(transformer, call)
    clear.parallelize(transformer)
    cache = QwenImage21KVCache(len(transformer.transformer_blocks))
    for mode in ("extract", "cached", "cached"):
        output = run(transformer, {**call, "kv_cache": cache, "kv_cache_mode": mode})
        torch.testing.assert_close(output, expected[:, -output.shape[1] :], atol=1e-5, rtol=0)


def equal_with_flex():
    check_equal(families.FLUX, [(32, 24)], 3, 2, backend="flex")  # compiles once


def memory_is_shared():
    """The peak memory of a rank is its share of that of one process, plus the halo; all keys would be more."""
    transformer, ranks = dummy_models.flux_transformer(num_single_layers=1), dist.get_world_size()
    call = dummy_models.flux_call(transformer, (64 * ranks, 16))
    peaks = []
    for operation in (functools.partial(clear.linearize, window=3, weights=None), clear.parallelize):
        operation(transformer)
        run(transformer, call)
        peaks.append(measure.measure([measure.Subject("", lambda mark: run(transformer, call))], CPU, 1)[0].peak_bytes)
    assert peaks[1] < 1.45 * peaks[0] / ranks


def bytes_are_counted():
    """`count_volume` counts the bytes that are sent."""
    transformer, grid = dummy_models.flux_transformer(), (8 * dist.get_world_size() + 20, 13)
    call = dummy_models.flux_call(transformer, grid, batch=2)
    split(transformer, 9, 3)
    run(transformer, call)
    hook = entry_hook_of(transformer)
    sent, ranks = Counter(), dist.get_world_size()

    def count(name, call, size):
        def wrapped(*args, **kwargs):
            if kwargs.get("group") is not hook.sharder.communicator._control:
                sent[name] += int(size(*args))
            return call(*args, **kwargs)

        return mock.patch.object(dist, name, wrapped)

    def halo(operations):
        return sum(each.tensor.nbytes for each in operations if each.op is dist.isend)

    with (
        count("batch_isend_irecv", dist.batch_isend_irecv, halo),
        count("all_gather", dist.all_gather, lambda parts, own: (ranks - 1) * own.nbytes),
        count("all_reduce", dist.all_reduce, lambda own: 2 * (ranks - 1) * own.nbytes / ranks),
    ):
        run(transformer, call)
    layout = clear.TokenLayout([grid], 7)
    counted = count_volume(layout, hook.method, dist.get_rank(), ranks, heads=2, head_dim=16, element=4, batch=2)
    layers = families.FLUX.layers
    assert sent["batch_isend_irecv"] == layers * counted.halo
    assert sent["all_gather"] == layers * (counted.pooled + counted.text_lse) + counted.output(8)
    assert sent["all_reduce"] == layers * counted.text_sum


def differing_calls():
    """Every rank raises an error, and the next call works."""
    transformer, rank = dummy_models.flux_transformer(), dist.get_rank()
    split(transformer)
    last = dist.get_world_size() - 1
    call = dummy_models.flux_call(transformer, (32, 8))
    expected = run(transformer, call)

    def refuses(words, **changes):
        with pytest.raises(ValueError, match=words):
            run(transformer, {**call, **(changes if rank == last else {})})

    refuses(f"hidden_states.* of rank {last} is not rank 0's", hidden_states=torch.randn(1, 256, 8))
    refuses(f"timestep.* of rank {last} is not rank 0's", timestep=torch.tensor([0.7001]))
    refuses(rf"rank {last}'s .*encoder_hidden_states.* is \[1, 9, 12\]", encoder_hidden_states=torch.randn(1, 9, 12))
    text = call["encoder_hidden_states"].repeat(1, 12, 1)
    other = text.clone()
    other[:, 5] = torch.randn(12)
    ids = torch.zeros(84, 3)
    call |= {"encoder_hidden_states": text, "txt_ids": ids}
    refuses(f"encoder_hidden_states.* of rank {last} is not rank 0's", encoder_hidden_states=other)
    call = dummy_models.flux_call(transformer, (32, 8))
    torch.testing.assert_close(run(transformer, call), expected, atol=0, rtol=0)


def differing_weights():
    """Every rank raises an error, in `parallelize` or in the next call; offloading and moving are no difference."""
    rank = dist.get_rank()

    def refused(name):
        return pytest.raises(
            ValueError, match=f"ranks hold different weights: .*{name}.* of rank 1 is not that of rank 0"
        )

    transformer = dummy_models.flux_transformer()
    call = dummy_models.flux_call(transformer, (16, 8))
    clear.linearize(transformer, 3, weights=None)
    if rank == 1:
        with torch.no_grad():
            transformer.transformer_blocks[0].attn.to_k.weight[3, 5] += 1e-6
    with refused(r"transformer_blocks\.0\.attn\.to_k\.weight"):
        clear.parallelize(transformer)
    assert entry_hook_of(transformer).sharder is None
    transformer = split(dummy_models.flux_transformer())
    expected = run(transformer, call)
    lora = LoraConfig(r=2, target_modules=["to_q"])
    if rank == 1:
        transformer.add_adapter(lora)
    with refused("to_q"):
        run(transformer, call)
    if rank == 0:
        transformer.add_adapter(lora)
    run(transformer, call)
    transformer = split(dummy_models.flux_transformer())
    if rank == 1:
        transformer.enable_group_offload(onload_device=CPU, offload_type="leaf_level")
    for _ in range(2):
        torch.testing.assert_close(run(transformer, call), expected, atol=0, rtol=0)
    clear.linearize(transformer, 4, weights=None)
    run(transformer, call)
    if rank == 1:
        with torch.no_grad():
            transformer.proj_out.bias.mul_(-1)
    with refused(r"proj_out\.bias"):
        run(transformer, call)


def weights_are_read_once():
    transformer = dummy_models.flux_transformer()
    call = dummy_models.flux_call(transformer, (16, 8))
    split(transformer)
    with mock.patch.object(weights_digest, "digest_of", side_effect=AssertionError("read again")):
        run(transformer, call)
        run(transformer, call)


def refusals():
    transformer = dummy_models.flux_transformer()
    with pytest.raises(ValueError, match="only a linearized pipeline can be split"):
        clear.parallelize(transformer)
    clear.linearize(transformer, 3, weights=None)
    if families.QWEN in families.FAMILIES.values():
        edits = dummy_models.qwen_transformer(zero_cond_t=True)
        with pytest.raises(TypeError, match="zero_cond_t"):
            split(edits)
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "rows"))
    with pytest.raises(ValueError, match=r"mesh has 2 dimensions, \('data', 'rows'\)"):
        clear.parallelize(transformer, mesh)
    with pytest.raises(TypeError, match="got a str"):
        clear.parallelize(transformer, "rows")
    clear.parallelize(transformer, mesh["rows"])
    call = dummy_models.flux_call(transformer, (5, 9))
    with pytest.raises(RuntimeError, match="gives no gradients"):
        transformer(**call)
    transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(RuntimeError, match="FirstBlockCache skips steps"):
        run(transformer, call)
    transformer.disable_cache()
    with pytest.raises(ValueError, match="2 ranks are too many for an image of 5 x 9 tokens, which has 1 tile row "):
        run(transformer, call)
    assert torch.equal(run(copy.deepcopy(clear.deparallelize(transformer)), call), run(transformer, call))


def data_and_rows():
    """A mesh of two images at a time, each on two ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "rows"))
    transformer = dummy_models.sd3_transformer()
    call = dummy_models.sd3_call(transformer, (19, 6), seed=mesh["data"].get_local_rank())
    clear.linearize(transformer, 4, 2, weights=None)
    expected = run(transformer, call)
    clear.parallelize(transformer, mesh["rows"])
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)
    first, second = mesh["rows"].mesh.tolist()  # ranks of the whole job
    with pytest.raises(ValueError, match=f"timestep.* of rank {second} is not rank {first}'s"):
        run(transformer, {**call, "timestep": torch.tensor([700.0 + mesh["rows"].get_local_rank()])})


def compiled():
    transformer = dummy_models.flux_transformer(num_layers=1, num_single_layers=1)
    clear.linearize(transformer, 5, 2, weights=None)
    call = dummy_models.flux_call(transformer, (17, 9))
    expected = run(transformer, call)
    clear.parallelize(transformer)
    dummy_models.compile_blocks(transformer, backend="eager")
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)


def pipelines():
    """A seed gives the same image as on one process, with a LoRA, and with guidance in a batch."""
    for make, options in ((dummy_models.flux_pipeline, {}), (dummy_models.sd3_pipeline, {"guidance_scale": 3.0})):
        pipe = make()
        lora = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        torch.manual_seed(3)
        pipe.transformer.add_adapter(lora)
        draw = functools.partial(_draw, pipe, **options)
        clear.linearize(pipe, 4, 2, weights=None)
        one = draw()
        clear.parallelize(pipe)
        with mock.patch.object(pipe.vae.decoder.conv_in, "forward", wraps=pipe.vae.decoder.conv_in.forward) as decoded:
            torch.testing.assert_close(draw(), one, atol=1e-4, rtol=0)
        assert decoded.call_count == (dist.get_rank() == 0)
        clear.deparallelize(pipe)
        assert torch.equal(draw(), one)


def all_kinds_of_pipelines():
    """Check the pipelines of the compatibility matrix, with adapters, references and residuals."""
    for kind, row in PRESENT.items():
        pipe = row.pipeline()
        clear.linearize(pipe, 4, 2, weights=None)
        one = row.draw(pipe)
        clear.parallelize(pipe)
        torch.testing.assert_close(row.draw(pipe), one, atol=1e-5, rtol=0, msg=kind)


def _draw(pipe, **options):
    generator = torch.Generator().manual_seed(5)
    options = {"num_inference_steps": 2, "max_sequence_length": 24, "output_type": "pt", **options}
    return pipe("a red circle", height=128, width=96, generator=generator, **options).images


def decoding():
    """Check decoding by a video autoencoder. All ranks raise an error if one is in another step, or fails."""
    pipe, rank = dummy_pipelines.qwen(QwenImagePipeline), dist.get_rank()
    call = {**dummy_pipelines.qwen_text(), "height": 144, "width": 160, "output_type": "pt"}
    clear.linearize(pipe, 3, weights=None)

    def draw(steps):
        return pipe(**call, num_inference_steps=steps, generator=torch.Generator().manual_seed(0)).images

    one = draw(1)
    clear.parallelize(pipe)
    torch.testing.assert_close(draw(1), one, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="rank 0's decoding of the latents, rank 1's grids"):
        draw(1 + rank)
    full, words = torch.OutOfMemoryError("full"), "rank 0 failed to compute what it sends to all"
    with (
        mock.patch.object(pipe.vae.decoder.conv_in, "forward", side_effect=full),
        pytest.raises(RuntimeError, match=words if rank else "^full"),
    ):
        draw(1)
    assert torch.equal(draw(1), draw(1))


def cascade():
    recorded = {"stepwise_guidance": clear.StepwiseGuidance(), "continues": True}
    check_cascade(dummy_models.flux_pipeline(), clear.Base(steps=2), **recorded)


def cascade_of_a_modular_pipeline():
    dummy_pipelines.fake_flux3_text(setattr)
    for name in ("Flux3ModularPipeline", "Flux3DistilledModularPipeline"):
        check_cascade(dummy_pipelines.flux3(name, ["text_encoder"]), clear.Base(height=48, width=32, steps=2))


def check_cascade(pipe, base, **settings):
    """Check that a pipeline that is split over ranks draws the same large image as on one process."""
    stages = [Stage(steps=2, strength=0.5, low_resolution_guidance=1)]
    if settings:
        stages.append(Stage(steps=2, strength=0.5, **settings))
    options = {"height": 192, "width": 128, "window": 4, "down_factor": 2, "weights": None, "seed": 1}
    draw = functools.partial(clear.highres, pipe, "a red circle", **options, base=base)
    one = [image for stage in stages for image in draw(stages=stage).images]
    clear.linearize(pipe, 3, weights=None)
    clear.parallelize(pipe)
    for ours, expected in zip((image for stage in stages for image in draw(stages=stage).images), one, strict=True):
        ours, expected = (torch.tensor(list(image.tobytes()), dtype=torch.int) for image in (ours, expected))
        assert (ours - expected).abs().max() <= 1


def too_many_ranks_for_a_stage():
    """The error comes before anything is drawn."""
    pipe, finished = clear.parallelize(clear.linearize(dummy_models.flux_pipeline(), 3, weights=None)), []
    with pytest.raises(ValueError, match="the stage of 64 x 96 px: 2 ranks are too many for an image of 8 x 12"):
        clear.highres(
            pipe,
            "a red circle",
            height=128,
            width=192,
            base=clear.Base(height=32, width=48, steps=1),
            stages=[Stage(height=64, width=96), Stage()],
            callback_on_stage_end=finished.append,
        )
    assert not finished


def _stopped_in_a_layer(name, stop):
    """Stop rank 1 in the middle of a step; the others name it before long."""
    transformer = dummy_models.flux_transformer()
    split(transformer)
    call = dummy_models.flux_call(transformer, (24, 8))
    run(transformer, call)
    if dist.get_rank() == 1:
        transformer.transformer_blocks[1].register_forward_pre_hook(lambda *_: stop())
        with pytest.raises(RuntimeError, match=r"this rank came late, and the others|the store ended with"):
            run(transformer, call)
        print(f"{name}: rank 1 came late", flush=True)
        return
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"timed out waiting for .*; ranks that do not answer: 1\. "):
        run(transformer, call)
    assert time.monotonic() - start < TIMEOUT + 3
    print(f"{name}: rank 1 was named", flush=True)


def a_rank_dies():
    _stopped_in_a_layer("a_rank_dies", lambda: os._exit(0))


def a_rank_hangs():
    _stopped_in_a_layer("a_rank_hangs", lambda: time.sleep(TIMEOUT + 2))


def a_rank_never_calls():
    """One of three ranks does not call `parallelize`."""
    if dist.get_rank() == 1:
        time.sleep(TIMEOUT + 3)
        return
    with pytest.raises(RuntimeError, match=r"timed out waiting for clear_attn\.parallelize.*do not call it: 1\. "):
        split(dummy_models.flux_transformer())
    print("a_rank_never_calls: rank 1 was named", flush=True)


CHECKS = {
    check.__name__: check
    for check in (
        equal,
        equal_in_all_families,
        equal_with_cached_keys,
        equal_with_flex,
        memory_is_shared,
        bytes_are_counted,
        differing_calls,
        differing_weights,
        weights_are_read_once,
        refusals,
        data_and_rows,
        compiled,
        pipelines,
        all_kinds_of_pipelines,
        decoding,
        cascade,
        cascade_of_a_modular_pipeline,
        too_many_ranks_for_a_stage,
        a_rank_dies,
        a_rank_hangs,
        a_rank_never_calls,
    )
}


def run_rank(rank, ranks, store, names):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=store,
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=TIMEOUT if "a_rank" in names[0] else 300),
    )
    for name in names:
        start = time.perf_counter()
        torch.manual_seed(rank)
        CHECKS[name]()
        if rank == 0:
            print(f"{name} on {ranks}: {time.perf_counter() - start:.1f} s", flush=True)
    if "a_rank" in names[0]:
        os._exit(0)  # the group cannot be destroyed
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    failures = []
    for job in sys.argv[1:]:
        count, names = job.split(":")
        with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            # For checks of ranks that stop, the store is on rank 0, as under torchrun without --standalone.
            store = f"tcp://127.0.0.1:{free.getsockname()[1]}" if "a_rank" in names else f"file://{folder}/store"
            free.close()
            arguments = int(count), store, names.split(",")
            try:
                torch.multiprocessing.start_processes(run_rank, arguments, nprocs=int(count), start_method="fork")
            except (ProcessExitedException, ProcessRaisedException) as error:
                failures.append(f"{job}: {error}")
    # At the end, as the ranks themselves write much more about lost connections.
    for failure in failures:
        print(failure, file=sys.stderr, flush=True)
