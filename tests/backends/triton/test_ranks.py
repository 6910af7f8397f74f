import torch

from clear_attn.backends.selection import BACKENDS
from clear_attn.parallel.sharder import RankSharder


class Links:
    """Links to ranks that selected these backends; the first is this one."""

    def __init__(self, *selected):
        self.rank, self.ranks = 0, len(selected)
        self.numbers = torch.tensor([list(BACKENDS).index(name) for name in selected])

    def compare(self, own):
        assert own == self.numbers[0]
        return self.numbers


def test_ranks_agree_on_a_backend():
    assert RankSharder(Links("triton", "triton")).agree_on_backend("triton") == "triton"
    assert RankSharder(Links("triton", "flex")).agree_on_backend("triton") == "tiled"
    assert RankSharder(Links("flex", "flex", "tiled")).agree_on_backend("flex") == "tiled"
