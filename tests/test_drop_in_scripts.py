"""The functions that published scripts use, and scripts of their kind with `segm` replaced by one name."""

import argparse
import builtins
import math
import re
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

import segmenter
from segmenter import inference as windows_of_ours
from segmenter.classes import ClassesError
from segmenter.pretrained import variant_of
from segmenter.segm import engine, metrics
from segmenter.segm.data import utils as data_utils
from segmenter.segm.eval.miou import blend_im, process_batch
from segmenter.segm.model import utils
from segmenter.segm.optim.factory import create_optimizer, create_scheduler
from segmenter.segm.utils import distributed
from segmenter.segm.utils import torch as ptu
from segmenter.segm.utils.logger import MetricLogger, SmoothedValue
from tests.tiny import tiny_model


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _process_state(monkeypatch):
    """What `set_gpu_mode` and `silence_print` change is put back."""
    for name in ("use_gpu", "gpu_id", "device", "distributed", "dist_rank", "world_size"):
        monkeypatch.setattr(ptu, name, getattr(ptu, name))
    monkeypatch.setattr(builtins, "print", print)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)


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
    want = windows_of_ours.inference(model, *arguments)
    other = Anybody(model)
    torch.testing.assert_close(utils.inference(other, *arguments), want, atol=1e-5, rtol=1e-5)
    assert want.std() > 0.01
    assert {shape[2:] for shape in other.sizes} == {(64, 64)}
    assert max(shape[0] for shape in other.sizes) == 2
    assert torch.equal(utils.inference(model, *arguments), want)


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


# ---------------------------------------------------------------------------------------------------------------------
# Processes, logging


def test_gpu_mode(monkeypatch):
    ptu.set_gpu_mode(False)
    assert (ptu.device, ptu.use_gpu, ptu.distributed) == (torch.device("cpu"), False, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="there is no CUDA device"):
        ptu.set_gpu_mode(True)
    assert ptu.device == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ptu.set_gpu_mode(True)
    assert (ptu.device, ptu.use_gpu) == (torch.device("cuda:0"), True)


def test_a_process_on_its_own_is_connected(tmp_path, capsys):
    ptu.set_gpu_mode(False)
    distributed.init_process()
    try:
        model = torch.nn.Linear(2, 2)
        assert distributed.sync_model(tmp_path, model) is model
        assert list(tmp_path.iterdir()) == []
        distributed.barrier()
        meter = SmoothedValue()
        meter.update(3.0, n=2)
        meter.synchronize_between_processes()
        assert (meter.count, meter.total) == (2, 6.0)
        maps = label_maps(0)
        assert segmenter.gather_data(maps) == maps
        got = segmenter.compute_metrics(maps, maps, 4, distributed=True)
        assert got["mean_iou"] == 100
    finally:
        distributed.destroy_process()
    distributed.silence_print(False)
    print("lost")
    print("kept", force=True)
    assert capsys.readouterr().out == "kept\n"


def test_meters():
    meter = SmoothedValue(window_size=4, fmt="{median} {avg} {global_avg} {max} {value}")
    for value, n in ((10.0, 1), (4.0, 1), (1.0, 2), (2.0, 1), (3.0, 1)):
        meter.update(value, n)
    assert (meter.median, meter.avg, meter.max, meter.value) == (2.0, 2.5, 4.0, 3.0)
    assert meter.global_avg == pytest.approx(21 / 6)
    assert str(meter) == "2.0 2.5 3.5 4.0 3.0"


def test_logger(capsys):
    logger = MetricLogger(delimiter=" | ")
    for i in logger.log_every(range(5), 2, "Epoch:"):
        logger.update(loss=torch.tensor(float(i)), n=2)
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"\[.(\d)/5|\[(\d)/5", line).group(0)[1] for line in lines[:-1]] == ["0", "2", "4"]
    assert lines[0].startswith("Epoch: | [0/5] | eta: 0:00:00 | loss: 0.0000 (0.0000)")
    assert lines[-1].startswith("Epoch: Total time: 0:00:00 (")
    assert logger.loss.global_avg == logger.meters["loss"].global_avg == 2.0
    with pytest.raises(AttributeError, match="no attribute 'accuracy'"):
        _ = logger.accuracy
    with pytest.raises(TypeError, match="loss must be a number, got str"):
        logger.update(loss="nothing")
    list(logger.log_every([], 2))


