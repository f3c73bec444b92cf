"""Other segmentation models beside ours, in one run: the rows of the paper's poster, and today's. Random weights.

Every model runs in the session's type, channels last, as its library gives it; scores are resized to the image and
the best class is taken, alike for all. Ours run as `impl="auto"` would run them here.

EoMT has rows of its own besides: as transformers runs it, preprocessing and post-processing included, and on our
kernels, which give the same labels.
"""

import copy
import functools

import pytest
import torch

from bench import gate, models, peers, profiling, providers
from bench.harness import Call, Row
from bench.shapes import Work
from segmenter.classes import generic_classes
from segmenter.eomt import Eomt
from segmenter.ops import why_not_on

N_CLS = 150
GPU_BATCH, CPU_SHRINK = 8, 2  # a CPU gets one image of half the side at a time
SMOKE_PEERS = ("DeepLabv3+ ResNet-101", "Seg-B†/16 DeiT-B/16")  # the others are built by tests/bench/test_peers.py


@torch.no_grad()
def count(run, im):
    """Operations of one call, those of attention on a CPU included, for which torch's own counter has no formula."""
    with profiling.Counter() as counter:
        run(im)
    return sum(counted.work.flops for counted in counter.found.values())


class Theirs:
    """Another's model: pixels (B, H, W, 3) uint8 to labels (B, H, W)."""

    def __init__(self, peer, size, device, dtype):
        try:
            network = peer.build(N_CLS, size)
        except ImportError as error:
            raise providers.Unavailable(str(error)) from None
        self.network = network.to(device, dtype, memory_format=torch.channels_last)
        self.normalize = models.Normalize("vit", dtype, device)
        self.parameters = sum(p.numel() for p in network.parameters())
        self.flops = count(network, torch.zeros(1, 3, size, size, device=device, dtype=dtype))

    @torch.inference_mode()
    def scores(self, pixels):
        im = self.normalize(pixels).contiguous(memory_format=torch.channels_last)
        return peers.resize(self.network(im), im.shape[-2:])

    @torch.inference_mode()
    def labels(self, pixels):
        return self.scores(pixels).argmax(1).to(torch.uint8)

    def check(self, labels, pixels):
        """Without trained weights there is nothing to compare with: sizes, and that nothing overflows."""
        if labels.shape != pixels.shape[:3] or not torch.isfinite(self.scores(pixels[:1])).all():
            raise gate.GateError("labels of another size than the image, or scores that are not finite")
        return "labels of the image's size from finite scores"


class Ours:
    """Our model, the way `impl="auto"` runs it here."""

    def __init__(self, peer, size, device, dtype):
        self.id, self.dtype, self.model = peer.id, dtype, peer.build(N_CLS, size).to(device)
        kernels = device.type == "cuda" and why_not_on("cuda", device.index) is None
        self.labels = models.labels_of(self.model, "triton" if kernels else "pruned", dtype)
        unused = sum(p.numel() for p in self.model.encoder.head.parameters())  # the ImageNet head
        self.parameters = sum(p.numel() for p in self.model.parameters()) - unused
        with providers.using(self.model, providers.PUBLISHED):
            self.flops = count(self.model.masks, torch.zeros(1, 3, size, size, device=device))

    def check(self, labels, pixels):
        scores = models.exact_scores(self.model, pixels[:1])
        eager = models.labels_of(self.model, "eager", self.dtype)(pixels[:1])
        return gate.check_labels(self.id, labels[:1], scores, eager, models.LABEL_FLOOR[self.dtype])


def _published(peer):
    figures = {"ss": peer.miou_ss, "ms": peer.miou_ms, "im_s": peer.images_per_second, "params_m": peer.parameters}
    found = {key: figure and figure.value for key, figure in figures.items()}
    found["gpu"] = peer.images_per_second and peer.images_per_second.gpu
    found["source"] = ", ".join(sorted({figure.source for figure in figures.values() if figure}))  # of peers.SOURCES
    return found | {"crop": peer.crop}


