"""Exports of a model that lies on a GPU: files for that GPU, compared with the kernels."""

import pytest
import torch

from segmenter.export.check import export_model
from tests.support.tiny import tiny_model


@pytest.mark.gpu
@pytest.mark.card
@pytest.mark.parametrize(("format", "output"), [("torch", "logits"), ("aoti", "labels"), ("aoti", "logits")])
def test_export_on_gpu(format, output, device, tmp_path):
    model = tiny_model(n_cls=11).to(device)
    report = export_model(model, tmp_path / "model.pt2", format, output=output)
    assert report.device == "cuda:0"
    assert all(row.error <= row.limit and row.same > 0.99 for row in report.agreement)
    x = torch.randint(0, 256, (3, 50, 200, 3), dtype=torch.uint8, device=device)
    if format == "torch":
        run = torch.export.load(tmp_path / "model.pt2").module()
    else:
        run = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    im = (x.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        wanted, got = model(im), run(x)
    if output == "labels":
        assert (got == wanted.argmax(1)).double().mean() > 0.99
    else:
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