# ---------------------------------------------------------------------------------------------------------------------
# Training and evaluation, as the published scripts put them together


class Batches(list):
    epochs = ()

    def set_epoch(self, epoch):
        self.epochs += (epoch,)


def training_parts(model, batches, epochs=2):
    options = argparse.Namespace(
        opt="sgd", lr=0.01, weight_decay=0.0, momentum=0.9, clip_grad=None, sched="polynomial", min_lr=1e-5,
        poly_power=0.9, poly_step_size=1, iter_max=len(batches) * epochs, iter_warmup=0.0, epochs=epochs,
    )  # fmt: skip
    optimizer = create_optimizer(options, model)
    return optimizer, create_scheduler(options, optimizer)


def test_an_epoch_of_training():
    pytest.importorskip("timm")
    ptu.set_gpu_mode(False)
    model = tiny_model(decoder={"name": "linear"})
    labels = torch.arange(2 * 64 * 64).reshape(2, 64, 64) // 900 % 5
    labels[:, 0] = 255
    batches = Batches([{"im": noise(2, 3, 64, 64), "segmentation": labels}] * 3)
    with torch.no_grad():
        first = F.cross_entropy(model(batches[0]["im"]), labels, ignore_index=255).item()
    optimizer, schedule = training_parts(model, batches)
    logger = engine.train_one_epoch(model, batches, optimizer, schedule, 1, torch.enable_grad, None)
    assert batches.epochs == (1,)
    assert logger.loss.deque[0] == pytest.approx(first, rel=1e-5)
    assert logger.loss.value < first
    rates = [(0.01 - 1e-5) * (1 - t / 6) ** 0.9 + 1e-5 for t in (1, 2, 3)]
    assert list(logger.learning_rate.deque) == pytest.approx(rates)

    steps = []
    scaler = lambda loss, optimizer, parameters: steps.append(len(list(parameters)))  # noqa: E731
    engine.train_one_epoch(model, batches, optimizer, schedule, 2, loss_scaler=scaler)
    assert steps == [len(list(model.parameters()))] * 3
    model.decoder.head.bias.data.fill_(math.nan)
    with pytest.warns(UserWarning, match="the loss is nan in epoch 3"):
        engine.train_one_epoch(model, batches[:1], optimizer, schedule, 3)


def evaluation_batch(name, seed):
    """As a DataLoader with batches of one puts together what the published data set gives."""
    ims = [noise(1, 3, 70, 90, seed=seed), noise(1, 3, 70, 90, seed=seed).flip(3)]
    meta = {"ori_shape": (torch.tensor([75]), torch.tensor([95]), torch.tensor([3])), "ori_filename": [name]}
    return {"im": ims, "im_metas": [{**meta, "flip": torch.tensor([flip])} for flip in (False, True)]}


def test_an_evaluation(model):
    ptu.set_gpu_mode(False)
    batches = Batches([evaluation_batch("a.png", 0), evaluation_batch("b.png", 1)])
    truth = {}
    for batch in batches:
        batch["im_metas"] = [{**m, "ori_shape": m["ori_shape"][:2]} for m in batch["im_metas"]]
        name, im, got = process_batch(model, batch, 64, 32, 2)
        want = windows_of_ours.inference(model, batch["im"], batch["im_metas"], (75, 95), 64, 32, 2).argmax(0)
        assert torch.equal(got, want)
        torch.testing.assert_close(im, F.interpolate(batch["im"][-1], (75, 95), mode="bilinear"))
        assert torch.equal(process_batch(types.SimpleNamespace(module=model), batch, 64, 32, 2)[2], want)
        truth[name] = want.numpy().copy()
    truth["b.png"][:15] = 255
    truth["a.png"][:15] = (truth["a.png"][:15] + 1) % 5
    batches.unwrapped = types.SimpleNamespace(n_cls=5)
    logger = engine.evaluate(model.train(), batches, truth, 64, 32, torch.enable_grad)
    assert not model.training
    assert logger.pixel_accuracy.value == round(100 * (1 - 15 / 135), 2)
    assert 50 < logger.mean_iou.value < logger.pixel_accuracy.value


def test_blended_pictures():
    dark, light = np.zeros((2, 3, 3), np.uint8), np.full((2, 3, 3), 200, np.uint8)
    assert (blend_im(dark, light, alpha=0.25) == 50).all()


