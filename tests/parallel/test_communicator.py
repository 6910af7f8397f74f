"""Communication between ranks, on two processes."""

import subprocess
import sys

SCRIPT = """
import datetime, sys
import torch, torch.distributed as dist
from clear_attn.parallel.communicator import Communicator

def run_rank(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2,
                            timeout=datetime.timedelta(seconds=60))
    communicator = Communicator(dist.group.WORLD)
    assert (communicator.rank, communicator.ranks, communicator.names) == (rank, 2, [0, 1])
    own, other = torch.full((3,), float(rank)), torch.empty(3)
    communicator.exchange([(1 - rank, own)], [(1 - rank, other)])()
    assert other.tolist() == [1.0 - rank] * 3
    communicator.exchange([], [])()
    parts = communicator.all_gather(torch.full((1, rank + 1), float(rank)), [1, 2], dim=1)()
    assert [part.tolist() for part in parts] == [[[0.0]], [[1.0, 1.0]]]
    total = torch.tensor([1.0 + rank])
    communicator.all_reduce(total)()
    assert total.item() == 3
    assert communicator.compare(torch.tensor([rank])).tolist() == [[0], [1]]
    made = communicator.broadcast(lambda: torch.arange(6.0).view(2, 3).bfloat16(), torch.device("cpu"))
    assert (made.dtype, made.tolist()) == (torch.bfloat16, [[0, 1, 2], [3, 4, 5]])
    try:
        communicator.broadcast(lambda: 1 / 0, torch.device("cpu"))
    except (ZeroDivisionError, RuntimeError) as error:
        expected = "division" if rank == 0 else "rank 0 failed to compute what it sends to all"
        assert expected in str(error), error
    else:
        raise AssertionError("no error")
    print(f"rank {rank} is done", flush=True)
    dist.barrier()
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.start_processes(run_rank, (sys.argv[1],), nprocs=2, start_method="fork")
"""


def test_all_kinds_of_communication(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "store")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-4000:]
    # In any order, and on one line if both write at once.
    assert all(f"rank {rank} is done" in ran.stdout for rank in range(2))
