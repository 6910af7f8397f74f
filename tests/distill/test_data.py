"""Images and captions, their sizes, and the cache of latents and text embeddings."""

import io
import json
import math
import tarfile

import pytest
import torch
from PIL import ExifTags, Image

from clear_attn import demo
from clear_attn.distill.data import buckets, cache
from clear_attn.distill.data.cache import Cache, Origin, batches
from clear_attn.distill.data.examples import from_dataset, from_folder
from clear_attn.models import training_adapter_for
from tests.helpers.training_runs import fill


class TestFolder:
    def test_three_ways_to_give_captions(self, tmp_path):
        fill(tmp_path, 3)
        (tmp_path / "0.txt").unlink()
        (tmp_path / "1.txt").unlink()
        (tmp_path / "0.json").write_text(json.dumps({"prompt": "from json"}))
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": "from metadata"}) + "\n")
        examples = from_folder(tmp_path)
        assert [each.name for each in examples] == ["0.png", "1.png", "2.png"]
        assert [each.prompt for each in examples] == ["from json", "from metadata", (tmp_path / "2.txt").read_text()]
        assert examples[0].open().size == (64, 64)

    def test_subfolders(self, tmp_path):
        fill(tmp_path / "a", 1)
        fill(tmp_path / "b", 1)
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "b/0.png", "prompt": "the second"}))
        assert [(each.name, each.prompt) for each in from_folder(tmp_path)][1] == ("b/0.png", "the second")

    def test_tar_shards(self, tmp_path):
        loose, packed = fill(tmp_path / "loose", 4), tmp_path / "packed"
        packed.mkdir()
        for shard in range(2):
            with tarfile.open(packed / f"data_{shard:06}.tar", "w") as tar:
                for number in (2 * shard, 2 * shard + 1):
                    tar.add(loose / f"{number}.png", f"{number}.png")
                    caption = json.dumps({"prompt": (loose / f"{number}.txt").read_text()}).encode()
                    about = tarfile.TarInfo(f"{number}.json")
                    about.size = len(caption)
                    tar.addfile(about, io.BytesIO(caption))
        expected, found = from_folder(loose), from_folder(packed)
        assert [each.name for each in found[1:3]] == ["data_000000.tar/1.png", "data_000001.tar/2.png"]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.prompt == theirs.prompt
            assert ours.open().tobytes() == theirs.open().tobytes()
        file = packed / "data_000001.tar"
        file.write_bytes(file.read_bytes()[:700])
        with pytest.raises(ValueError, match=r"data_000001\.tar is not a complete tar file"):
            from_folder(packed)

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda folder: [path.unlink() for path in folder.glob("*.png")], "has no images"),
            (lambda folder: (folder / "1.txt").unlink(), r"1 of 3 images .* have no caption, 1.png first"),
            (lambda folder: (folder / "1.txt").write_text("  \n"), "have no caption"),
            (lambda folder: (folder / "1.json").write_text("{}"), "1.json must have one text as its prompt, got None"),
            (
                lambda folder: (folder / "1.json").write_text('{"prompt": null}'),
                "1.json must have one text .* got None",
            ),
            (
                lambda folder: (folder / "1.json").write_text('{"prompt": ["a"]}'),
                r"one text as its prompt, got \['a'\]",
            ),
            (lambda folder: (folder / "1.json").write_text('{"prompt": "\\ud800"}'), "1.json has a prompt that is no"),
            (lambda folder: (folder / "1.txt").write_text("caption", encoding="utf-16"), "1.txt is not text in UTF-8"),
            (lambda folder: (folder / "metadata.jsonl").write_text("{}\n"), "line 1 of .* has no 'file_name'"),
        ],
    )
    def test_refusals(self, tmp_path, spoil, message):
        spoil(fill(tmp_path, 3))
        with pytest.raises(ValueError, match=message):
            from_folder(tmp_path)

    def test_a_caption_is_one_line_of_metadata(self, tmp_path):
        """It keeps other characters that Python treats as line ends; empty lines are ignored."""
        fill(tmp_path, 2)
        captions = ["a\u2028b\u0085c", "d\fe"]
        rows = [
            json.dumps({"file_name": f"{n}.png", "prompt": each}, ensure_ascii=False) for n, each in enumerate(captions)
        ]
        (tmp_path / "metadata.jsonl").write_text("\n\n".join(rows) + "\n", encoding="utf-8")
        assert [example.prompt for example in from_folder(tmp_path)] == captions

    def test_the_orientation_of_a_photo(self, tmp_path):
        fill(tmp_path, 1)
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        Image.new("RGB", (40, 20)).save(tmp_path / "0.png", exif=exif)
        assert from_folder(tmp_path)[0].open().size == (20, 40)

    def test_a_caption_from_windows(self, tmp_path):
        (fill(tmp_path, 1) / "0.txt").write_text("a red circle", encoding="utf-8-sig")
        assert from_folder(tmp_path)[0].prompt == "a red circle"

    def test_no_folder(self, tmp_path):
        with pytest.raises(NotADirectoryError, match="is not a directory"):
            from_folder(tmp_path / "nowhere")


