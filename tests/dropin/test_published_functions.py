"""The functions that published scripts use, against their definitions."""

import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import segmenter
from segmenter.classes import ClassesError
from segmenter.inference import merge
from segmenter.segm import metrics
from segmenter.segm.data import utils as data_utils
from segmenter.segm.model import utils
from tests.support.tiny import tiny_model


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Windows


def test_padding_and_back():
    im = noise(2, 3, 5, 8)
    padded = segmenter.padding(im, 4, fill_value=7)
    assert padded.shape == (2, 3, 8, 8)
    assert (padded[:, :, 5:] == 7).all()
    assert torch.equal(segmenter.unpadding(padded, (5, 8)), im)
    assert torch.equal(segmenter.unpadding(im, (5, 8)), im)
    assert segmenter.padding(padded, 4) is padded


@pytest.mark.parametrize(("shape", "want"), [((20, 31), (32, 49)), ((31, 20), (49, 32)), ((32, 40), (32, 40))])
def test_resize_brings_the_short_side_up(shape, want):
    im = noise(1, 3, *shape)
    got = segmenter.resize(im, smaller_size=32)
    assert got.shape[2:] == want
    torch.testing.assert_close(got, F.interpolate(im, want, mode="bilinear"))


def test_windows_cover_the_image_and_end_flush():
    im = noise(1, 2, 10, 7)
    windows = segmenter.sliding_window(im, True, window_size=4, window_stride=3)
    assert windows["anchors"] == [(top, left) for top in (0, 3, 6) for left in (0, 3)]
    assert (windows["flip"], windows["shape"]) == (True, (10, 7))
    for crop, (top, left) in zip(windows["crop"], windows["anchors"], strict=True):
        assert torch.equal(crop, im[:, :, top : top + 4, left : left + 4])
    with pytest.raises(ValueError, match="would leave pixels out"):
        segmenter.sliding_window(im, False, 4, 5)
    with pytest.raises(ValueError, match="smaller than the window"):
        segmenter.sliding_window(im, False, 8, 4)


@pytest.mark.parametrize("flip", [False, True, torch.tensor([True])])
def test_merged_windows_are_the_mean_of_all_that_cover_a_pixel(flip):
    windows = segmenter.sliding_window(noise(1, 3, 10, 7), flip, 4, 3)
    windows["seg_maps"] = maps = noise(6, 5, 4, 4, seed=1)
    mean = torch.empty(5, 10, 7)
    for y in range(10):
        for x in range(7):
            over = [m[:, y - t, x - s] for m, (t, s) in zip(maps, windows["anchors"], strict=True)
                    if t <= y < t + 4 and s <= x < s + 4]  # fmt: skip
            mean[:, y, x] = torch.stack(over).mean(0)
    want = F.interpolate(mean[None], (13, 9), mode="bilinear")[0]
    want = torch.softmax(want.flip(-1) if flip else want, 0)
    got = segmenter.merge_windows(windows, 4, (13, 9))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got.sum(0), torch.ones(13, 9))


