"""The values of a tensor are read once, as long as it is the same tensor with the same values."""

import gc

import torch

from clear_attn.models.parsing.tensor_cache import ReadOnce
from clear_attn.utils._torch import is_transformed


def counted():
    read = []
    return ReadOnce(lambda tensor: read.append(1) or tensor.sum().item()), read


def test_a_tensor_is_read_once():
    once, read = counted()
    tensor = torch.ones(3)
    assert [once(tensor) for _ in range(3)] == [3, 3, 3]
    assert len(read) == 1


def test_a_tensor_read_in_another_way_is_read_again():
    read = []
    once = ReadOnce(lambda tensor, power: read.append(power) or tensor.pow(power).sum().item())
    tensor = torch.full((3,), 2.0)
    assert [once(tensor, power) for power in (1, 2, 1, 2)] == [6, 12, 6, 12]
    assert read == [1, 2]


def test_a_tensor_that_was_written_to_is_read_again():
    once, read = counted()
    tensor = torch.ones(3)
    assert once(tensor) == 3
    tensor.add_(1)
    assert once(tensor) == 6
    assert len(read) == 2


def test_an_equal_tensor_is_read_on_its_own():
    once, read = counted()
    for _ in range(3):
        tensor = torch.ones(3)
        once(tensor)
        del tensor
        gc.collect()
    assert len(read) == 3


def test_tensors_of_inference_mode_are_not_cached():
    once, _ = counted()
    with torch.inference_mode():
        tensor = torch.ones(3)
        assert once(tensor) == 3
        tensor.add_(1)
        assert once(tensor) == 6
    assert not once.recent


def test_results_outlive_the_transform_in_which_a_tensor_is_read():
    once, ids, x = ReadOnce(lambda tensor: tensor + 1), torch.ones(3), torch.ones(3)
    torch.func.jvp(lambda x: x * once(ids), (x,), (x,))
    assert not is_transformed(once(ids))
    assert len(once.recent) == 1


def test_transformed_tensors_are_not_cached():
    once, x = ReadOnce(lambda tensor: tensor + 1), torch.ones(3)
    assert torch.equal(torch.func.jvp(once, (x,), (x,))[1], x)
    assert not once.recent


def test_only_the_last_sixteen_are_kept():
    once, _ = counted()
    tensors = [torch.ones(1) for _ in range(20)]
    for tensor in tensors:
        once(tensor)
    assert len(once.recent) == 16


def test_writes_through_numpy_are_noticed():
    once, read = counted()
    tensor = torch.ones(3)
    assert once(tensor) == 3
    tensor.numpy()[0] = 5
    assert [once(tensor), once(tensor)] == [7, 7]
    assert len(read) == 2


def test_results_of_tensors_that_are_gone_are_dropped():
    once, _ = counted()
    for _ in range(3):
        once(torch.ones(1))
        gc.collect()
    assert len(once.recent) == 1
