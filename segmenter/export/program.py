"""A Segmenter as one program of torch.export, from uint8 pixels to labels, for any batch, height and width."""

import copy
import functools
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from segmenter.config import NORMALIZATION
from segmenter.dropin.accelerate import restore
from segmenter.encoder import VisionTransformer
from segmenter.kernels.reference import label_dtype
from segmenter.layers import resize_pos_embed
from segmenter.model import Segmenter
from segmenter.ops import EAGER, Automatic, Operators

OUTPUTS = ("labels", "logits", "masks")
Size = tuple[int, int]


class ExportError(RuntimeError):
    """The export failed, or what was written does not compute what the model computes. No file is left."""


class Pipeline(nn.Module):
    """From pixels to labels, written so that no step depends on what batch, height and width are.

    Args:
        model: a `Segmenter` that runs eager PyTorch; `eager_twin` makes one. It is changed: its encoder gets another
            `embed`. output: one of OUTPUTS.

    `forward` takes pixels (B, H, W, 3) uint8 and gives, for output
        "labels": (B, H, W) uint8, int16 above 256 classes, int32 above 32,768.
        "logits": (B, n_cls, H, W) float32. "masks": (B, n_cls, ceil(H/P), ceil(W/P)) float32, before upsampling.
    """

    def __init__(self, model: Segmenter, output: str):
        super().__init__()
        self.model = model
        self.output = output
        parameter = next(model.parameters())
        self.dtype = parameter.dtype
        for name, values in zip(("mean", "std"), NORMALIZATION[model.info.normalization], strict=True):
            self.register_buffer(name, torch.tensor(values, device=parameter.device).view(1, 3, 1, 1))
        model.encoder.embed = functools.partial(_embed, model.encoder)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        H, W = pixels.shape[1:3]
        P = self.model.patch_size
        gh, gw = (H - 1) // P + 1, (W - 1) // P + 1
        # the order of segmenter.inference.images.normalize, so that the numbers are the same
        im = (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        # P - 1 zeros always, in place of as many as are missing: the patches begin and end where they should, and no
        # size depends on a remainder
        im = F.pad(im, (0, P - 1, 0, P - 1)).to(self.dtype)
        x = self.model.encoder(im, return_features=True)[:, self.model.encoder.n_extra_tokens :]
        masks = self.model.decoder(x, (gh * P, gw * P)).float()
        if self.output == "masks":
            return masks
        logits = F.interpolate(masks, size=(gh * P, gw * P), mode="bilinear", align_corners=False)
        # a slice would make the export ask whether it leaves anything out, and then hold for one answer only
        rows, columns = torch.arange(H, device=masks.device), torch.arange(W, device=masks.device)
        if self.output == "logits":
            return logits.index_select(2, rows).index_select(3, columns)
        labels = logits.argmax(1).to(label_dtype(self.model.n_cls))
        return labels.index_select(1, rows).index_select(2, columns)


def _embed(encoder: VisionTransformer, im: torch.Tensor) -> torch.Tensor:
    """`VisionTransformer.embed` without a branch: (B, 3, H + P - 1, W + P - 1) -> tokens (B, n_extra + gh * gw, d)."""
    P = encoder.patch_size
    x = encoder.patch_embed(im)
    x = torch.cat([token.expand(x.shape[0], -1, -1) for token in encoder.extra_tokens()] + [x], dim=1)
    if encoder.pos_embed is None:
        return x
    # the formula of the convolution, letter by letter: torch.export has to see that the numbers of tokens are the same
    return x + positions(encoder, ((im.shape[2] - P) // P + 1, (im.shape[3] - P) // P + 1))


def positions(encoder: VisionTransformer, grid: Size) -> torch.Tensor:
    """The encoder's `positions` for a grid of patches (gh, gw), (1, n_extra + gh * gw, d), without a branch.

    It is always resampled, which changes no bit at the model's own grid. Where pos_embed_check="tokens" takes the rows
    as they are, because their number fits, they are picked by their number, at the price of one gather.
    """
    embedding, n_extra, old = encoder.pos_embed, encoder.n_extra_positions, encoder.patch_embed.grid_size
    # in float32 always: the interpolation of half types cannot be traced for all sizes at once, and rounds more
    resampled = resize_pos_embed(embedding.float(), old, grid, n_extra, encoder.pos_embed_mode).to(embedding.dtype)
    if encoder.pos_embed_check == "tokens":
        last = embedding.shape[1] - 1
        rows = torch.arange(n_extra + grid[0] * grid[1], device=embedding.device)
        resampled = torch.where((rows[-1:] == last)[:, None], embedding[:, rows.clamp(max=last)], resampled)
    return F.pad(resampled, (0, 0, encoder.n_extra_tokens - n_extra, 0))


def eager_twin(model: Segmenter, dtype: torch.dtype | None = None) -> Segmenter:
    """A model with the same weights whose every operation is eager PyTorch; `model` stays what it is.

    The twin shares parameters and buffers with `model`, unless `dtype` is another than theirs.
    """
    shares = dtype is None or dtype == next(model.parameters()).dtype
    shared = [*model.parameters(), *model.buffers()] if shares else []
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    restore(twin)
    for module in twin.modules():
        if isinstance(module.__dict__.get("ops"), (Operators, Automatic)):
            module.ops = EAGER
    return twin if shares else twin.to(dtype)


def trace(model: Segmenter, output: str = "labels", dtype: torch.dtype | None = None) -> torch.export.ExportedProgram:
    """The model from pixels to `output` as a program of torch.export; see `Pipeline` for what goes in and comes out.

    Batch, height and width are dynamic: batch from 1, height and width from the patch size + 1 (a grid of one row or
    column would be a program of its own to torch.export).

    Args:
        model: a `Segmenter` in evaluation mode, of any implementation; it is not changed. output: one of OUTPUTS.
        dtype: type of the network, by default that of the model.
    Raises:
        TypeError, RuntimeError, ValueError: the model or an argument cannot be used. ExportError: the model holds
            operators that are not PyTorch's own, which a file would not bring along.
    """
    check_exportable(model)
    if output not in OUTPUTS:
        raise ValueError(f"output={output!r} is unknown; choose one of {', '.join(OUTPUTS)}")
    least = model.patch_size + 1
    side = max(model.info.window_size, least + 1)
    device = next(model.parameters()).device
    # what a compiler tunes for: a batch, so that nothing holds for one image only, of the size of windows
    example = torch.zeros(2, side, side + 1, 3, dtype=torch.uint8, device=device)
    sizes = (("batch", 1), ("height", least), ("width", least))  # PyTorch 2.6 takes none without a largest size
    dims = {i: torch.export.Dim(name, min=smallest, max=2**31 - 1) for i, (name, smallest) in enumerate(sizes)}
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        pipeline = Pipeline(eager_twin(model, dtype), output).eval()
        program = torch.export.export(pipeline, (example,), dynamic_shapes={"pixels": dims})
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    foreign = sorted({name for graph in graphs for node in graph.nodes if (name := _foreign_operator(node.target))})
    if foreign:
        raise ExportError(f"the model holds operators that a file cannot bring along: {', '.join(foreign)}")
    return program


def check_exportable(model: nn.Module) -> None:
    """Raises TypeError, RuntimeError or ValueError, saying why, if `model` cannot be exported."""
    if not isinstance(model, Segmenter) or not isinstance(model.encoder, VisionTransformer):
        inner = f" with a {type(model.encoder).__name__}" if isinstance(model, Segmenter) else ""
        raise TypeError(
            f"only a Segmenter with a VisionTransformer of this package can be exported, not a {type(model).__name__}"
            f"{inner}; segmenter.load_any makes one of the weights of other projects"
        )
    if any(module.training for module in model.modules()):
        raise RuntimeError("the model is in training mode: dropout would become part of the file; call model.eval()")
    if model.info.normalization not in NORMALIZATION:
        raise ValueError(f"model.info.normalization is {model.info.normalization!r}, not {' or '.join(NORMALIZATION)}")
    if model.encoder.channels != 3:
        raise ValueError(f"images of 3 channels are exported; the model takes {model.encoder.channels}")


def _foreign_operator(target: Any) -> str | None:
    """The name of an operator that is not PyTorch's own, else None."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace not in ("aten", "prims", "prim"):
        return str(target)
    return None
