"""Training, evaluation and scripts as the published ones are, with `segm` replaced by one name."""

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
from segmenter.inference import merge
from segmenter.segm import engine
from segmenter.segm.eval.miou import blend_im, process_batch
from segmenter.segm.optim.factory import create_optimizer, create_scheduler
from segmenter.segm.utils import distributed
from segmenter.segm.utils import torch as ptu
from segmenter.segm.utils.logger import MetricLogger, SmoothedValue
from segmenter.weights.settings import as_published
from tests.support.tiny import tiny_model


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def label_maps(seed, n_cls=4):
    generator = np.random.default_rng(seed)
    return {name: generator.integers(0, n_cls, (6, 9)) for name in ("b.png", "a.png")}


@pytest.fixture(autouse=True)
def _process_state(monkeypatch):
    """What `set_gpu_mode` and `silence_print` change is put back."""
    for name in ("use_gpu", "gpu_id", "device", "distributed", "dist_rank", "world_size"):
        monkeypatch.setattr(ptu, name, getattr(ptu, name))
    monkeypatch.setattr(builtins, "print", print)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)


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
    counter = types.SimpleNamespace(step_update=lambda num_updates: steps.append(num_updates))
    engine.train_one_epoch(model, batches, optimizer, counter, 2, loss_scaler=scaler)
    n = len(list(model.parameters()))
    assert steps == [n, 7, n, 8, n, 9]
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
        want = merge.inference(model, batch["im"], batch["im_metas"], (75, 95), 64, 32, 2).argmax(0)
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


def test_blended_images():
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
    (tmp_path / "variant.yml").write_text(yaml.safe_dump(as_published(model)))
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