class TestDataset:
    class Rows(list):
        column_names = ("image", "text")

        def __getitem__(self, key):
            return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    rows = Rows({"image": Image.new("L", (20, 30), shade), "text": f"shade {shade}"} for shade in (10, 20))

    def test_rows(self):
        examples = from_dataset(self.rows, "image", "text")
        assert [each.prompt for each in examples] == ["shade 10", "shade 20"]
        assert examples[1].open().getpixel((0, 0)) == (20, 20, 20)

    def test_another_column(self):
        with pytest.raises(ValueError, match="caption_column='words' is not among"):
            from_dataset(self.rows, "image", "words")

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"text": None}, "caption_column='text' of row 1 must have one text as its prompt, got None"),
            ({"text": " "}, "caption_column='text' of row 1 is empty; write a caption"),
            ({"text": ["a", "b"]}, r"of row 1 must have one text as its prompt, got \['a', 'b'\]"),
        ],
    )
    def test_rows_without_a_caption(self, row, message):
        with pytest.raises(ValueError, match=message):
            from_dataset(self.Rows([self.rows[0], {**self.rows[1], **row}]), "image", "text")

    def test_a_column_without_images(self):
        rows = self.Rows([{"image": "0.png", "text": "a red circle"}])
        with pytest.raises(ValueError, match="image_column='image' has a str, not an image"):
            from_dataset(rows, "image", "text")
        with pytest.raises(ValueError, match="the dataset has no rows"):
            from_dataset(self.Rows(), "image", "text")


