"""The models that ours are compared with: their published figures are complete, and the networks are the published."""

import functools
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench import peers
from bench.peers import BUILDERS, OURS, PEERS, SOURCES, Figure

ROOT = Path(__file__).parents[2]
N_CLS = 150
FIGURES = ("miou_ss", "miou_ms", "images_per_second", "parameters", "multiply_adds")
TOLERANCE = 0.03
BUILDABLE = pytest.mark.parametrize("peer", [p for p in PEERS if p.build], ids=lambda p: p.id)


@functools.cache
def meta(peer):
    """The row's network without storage, in its size; the test is skipped where a library is missing."""
    try:
        with torch.device("meta"):
            return peer.build(N_CLS, peer.size)
    except ImportError as error:
        pytest.skip(str(error))


def test_rows_are_complete():
    assert len({p.id for p in PEERS}) == len(PEERS)
    assert Counter(p.group for p in PEERS) == {"poster": 14, "today": 4, "variant": 2}
    for peer in PEERS:
        figures = {name: getattr(peer, name) for name in FIGURES}
        assert peer.size % 32 == 0, peer.id
        assert peer.crop in (512, 520, 640), peer.id
        if peer.group == "variant":
            assert not any(figures.values()), f"{peer.id}: the figures belong to another network"
            assert peer.note, peer.id
            continue
        assert peer.miou_ss or peer.miou_ms, peer.id
        for figure in filter(None, figures.values()):
            assert figure.source in SOURCES, peer.id
        ranges = {"miou_ss": (40, 65), "miou_ms": (40, 65), "images_per_second": (5, 250), "parameters": (40, 400)}
        for name, (low, high) in ranges.items():
            assert figures[name] is None or low < figures[name].value < high, f"{peer.id} {name}"
        if peer.miou_ss and peer.miou_ms:
            assert peer.miou_ss.value < peer.miou_ms.value, peer.id
        if peer.images_per_second:
            assert peer.images_per_second.gpu and peer.images_per_second.how, peer.id


def test_every_source_is_used_and_says_where_it_is():
    used = {figure.source for peer in PEERS for name in FIGURES if (figure := getattr(peer, name))}
    assert used == set(SOURCES)
    for source in SOURCES.values():
        assert set(source) == {"title", "where", "seen"} and all(source.values())


def test_every_builder_is_used():
    built = [row["build"] for row in peers._DATA["rows"] if "build" in row]
    assert set(built) == set(BUILDERS)
    assert [p.ours for p in PEERS if p.build] == [key == OURS for key in built]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [({"mIoU": 1}, TypeError), ({"build": "nothing"}, KeyError), ({"miou_ss": {"value": 50}}, TypeError)],
    ids=["misspelt key", "unknown builder", "no source"],
)
def test_wrong_rows_are_errors(wrong, error):
    row = {"name": "X", "backbone": "Y", "group": "today", "size": 512, "images_per_second": None, "parameters": None}
    row |= {"miou_ss": {"value": 50, "source": "poster"}, "miou_ms": None}
    assert peers._peer(row).miou_ss == Figure(50, "poster")
    with pytest.raises(error):
        peers._peer(row | wrong)


def test_importing_loads_no_library():
    heavy = {"timm", "transformers", "segmentation_models_pytorch", "torchvision", "torch._dynamo"}
    code = f"import sys, bench.peers; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("module", "package"), [("timm", "timm"), ("transformers", "transformers")])
def test_a_missing_library_is_named(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    row = {"timm": "SETR-L MLA", "transformers": "SegFormer-B5"}[module]
    with pytest.raises(ImportError, match=f"pip install -U {package}"):
        next(p for p in PEERS if p.name == row).build(N_CLS, 512)


def test_a_library_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace())
    with pytest.raises(ImportError, match="transformers with EomtConfig.*has no attribute 'EomtConfig'"):
        next(p for p in PEERS if p.name == "EoMT-L").build(N_CLS, 512)


@BUILDABLE
def test_parameters_are_the_published(peer):
    network = meta(peer)
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    published = peer.parameters.value - peer.training_only if peer.parameters else UNPUBLISHED[peer.id]
    assert millions == pytest.approx(published, rel=TOLERANCE), f"{peer.id}: {millions:.2f}"
    assert not any(module.training for module in network.modules())
    assert not any("aux" in name for name, _ in network.named_parameters()), "only training uses auxiliary heads"


UNPUBLISHED = {
    "Seg-L/16 ViT-L/16": 334 - 28.3,  # Seg-L-Mask/16 without its mask transformer
    "EoMT-L DINOv3 ViT-L/16": 316 - 1.0,  # rotary position embedding for the learned one of EoMT-L with DINOv2
    "DeepLabv3+ (output stride 16) ResNet-101": 45.7,  # as counted for segmentation-models-pytorch 0.6
    "DeepLabv3+ (output stride 16) ResNeSt-101": 49.4,  # likewise
}


