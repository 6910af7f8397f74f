import time

import numpy as np
import pytest
import torch

from clear_attn import TokenLayout, methods
from clear_attn.core.window_mask import window_mask


def attended(lists, queries, keys):
    """Which pairs the lists visit and allow, bool `[queries, keys]`."""
    mask = np.zeros((queries, keys), bool)
    for rows, (block, _, blocks, step, _, steps, bits) in zip(lists.rows.numpy(), lists.tiles.tolist(), strict=True):
        present = rows >= 0
        for start in lists.blocks[block : block + blocks].tolist():
            mask[np.ix_(rows[present], range(start, start + 64))] = True
        for number in range(steps):
            words = lists.bits[bits + number].numpy().view(np.uint16)
            for column, key in enumerate(lists.keys[step + number].tolist()):
                bit = 2 * (column // 8) + column % 2
                mask[rows[present], key] |= (words[present, column % 8 // 2] >> bit & 1).astype(bool)
    return mask


@pytest.mark.parametrize(
    ("grids", "text", "text_first", "window", "down_factor"),
    [
        ([(13, 18)], 7, True, 4, 1),
        ([(40, 35)], 70, False, 9, 1),
        ([(33, 50)], 130, True, 40, 4),
        ([(24, 32), (12, 20)], 5, True, 6, 1),
        ([(24, 40)], 0, True, 1, 1),
    ],
)
def test_the_lists_are_the_rule(grids, text, text_first, window, down_factor):
    plan = methods.Clear(window, down_factor).plan(TokenLayout(grids, text, text_first=text_first))
    mask = attended(plan.key_lists, plan.tokens, plan.key_tokens)
    assert np.array_equal(mask[plan.image], window_mask(plan.query, plan.key, plan.radius_sq).numpy())
    assert not mask[plan.text].any()


def test_the_lists_of_a_partition_are_the_rule():
    layout = TokenLayout([(18, 40)], 70)
    for method in (methods.Swin(16), methods.Strided(3)):
        plan = method.plan(layout)
        mask = attended(plan.key_lists, layout.tokens, layout.tokens)[plan.image]
        label = method.labels((18, 40))[layout.permutation]
        assert mask[:, plan.text].all()
        assert np.array_equal(mask[:, plan.image], np.equal.outer(label, label))


def test_aligned_windows_of_a_partition_are_whole_blocks():
    lists = methods.Swin(16).plan(TokenLayout([(32, 32)], 64)).key_lists
    assert lists.tiles[:, 2].tolist() == [5] * 8  # 256 keys of the window and 64 of the text
    assert len(lists.keys) == 0


@pytest.mark.parametrize(("window", "megabytes"), [(8, 16), (32, 64)])
def test_memory_and_time_of_a_large_cut_grid(window, megabytes):
    plan = methods.Clear(window).plan(TokenLayout([(509, 515)], 512))
    start = time.process_time()
    lists = plan.key_lists
    assert time.process_time() - start < 2
    assert sum(each.numel() * each.element_size() for each in lists) <= megabytes * 2**20


def test_tiles_that_are_translations_share_their_bits():
    few, many = (methods.Clear(16).plan(TokenLayout([grid], 0)).key_lists for grid in ((128, 128), (512, 256)))
    assert len(few.bits) == len(many.bits)
    cut = methods.Clear(16).plan(TokenLayout([(507, 251)], 0)).key_lists
    assert len(cut.bits) < 4 * len(many.bits)


def test_lists_made_under_inference_mode_serve_training():
    with torch.inference_mode():
        lists = methods.Clear(4).plan(TokenLayout([(9, 18)], 3)).key_lists
    assert not any(each.is_inference() for each in lists)
