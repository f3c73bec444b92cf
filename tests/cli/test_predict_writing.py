"""`segmenter predict` writes results while the model runs."""

import threading
import time

from PIL import Image

from segmenter.cli import main
from segmenter.cli.commands import predict as predict_module
from tests.cli.tools import image


def test_results_are_written_while_the_model_runs(folder, tmp_path, out, monkeypatch):
    """By other threads, a few images at a time, and noted in the order in which they came."""
    save, threads, under_way, most = predict_module.save_png, set(), [], []

    def slow(image, path):
        under_way.append(path)
        threads.add(threading.current_thread())
        most.append(len(under_way))
        time.sleep(0.05)
        save(image, path)
        under_way.remove(path)

    for i in range(12):
        Image.fromarray(image(seed=i)).save(tmp_path / f"{i:02}.png")
    monkeypatch.setattr(predict_module, "save_png", slow)
    assert main(["predict", str(tmp_path), "-m", folder, "-o", str(out)]) == 0
    assert threading.main_thread() not in threads and max(most) <= predict_module.WAITING + 1
    assert len(list(out.glob("*_overlay.png"))) == len(list(out.glob("*.json"))) == 12
