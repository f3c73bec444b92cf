"""`segmenter attention`: whole images, and with --square the published crop."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from segmenter.analysis import attention
from segmenter.cli import main
from segmenter.cli.square_attention import square_input
from segmenter.inference.images import normalize, read_image
from segmenter.visualize import enlarge, frame_patch, heat_colors, heat_map
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
    """The published way."""
    argv = ["attention", str(photos / "a.png"), "-m", folder, "-o", str(out), "--part", part, "--layer", str(layer)]
    argv.append("--square")
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
    argv = ["attention", str(photos / "a.png"), "-m", str(tmp_path / "model"), "-o", str(out), "--square"]
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
    assert main(["attention", str(photos / "a.png"), *argv, "--square"]) == 2
    assert "the linear decoder has no attention" in capsys.readouterr().err
    assert main(["attention", str(tmp_path / "missing.png"), *argv]) == 3
    assert "missing.png: No such file" in capsys.readouterr().err
    assert not out.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Whole images


def drawn(values, patch_size, pixels, patch=None, alpha=0.6):
    """The picture without its bar."""
    picture = heat_map(values, patch_size, pixels, alpha, smooth=alpha < 1)
    return picture if patch is None else frame_patch(picture, *patch, patch_size)


def test_points_and_classes_over_the_whole_image(trained, folder, photos, out):
    pixels = read_image(photos / "a.png")
    labels = trained.masks_of_pixels(torch.from_numpy(pixels)[None])[0].argmax(0)
    label = int(labels[2, 3])
    argv = ["attention", str(photos / "a.png"), "-m", folder, "-o", str(out), "--npz", "--point", "20", "68.5"]
    assert main([*argv, "--class", str(label), "--layer", "1,0"]) == 0
    maps = attention(trained, pixels, points=[(20, 68.5)], classes=[label], layers=[1, 0])
    name = maps.queries[1].replace(" ", "_")
    names = [f"enc_layer{layer}/{query}/mean.png" for layer in (0, 1) for query in sorted((name, "point_20_68.5"))]
    assert files(out) == ["attention.npz", *names, "input.png"]
    for i, layer in enumerate((1, 0)):
        for query, patch, folder_name in ((0, (4, 1), "point_20_68.5"), (1, None, name)):
            got = read_image(out / f"enc_layer{layer}" / folder_name / "mean.png")
            want = drawn(maps.mean[i, query].numpy(), 16, pixels, patch)
            np.testing.assert_array_equal(got[:70, :91], want)
            assert got.shape[0] >= 70 and got.shape[1] > 91 + 20
    np.testing.assert_array_equal(read_image(out / "input.png"), frame_patch(pixels, 4, 1, 16))
    with np.load(out / "attention.npz") as numbers:
        np.testing.assert_allclose(numbers["maps"], maps.maps.numpy(), rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(numbers["maps"].sum((-2, -1)) + numbers["others"].sum(-1), 1, rtol=1e-5)
        assert numbers["queries"].tolist() == list(maps.queries)
        assert numbers["layers"].tolist() == [1, 0] and numbers["patches"].tolist() == [[4, 1], [-1, -1]]
        assert (numbers["patch_size"], *numbers["image_size"]) == (16, 70, 91)


def test_what_is_asked_for_twice_is_drawn_once(folder, photos, out, capsys):
    argv = ["attention", str(photos / "a.png"), "-m", folder, "-o", str(out), "--npz", "--layer", "0,0"]
    assert main([*argv, "--point", "3", "3", "--point", "3.0", "3", "--point", "90", "3"]) == 0
    assert files(out) == ["attention.npz", *(f"enc_layer0/point_{x}_3/mean.png" for x in (3, 90)), "input.png"]
    assert "attention maps: 2 ->" in capsys.readouterr().out
    with np.load(out / "attention.npz") as numbers:
        assert numbers["queries"].tolist() == ["point 3 3", "point 90 3"] and numbers["maps"].shape[:2] == (1, 2)
    shutil.rmtree(out)
    assert main([*argv, "--part", "decoder", "--class", "3", "--class", "road", "--head", "0,0"]) == 0
    assert "attention maps: 1 ->" in capsys.readouterr().out


def test_heads_as_heat_and_their_grid(photos, out, tmp_path):
    model = tiny_model(d_model=128, n_heads=2, distilled=True)
    model.save_pretrained(tmp_path / "model")
    argv = ["attention", str(photos / "a.png"), "-m", str(tmp_path / "model"), "-o", str(out), "--view", "heat"]
    assert main([*argv, "--head", "0,1", "--layer", "1"]) == 0
    tokens = [f"enc_layer1/{token}_token/{file}.png" for token in ("class", "distillation")
              for file in ("grid", "head0", "head1")]  # fmt: skip
    assert files(out) == [*tokens, "input.png"]
    pixels = read_image(photos / "a.png")
    values = attention(model, pixels, layers=1).maps[0, 1, 1].numpy()
    got = read_image(out / "enc_layer1" / "distillation_token" / "head1.png")
    np.testing.assert_array_equal(got[:70, :91], drawn(values, 16, pixels, alpha=1.0))
    assert len(np.unique(got[:70, :91].reshape(-1, 3), axis=0)) > 9
    assert read_image(out / "enc_layer1" / "class_token" / "grid.png").shape[1] > 2 * 91


def test_class_tokens_of_the_decoder(trained, folder, photos, out):
    argv = ["attention", str(photos / "a.png"), "-m", folder, "-o", str(out), "--part", "decoder"]
    assert main([*argv, "--cls", "road"]) == 0
    assert files(out) == ["dec_layer0/class_Road/mean.png", "input.png"]
    pixels = read_image(photos / "a.png")
    values = attention(trained, pixels, part="decoder", classes=["road"]).mean[0, 0].numpy()
    got = read_image(out / "dec_layer0/class_Road/mean.png")
    np.testing.assert_array_equal(got[:70, :91], drawn(values, 16, pixels))
    shutil.rmtree(out)
    assert main([*argv, "--cls"]) == 0
    assert len(files(out)) == 11 + 1


@pytest.mark.parametrize("layer", [[], ["--layer", "0,1"]])
def test_rollout(trained, folder, photos, out, layer):
    argv = ["attention", str(photos / "a.png"), "-m", folder, "-o", str(out), "--rollout", "--point", "50", "3", *layer]
    assert main(argv) == 0
    layers = [0, 1] if layer else [1]
    assert files(out) == [*(f"enc_rollout{i}/point_50_3.png" for i in layers), "input.png"]
    pixels = read_image(photos / "a.png")
    maps = attention(trained, pixels, points=[(50, 3)], rollout=True, layers=layers)
    for i, number in enumerate(layers):
        got = read_image(out / f"enc_rollout{number}" / "point_50_3.png")
        np.testing.assert_array_equal(got[:70, :91], drawn(maps.maps[i, 0, 0].numpy(), 16, pixels, (0, 3)))


def test_windows_around_points(trained, folder, photos, out):
    argv = ["attention", str(photos / "a.png"), "-m", folder, "-o", str(out), "--window-size", "32", "--layer", "0"]
    assert main([*argv, "--window-stride", "16", "--point", "45", "40", "--point", "90", "69", "--npz"]) == 0
    assert files(out) == ["attention.npz", *(f"enc_layer0/point_{p}/mean.png" for p in ("45_40", "90_69"))]
    pixels = read_image(photos / "a.png")
    for name, left, top, inside, patch in (("45_40", 32, 16, (13, 24), (1, 0)), ("90_69", 59, 38, (31, 31), (1, 1))):
        window = pixels[top : top + 32, left : left + 32]
        maps = attention(trained, window, points=[inside], layers=0)
        got = read_image(out / f"enc_layer0/point_{name}/mean.png")
        np.testing.assert_array_equal(got[:32, :32], drawn(maps.mean[0, 0].numpy(), 16, window, patch))
    with np.load(out / "attention.npz") as numbers:
        assert numbers["windows"].tolist() == [[32, 16], [59, 38]]
        assert numbers["queries"].tolist() == ["point 45 40", "point 90 69"]


def test_size_shrinks_the_image(trained, folder, photos, out):
    argv = ["attention", str(photos / "a.png"), "-m", folder, "-o", str(out), "--size", "35", "--layer", "0"]
    assert main([*argv, "--point", "90", "69"]) == 0
    assert read_image(out / "input.png").shape == (35, 46, 3)


def test_encoders_of_others_need_no_decoder(photos, out, tmp_path, capsys):
    model = tiny_model()
    save_file({n: t.contiguous() for n, t in model.encoder.state_dict().items()}, tmp_path / "vit.safetensors")
    argv = ["attention", str(photos / "a.png"), "-m", str(tmp_path / "vit.safetensors"), "-o", str(out), "--layer", "0"]
    assert main([*argv, "--point", "3", "3", "--npz"]) == 0
    assert "RANDOM" not in capsys.readouterr().err
    with np.load(out / "attention.npz") as numbers:
        want = attention(model, read_image(photos / "a.png"), points=[(3, 3)], layers=0)
        np.testing.assert_allclose(numbers["maps"], want.maps.numpy(), rtol=1e-4, atol=1e-7)
    shutil.rmtree(out)
    assert main([*argv, "--class", "0"]) == 4
    assert "give --n-cls" in capsys.readouterr().err
