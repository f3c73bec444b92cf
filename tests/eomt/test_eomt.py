"""EoMT end to end: folders of transformers with random weights, whose results ours are held against."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import segmenter
from segmenter.classes import load_classes
from segmenter.eomt import is_eomt, load_eomt
from segmenter.eomt.preprocessing import Preprocessing, window_starts
from segmenter.inference.images import ImageError
from segmenter.kernels import reference_queries
from segmenter.ops import why_no_triton
from segmenter.weights.read import CheckpointError
from tests.support import eomt
from tests.support.fake_graphs import install
from tests.support.largest import Largest
from tests.support.queries import assert_labels

if (reason := eomt.why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)

SIDE = eomt.SIDE
SIZES = [(40, 70), (70, 40), (32, 32), (90, 20), (31, 33), (7, 50)]
needs_kernels = pytest.mark.skipif(why_no_triton() is not None, reason="no Triton")
IMPLS = ["eager", pytest.param("triton", marks=needs_kernels)]
every_kind = pytest.mark.parametrize("kind", eomt.NAMES)


def image(h, w, seed=0):
    """Blocks of colours, whose masks differ more than those of noise."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-h // 9), -(-w // 9), 3), dtype=np.uint8)
    return np.kron(blocks, np.ones((9, 9, 1), np.uint8))[:h, :w]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(kind, split) -> (folder, transformers' network in it), written when first asked for."""
    found = {}

    def folder(kind="eomt", split=True, **settings):
        key = (kind, split, *settings.items())
        if key not in found:
            path = tmp_path_factory.mktemp("eomt") / "tiny"
            found[key] = path, eomt.write(path, kind, split, **settings)
        return found[key]

    return folder


@torch.inference_mode()
def theirs(network, processor, pixels):
    """What transformers' network gives for an image."""
    inputs = processor(images=[pixels], return_tensors="pt")
    return network(**inputs)


@torch.inference_mode()
def their_scores(network, pixels):
    """transformers' scores (1, n_cls, H, W) in float64, and its labels (H, W)."""
    processor, size = eomt.processor(), [pixels.shape[:2]]
    found = theirs(network, processor, pixels)
    labels = processor.post_process_semantic_segmentation(found, size)[0]
    for name in ("masks_queries_logits", "class_queries_logits"):
        setattr(found, name, getattr(found, name).double())
    scores = processor.post_process_semantic_segmentation(found, size, return_segmentation_scores=True)
    return scores[0]["segmentation_scores"][None].double(), labels


# ---------------------------------------------------------------------------------------------------------------------
# Labels


@pytest.mark.parametrize("size", [*SIZES, (33, 32), (32, 65), (301, 32), (32, 1000), (17, 512)])
@pytest.mark.parametrize("split", [True, False])
def test_windows_are_transformers(size, split):
    """To the last bit, in its order."""
    processor = eomt.processor(split)
    found = processor(images=[image(*size), image(*size, seed=1)], return_tensors="pt")
    windows, geometry = Preprocessing(processor, SIDE)(torch.from_numpy(np.stack([image(*size), image(*size, seed=1)])))
    assert torch.equal(windows, found["pixel_values"])
    if split:
        starts = geometry.tops if size[0] > size[1] else geometry.lefts
        offsets = [offset.tolist() for offset in found["patch_offsets"]]
        assert offsets == [[b, start, start + SIDE] for b in range(2) for start in starts]
    assert geometry.shape == size and geometry.window == (SIDE, SIDE)
    assert min(geometry.canvas) == SIDE if split else max(geometry.canvas) == SIDE


def test_windows_may_leave_out_the_last_pixel():
    """transformers rounds down in floating point; what no window covers has a score of 0."""
    assert window_starts(4481, 640)[-1] + 640 == 4480
    assert window_starts(4480, 640) == tuple(range(0, 4480, 640))
    image = torch.zeros(1, 3, 640, 4481)
    _, offsets = eomt.processor()._split_image(image, eomt.processor().size.__class__(shortest_edge=640), [0])
    assert tuple(start for _, start, _ in offsets) == window_starts(4481, 640)


@every_kind
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [SIZES[0], *(pytest.param(s, marks=pytest.mark.more) for s in SIZES[1:])])
def test_labels_are_transformers(kind, impl, size, folders):
    """In float32 with the kernels in the network as well: a label's class scores best by transformers' own scores."""
    folder, network = folders(kind)
    model = load_eomt(folder, impl=impl)
    assert model.impl == impl
    pixels = image(*size)
    with torch.inference_mode():
        masks, classes, _ = model.queries(torch.from_numpy(pixels)[None])
    found = theirs(network, eomt.processor(), pixels)
    for ours, their in ((masks[0], found.masks_queries_logits), (classes[0], found.class_queries_logits)):
        assert (ours - their).abs().max() < 2e-5 * their.abs().max()
    got = model.segment(pixels)
    scores, labels = their_scores(network, pixels)
    assert_labels(got[None], None, None, scores=scores, limit=1e-4)
    assert (got.long() == labels).float().mean() > 0.999
    assert len(labels.unique()) > 1


