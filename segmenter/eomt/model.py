"""`Eomt`: images to labels, panoptic segments and instances by transformers' network, our kernels, its post-processing.

Queries join the patches in the last blocks, whose attention, like all others', is ours (`segmenter.accelerate`). Labels
are made of masks and classes by one operator (`segmenter.kernels.queries_argmax`), which never has the scores of all
classes at all pixels.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn as nn

from segmenter.classes import ClassSet
from segmenter.config import ModelInfo
from segmenter.dropin.accelerate import Report, accelerate
from segmenter.eomt.preprocessing import Geometry, Preprocessing
from segmenter.inference.compiled_inference import CompiledInference
from segmenter.inference.images import read_image
from segmenter.inference.precision import compute_dtype
from segmenter.inference.segment import segment_image, usual_batch_size
from segmenter.inference.stream import segment_stream
from segmenter.inference.transfers import upload
from segmenter.inference.windows import check_finite
from segmenter.ops import select, why_not_on


class Eomt(nn.Module):
    """EoMT for semantic, instance or panoptic segmentation; `segmenter.eomt.load_eomt` makes it of a folder.

    Args:
        network: transformers' EomtForUniversalSegmentation or EomtDinov3ForUniversalSegmentation. It is changed: see
            `accelerate`, and masked attention, which EoMT is trained with, is decided by numbers and not by a buffer.
        processor: its EomtImageProcessor. classes: names and colours. source: where the weights came from, for people.
        impl: "eager", "triton" or "auto", of all that has a kernel.
    Raises:
        CheckpointError: the preprocessing is not EoMT's. ImplementationError: impl cannot run.

    Attributes:
        report: what of the network runs on kernels; None while `accelerate` was not called.
    """

    def __init__(self, network: nn.Module, processor: Any, classes: ClassSet, source: str = "", impl: str = "auto"):
        super().__init__()
        self.ops = select(impl)
        self.network, self.classes, self.n_cls = network, classes, network.config.num_labels
        self.preprocessing = Preprocessing(processor, network.config.image_size)
        side = network.config.image_size
        name = classes.name if classes.name != "generic" else None
        self.info = ModelInfo("deit", side, side, name, weights="trained", source=source)
        self.report: Report | None = None
        _decide_masks(network)

    @property
    def impl(self) -> str:
        """What runs on the device where the model is: "eager" or "triton". `report` tells it layer by layer."""
        return self.ops.on(next(self.parameters())).name

    @property
    def config(self) -> "Settings":
        """The configuration of the network, and as "preprocessing" what the folder says of that."""
        return Settings({**self.network.config.to_dict(), "preprocessing": self.preprocessing.settings()})

    def accelerate(self) -> "Eomt":
        """Puts the kernels into the network, if they can run where it is; called again after it has moved to a GPU.

        The network is called once, with an empty image, to see which of its layers get masks or positions.
        """
        parameter = next(self.parameters())
        if self.ops.name != "eager" and why_not_on(parameter.device.type, parameter.device.index) is None:
            side = self.network.config.image_size
            self.report = accelerate(self.network, example=torch.zeros(1, 3, side, side).to(parameter))
        return self

    def forward(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks (B, Q, h, w) and classes (B, Q, n_cls + 1), logits, of normalised windows (B, 3, side, side)."""
        found = self.network(windows)
        return found.masks_queries_logits, found.class_queries_logits

    def queries(
        self, pixels: torch.Tensor, batch_size: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Geometry]:
        """Masks and classes of all windows of images.

        Args:
            pixels: (B, H, W, 3) uint8 on the model's device. batch_size: windows a forward call; by default 1 on a CPU,
                8 elsewhere.
        Returns:
            masks (B, n, Q, gh, gw), classes (B, n, Q, n_cls + 1), and how the n windows of an image lie.
        """
        windows, geometry = self.preprocessing(pixels)
        windows = windows.to(next(self.parameters()).dtype)
        found = [self(part) for part in windows.split(batch_size or usual_batch_size(pixels.device))]
        masks, classes = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True))
        shape = len(pixels), geometry.count
        return masks.unflatten(0, shape), classes.unflatten(0, shape), geometry

    def labels_of_pixels(
        self, pixels: torch.Tensor, batch_size: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels (B, H, W) of images (B, H, W, 3) uint8 on the model's device, and a number that is finite if all
        scores are. It does not wait for the device. (What makes labels of images calls this: see
        `segmenter.inference.segment.labels_of_pixels`.)"""
        masks, classes, geometry = self.queries(pixels, batch_size)
        largest = torch.maximum(masks.abs().max().float(), classes.abs().max().float())
        return self.ops.on(masks).queries_argmax(masks, classes, *geometry), largest

    def refuse(self, options: dict[str, Any]) -> None:
        """Raises ValueError if one of these options, which differ from what is usual, is none of this model's."""
        if options:
            raise ValueError(
                f"EoMT has no {', '.join(options)}: its windows are those that it was trained with "
                f"({self.info.window_size} pixels)"
            )

    def segment(self, image: Any, **kwargs: Any) -> torch.Tensor:
        """Labels (H, W) of an image at its own size, by way of `segmenter.inference.segment.segment_image`.

        Args:
            image: whatever `segmenter.inference.images.read_image` takes. kwargs: batch_size, dtype.
        """
        return segment_image(self, image, **kwargs)

    def segment_stream(self, images: Any, **kwargs: Any) -> Any:
        """Labels of many images, read in threads, run in batches; see `segmenter.inference.stream.segment_stream`."""
        return segment_stream(self, images, **kwargs)

    def panoptic(self, image: Any, *, dtype: str | torch.dtype | None = None, **kwargs: Any) -> dict[str, Any]:
        """What transformers' `post_process_panoptic_segmentation` makes of an image.

        Args:
            image: as of `segment`. dtype: as of `segmenter.inference.segment.segment_image`.
            kwargs: threshold (0.8), mask_threshold (0.5), overlap_mask_area_threshold (0.8), stuff_classes (None).
        Returns:
            {"segmentation": (H, W) ids of segments, -1 for none, "segments_info": [{"id", "label_id", "score"}]}.
        Raises:
            ValueError: the folder is for semantic segmentation. ImageError: the image cannot be read.
        """
        return self._processed("post_process_panoptic_segmentation", image, dtype, kwargs)

    def instances(self, image: Any, *, dtype: str | torch.dtype | None = None, **kwargs: Any) -> dict[str, Any]:
        """What transformers' `post_process_instance_segmentation` makes of an image; as `panoptic`, but where masks
        overlap the last one counts.

        Args:
            kwargs: threshold (0.8).
        """
        return self._processed("post_process_instance_segmentation", image, dtype, kwargs)

    def compile_inference(self, batch: int, height: int, width: int, **kwargs: Any) -> CompiledInference:
        """A function from images (B, H, W, 3) uint8 to labels (B, H, W), as a CUDA graph for each shape.

        Args:
            batch, height, width: the shape to capture now. kwargs: dtype, window_batch_size (8), max_shapes (8).
        Returns:
            `segmenter.inference.compiled_inference.CompiledInference`; on a CPU it is the same without graphs.
        """
        compiled = CompiledInference(self, **kwargs)
        compiled.capture(batch, height, width)
        return compiled

    @torch.inference_mode()
    def _processed(self, what: str, image: Any, dtype: str | torch.dtype | None, options: dict[str, Any]) -> dict:
        if self.preprocessing.split:
            raise ValueError(
                f"this model cuts images into windows, for semantic segmentation; {what} needs one that pads them"
            )
        pixels = torch.from_numpy(read_image(image))[None]
        with compute_dtype(self, dtype):
            masks, classes, geometry = self.queries(upload(pixels, next(self.parameters()).device))
        masks, classes = masks[:, 0].float(), classes[:, 0].float()
        check_finite(torch.maximum(masks.abs().max(), classes.abs().max()))
        found = SimpleNamespace(masks_queries_logits=masks, class_queries_logits=classes, patch_offsets=None)
        return getattr(self.preprocessing.processor, what)(found, target_sizes=[geometry.shape], **options)[0]


class Settings(dict):
    """A dictionary that says `to_dict`, as configurations do."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


def _decide_masks(network: nn.Module) -> None:
    """Makes numbers of the probabilities with which the last blocks mask their attention.

    They are 0 once training has ended. The network looks at them in every call, and each look at a buffer would wait
    for the device, which no CUDA graph can; of what they decide nothing changes. Its state has them as before: what is
    saved without them would be read with 1.
    """
    probabilities: Sequence[float] = tuple(torch.as_tensor(network.attn_mask_probs).tolist())
    del network.attn_mask_probs
    network.attn_mask_probs = probabilities
    network.register_state_dict_post_hook(_write_masks)
    network.register_load_state_dict_pre_hook(_read_masks)


def _write_masks(network: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    state[f"{prefix}attn_mask_probs"] = torch.tensor(network.attn_mask_probs)


def _read_masks(network: nn.Module, state: dict[str, Any], prefix: str, _: Any, strict: bool, missing: list, *__: Any):
    name = f"{prefix}attn_mask_probs"
    if name in state:
        network.attn_mask_probs = tuple(state.pop(name).tolist())
    elif strict:
        missing.append(name)
