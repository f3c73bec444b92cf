"""`Segmenter`: encoder, decoder, upsampling; and the factory that builds one from a configuration.

Nothing here needs what reads weights or makes labels. The methods that are short cuts to it import it when called:
`masks_of_pixels`, `segment`, `segment_stream`, `compile_inference` from `segmenter.inference`, `attention` from
`segmenter.analysis`, `save_pretrained` and `from_pretrained` from `segmenter.weights`.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from segmenter.config import DECODERS, NORMALIZATION, ConfigError, ModelConfig, ModelInfo
from segmenter.decoder import DecoderLinear, MaskTransformer
from segmenter.encoder import VisionTransformer
from segmenter.guard import why_not_bypass
from segmenter.kernels import reference
from segmenter.kernels.upsample_tiles import MAX_CLASSES
from segmenter.layers import Block, pad_to_multiple
from segmenter.ops import Automatic, OperatorModule, select

ENCODER_HEAD_CLASSES = 1000  # the ImageNet head that every published checkpoint holds


class Segmenter(OperatorModule):
    """Transformer for semantic segmentation (Strudel et al., ICCV 2021).

    Args:
        encoder: a `VisionTransformer`, or a module with `patch_size`, `distilled`, `no_weight_decay()` and
            `forward(im, return_features=True)`. decoder: `DecoderLinear`, `MaskTransformer` or alike. n_cls: classes.
        impl: "eager", "triton" or "auto", of what makes labels of masks; encoder and decoder have their own.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, n_cls: int, impl: str = "auto"):
        super().__init__()
        self.ops = select(impl)
        self.n_cls = n_cls
        self.patch_size = encoder.patch_size
        self.encoder = encoder
        self.decoder = decoder
        self.config: ModelConfig | None = None
        patch_embed = getattr(encoder, "patch_embed", None)
        window = max(getattr(patch_embed, "image_size", (512, 512)))
        self.info = ModelInfo(window_size=window, window_stride=window)

    def train(self, mode: bool = True) -> "Segmenter":
        if mode:
            self._end_graphs()
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True) -> "Segmenter":  # what `to`, `half` and the like do
        self._end_graphs()
        return super()._apply(fn, recurse)

    def _end_graphs(self) -> None:
        """Of `segment` and the like, if there can be any: they hold memory of the device."""
        if (graphs := sys.modules.get("segmenter.inference.network_graphs")) is not None:
            graphs.forget(self)

    @property
    def impl(self) -> str:
        """What runs on the device where the model is: "eager" or "triton"; "unknown" for foreign encoder and decoder.

        `segmenter.ops.parts` tells it part by part.
        """
        parameter = next(self.parameters(), torch.empty(0))
        modules = (module for part in (self.encoder, self.decoder) for module in part.modules())
        names = {module.ops.on(parameter).name for module in modules if isinstance(module, OperatorModule)}
        return " and ".join(sorted(names)) or "unknown"

    def implementations(self, parameter: torch.Tensor) -> Iterator[tuple[str, str]]:
        name = self.ops.on(parameter).name
        too_many = name == "triton" and self.n_cls > MAX_CLASSES and isinstance(self.ops, Automatic)
        yield "windows_argmax", f"eager ({self.n_cls} classes)" if too_many else name

    def recompute(self, level: int) -> "Segmenter":
        """What backward passes compute again, so that forward passes need not keep it. Returns the model.

        Per block, in bytes a token and column of activations, if all of them are 16 bits wide:

        0: 20. Of 1 and 2 nothing.
        1: 12. The MLP's hidden layer, a tenth more of a block's products. This is how a model is made.
        2: 6. Queries, keys and values as well, unless positions are rotary: then it is as 1.
        3: 2. Everything: whole blocks, by torch.utils.checkpoint.

        From 1 on gradients are the same bit for bit. 0 to 2 are levels of the kernels; eager PyTorch keeps what it
        keeps, unless it is 3. Dropout of a layer makes its half of a block run layer by layer, which keeps more.
        Parameters are not counted, nor what is kept of a block of another class.

        Raises:
            ValueError: no such level.
        """
        if level not in range(4):
            raise ValueError(f"level must be 0, 1, 2 or 3, got {level!r}")
        for module in self.modules():
            if isinstance(module, Block):
                module.recompute = level
        return self

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone."""
        parts = {"encoder": self.encoder, "decoder": self.decoder}
        return {f"{prefix}.{name}" for prefix, part in parts.items() for name in part.no_weight_decay()}

    def masks(self, im: torch.Tensor) -> torch.Tensor:
        """Low-resolution class masks, before any upsampling.

        Args:
            im: (B, 3, H, W), normalised, any H and W >= 1; padded with zeros to multiples of the patch size P.
        Returns:
            (B, n_cls, ceil(H/P), ceil(W/P)) logits.
        Raises:
            ValueError, TypeError: im has another shape or is not floating point.
        """
        _check_image(im, getattr(self.encoder, "channels", 3))
        im = pad_to_multiple(im, self.patch_size)
        x = self.encoder(im, return_features=True)[:, self._n_extra_tokens :]
        return self.decoder(x, im.shape[-2:])

    def masks_of_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """`masks` of images as bytes, normalised as the model's `info` says.

        On a GPU, normalisation and patch embedding are one kernel that reads the bytes (`encoder.embed_pixels`). An
        encoder of another class, or with hooks, is called with the normalised image, and so is a `masks` of one's own.

        Args:
            pixels: (B, H, W, 3) uint8, on the model's device, any H and W >= 1.
        Returns:
            (B, n_cls, ceil(H/P), ceil(W/P)) logits.
        Raises:
            ValueError, TypeError: pixels have another shape or are no bytes.
        """
        if not isinstance(pixels, torch.Tensor) or pixels.dtype != torch.uint8:
            what = pixels.dtype if isinstance(pixels, torch.Tensor) else type(pixels).__name__
            raise TypeError(f"expected uint8 images (B, H, W, 3), got {what}; for normalised images use masks()")
        _, grid_h, grid_w = reference.patch_grid(pixels, self.patch_size)
        mean, std = NORMALIZATION[self.info.normalization]
        overridden = type(self).masks is not Segmenter.masks or "masks" in self.__dict__
        if overridden or why_not_bypass(self.encoder, (VisionTransformer,)) is not None:
            parameter = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
            return self.masks(reference.normalized(pixels, mean, std, parameter.dtype))
        tokens = self.encoder.embed_pixels(pixels, mean, std)
        x = self.encoder.forward_tokens(tokens, True, (grid_h, grid_w))[:, self._n_extra_tokens :]
        return self.decoder(x, (grid_h * self.patch_size, grid_w * self.patch_size))

    def forward(self, im: torch.Tensor) -> torch.Tensor:
        """Normalised image (B, 3, H, W) -> logits (B, n_cls, H, W); see `masks` for the checks.

        Masks are upsampled bilinearly (align_corners=False) to the padded size, then the padding is cut off.
        Full-resolution logits are large: `segment` gives labels without them.
        """
        masks = self.masks(im)
        size = (masks.shape[-2] * self.patch_size, masks.shape[-1] * self.patch_size)
        logits = F.interpolate(masks, size=size, mode="bilinear", align_corners=False)
        return logits[..., : im.shape[-2], : im.shape[-1]]

    def segment(self, image: Any, **kwargs: Any) -> Any:
        """Labels of an image at its own size; see `segmenter.inference.segment.segment_image`."""
        from segmenter.inference.segment import segment_image

        return segment_image(self, image, **kwargs)

    def segment_stream(self, images: Any, **kwargs: Any) -> Any:
        """Labels of many images, read in threads, run in batches; see `segmenter.inference.stream.segment_stream`."""
        from segmenter.inference.stream import segment_stream

        return segment_stream(self, images, **kwargs)

    def attention(self, image: Any, **kwargs: Any) -> Any:
        """Where points, classes or class tokens attend to in an image of any size; see
        `segmenter.analysis.maps.attention`, and `segmenter.attention_statistics` for numbers of all tokens."""
        from segmenter.analysis.maps import attention

        return attention(self, image, **kwargs)

    def compile_inference(self, batch: int, height: int, width: int, **kwargs: Any) -> Any:
        """A function from images (B, H, W, 3) uint8 to labels (B, H, W), as a CUDA graph for each shape.

        Args:
            batch, height, width: the shape to capture now; others follow as they come.
            kwargs: dtype, window_size, window_stride as for `segment`; window_batch_size (8), windows a forward call;
                max_shapes (8), the captured shapes that are kept.
        Returns:
            `segmenter.inference.compiled_inference.CompiledInference`; on a CPU it is the same without graphs.
        """
        from segmenter.inference.compiled_inference import CompiledInference

        compiled = CompiledInference(self, **kwargs)
        compiled.capture(batch, height, width)
        return compiled

    def get_attention_map_enc(self, im: torch.Tensor, layer_id: int) -> torch.Tensor:
        """Encoder attention (B, heads, T, T), T = extra tokens + patches; `im` is not padded."""
        return self.encoder.get_attention_map(im, layer_id)

    def get_attention_map_dec(self, im: torch.Tensor, layer_id: int) -> torch.Tensor:
        """Mask transformer attention (B, heads, T, T), T = patches + n_cls; `im` is not padded."""
        if not hasattr(self.decoder, "get_attention_map"):
            raise ValueError("the linear decoder has no attention; ask for the encoder's map")
        x = self.encoder(im, return_features=True)[:, self._n_extra_tokens :]
        return self.decoder.get_attention_map(x, layer_id)

    def save_pretrained(self, folder: Any, **kwargs: Any) -> None:
        """Writes a folder with model.safetensors and config.json; see `segmenter.weights.load.save_pretrained`."""
        from segmenter.weights.load import save_pretrained

        save_pretrained(self, folder, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Uploads what `save_pretrained` would write, with a model card; see `segmenter.weights.hub.push_to_hub`."""
        from segmenter.weights.hub import push_to_hub

        return push_to_hub(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(cls, folder: Any, **kwargs: Any) -> "Segmenter":
        """Reads what `save_pretrained` wrote; see `segmenter.weights.load.from_pretrained`."""
        from segmenter.weights.load import from_pretrained

        return from_pretrained(folder, **kwargs)

    @property
    def _n_extra_tokens(self) -> int:
        found = getattr(self.encoder, "n_extra_tokens", None)
        return 1 + self.encoder.distilled if found is None else found


def create_vit(model_cfg: dict[str, Any] | ModelConfig, impl: str = "auto") -> VisionTransformer:
    """An encoder with random weights. (The published function of this name downloads pretrained ones; here
    `VisionTransformer.load_pretrained` reads them from a file.)

    Args:
        model_cfg: as of `create_segmenter`; a mapping needs neither decoder nor n_cls. It is not changed.
    Raises:
        ConfigError, ImplementationError: as `create_segmenter`.
    """
    if isinstance(model_cfg, ModelConfig):
        config = model_cfg
    else:
        config = ModelConfig.from_dict({"n_cls": ENCODER_HEAD_CLASSES, "decoder": {"name": "linear"}, **model_cfg})
    return VisionTransformer(
        config.image_size,
        config.patch_size,
        config.n_layers,
        config.d_model,
        4 * config.d_model,
        config.n_heads,
        ENCODER_HEAD_CLASSES,
        config.dropout,
        config.drop_path_rate,
        config.distilled,
        norm_eps=config.norm_eps,
        pos_embed_mode=config.pos_embed_mode,
        pos_embed_check=config.pos_embed_check,
        layer_scale=config.layer_scale,
        n_registers=config.n_registers,
        class_token=config.class_token,
        final_norm=config.final_norm,
        pos_embed=config.pos_embed,
        rope_theta=config.rope_theta,
        impl=impl,
    )


def create_decoder(encoder: nn.Module, decoder_cfg: dict[str, Any], impl: str = "auto") -> nn.Module:
    """A decoder with random weights for an encoder that has `d_model` and `patch_size`.

    Args:
        decoder_cfg: name ("linear" or "mask_transformer"), n_cls and, of a mask transformer, n_layers, drop_path_rate,
            dropout, with the published defaults; of a linear decoder, batch_norm (False). It is not changed.
    Raises:
        ConfigError: an unknown name. ImplementationError: impl cannot run.
    """
    kwargs = dict(decoder_cfg)
    name, n_cls = kwargs.pop("name"), kwargs.pop("n_cls")
    d, patch_size = encoder.d_model, encoder.patch_size
    if "linear" in name:
        return DecoderLinear(n_cls, patch_size, d, kwargs.get("batch_norm", False))
    if name not in DECODERS:
        raise ConfigError(f"decoder {name!r} is unknown; choose one of {', '.join(DECODERS)}")
    if n_cls == 2:
        warnings.warn(
            "mask transformer with 2 classes: the LayerNorm over classes leaves only the sign and no gradient; "
            "use 3 classes or the linear decoder",
            stacklevel=3,
        )
    kwargs = {**DECODERS[name], **kwargs}
    return MaskTransformer(n_cls, patch_size, d, n_heads=d // 64, d_model=d, d_ff=4 * d, impl=impl, **kwargs)


def create_segmenter(model_cfg: dict[str, Any] | ModelConfig, impl: str = "auto") -> Segmenter:
    """Builds a model with random weights. (The published function of this name downloads a pretrained encoder; here
    `segmenter.weights.load.load_any` puts a decoder on one.)

    Args:
        model_cfg: `net_kwargs` of a variant.yml, or a ModelConfig (`segmenter.config.preset("Seg-S-Mask/16")`).
            The argument is not changed.
        impl: "eager", "triton" or "auto".
    Raises:
        ConfigError: the configuration cannot be built. ImplementationError: impl cannot run.
    """
    config = model_cfg if isinstance(model_cfg, ModelConfig) else ModelConfig.from_dict(model_cfg)
    encoder = create_vit(config, impl)
    decoder = create_decoder(encoder, {**config.decoder, "n_cls": config.n_cls}, impl)
    model = Segmenter(encoder, decoder, config.n_cls, impl)
    model.config = config
    model.info.normalization = config.normalization
    return model


def _check_image(im: torch.Tensor, channels: int) -> None:
    if not isinstance(im, torch.Tensor):
        raise TypeError(f"expected a tensor (B, {channels}, H, W), got {type(im).__name__}; for images use segment()")
    if im.ndim != 4 or im.shape[1] != channels or 0 in im.shape[2:]:
        raise ValueError(f"expected an image batch (B, {channels}, H, W), got {tuple(im.shape)}")
    if not im.is_floating_point():
        raise TypeError(f"expected a normalised float image, got {im.dtype}; for uint8 images use segment()")
