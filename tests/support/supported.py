"""Models of other libraries that `accelerate` is tested with, tiny and random, and the table of them in the docs.

python -m tests.support.supported        prints the table of docs/accelerate.md
"""

import dataclasses
import importlib
from typing import Any
from unittest import mock

import torch
import torch.nn as nn

ALL, CORE = "attention and MLP", "attention core"
TIMM = {"pretrained": False, "depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 7}
HF = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
EOMT = {**HF, "num_blocks": 1, "num_queries": 4, "num_upscale_blocks": 1}
SWIGLU = "SwiGLU: the MLP is the model's own"


@dataclasses.dataclass(frozen=True)
class Supported:
    """One kind of model.

    Attributes:
        name: for people. library: "timm" or "transformers".
        made: what it is in the library: a name of timm, or (configuration, model) of transformers.
        became: what its blocks become, in the words of a report. why: what does not, and why.
        arguments: of timm.create_model or of the configuration, beside the small sizes. side: of images, in pixels.
        example: whether `accelerate` needs one to see that blocks get tokens alone.
        half: how the attention half is computed, a name in `blocks.HALVES`.
    """

    name: str
    library: str
    made: Any
    became: str = ALL
    why: str = ""
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    side: int = 32
    example: bool = False
    half: str = "packed"

    def build(self, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
        """The model in evaluation mode, every parameter random (LayerScale starts at 1e-5 in some), and two images."""
        generator = torch.Generator().manual_seed(seed)
        if self.library == "timm":
            model = importlib.import_module("timm").create_model(
                self.made, img_size=self.side, **TIMM, **self.arguments
            )
        else:
            transformers = importlib.import_module("transformers")
            config, cls = (getattr(transformers, name) for name in self.made)
            modeling = importlib.import_module(cls.__module__)
            with mock.patch.multiple(modeling, create=True, EomtLoss=NoLoss, EomtDinov3Loss=NoLoss):
                model = cls(config(**{**HF, **self.arguments}))
        with torch.no_grad():
            for name, p in model.named_parameters():
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(noise * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3 * noise + ("bias" not in name))
            if hasattr(model, "attn_mask_probs"):  # of EoMT: trained models come without masks in the end
                model.attn_mask_probs.zero_()
        return model.eval(), torch.randn(2, 3, self.side, self.side, generator=generator)


class NoLoss:
    """In place of EoMT's, which it makes even if it is not wanted, and which needs scipy."""

    def __new__(cls, **kwargs: Any) -> nn.Module:
        return nn.Identity()


def _of(name: str, *more: Any, **options: Any) -> Supported:
    return Supported(name, "transformers", (f"{more[0]}Config", f"{more[0]}Model"), **{"half": "separate", **options})


def _rotary(name: str, made: str, **options: Any) -> Supported:
    """Of timm."""
    return Supported(name, "timm", made, **{"half": "packed rotary", **options})


SUPPORTED = (
    Supported("ViT, DeiT", "timm", "vit_tiny_patch16_224"),
    Supported("ViT with registers, averaged", "timm", "vit_betwixt_patch16_reg4_gap_256"),
    Supported("ViT with norms of q and k", "timm", "vit_tiny_patch16_224", arguments={"qk_norm": True},
              half="packed normed"),
    Supported("DeiT-III", "timm", "deit3_small_patch16_224"),
    Supported("DINOv2", "timm", "vit_small_patch14_dinov2", side=56),
    Supported("DINOv2 with registers", "timm", "vit_small_patch14_reg4_dinov2", side=56),
    _rotary("DINOv3", "vit_small_patch16_dinov3"),
    _rotary("DINOv3 with biases of q, k, v", "vit_small_patch16_dinov3_qkvb"),
    _rotary("DINOv3+", "vit_small_plus_patch16_dinov3", became="attention", why=SWIGLU),
    _rotary("EVA-02, tiny and small", "eva02_tiny_patch14_224", side=56, became="attention", why=SWIGLU),
    _rotary("EVA-02, base and large", "eva02_base_patch14_224", side=56, half="separate rotary", became="attention",
            why=SWIGLU),
    _rotary("ViT with rotary positions", "vit_medium_patch16_rope_reg1_gap_256"),
    _rotary("RoPE-ViT, axial", "vit_small_patch16_rope_224"),
    _rotary("RoPE-ViT, mixed", "vit_small_patch16_rope_mixed_224"),
    _of("ViT", "ViT"),
    _of("DeiT", "DeiT"),
    _of("ViT-MAE", "ViTMAE", arguments={"mask_ratio": 0.0}),
    _of("DINOv2", "Dinov2"),
    _of("DINOv2 with registers", "Dinov2WithRegisters"),
    _of("SigLIP, image encoder", "SiglipVision"),
    _of("DINOv3", "DINOv3ViT", half="separate rotary", arguments={"num_register_tokens": 2}),
    Supported("EoMT", "transformers", ("EomtConfig", "EomtForUniversalSegmentation"), arguments=EOMT, example=True,
              half="separate", why="`example` shows that no mask is passed; with a mask, MLP"),
    Supported("EoMT with DINOv3", "transformers", ("EomtDinov3Config", "EomtDinov3ForUniversalSegmentation"),
              arguments=EOMT, example=True, half="separate rotary",
              why="`example` shows that no mask is passed; with a mask, MLP"),
)  # fmt: skip


def table() -> str:
    """The table for people, in Markdown."""
    lines = ["| model | library | of each block, on the kernels | left |", "|---|---|---|---|"]
    lines += [f"| {s.name} | {s.library} | {s.became} | {s.why} |" for s in SUPPORTED]
    return "\n".join(line.replace("|  |", "| |") for line in lines)


if __name__ == "__main__":
    print(table())