@pytest.mark.parametrize("peer", [p for p in PEERS if p.multiply_adds], ids=lambda p: p.id)
def test_multiply_adds_are_the_published(peer):
    """A network of the right width and number of layers at the wrong resolution has the right parameters, too."""
    network = meta(peer)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        scores = network(torch.empty(1, 3, peer.size, peer.size, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(peer.multiply_adds.value, rel=TOLERANCE)
    assert scores.shape == (1, N_CLS, peer.size // 4, peer.size // 4)


def test_eomt_predicts_masks_once():
    """As the authors' inference does; transformers' own default predicts them before each of the last four layers."""
    network = meta(next(p for p in PEERS if p.name == "EoMT-L"))
    calls = []
    handle = network.model.mask_head.register_forward_hook(lambda *_: calls.append(1))
    assert network(torch.empty(1, 3, 512, 512, device="meta")).shape == (1, N_CLS, 128, 128)
    handle.remove()
    assert calls == [1]


def test_setr_takes_every_sixth_layer():
    network = meta(next(p for p in PEERS if p.name == "SETR-L MLA"))
    assert list(network[0].out_indices) == [5, 11, 17, 23]
    assert len(network[0].model.blocks) == 24
    assert network(torch.empty(1, 3, 512, 512, device="meta")).shape == (1, N_CLS, 128, 128)


def test_upernet_leaves_scores_at_its_resolution():
    network = meta(next(p for p in PEERS if p.name == "Swin-L UperNet"))
    assert network(torch.empty(2, 3, 64, 96, device="meta")).shape == (2, N_CLS, 16, 24)


def test_ours_are_segmenters():
    ours = [p for p in PEERS if p.ours]
    assert [p.name for p in ours] == ["Seg-B†/16", "Seg-B†-Mask/16", "Seg-L/16", "Seg-L-Mask/16"]
    for peer in ours:
        model = meta(peer)
        assert model.encoder.distilled == peer.name.startswith("Seg-B†")
        assert (model.n_cls, model.encoder.patch_embed.grid_size) == (N_CLS, (32, 32))


# ---------------------------------------------------------------------------------------------------------------------
# Heads, at reduced width


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@torch.no_grad()
def test_deeplab_head():
    head = peers.DeepLabHead(6, 10, 5, channels=8, low_out=4).eval()
    low, high = torch.randn(2, 6, 16, 24), torch.randn(2, 10, 8, 12)
    scores = head([low, high])
    assert scores.shape == (2, 5, 16, 24)
    moved = high.clone()
    moved[:, :, -1, -1] += 5
    changed = (head([low, moved]) - scores).abs().amax(1) > 0
    assert changed.float().mean() > 0.7, "only the pooled branch carries it further than a few pixels"
    assert not torch.equal(head([low + 1, high]), scores)


@torch.no_grad()
def test_object_regions_are_weighted_means():
    pixels, scores = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 4, 5)
    expected = torch.empty(2, 3, 6, 1)
    for b in range(2):
        for k in range(6):
            weights = scores[b, k].exp() / scores[b, k].exp().sum()
            expected[b, :, k, 0] = (pixels[b] * weights).sum((1, 2))
    torch.testing.assert_close(peers.object_regions(pixels, scores), expected)


@torch.no_grad()
def test_ocr_context_is_attention_over_classes():
    head = peers.OCRHead(4, 6, channels=8, key_channels=16).eval()
    pixels, objects = torch.randn(2, 8, 3, 5), torch.randn(2, 8, 6, 1)
    q, k, v = head.query(pixels), head.key(objects), head.value(objects)
    expected = torch.empty_like(q)
    for b in range(2):
        for y in range(3):
            for x in range(5):
                attention = (q[b, :, y, x] @ k[b, :, :, 0] / 16**0.5).softmax(0)  # (K,)
                expected[b, :, y, x] = v[b, :, :, 0] @ attention
    torch.testing.assert_close(head.context(pixels, objects), head.up(expected))


@torch.no_grad()
def test_ocr_head():
    head = peers.OCRHead(2 + 3 + 4 + 5, 7, channels=8, key_channels=4).eval()
    branches = [torch.randn(2, c, 16 // s, 24 // s) for c, s in ((2, 1), (3, 2), (4, 4), (5, 8))]
    seen = {}
    for name in ("pixels", "up", "fuse"):
        head.get_submodule(name).register_forward_hook(lambda _m, i, o, name=name: seen.__setitem__(name, (i[0], o)))
    scores = head(branches)
    assert scores.shape == (2, 7, 16, 24)
    assert torch.equal(seen["fuse"][0], torch.cat([seen["up"][1], seen["pixels"][1]], 1))
    for i in range(4):
        others = [torch.randn_like(b) if i == j else b for j, b in enumerate(branches)]
        assert not torch.equal(head(others), scores), f"branch {i}"


@torch.no_grad()
def test_mla_head_adds_from_the_deepest_layer_down():
    head = peers.MLAHead(12, 5, channels=8, head_channels=4).eval()
    layers = [torch.randn(2, 12, 3, 3) for _ in range(4)]
    assert head(layers).shape == (2, 5, 12, 12)
    seen = {}
    for i, smooth in enumerate(head.smooth):
        smooth.register_forward_hook(lambda _module, inputs, _output, i=i: seen.__setitem__(i, inputs[0]))
    head(layers)
    maps = [
        lateral(norm(layer.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (3, 3)))
        for lateral, norm, layer in zip(head.lateral, head.norms, layers, strict=True)
    ]
    for i in range(4):
        torch.testing.assert_close(seen[i], sum(maps[i:]))


@torch.no_grad()
def test_settled_networks_keep_values_small():
    convolutions = [torch.nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(12)]
    for convolution in convolutions:
        torch.nn.init.normal_(convolution.weight)
    layers = [layer for c in convolutions for layer in (c, torch.nn.BatchNorm2d(8, momentum=0.3), torch.nn.ReLU())]
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), *layers).eval()
    im = torch.randn(1, 3, 32, 32)
    assert network(im).abs().max() > 1e5
    assert peers.settled(network).eval()(im).abs().max() < 100
    assert {m.momentum for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.3}


# ---------------------------------------------------------------------------------------------------------------------
# Scores of queries


@pytest.mark.parametrize("name", ["Mask2Former", "Eomt"])
def test_query_scores_are_transformers_post_processing(name):
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, f"{name}ImageProcessor", None)
    if processor is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}ImageProcessor")
    side = 384  # Mask2Former's first resizes masks to this
    classes, masks = 3 * torch.randn(2, 4, 7), 3 * F.interpolate(torch.randn(2, 4, 12, 12), (side, side))
    found = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks, patch_offsets=None)
    kwargs = {"size": {"shortest_edge": side, "longest_edge": side}} if name == "Eomt" else {}
    try:
        labels = processor().post_process_semantic_segmentation(found, target_sizes=[(100, 140)] * 2, **kwargs)
    except ImportError as error:  # torchvision
        pytest.skip(str(error))
    scores = peers.semantic_scores(classes, masks)
    assert scores.shape == (2, 6, side, side)
    ours = peers.resize(scores, (100, 140)).argmax(1)
    assert len(ours.unique()) > 2
    assert torch.equal(ours, torch.stack(list(labels)))


