"""The command `clear-attn`, as torchrun takes it: torchrun --nproc_per_node 4 -m clear_attn generate ..."""

from clear_attn.tools.cli import app

if __name__ == "__main__":
    app(prog_name="clear-attn")