SCRIPT = """
from pathlib import Path
import numpy as np
import torch
import segm.utils.torch as ptu
from PIL import Image
from segm import config
from segm.data.ade20k import ADE20K_CATS_PATH
from segm.data.utils import STATS, dataset_cat_description, rgb_normalize, seg_to_rgb
from segm.eval.miou import blend_im
from segm.model.decoder import MaskTransformer
from segm.model.factory import load_model
from segm.model.utils import inference, num_params

def overlays(model_path, source, target):
    ptu.set_gpu_mode(False)
    model, variant = load_model(model_path)
    model.eval()
    model.to(ptu.device)
    stats = STATS[variant["dataset_kwargs"]["normalization"]]
    names, colors = dataset_cat_description(ADE20K_CATS_PATH)
    for path in sorted(Path(source).iterdir()):
        pixels = np.asarray(Image.open(path))
        im = rgb_normalize(torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255, stats)[None]
        scores = inference(
            model, [im.to(ptu.device)], [dict(flip=False)], ori_shape=im.shape[2:4],
            window_size=variant["inference_kwargs"]["window_size"],
            window_stride=variant["inference_kwargs"]["window_stride"], batch_size=2,
        )
        rgb = seg_to_rgb(scores.argmax(0).unsqueeze(0), colors)
        Image.fromarray(blend_im(pixels, (255 * rgb[0].numpy()).astype(np.uint8))).save(Path(target) / path.name)
    return names

def attention(model_path, layer_id, enc):
    model, variant = load_model(model_path)
    for p in model.parameters():
        p.requires_grad = False
    size, n_cls = variant["dataset_kwargs"]["image_size"], variant["net_kwargs"]["n_cls"]
    grid = size // model.patch_size
    im = torch.linspace(-1, 1, 3 * size * size).reshape(1, 3, size, size)
    if enc:
        extra = 1 + model.encoder.distilled
        assert layer_id < model.encoder.n_layers
        maps = model.get_attention_map_enc(im, layer_id)[0, :, 0, extra:]
    else:
        assert isinstance(model.decoder, MaskTransformer) and layer_id < model.decoder.n_layers
        maps = model.get_attention_map_dec(im, layer_id)[0, :, -n_cls:, :-n_cls]
    return maps.reshape(maps.shape[0], -1, grid, grid), num_params(model), config.load_config()["decoder"]
"""


@pytest.fixture
def script(tmp_path):
    """The functions of SCRIPT after `sed 's/\\bsegm\\b/segmenter.segm/g'`, and a folder with a model for it."""
    model = tiny_model(n_cls=150)
    model.info.classes = "ade20k"
    torch.save({"model": model.state_dict()}, tmp_path / "checkpoint.pth")
    (tmp_path / "variant.yml").write_text(yaml.safe_dump(variant_of(model)))
    namespace = {}
    exec(compile(re.sub(r"\bsegm\b", "segmenter.segm", SCRIPT), "script.py", "exec"), namespace)
    return types.SimpleNamespace(**namespace, path=tmp_path / "checkpoint.pth", model=model)


def test_a_script_that_draws_overlays(script, tmp_path):
    for folder in ("in", "out"):
        (tmp_path / folder).mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png")
    names = script.overlays(script.path, tmp_path / "in", tmp_path / "out")
    assert names[:2] == ["wall", "building"]
    classes = segmenter.segm.data.ade20k.ADE20K_CATS_PATH
    palette = np.array([entry["color"] for entry in yaml.safe_load(classes.read_text())])
    want = palette[script.model.segment(pixels).numpy()]
    got = np.asarray(Image.open(tmp_path / "out" / "a.png")).astype(int)
    assert len(np.unique(want)) > 5
    assert np.abs(got - (pixels.astype(int) + want) / 2).max() <= 1.5  # 255 * (c / 255) may round down


def test_a_script_that_shows_attention(script):
    encoder_maps, n, decoders = script.attention(script.path, 1, True)
    assert encoder_maps.shape == (1, 1, 4, 4)
    assert 0.5 < encoder_maps.sum() < 1  # the rest goes to the class token
    assert n == 0
    assert decoders["mask_transformer"]["n_layers"] == 2
    decoder_maps, _, _ = script.attention(script.path, 0, False)
    assert decoder_maps.shape == (1, 150, 4, 4)