@needs_kernels
@pytest.mark.parametrize("kind", ["eomt", pytest.param("eomt_dinov3", marks=pytest.mark.more)])
def test_every_layer_and_the_labels_run_on_kernels(kind, folders, monkeypatch):
    from tests.support.spies import kernels_run

    ran = kernels_run(monkeypatch)
    folder, _ = folders(kind)
    model = load_eomt(folder, impl="triton")
    layers = len(model.network.layers)
    assert len(model.report.swapped) == layers
    ran.clear()
    model.segment(image(32, 32))
    assert ran.count("attention") == layers
    assert ran.count("rotate") == (0 if kind == "eomt" else 2 * layers), "queries and keys"
    assert ran.count("layernorm_mlp") == layers
    assert ran.count("queries_argmax") == 1
    ran.clear()
    model.segment(image(40, 70), batch_size=1)
    assert ran.count("layernorm_mlp") == 2 * layers, "two windows"
    assert ran.count("queries_argmax") == 1


@pytest.mark.parametrize("masked", [(0.0, 1.0), pytest.param((1.0, 1.0), marks=pytest.mark.more)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_masked_attention_stays_what_it_is(impl, masked, folders):
    """Of weights that are not trained to the end; the layers with masks are then the model's own."""
    folder, network = folders(masked=masked)
    model = load_eomt(folder, impl=impl)
    scores, _ = their_scores(network, image(40, 70))
    assert_labels(model.segment(image(40, 70))[None], None, None, scores=scores, limit=1e-4)
    plain, _ = their_scores(folders()[1], image(40, 70))
    assert (plain - scores).abs().max() > 1e-3


def test_masked_attention_is_in_the_state(folders, tmp_path):
    """What is saved after loading is read as it was: without these numbers it would be read with 1."""
    folder, network = folders()
    model = load_eomt(folder)
    labels, name = model.segment(image(40, 70)), "network.attn_mask_probs"
    assert model.state_dict()[name].tolist() == [0.0, 0.0]
    model.network.save_pretrained(tmp_path)
    eomt.processor().save_pretrained(tmp_path)
    assert torch.equal(load_eomt(tmp_path).segment(image(40, 70)), labels)
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    model.load_state_dict({**state, name: torch.tensor([0.0, 1.0])})
    masked, _ = their_scores(folders(masked=(0.0, 1.0))[1], image(40, 70))
    assert_labels(model.segment(image(40, 70))[None], None, None, scores=masked, limit=1e-4)
    del state[name]
    with pytest.raises(RuntimeError, match="Missing.*attn_mask_probs"):
        model.load_state_dict(state)
    model.load_state_dict(state, strict=False)
    assert model.state_dict()[name].tolist() == [0.0, 1.0]


def test_images_are_normalised_in_float32_for_any_network(folders):
    preprocessing = load_eomt(folders()[0]).preprocessing
    pixels = torch.from_numpy(image(40, 70))[None]
    want = preprocessing(pixels)[0]
    for dtype in (torch.bfloat16, torch.float64):
        found = preprocessing.to(dtype)(pixels)[0]
        assert found.dtype == torch.float32 and torch.equal(found, want)


@pytest.mark.parametrize("size", [(1, 200), (200, 1)])
def test_images_that_vanish_when_they_are_resized_are_refused(size, folders):
    model = load_eomt(folders(split=False)[0])
    with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} pixels is too narrow"):
        model.segment(image(*size))
    assert model.segment(image(3, 190)).shape == (3, 190)  # the narrowest that is not


@pytest.mark.parametrize("size", [(10, 33), (33, 10)])
def test_images_that_the_resize_leaves_too_long_lie_in_their_window(size, folders):
    """Pixels that no window covered would have no score at all."""
    windows, geometry = load_eomt(folders(split=False)[0]).preprocessing(torch.from_numpy(image(*size))[None])
    assert windows.shape == (1, 3, SIDE, SIDE) and geometry.canvas == tuple(min(n, SIDE) for n in size)


def test_padded_images_have_labels_without_the_padding(folders):
    """Of a folder for panoptic segmentation. (transformers' semantic post-processing stretches the padding as well.)"""
    folder, network = folders(split=False)
    model, pixels = load_eomt(folder), image(20, 50)
    found = theirs(network, eomt.processor(False), pixels)
    masks, classes = found.masks_queries_logits.double(), found.class_queries_logits.double()
    upsampled = torch.nn.functional.interpolate(masks, (SIDE, SIDE), mode="bilinear").sigmoid()
    scores = torch.einsum("bqc,bqhw->bchw", classes.softmax(-1)[..., :-1], upsampled)[:, :, : 20 * SIDE // 50 + 1]
    height = model.preprocessing(torch.from_numpy(pixels)[None])[1].canvas[0]
    scores = torch.nn.functional.interpolate(scores[:, :, :height], (20, 50), mode="bilinear")
    assert_labels(model.segment(pixels)[None], None, None, scores=scores, limit=1e-4)


def test_any_image_and_batches(folders, tmp_path):
    model = load_eomt(folders()[0])
    images = [image(40, 70, seed) for seed in range(3)]
    want = [model.segment(x) for x in images]
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    for same in (tmp_path / "a.png", Image.fromarray(images[0]), torch.from_numpy(images[0])):
        assert torch.equal(model.segment(same), want[0])
    found = list(model.segment_stream([*images, image(33, 31)], batch_size=2, progress=False))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=False)) and found[3].shape == (33, 31)
    assert torch.equal(segmenter.segment_image(model, images[1], batch_size=1), want[1])
    half = model.segment(images[0], dtype="bfloat16")
    assert half.dtype == torch.uint8 and (half == want[0]).float().mean() > 0.9
    with pytest.raises(ImageError):
        model.segment(tmp_path / "none.png")


