"""Arguments of `segmenter train`: one flag for each setting of `segmenter.training.recipe.Recipe`."""

import argparse

DATA_KINDS = (  # `segmenter.data.datasets.KINDS`, which imports numpy
    "ade20k, pascal_context, pascal_context_59, cityscapes, camvid, voc2012, voc2012_aug, coco_stuff, mapillary_v1.2, "
    "mapillary_v2.0, loveda, potsdam, potsdam_no_boundary, folder"
)

# setting -> what it says in --help; defaults are those of the recipe, or of the data set as published
_SETTINGS = {
    "data": {
        "data": "folder of the data set",
        "kind": f"{DATA_KINDS} (default: recognised)",
        "split": "split to train on (default: train)",
        "val_split": "split to evaluate on (default: val; none: no evaluation)",
        "workers": "processes that read samples (default: 4)",
        "bad_samples": "stop, or skip and count, samples that cannot be read (default: stop)",
    },
    "model": {
        "model": "preset (random weights), timm/NAME (downloads its weights), or weights of any kind "
        "(default: Seg-S-Mask/16)",
        "new_decoder": "put a random decoder on a model that has one",
        "decoder": "mask_transformer (default) or linear, where the file has none",
        "decoder_layers": "blocks of the mask transformer (default: 2)",
        "decoder_batch_norm": "of a linear decoder: normalise the tokens' columns first",
        "patch_size": "resample the patch embedding to this patch",
        "n_layers": "keep only the encoder's first blocks",
        "freeze_backbone": "train the decoder alone",
        "drop_path": "stochastic depth of the encoder (default: 0.1)",
        "dropout": "of the encoder (default: 0)",
        "decoder_dropout": "of the mask transformer (default: 0.1)",
        "normalization": "vit, deit or sat493m (default: the model's)",
        "pos_embed_mode": "bilinear, bicubic or bicubic_antialias (default: the model's)",
        "pos_embed_check": "tokens or grid (default: the model's)",
    },
    "augmentation": {
        "crop_size": "side of the crops, pixels",
        "im_size": "short side before the random ratio, and in evaluation (default: as published, or own size)",
        "max_ratio": "its long side is at most this times that",
        "scale": "smallest and largest ratio (default: 0.5 2.0)",
        "cat_max_ratio": "a crop with a larger share of one class is drawn again (default: 0.75)",
        "flip": "probability of mirroring (default: 0.5)",
        "photometric": "distort colours (default: yes)",
    },
    "optimisation": {
        "epochs": "passes over the split",
        "batch_size": "samples a step, of all processes together",
        "accumulate": "parts of a batch, one after another: less memory, the same step (default: 1)",
        "optimizer": "sgd (Nesterov) or adamw (default: sgd)",
        "learning_rate": "of the decoder, and of all unless the next two are below 1",
        "backbone_rate": "rate of the encoder's last block over the decoder's (default: 1)",
        "momentum": "of sgd (default: 0.9)",
        "layer_decay": "rate of an encoder block over that of the next (default: 1)",
        "weight_decay": "(default: 0)",
        "min_lr": "where the rate ends (default: 1e-5)",
        "power": "of the polynomial decay (default: 0.9)",
        "warmup_steps": "linear rise of the rate (default: 0)",
        "clip_grad": "largest norm of the gradients (default: not clipped)",
        "class_weighting": "classes weigh their share of pixels to the power of minus this (default: 0)",
        "loss": "a name or sum such as 'cross_entropy + 0.5 dice(smooth=1)', of cross_entropy, ohem, dice, jaccard, "
        "tversky, focal, lovasz (default: cross_entropy)",
        "lovasz": "weight of an added Lovasz-softmax loss (default: 0)",
        "ema": "decay of an average of the weights, which is then what is evaluated and saved (default: 0, none)",
        "impl": "eager, triton or auto (default: eager)",
        "recompute": "0 to 3: what is computed again in the backward pass instead of kept (default: 1, by kernels)",
        "amp": "none, bfloat16 or float16 autocast (default: none)",
        "seed": "of weights, order, augmentation and dropout (default: 0)",
    },
    "evaluation and files": {
        "eval_freq": "epochs between evaluations",
        "window_size": "sliding windows of evaluation and of the saved model (default: the crop)",
        "window_stride": "their stride",
        "save_minutes": "minutes between saves (default: 10)",
        "log_steps": "steps between lines of log.jsonl (default: 20)",
        "overlays": "images of val drawn at each evaluation (default: 4)",
        "tensorboard": "log for TensorBoard as well",
    },
}


def add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting; those that are not given are None."""
    from segmenter.training.recipe import flag_kinds

    kinds = flag_kinds()
    for title, settings in _SETTINGS.items():
        group = parser.add_argument_group(title)
        for name, text in settings.items():
            flag, kind = f"--{name.replace('_', '-')}", kinds[name]
            if kind is bool:
                group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
            elif name == "scale":
                group.add_argument(flag, type=float, nargs=2, metavar=("LOW", "HIGH"), help=text)
            else:
                group.add_argument(flag, type=kind, metavar={int: "N", float: "X", str: "TEXT"}[kind], help=text)