class Anybody(torch.nn.Module):
    """A network of somebody else: a forward and `n_cls`."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.n_cls, self.sizes = inner, inner.n_cls, []

    def forward(self, im):
        self.sizes.append(tuple(im.shape))
        return self.inner(im)


def views():
    ims = [noise(1, 3, 70, 90), noise(1, 3, 70, 90).flip(3), noise(1, 3, 40, 52, seed=2)]
    return ims, [{"flip": torch.tensor([False])}, {"flip": torch.tensor([True])}, {"flip": False}]


def test_inference_of_any_network_is_that_of_ours(model):
    ims, metas = views()
    arguments = (ims, metas, (81, 103), 64, 32, 2)
    want = merge.inference(model, *arguments)
    other = Anybody(model)
    torch.testing.assert_close(utils.inference(other, *arguments), want, atol=1e-5, rtol=1e-5)
    assert want.std() > 0.01
    assert {shape[2:] for shape in other.sizes} == {(64, 64)}
    assert max(shape[0] for shape in other.sizes) == 2
    assert torch.equal(utils.inference(model, *arguments), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_windows_are_merged_in_float32(dtype):
    windows = segmenter.sliding_window(noise(1, 3, 10, 7), False, 4, 1)
    maps = noise(len(windows["crop"]), 5, 4, 4).to(dtype)
    want = segmenter.merge_windows({**windows, "seg_maps": maps.float()}, 4, (10, 7))
    got = segmenter.merge_windows({**windows, "seg_maps": maps}, 4, (10, 7))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_inference_of_a_network_without_parameters():
    class Repeat(torch.nn.Module):
        n_cls = 4

        def forward(self, im):
            return torch.cat([im, im[:, :1]], 1)

    im = noise(1, 3, 8, 8)
    got = utils.inference(Repeat(), [im], [{"flip": False}], (8, 8), 8, 8, 1)
    torch.testing.assert_close(got, torch.cat([im, im[:, :1]], 1)[0].softmax(0))


def test_inference_calls_a_forward_that_is_not_the_class_s_own(model):
    class Biased(type(model)):
        def forward(self, im):
            return super().forward(im) + torch.arange(5.0)[:, None, None] * 9

    ims, metas = views()
    arguments = (ims, metas, (81, 103), 64, 32, 2)
    before = utils.inference(model, *arguments)
    model.__class__ = Biased
    assert (utils.inference(model, *arguments).argmax(0) == 4).float().mean() > 0.9
    model.__class__ = Biased.__base__
    handle = model.register_forward_hook(lambda m, i, out: -out)
    assert (utils.inference(model, *arguments) - before).abs().max() > 0.1
    handle.remove()
    assert torch.equal(utils.inference(model, *arguments), before)


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def test_positions_by_the_published_arguments():
    posemb = noise(1, 2 + 12, 6)
    got = segmenter.resize_pos_embed(posemb=posemb, grid_old_shape=(3, 4), grid_new_shape=(5, 6), num_extra_tokens=2)
    grid = F.interpolate(posemb[:, 2:].mT.reshape(1, 6, 3, 4), (5, 6), mode="bilinear")
    torch.testing.assert_close(got, torch.cat([posemb[:, :2], grid.flatten(2).mT], 1))


@pytest.mark.parametrize("wrapped", [False, True])
def test_filtered_checkpoints_fit_the_encoder(wrapped):
    net = tiny_model(distilled=True).encoder
    weights = {**net.state_dict(), "pos_embed": noise(1, 2 + 9, 64)}
    got = segmenter.checkpoint_filter_fn({"model": weights} if wrapped else weights, net)
    net.load_state_dict(got)
    torch.testing.assert_close(got["pos_embed"], segmenter.resize_pos_embed(weights["pos_embed"], (3, 3), (4, 4), 2))
    assert weights["pos_embed"].shape == (1, 11, 64)
    assert torch.equal(segmenter.checkpoint_filter_fn(net.state_dict(), net)["pos_embed"], net.pos_embed)


def test_trained_parameters_are_counted():
    layer = torch.nn.Linear(3, 4)
    assert segmenter.num_params(layer) == 16
    layer.bias.requires_grad_(False)
    assert segmenter.num_params(layer) == 12


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def label_maps(seed, n_cls=4):
    generator = np.random.default_rng(seed)
    return {name: generator.integers(0, n_cls, (6, 9)) for name in ("b.png", "a.png")}


@pytest.mark.parametrize("ignore_index", [255, None])
def test_metrics_are_their_definition(ignore_index):
    predictions, truth = label_maps(0), label_maps(1)
    truth["a.png"][:2] = 255
    got = segmenter.compute_metrics(predictions, truth, 4, ignore_index=ignore_index, ret_cat_iou=True)
    pred, gt = (np.concatenate([maps[name].ravel() for name in ("a.png", "b.png")]) for maps in (predictions, truth))
    counted = gt != 255 if ignore_index == 255 else np.ones_like(gt, bool)
    pred, gt = pred[counted], gt[counted]
    both = np.array([((pred == c) & (gt == c)).sum() for c in range(4)])
    gts, preds = (np.array([(a == c).sum() for c in range(4)]) for a in (gt, pred))
    want = {
        "pixel_accuracy": both.sum() / gts.sum(),
        "mean_accuracy": (both / gts).mean(),
        "mean_iou": (both / (gts + preds - both)).mean(),
    }
    for name, value in want.items():
        assert got[name].dtype == torch.float64
        assert got[name].item() == pytest.approx(round(100 * value, 2))
    np.testing.assert_allclose(got["cat_iou"], both / (gts + preds - both))
    assert "cat_iou" not in segmenter.compute_metrics(predictions, truth, 4, ignore_index)


def test_accuracy_among_the_best():
    output = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [0, 3, 2, 1], [1, 0, 3, 2]])
    top1, top2 = metrics.accuracy(output, torch.tensor([0, 2, 1, 3]), topk=(1, 2))
    assert (top1.tolist(), top2.tolist()) == ([0.5], [1.0])
    assert metrics.accuracy(output, torch.tensor([0, 2, 0, 1]))[0].item() == 0.25


def test_one_process_gathers_nothing():
    maps = label_maps(0)
    assert segmenter.gather_data(maps) is maps


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_of_several_processes_gets_all(monkeypatch, rank):
    def gather_object(own, parts):
        assert (parts is None) == (rank > 0)
        if parts is not None:
            parts[:] = [own, {"c.png": 3}]

    several = types.SimpleNamespace(get_world_size=lambda: 2, get_rank=lambda: rank, gather_object=gather_object)
    monkeypatch.setattr(metrics, "dist", several)
    monkeypatch.setattr(metrics, "is_dist_avail_and_initialized", lambda: True)
    assert segmenter.gather_data({"a.png": 1}, tmp_dir="unused") == ({"a.png": 1, "c.png": 3} if rank == 0 else {})


# ---------------------------------------------------------------------------------------------------------------------
# Colours


def test_names_and_colours_of_a_file(tmp_path):
    path = tmp_path / "classes.yml"
    path.write_text("- {id: 7, name: sky, color: [255, 0, 51]}\n- {id: 0, name: road, isthing: 0}\n")
    names, colors = segmenter.dataset_cat_description(path, cmap={0: (0.5, 1.0, 0.0)})
    assert names == ["sky", "road"]
    assert {i: c.tolist() for i, c in colors.items()} == {
        7: pytest.approx([1, 0, 0.2]), 0: [0.5, 1, 0], segmenter.IGNORE_LABEL: [0, 0, 0],
    }  # fmt: skip
    with pytest.raises(ClassesError, match="class 0 has no color"):
        segmenter.dataset_cat_description(path)
    path.write_text("names: [a]\n")
    with pytest.raises(ClassesError, match="expected a list"):
        segmenter.dataset_cat_description(path)


@pytest.mark.parametrize(("module", "n"), [("ade20k", 150), ("cityscapes", 19), ("pascal_context", 60)])
def test_shipped_class_files(module, n):
    path = getattr(__import__(f"segmenter.segm.data.{module}", fromlist=["_"]), f"{module.upper()}_CATS_PATH")
    names, colors = segmenter.dataset_cat_description(path)
    assert len(names) == n
    assert set(colors) == {*range(n), 255}


def test_labels_as_colours():
    colors = {0: torch.tensor([0.1, 0.2, 0.3]), 4: torch.tensor([[1.0, 0, 1]]), 255: torch.zeros(3)}
    seg = torch.tensor([[[0, 4], [255, 0]]])
    got = segmenter.seg_to_rgb(seg, colors)
    want = torch.stack([torch.stack([colors[int(i)].reshape(3) for i in row]) for row in seg[0]])[None]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("stats", ["vit", "deit"])
def test_statistics_there_and_back(stats):
    stats, x = segmenter.STATS[stats], torch.rand(2, 3, 4, 5)
    normal = data_utils.rgb_normalize(x, stats)
    torch.testing.assert_close(normal[1, 2], (x[1, 2] - stats["mean"][2]) / stats["std"][2])
    torch.testing.assert_close(data_utils.rgb_normalize(x[1], stats), normal[1])
    back = data_utils.rgb_denormalize(normal, stats)
    assert back is normal
    torch.testing.assert_close(back, x)
