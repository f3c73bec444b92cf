"""`segmenter attention`."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter.cli import main
from segmenter.cli.commands.attention import square_input
from segmenter.inference.images import normalize, read_image
from segmenter.visualize import enlarge, heat_colors
from tests.cli.tools import files, image
from tests.support.tiny import tiny_model


def expected_map(trained, photos, part, layer, row):
    """(heads, 4, 4) for photos/a.png on the 64 pixel model."""
    pixels = square_input(read_image(photos / "a.png"), 64, 16)
    im = normalize(pixels, "vit")[None]
    with torch.no_grad():
        if part == "encoder":
            return trained.get_attention_map_enc(im, layer)[0, :, row, 1:].reshape(-1, 4, 4).numpy()
        return trained.get_attention_map_dec(im, layer)[0, :, row, :16].reshape(-1, 4, 4).numpy()


@pytest.mark.parametrize(
    ("part", "options", "layer", "name", "row"),
    [
        ("encoder", ["--cls"], 1, "enc_layer1/cls", 0),
        ("encoder", ["--patch", "1", "2"], 0, "enc_layer0/patch_1_2", 1 + 4 * 2 + 1),
        ("decoder", ["--patch", "3", "0"], 0, "dec_layer0/patch_3_0", 3),
        ("decoder", ["--cls", "9"], 0, "dec_layer0/cls_9", 16 + 9),
        ("decoder", ["--cls", "road"], 0, "dec_layer0/cls_3", 16 + 3),
    ],
)
def test_attention_maps(trained, folder, photos, out, part, options, layer, name, row):
    argv = ["attention", str(photos / "a.png"), "-m", folder, "-o", str(out), "--part", part, "--layer", str(layer)]
    assert main([*argv, *options]) == 0
    assert files(out) == [f"{name}/grid.png", f"{name}/head0.png", "input.png"]
    expected = enlarge(heat_colors(expected_map(trained, photos, part, layer, row)[0]), 16)
    got = read_image(out / name / "head0.png")
    assert got.shape == (64, 64, 3)
    assert len(np.unique(got.reshape(-1, 3), axis=0)) > 4
    np.testing.assert_array_equal(got, expected)
    grid = read_image(out / name / "grid.png")
    assert grid.shape[1] > 2 * 64
    assert any(
        (grid[y : y + 64, x : x + 64] == expected).all()
        for y in range(len(grid) - 63)
        for x in range(64, grid.shape[1] - 63)
    )
    shown = read_image(out / "input.png")
    plain = square_input(read_image(photos / "a.png"), 64, 16)
    if "--patch" in options:
        x, y = 16 * int(options[1]), 16 * int(options[2])
        assert (shown[y : y + 16, x : x + 16] == (255, 0, 0)).all()
        plain[y : y + 16, x : x + 16] = (255, 0, 0)
    np.testing.assert_array_equal(shown, plain)


def test_attention_of_all_layers_heads_and_classes(photos, out, tmp_path):
    model = tiny_model(d_model=128, n_heads=2, distilled=True)
    model.save_pretrained(tmp_path / "model")
    argv = ["attention", str(photos / "a.png"), "-m", str(tmp_path / "model"), "-o", str(out)]
    assert main([*argv, "--patch", "0", "3"]) == 0
    assert len(files(out)) == 1 + 2 * 3
    pixels = square_input(read_image(photos / "a.png"), 64, 16)
    with torch.no_grad():
        row = model.get_attention_map_enc(normalize(pixels, "vit")[None], 1)[0, 1, 2 + 12, 2:].reshape(4, 4)
    got = read_image(out / "enc_layer1" / "patch_0_3" / "head1.png")
    np.testing.assert_array_equal(got, enlarge(heat_colors(row.numpy()), 16))
    shutil.rmtree(out)
    assert main([*argv, "--part", "decoder", "--cls", "--head", "1"]) == 0
    assert files(out) == sorted(
        [f"dec_layer0/cls_{c}/{f}.png" for c in range(5) for f in ("grid", "head1")] + ["input.png"]
    )


def test_attention_input_is_the_top_left_square_at_the_models_size():
    pixels = np.zeros((100, 300, 3), np.uint8)
    pixels[:50, :50] = 255
    square = square_input(pixels, 40, 16)
    assert square.shape == (32, 32, 3), "whole patches"
    assert (square[:18, :18] == 255).all()
    assert (square[22:] == 0).all()
    assert (square[:, 22:] == 0).all()
    np.testing.assert_array_equal(square_input(image(64, 64), 64, 16), image(64, 64))


def test_attention_input_of_a_long_thin_image_takes_no_more_memory_than_a_square(monkeypatch):
    sizes = []
    resize = Image.Image.resize

    def watched(self, size, *args, **kwargs):
        sizes.append(size)
        assert max(size) <= 64, f"{size}: more than the square"
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    for shape in ((1, 60_000, 3), (60_000, 1, 3)):
        thin = np.full(shape, 200, np.uint8)
        thin[:1, :1] = (10, 20, 30)
        square = square_input(thin, 64, 16)
        assert square.shape == (64, 64, 3)
        assert (square[0, 0] == (10, 20, 30)).all()
    assert sizes


def test_attention_of_a_linear_decoder_and_of_a_bad_image(folder, photos, out, tmp_path, capsys):
    tiny_model(decoder={"name": "linear"}).save_pretrained(tmp_path / "linear")
    argv = ["-m", str(tmp_path / "linear"), "-o", str(out), "--part", "decoder", "--cls"]
    assert main(["attention", str(photos / "a.png"), *argv]) == 2
    assert "the linear decoder has no attention" in capsys.readouterr().err
    assert main(["attention", str(tmp_path / "missing.png"), *argv]) == 3
    assert "missing.png: No such file" in capsys.readouterr().err
    assert not out.exists()