def test_scores_of_all_classes_are_never_whole(folders, monkeypatch):
    monkeypatch.setattr(reference_queries, "BLOCK", 2**14)
    model = load_eomt(folders()[0])
    with Largest() as largest:
        assert model.segment(image(500, 700)).shape == (500, 700)
    assert largest.numel <= 3 * 500 * 700 < 6 * 500 * 700, "the image itself"


@pytest.mark.parametrize(
    "options", [{"scales": (0.5, 1.0)}, {"flip": True}, {"window_size": 64}, {"return_probabilities": True}], ids=str
)
def test_options_of_other_models_are_refused(options, folders):
    model, name = load_eomt(folders()[0]), next(iter(options))
    with pytest.raises(ValueError, match=f"EoMT has no {name}: its windows are those that it was trained with"):
        model.segment(image(40, 70), **options)
    if name != "return_probabilities":
        with pytest.raises(ValueError, match=f"EoMT has no {name}"):
            model.segment_stream([image(40, 70)], **options)


def test_training_mode_is_refused(folders):
    model = load_eomt(folders()[0]).train()
    with pytest.raises(RuntimeError, match="training mode"):
        model.segment(image(40, 70))


# ---------------------------------------------------------------------------------------------------------------------
# Panoptic segments and instances


SEGMENTS = {
    "panoptic": {"threshold": 0.1, "overlap_mask_area_threshold": 0.1, "stuff_classes": [1, 2]},
    "instances": {"threshold": 0.1},
}


@every_kind
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SEGMENTS)
def test_segments_and_instances_are_transformers(name, kind, impl, folders):
    folder, network = folders(kind, split=False)
    model, processor, pixels = load_eomt(folder, impl=impl), eomt.processor(False), image(45, 60)
    found, options = theirs(network, processor, pixels), SEGMENTS[name]
    post = getattr(processor, f"post_process_{name.removesuffix('s')}_segmentation")
    want, got = post(found, [(45, 60)], **options)[0], getattr(model, name)(pixels, **options)
    assert (got["segmentation"] != want["segmentation"]).float().mean() < 1e-3
    assert len(want["segments_info"]) > 1
    for ours, their in zip(got["segments_info"], want["segments_info"], strict=True):
        assert (ours["id"], ours["label_id"]) == (their["id"], their["label_id"])
        assert ours["score"] == pytest.approx(their["score"], abs=2e-5)


def test_semantic_folders_have_no_segments(folders):
    model = load_eomt(folders()[0])
    for call in (model.panoptic, model.instances):
        with pytest.raises(ValueError, match="cuts images into windows, for semantic segmentation"):
            call(image(40, 70))


# ---------------------------------------------------------------------------------------------------------------------
# Compiled inference