@pytest.fixture(autouse=True)
def chosen_convolutions():
    """cuDNN tries its algorithms for each shape, as a careful user of a convolutional network has it do."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    yield
    torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize("row", range(len(peers.PEERS)), ids=[peer.id for peer in peers.PEERS])
def bench_peers(benchmark, harness, row):
    peer = peers.PEERS[row]
    on_gpu = harness.device.type == "cuda"
    if harness.smoke and peer.id not in SMOKE_PEERS:
        pytest.skip("smoke tests build two of them")
    size = 64 if harness.smoke else peer.size if on_gpu else peer.size // CPU_SHRINK // 32 * 32
    batch = GPU_BATCH if on_gpu else 1
    extra = {"model": peer.name, "backbone": peer.backbone, "group": peer.group, "ours": peer.ours}
    extra |= {"size": size, "batch": batch, "published": _published(peer)}

    def inputs():
        return (torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=harness.device),)

    def build():
        if peer.build is None:
            raise providers.Unavailable("published figures only")
        model = (Ours if peer.ours else Theirs)(peer, size, harness.device, harness.dtype)
        extra["parameters"] = model.parameters
        work = Work(model.flops * batch, model.parameters * harness.dtype.itemsize + 4 * batch * size**2)
        return Call(model.labels, inputs, lambda labels, first: model.check(labels, *first), work)

    harness.run(benchmark, Row("peers", peer.id, None, build, batch, extra=extra, name=f"peers-{peer.id}"))


# ---------------------------------------------------------------------------------------------------------------------
# EoMT, theirs and ours

EOMT = {"dinov2": ("Eomt", "DINOv2 ViT-L/16"), "dinov3": ("EomtDinov3", "DINOv3 ViT-L/16")}
WAYS = {
    "transformers": "EoMT-L, transformers as it is",
    "ours": "EoMT-L, on our kernels",
    "graph": "EoMT-L, on our kernels, CUDA graph",
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8, "num_blocks": 2,
         "num_queries": 9, "num_upscale_blocks": 1}  # fmt: skip


@functools.lru_cache(1)
def _eomt_network(prefix, size, smoke):
    """With seeded random weights, in float32 on the CPU. One is kept."""
    more = {"intermediate_size": 64} if prefix == "EomtDinov3" else {}
    torch.manual_seed(0)
    return peers.eomt(prefix, N_CLS, size, **(SMALL | more if smoke else {})).eval()


class EomtLabels:
    """Pixels (B, size, size, 3) uint8 to labels, by transformers (`impl=None`) or by ours."""

    def __init__(self, prefix, size, device, dtype, impl, smoke):
        try:
            (processor,) = peers.library("transformers", "EomtImageProcessor")
            network = _eomt_network(prefix, size, smoke)
            self.processor = processor(size={"shortest_edge": size, "longest_edge": None}, do_split_image=True)
        except ImportError as error:
            raise providers.Unavailable(str(error)) from None
        self.network = copy.deepcopy(network).to(device, dtype)
        self.parameters = sum(p.numel() for p in network.parameters())
        self.model = None
        if impl is not None:
            model = Eomt(self.network, self.processor, generic_classes(N_CLS), impl=impl)
            self.model = model.to(device).eval().accelerate()

    @torch.inference_mode()
    def scores(self, pixels):
        """transformers' (B, n_cls, size, size)."""
        found, sizes = self._found(pixels)
        post = self.processor.post_process_semantic_segmentation
        return torch.stack([x["segmentation_scores"] for x in post(found, sizes, return_segmentation_scores=True)])

    @torch.inference_mode()
    def labels(self, pixels):
        if self.model is not None:
            return self.model.labels_of_pixels(pixels)[0]
        return torch.stack(self.processor.post_process_semantic_segmentation(*self._found(pixels))).to(torch.uint8)

    def _found(self, pixels):
        inputs = self.processor(images=[*pixels.permute(0, 3, 1, 2)], return_tensors="pt")
        windows = inputs["pixel_values"].to(pixels.device, next(self.network.parameters()).dtype)
        return self.network(windows, patch_offsets=inputs["patch_offsets"]), [tuple(pixels.shape[1:3])] * len(pixels)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", EOMT)
def bench_eomt(benchmark, harness, kind, way):
    """Images to labels; ours are checked by transformers' scores in float32."""
    prefix, backbone = EOMT[kind]
    on_gpu = harness.device.type == "cuda"
    size = 32 if harness.smoke else 512 if on_gpu else 256
    batch = GPU_BATCH if on_gpu else 1
    ours = way != "transformers"
    kernels = harness.smoke or (on_gpu and why_not_on("cuda", harness.device.index) is None)
    extra = {"model": WAYS[way], "backbone": backbone, "group": "variant", "ours": ours, "size": size, "batch": batch}

    def run_of(dtype, impl):
        return EomtLabels(prefix, size, harness.device, dtype, impl, harness.smoke)

    def check(labels, inputs):
        pixels, floor = inputs[0][:1], models.LABEL_FLOOR[harness.dtype]
        with providers.float32_products("highest"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            scores = run_of(torch.float32, None).scores(pixels)
        return gate.check_labels(WAYS[way], labels[:1], scores, run_of(harness.dtype, None).labels(pixels), floor)

    def build():
        if way == "graph" and not on_gpu:
            raise providers.Unavailable("no CUDA device")
        run = run_of(harness.dtype, ("triton" if kernels else "auto") if ours else None)
        extra["parameters"] = run.parameters
        call = run.model.compile_inference(batch, size, size) if way == "graph" else run.labels
        zeros = torch.zeros(1, size, size, 3, dtype=torch.uint8, device=harness.device)
        work = Work(count(run_of(harness.dtype, None).labels, zeros) * batch, run.parameters * harness.dtype.itemsize)
        return Call(call, inputs, check, work)

    def inputs():
        return (torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=harness.device),)

    row = Row("peers", f"EoMT {kind} {way}", None, build, batch, replays=way == "graph", extra=extra)
    row.name = f"peers-eomt-{kind}-{way}"
    harness.run(benchmark, row)
