import pytest

from clear_attn.utils.prompts import read_prompts


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_lines_without_blank_ones(tmp_path, start):
    (tmp_path / "p.txt").write_bytes(start + "a café\n\n  two \r\n".encode())
    assert read_prompts(tmp_path / "p.txt") == ["a café", "two"]


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, FileNotFoundError, "does not exist; give a text file"),
        (b" \n\n", ValueError, "has no prompts"),
        (b"caf\xe9", ValueError, "is not text in UTF-8"),
    ],
)
def test_refuses(tmp_path, content, error, words):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(error, match=words):
        read_prompts(tmp_path / "p.txt")


def test_a_prompt_ends_at_a_line_feed_only(tmp_path):
    prompts = ["a\u2028b", "c\fd", "e\u0085f"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == prompts