class TestBuckets:
    @pytest.mark.parametrize("resolution", [64, 128, 512, 1024])
    def test_sizes(self, resolution):
        found = buckets.sizes(resolution)
        assert (resolution, resolution) in found
        for height, width in found:
            assert height % 16 == width % 16 == 0
            assert height * width <= resolution**2
            assert 0.4 < height / width < 2.5
            assert (width, height) in found

    def test_little_is_cut(self):
        """At most a tenth, for any aspect ratio from 2:1 to 1:2."""
        for ratio in torch.linspace(0.5, 2.0, 61).tolist():
            image = Image.new("RGB", (1000, round(1000 * ratio)))
            fitted = buckets.fit(image, 1024)
            assert abs(math.log(fitted.height / fitted.width / ratio)) < 0.1

    def test_keeps_the_middle(self):
        image = Image.new("RGB", (96, 64))
        image.paste((255, 255, 255), (40, 24, 56, 40))
        fitted = buckets.fit(image, 64)
        assert fitted.getpixel((fitted.width // 2, fitted.height // 2)) == (255, 255, 255)
        assert fitted.getpixel((0, 0)) == (0, 0, 0)

    @pytest.mark.parametrize("resolution", [0, 8, 100])
    def test_refusals(self, resolution):
        with pytest.raises(ValueError, match=f"multiple of 16 pixels, got {resolution}"):
            buckets.sizes(resolution)


class TestCache:
    @pytest.fixture(scope="class")
    def pipe(self):
        return demo.pipeline()

    @pytest.fixture(autouse=True)
    def small_shards(self, monkeypatch):
        monkeypatch.setattr(cache, "SHARD", 2)

    def build(self, pipe, data, folder, progress=iter, **changes):
        examples = from_folder(data)
        origin = Origin.of("small", None, 64, 24, examples)._replace(**changes)
        cache.begin(folder, origin, len(examples))
        cache.build(
            pipe,
            training_adapter_for(pipe.transformer),
            examples,
            folder,
            origin,
            progress(cache.missing(folder, examples)),
        )
        return Cache(folder)

    def test_holds_what_the_pipeline_encodes(self, pipe, tmp_path):
        data = fill(tmp_path / "data", 5, sizes=((64, 64), (96, 48)))
        made = self.build(pipe, data, tmp_path / "cache")
        assert len(made) == 5
        assert made.sizes == [(16, 16), (20, 12), (16, 16), (20, 12), (16, 16)]
        batch = made.read([0, 2], torch.Generator().manual_seed(0))
        text, pooled, _ = pipe.encode_prompt([(data / "2.txt").read_text()], None, max_sequence_length=24)
        torch.testing.assert_close(batch.text["text"][1:], text)
        torch.testing.assert_close(batch.text["pooled"][1:], pooled)
        decoded = pipe.vae.decode(batch.latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
        expected = torch.tensor(list(Image.open(data / "2.png").getdata())).view(64, 64, 3).permute(2, 0, 1) / 127.5 - 1
        assert (decoded[1] - expected).abs().mean() < 0.05

    def test_a_truncated_shard_is_named(self, pipe, tmp_path):
        made = self.build(pipe, fill(tmp_path / "data", 2), tmp_path / "cache")
        (shard,) = (tmp_path / "cache").glob("*.safetensors")
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
        with pytest.raises(ValueError, match=rf"{shard.name} is not complete .*; delete it"):
            made.read([0], torch.Generator())
        with pytest.raises(ValueError, match=rf"{shard.name} is not complete"):
            Cache(tmp_path / "cache")

    def test_latents_are_sampled_again(self, pipe, tmp_path):
        made = self.build(pipe, fill(tmp_path / "data", 2), tmp_path / "cache")
        first, again, other = (made.read([0], torch.Generator().manual_seed(seed)).latents for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_continues_where_it_stopped(self, pipe, tmp_path):
        data = fill(tmp_path / "data", 5)
        whole = self.build(pipe, data, tmp_path / "whole")

        def stopped(numbers):
            for number in numbers:
                if number == 2:
                    raise KeyboardInterrupt
                yield number

        with pytest.raises(KeyboardInterrupt):
            self.build(pipe, data, tmp_path / "cache", stopped)
        todo = []
        made = self.build(pipe, data, tmp_path / "cache", lambda numbers: todo.extend(numbers) or iter(todo))
        assert todo == [2]
        for example in range(5):
            (ours, our_text), (expected, expected_text) = (
                each.read([example], torch.Generator().manual_seed(0)) for each in (made, whole)
            )
            assert torch.equal(ours, expected)
            assert our_text.keys() == expected_text.keys()
            assert all(torch.equal(value, expected_text[name]) for name, value in our_text.items())

    @pytest.mark.parametrize(
        "change", [{"model": "large"}, {"resolution": 128}, {"text_tokens": 96}, {"revision": "v2"}]
    )
    def test_of_other_settings(self, pipe, tmp_path, change):
        data = fill(tmp_path / "data", 2)
        self.build(pipe, data, tmp_path / "cache")
        before = (tmp_path / "cache" / cache.INDEX).read_text()
        with pytest.raises(ValueError, match=f"was made for {next(iter(change))} .* give another folder"):
            self.build(pipe, data, tmp_path / "cache", **change)
        assert (tmp_path / "cache" / cache.INDEX).read_text() == before

    def test_of_other_captions(self, pipe, tmp_path):
        data = fill(tmp_path / "data", 2)
        self.build(pipe, data, tmp_path / "cache")
        (data / "1.txt").write_text("another caption")
        with pytest.raises(ValueError, match="was made for examples"):
            self.build(pipe, data, tmp_path / "cache")

    def test_a_broken_image_is_skipped_and_named(self, pipe, tmp_path, caplog):
        data = fill(tmp_path / "data", 5)
        (data / "3.png").write_bytes((data / "3.png").read_bytes()[:50])
        made = self.build(pipe, data, tmp_path / "cache")
        assert len(made) == 4
        assert "skipped 3.png: it is a broken image (1 so far)" in caplog.text

    def test_too_many_broken_images(self, pipe, tmp_path):
        data = fill(tmp_path / "data", 5)
        for number in (1, 3):
            (data / f"{number}.png").write_bytes(b"not an image")
        with pytest.raises(ValueError, match=r"2 of 5 images are broken, such as 1.png, 3.png; replace them"):
            self.build(pipe, data, tmp_path / "cache")

    def test_a_full_disk_keeps_the_finished_shards(self, pipe, tmp_path, monkeypatch):
        data = fill(tmp_path / "data", 4)

        def write(tensors, path, **kwargs):
            if "00001" in str(path):
                path.write_bytes(b"half")
                raise OSError(28, "No space left on device")
            real(tensors, path, **kwargs)

        real = cache.write_tensors
        monkeypatch.setattr(cache, "write_tensors", write)
        with pytest.raises(OSError, match="No space left"):
            self.build(pipe, data, tmp_path / "cache")
        assert {path.name for path in (tmp_path / "cache").iterdir()} == {cache.INDEX, "shard-00000.safetensors"}
        monkeypatch.undo()
        monkeypatch.setattr(cache, "SHARD", 2)
        assert len(self.build(pipe, data, tmp_path / "cache")) == 4


class TestBatches:
    sizes = ((8, 8),) * 7 + ((12, 4),) * 4

    def test_every_example_is_used_once_and_sizes_are_not_mixed(self):
        for epoch in range(3):
            order = batches(self.sizes, 3, seed=1, epoch=epoch)
            assert sorted(example for batch in order for example in batch) == list(range(11))
            assert all(len({self.sizes[example] for example in batch}) == 1 for batch in order)
            assert len(order) == 3 + 2

    def test_the_order_depends_on_seed_and_epoch(self):
        orders = [batches(self.sizes, 3, seed, epoch) for seed, epoch in ((1, 0), (1, 0), (1, 1), (2, 0))]
        assert orders[0] == orders[1]
        assert orders[0] != orders[2] != orders[3] != orders[0]