def test_compiled_labels_are_those_of_segment(folders):
    model = load_eomt(folders()[0])
    compiled = model.compile_inference(2, 40, 70)
    for seed in range(2):
        pixels = torch.from_numpy(np.stack([image(40, 70, seed), image(40, 70, seed + 5)]))
        assert torch.equal(compiled(pixels), torch.stack([model.segment(x) for x in pixels.numpy()]))
    with pytest.raises(ValueError, match="EoMT has no window_size"):
        model.compile_inference(1, 40, 70, window_size=64)


def test_captured_labels_follow_images_and_weights(folders, monkeypatch):
    """With stand-ins for graphs: what a card has besides is in tests/gpu."""
    made = install(monkeypatch)
    model = load_eomt(folders()[0])
    compiled = model.compile_inference(1, 40, 70, dtype="bfloat16")
    assert len(made) == 1
    for seed in range(3):
        pixels = torch.from_numpy(image(40, 70, seed))[None]
        assert torch.equal(compiled(pixels)[0], model.segment(pixels[0].numpy(), dtype="bfloat16"))
    assert made[0].replays == 3
    with torch.no_grad():
        model.network.class_predictor.weight.neg_()
    assert torch.equal(compiled(pixels)[0], model.segment(pixels[0].numpy(), dtype="bfloat16"))


class NoWaiting(TorchDispatchMode):
    """Raises where a device would have to tell the host something, which no CUDA graph can capture."""

    WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.WAITS, f"waits for the device: {func}"
        return func(*args, **(kwargs or {}))


@needs_kernels
@pytest.mark.parametrize("kind", ["eomt", pytest.param("eomt_dinov3", marks=pytest.mark.more)])
def test_the_way_to_labels_does_not_wait_for_the_device(kind, folders):
    model = load_eomt(folders(kind)[0], impl="triton")
    pixels = torch.from_numpy(image(30, 32))[None]
    with torch.inference_mode():
        model.labels_of_pixels(pixels)  # makes tables
        with NoWaiting():
            labels, largest = model.labels_of_pixels(pixels)
        with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
            largest.item()
    assert labels.shape == (1, 30, 32)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def test_classes_are_the_folders(tmp_path):
    for key, palette in (("cityscapes", load_classes("cityscapes").palette), (None, None)):
        names = load_classes(key).names if key else ("grass, lawn", "water")
        folder = tmp_path / str(key)
        eomt.write(folder, n_cls=len(names), id2label=dict(enumerate(names)))
        model = load_eomt(folder)
        assert model.classes.names == tuple(names)
        assert palette is None or model.classes.palette == palette
        assert model.info.classes == key
        assert len(set(model.classes.palette)) == len(names)


def test_is_eomt(folders, tmp_path):
    assert is_eomt(folders()[0]) and is_eomt(str(folders("eomt_dinov3")[0]))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    for other in (tmp_path, tmp_path / "none", "Seg-T-Mask/16", torch.nn.Identity(), None):
        assert not is_eomt(other)


def broken(folder, tmp_path, how):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    how(copy)
    return copy


def edited(name, **changes):
    def edit(folder):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, **changes}))

    return edit


BROKEN = {
    "other model": (edited("config.json", model_type="vit"), "its model type is 'vit', not one of eomt, eomt_dinov3"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no preprocessing": (lambda f: (f / "preprocessor_config.json").unlink(), "has no preprocessor_config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors; pickled weights are not"),
    "damaged weights": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "transformers cannot load it"),
    "other sizes": (edited("config.json", hidden_size=48), "weights are missing or of another shape|cannot load it"),
    "more layers": (edited("config.json", num_hidden_layers=4), "weights are missing or of another shape: layers.3"),
    "other windows": (
        edited("preprocessor_config.json", size={"shortest_edge": 48}),
        "size 48 x 48 for a network that",
    ),
    "not resized": (edited("preprocessor_config.json", do_resize=False), "has do_resize off; that is not EoMT's"),
    "neither": (edited("preprocessor_config.json", do_split_image=False), "neither do_split_image nor do_pad"),
}


@pytest.mark.parametrize(("how", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_folders(how, message, folders, tmp_path):
    with pytest.raises(CheckpointError, match=message) as raised:
        load_eomt(broken(folders()[0], tmp_path, how))
    assert "copy" in str(raised.value)


def test_missing_libraries_are_named(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        CheckpointError, match=r"needs transformers 5 .*pip install -U 'transformers>=5' torchvision scipy"
    ):
        load_eomt(folders()[0])


def test_nothing_is_downloaded(folders, monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_eomt(folders()[0]).segment(image(32, 32)).shape == (32, 32)
