import pytest

from clear_attn.utils.prompts import read_prompts


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_lines_without_blank_ones(tmp_path, start):
    (tmp_path / "p.txt").write_bytes(start + "a café\n\n  two \r\n".encode())
    assert read_prompts(tmp_path / "p.txt") == ["a café", "two"]


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, FileNotFoundError, "is no file; give a text file"),
        (b" \n\n", ValueError, "has no prompts"),
        (b"caf\xe9", ValueError, "is no text in UTF-8"),
    ],
)
def test_refuses(tmp_path, content, error, words):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(error, match=words):
        read_prompts(tmp_path / "p.txt")
