"""Adapter between the golden checker (tests/golden/check.py, whose docstring defines these functions) and this project.

    python tests/golden/check.py tests/golden --adapter tests/golden_adapter.py

GOLDEN_IMPL=triton runs the kernels: on a GPU if there is one, else on the CPU, where Triton's interpreter must be on
(TRITON_INTERPRET=1). GOLDEN_IMPL=eager and auto (the default) run on the CPU.
"""

import os

import torch

from segmenter import load_model as _load_model
from segmenter.evaluation.metrics import mean_iou
from segmenter.inference.images import normalize as _normalize
from segmenter.inference.merge import inference as _inference
from segmenter.layers import pad_to_multiple
from segmenter.training.schedule import PolynomialLR

IMPL = os.environ.get("GOLDEN_IMPL", "auto")
DEVICE = "cuda" if IMPL == "triton" and torch.cuda.is_available() else "cpu"
if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.support import interpreter

    interpreter.patch()  # quicker, and right in bfloat16


def load_model(checkpoint_path):
    model, _ = _load_model(checkpoint_path, impl=IMPL, device=DEVICE)
    assert IMPL == "auto" or model.impl == IMPL
    return model


def forward(model, im):
    with torch.inference_mode():
        return model(im.to(DEVICE)).cpu()


def encoder_features(model, im):
    with torch.inference_mode():
        return model.encoder(pad_to_multiple(im.to(DEVICE), model.patch_size), return_features=True).cpu()


def lowres_masks(model, im):
    with torch.inference_mode():
        return model.masks(im.to(DEVICE)).cpu()


def attention_map_enc(model, im, layer):
    with torch.inference_mode():
        return model.get_attention_map_enc(im.to(DEVICE), layer).cpu()


def attention_map_dec(model, im, layer):
    with torch.inference_mode():
        return model.get_attention_map_dec(im.to(DEVICE), layer).cpu()


def inference(model, ims, flips, ori_shape, window_size, window_stride, batch_size):
    metas = [{"flip": flip} for flip in flips]
    ims = [im.to(DEVICE) for im in ims]
    return _inference(model, ims, metas, ori_shape, window_size, window_stride, batch_size).cpu()


def miou(preds, labels, n_cls, ignore_index):
    return mean_iou(preds, labels, n_cls, ignore_index)


def poly_lr(base_lr, step_size, iter_warmup, iter_max, power, min_lr, n_steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base_lr)
    scheduler = PolynomialLR(optimizer, step_size, iter_warmup, iter_max, power, min_lr)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(n_steps):
        optimizer.step()
        scheduler.step_update(len(rates))
        rates.append(optimizer.param_groups[0]["lr"])
    return torch.tensor(rates, dtype=torch.float64)


def normalize(image, stats):
    return _normalize(image, stats, rounded=True)


def normalize_demo(image, stats):
    return _normalize(image, stats)
