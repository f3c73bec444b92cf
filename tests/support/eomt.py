"""Folders of tiny EoMT with random weights, as transformers writes them."""

import importlib

import torch

SIDE = 32  # of the images that the networks take
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8,
    "num_blocks": 2, "num_queries": 9, "num_upscale_blocks": 1, "num_register_tokens": 1,
}  # fmt: skip
NAMES = {"eomt": "Eomt", "eomt_dinov3": "EomtDinov3"}
MORE = {"eomt": {}, "eomt_dinov3": {"intermediate_size": 48}}


def why_not():
    """What is missing for EoMT of transformers here, or None."""
    for name in ("torchvision", "scipy", "transformers"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            return f"needs {name}"
    return None if int(module.__version__.split(".")[0]) >= 5 else "needs transformers 5"


def network(kind="eomt", n_cls=6, seed=0, masked=(0.0, 0.0), **settings):
    """A network in evaluation mode, every parameter random, whose labels differ.

    masked: the probabilities with which its last blocks mask their attention.
    """
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, f"{NAMES[kind]}Config")(num_labels=n_cls, **SIZES, **MORE[kind], **settings)
    model = getattr(transformers, f"{NAMES[kind]}ForUniversalSegmentation")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3 * noise + ("bias" not in name))
        model.query.weight.mul_(30)  # so that queries differ in their classes
        model.class_predictor.weight.mul_(2)
        model.attn_mask_probs.copy_(torch.tensor(masked))
    return model


def processor(split=True):
    """Its preprocessing: for semantic segmentation, or with split=False for instances and panoptic segments."""
    transformers = importlib.import_module("transformers")
    longest = None if split else SIDE
    size = {"shortest_edge": SIDE, "longest_edge": longest}
    return transformers.EomtImageProcessor(size=size, do_split_image=split, do_pad=not split)


def write(folder, kind="eomt", split=True, **settings):
    """Writes a folder, and returns the network."""
    model = network(kind, **settings)
    model.save_pretrained(folder)
    processor(split).save_pretrained(folder)
    return model