def test_query_scores_by_hand():
    classes = torch.tensor([[[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]])  # 2 queries, 2 classes and "no object"
    masks = torch.tensor([[[[0.5]], [[-0.5]]]])
    p, m = classes.softmax(-1)[0], masks.sigmoid()[0, :, 0, 0]
    expected = [p[0, k] * m[0] + p[1, k] * m[1] for k in range(2)]
    torch.testing.assert_close(peers.semantic_scores(classes, masks).flatten(), torch.stack(expected))


# ---------------------------------------------------------------------------------------------------------------------
# Whole networks with storage, on small images


@torch.no_grad()
def test_a_smp_network_runs():
    pytest.importorskip("segmentation_models_pytorch")
    network = peers._deeplabv3plus_os16("resnet18", 5, 64).eval()
    assert network(torch.randn(1, 3, 64, 64)).shape == (1, 5, 16, 16)


@torch.no_grad()
def test_a_timm_network_runs():
    network = peers._deeplabv3plus("resnet18", 5, 64).eval()
    scores = network(torch.randn(1, 3, 64, 96))
    assert scores.shape == (1, 5, 16, 24)
    assert scores.isfinite().all()


@torch.no_grad()
def test_layers_are_those_of_the_vit():
    pytest.importorskip("timm")
    sizes = {"img_size": 32, "embed_dim": 24, "depth": 4, "num_heads": 2}
    features = peers._vit_layers("vit_tiny_patch16_224", (0, 1, 2, 3), **sizes).eval()
    vit, im = features.model, torch.randn(2, 3, 32, 32)
    x, expected = vit._pos_embed(vit.patch_embed(im)), []
    for block in vit.blocks:
        x = block(x)
        expected.append(x)
    maps = features(im)
    assert maps[0].shape == (2, 24, 2, 2)
    for found, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), wanted)
    assert peers.MLAHead(24, 5, channels=8, head_channels=4).eval()(maps).shape == (2, 5, 8, 8)
