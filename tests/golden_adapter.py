"""Adapter between the golden checker (tests/golden/check.py, whose docstring defines these functions) and this project.

python tests/golden/check.py tests/golden --adapter tests/golden_adapter.py
"""

import torch

from segmenter import load_model as _load_model
from segmenter.images import normalize as _normalize
from segmenter.inference import inference as _inference
from segmenter.layers import pad_to_multiple
from segmenter.metrics import mean_iou
from segmenter.schedule import PolynomialLR


def load_model(checkpoint_path):
    model, _ = _load_model(checkpoint_path)
    return model


def forward(model, im):
    with torch.inference_mode():
        return model(im)


def encoder_features(model, im):
    with torch.inference_mode():
        return model.encoder(pad_to_multiple(im, model.patch_size), return_features=True)


def lowres_masks(model, im):
    with torch.inference_mode():
        return model.masks(im)


def attention_map_enc(model, im, layer):
    with torch.inference_mode():
        return model.get_attention_map_enc(im, layer)


def attention_map_dec(model, im, layer):
    with torch.inference_mode():
        return model.get_attention_map_dec(im, layer)


def inference(model, ims, flips, ori_shape, window_size, window_stride, batch_size):
    metas = [{"flip": flip} for flip in flips]
    return _inference(model, ims, metas, ori_shape, window_size, window_stride, batch_size)


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
