"""Exported files compute what the model computes, at sizes they were not traced at, and a wrong one is never left."""

import errno
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn as nn

from segmenter import accelerate
from segmenter.export import check as export
from segmenter.export import formats
from segmenter.export import program as export_program
from segmenter.export.check import ExportError, default_check_sizes, export_model
from segmenter.export.program import eager_twin, positions, trace
from segmenter.files import directory_beside
from segmenter.inference.images import NORMALIZATION, normalize
from segmenter.layers import resize_pos_embed
from segmenter.ops import EAGER
from tests.support.tiny import tiny_model

MASK = {"n_layers": 1, "n_cls": 7}
LINEAR = {
    "n_layers": 1, "patch_size": 8, "distilled": True, "decoder": {"name": "linear"}, "pos_embed_check": "grid",
    "pos_embed_mode": "bicubic", "normalization": "deit",
}  # fmt: skip
SIZES = [(1, 64, 64), (3, 32, 128), (2, 17, 83), (1, 130, 40)]  # all but the first are in no check
onnx_needed = pytest.mark.skipif(
    torch.__version__ < formats.ONNX_TORCH
    or not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
    reason=f"needs the extra 'export' and PyTorch {formats.ONNX_TORCH}",
)


def pixels(B, H, W):
    return torch.randint(0, 256, (B, H, W, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(H))


def logits(model, x):
    """What the model says, by the way of segmenter.inference.images."""
    with torch.inference_mode():
        return model(torch.stack([normalize(image.numpy(), model.info.normalization) for image in x]))


def assert_same(run, model, output, sizes=SIZES):
    for size in sizes:
        x = pixels(*size)
        wanted, got = logits(model, x), run(x)
        if output == "labels":
            assert got.dtype == torch.uint8
            assert (got == wanted.argmax(1)).double().mean() > 0.999, size
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("options", "output"),
    [pytest.param(MASK, "labels", marks=pytest.mark.more), (LINEAR, "logits")],
    ids=["mask", "linear"],
)
def test_torch(options, output, tmp_path):
    model, path, said = tiny_model(**options), tmp_path / "model.pt2", []
    report = export_model(model, path, "torch", output=output, progress=said.append)
    assert [file.name for file in tmp_path.iterdir()] == report.files == ["model.pt2"]
    assert report.size_mb == path.stat().st_size / 1e6
    assert len(said) == 3
    assert [row.shape for row in report.agreement] == [
        (1, 64, 64),
        (2, 49, 72 if options is MASK else 68),
        (1, 32, 128),
    ]
    assert all(row.error <= row.limit and row.same > 0.999 and row.seen > 1 for row in report.agreement)
    assert "batch >= 1" in str(report)
    program = torch.export.load(path)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("segmenter" in target for target in targets)
    assert_same(program.module(), model, output)
    if output == "labels":
        assert_needs_no_segmenter(path, model)


def assert_needs_no_segmenter(path, model):
    x = pixels(2, 33, 50)
    torch.save(x, path.parent / "x.pt")
    code = (
        "import sys, json, torch; x = torch.load('x.pt'); y = torch.export.load('model.pt2').module()(x)\n"
        "assert not any(name.startswith('segmenter') for name in sys.modules); print(json.dumps(y.tolist()))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=path.parent, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert (torch.tensor(json.loads(result.stdout)) == logits(model, x).argmax(1)).double().mean() > 0.999


@onnx_needed
@pytest.mark.parametrize(
    ("options", "output", "limit"),
    [(MASK, "labels", None), pytest.param(LINEAR, "logits", 1000, marks=pytest.mark.more)],
    ids=["mask", "linear"],
)
def test_onnx(options, output, limit, tmp_path, monkeypatch):
    """One file; and two files, in place of an older one, where weights are beyond the limit of one."""
    import onnx
    import onnxruntime

    model, path, files = tiny_model(**options), tmp_path / "model.onnx", ["model.onnx"]
    if limit:
        path.write_text("an older one")
        monkeypatch.setattr(formats, "ONE_FILE_BYTES", limit)
        files.append("model.onnx.data")
    report = export_model(model, path, "onnx", output=output)
    assert report.files == sorted(file.name for file in tmp_path.iterdir()) == files
    assert ("keep them together" in str(report)) == bool(limit)
    proto = onnx.load(path)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", export.OPSET)]
    assert {node.domain for node in proto.graph.node} == {""}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (x,), (y,) = session.get_inputs(), session.get_outputs()
    assert (x.name, x.shape, x.type) == ("pixels", ["batch", "height", "width", 3], "tensor(uint8)")
    assert (y.name, y.shape[0], y.shape[-2:]) == (output, "batch", ["height", "width"])
    assert_same(lambda x: torch.from_numpy(session.run(None, {"pixels": x.numpy()})[0]), model, output)


@pytest.mark.more
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aoti(tmp_path, monkeypatch):
    """One small model without vector code: most of its time is the compiler's, reading PyTorch's headers."""
    monkeypatch.setenv("AOTI_RUNTIME_CHECK_INPUTS", "1")
    import torch._inductor

    model, path = tiny_model(**{**LINEAR, "normalization": "vit"}), tmp_path / "model.pt2"
    with torch._inductor.config.patch({"cpp.simdlen": 1, "aot_inductor.compile_wrapper_opt_level": "O0"}):
        report = export_model(model, path, "aoti")
    assert [file.name for file in tmp_path.iterdir()] == report.files == ["model.pt2"]
    run = torch._inductor.aoti_load_package(str(path))
    assert_same(run, model, "labels")
    for wrong in (pixels(1, 20, 30).float(), pixels(1, 20, 30).mT.contiguous().mT, pixels(1, 20, 30)[..., :2]):
        with pytest.raises(RuntimeError, match="unmatched"):
            run(wrong)


@pytest.mark.more
def test_other_types(tmp_path):
    """More than 256 classes, and a network in half precision, which is judged by float32."""
    model, path = tiny_model(n_layers=1, n_cls=300), tmp_path / "model.pt2"
    report = export_model(model, path, "torch", dtype="float16", check_sizes=[(64, 64), (40, 100)])
    assert report.dtype == "float16"
    assert report.outputs == {"labels": "(batch, height, width) int16"}
    assert torch.export.load(path).module()(pixels(1, 20, 30)).dtype == torch.int16
    assert all(1e-4 < row.limit < 0.1 for row in report.agreement)
    state = torch.export.load(path).state_dict
    assert {tensor.dtype for name, tensor in state.items() if name.startswith("model.")} == {torch.float16}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_model_stays_what_it_is(dtype):
    model = tiny_model(**MASK)
    accelerate(model)
    ops = [module.ops for module in model.modules() if hasattr(module, "ops")]
    before = {name: (tensor, tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    program = trace(model, "masks", dtype)
    assert not any("segmenter" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert [module.ops for module in model.modules() if hasattr(module, "ops")] == ops
    assert not any(operators is EAGER for operators in ops)
    assert not model.training
    assert "embed" not in vars(model.encoder)
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][1]
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name][2])
    twin = eager_twin(model, dtype)
    assert (next(twin.parameters()) is next(model.parameters())) == (dtype is None)
    assert twin.impl == "eager"


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("check", ["tokens", "grid"])
def test_position_embeddings_bit_by_bit(check, mode):
    """At the model's own grid, at another of as many tokens (where `check` matters), and at others."""
    model = tiny_model(n_layers=1, pos_embed_check=check, pos_embed_mode=mode)
    own, grid = model.encoder.pos_embed, model.encoder.patch_embed.grid_size
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model.encoder.pos_embed.data = own.data.to(dtype)
        for other in (grid, (2, 8), (6, 5), (1, 3)):
            as_it_is = other == grid or (check == "tokens" and other == (2, 8))
            wanted = own if as_it_is else resize_pos_embed(own.float(), grid, other, 1, mode).to(dtype)
            assert torch.equal(positions(model.encoder, other), wanted), (dtype, other)


@functools.cache
def linear_program(output, dtype):
    return trace(tiny_model(**LINEAR), output, dtype)


@pytest.fixture
def traced(monkeypatch):
    """What is tested comes after tracing, which takes seconds: one program of the model LINEAR stands for all."""
    monkeypatch.setattr(export, "trace", lambda model, output, dtype: linear_program(output, dtype))


@pytest.mark.parametrize("output", ["labels", "masks"])
def test_a_wrong_file_is_not_left(output, tmp_path, traced):
    model = tiny_model(**LINEAR)
    with torch.no_grad():
        model.encoder.blocks[0].mlp.fc2.weight[0] *= 1.5
    with pytest.raises(ExportError, match="disagrees with the model at 1 x 64x64"):
        export_model(model, tmp_path / "model.pt2", "torch", output=output)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_normalisation_is_found_and_an_older_file_kept(tmp_path, monkeypatch):
    model, path = tiny_model(**LINEAR), tmp_path / "model.pt2"
    path.write_text("an older one")
    monkeypatch.setattr(export_program, "NORMALIZATION", {"deit": NORMALIZATION["vit"]})
    with pytest.raises(ExportError, match="disagrees"):
        export_model(model, path, "torch")
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    assert path.read_text() == "an older one"


@pytest.mark.parametrize("size", [1_000, 200_000])
def test_no_room_is_an_error_that_names_the_file(size, tmp_path, traced):
    """In a process of its own: what torch writes to by itself ends the process when it fails."""
    resource = pytest.importorskip("resource")
    linear_program("labels", torch.float32)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            export_model(tiny_model(**LINEAR), tmp_path / "model.pt2", "torch")
        except OSError as error:
            status = 0 if (error.filename, error.errno) == (str(tmp_path / "model.pt2"), errno.EFBIG) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_export_are_removed(tmp_path, traced):
    (tmp_path / ".segmenter-1.tmp").mkdir()
    (tmp_path / ".segmenter-1.tmp" / "model.pt2").write_text("half")
    with directory_beside(tmp_path / "other.pt2") as running:
        export_model(tiny_model(**LINEAR), tmp_path / "model.pt2", "torch", check_sizes=[(64, 64), (40, 72)])
        assert sorted(tmp_path.iterdir()) == sorted([running, tmp_path / "model.pt2"])


def test_what_counts_as_agreement():
    scores = torch.tensor([[2.0, 1.0, -4.0], [2.0 - 1e-4, 0.0, 1.0]]).view(1, 2, 1, 3)
    batch, right = (1, 1, 3), torch.tensor([[[0, 0, 1]]], dtype=torch.uint8)

    def compare(labels):
        return export._compare(labels, scores, "labels", 1e-4, batch)

    assert compare(right).error == 0
    assert compare(right).seen == 2
    tie = compare(torch.tensor([[[1, 0, 1]]], dtype=torch.uint8))
    assert tie.same == pytest.approx(2 / 3)
    assert tie.error == pytest.approx(2.5e-5, rel=0.01)
    for wrong in ([[[0, 1, 1]]], [[[0, 0, 2]]]):
        with pytest.raises(ExportError, match="disagrees"):
            compare(torch.tensor(wrong, dtype=torch.uint8))
    with pytest.raises(ExportError, match="int64"):
        compare(right.long())
    with pytest.raises(ExportError, match="disagrees"):
        export._compare(torch.full_like(scores, torch.nan), scores, "masks", 1e-4, batch)


def test_images_of_one_label_show_little(tmp_path):
    model = tiny_model(**LINEAR)
    with torch.no_grad():
        model.decoder.head.bias[3] = 100
    with pytest.warns(UserWarning, match="agree says little"):
        export_model(model, tmp_path / "model.pt2", "torch")


def test_scores_that_are_not_finite_are_no_agreement(tmp_path):
    model = tiny_model(**LINEAR)
    with torch.no_grad():
        model.decoder.head.weight *= 1e5  # beyond float16
    with pytest.raises(ExportError, match="not finite; in float16 try"):
        export_model(model, tmp_path / "model.pt2", "torch", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_an_operator_of_ours_is_refused(monkeypatch):
    pytest.importorskip("triton")
    model = tiny_model(**MASK)
    accelerate(model)
    monkeypatch.setattr(export_program, "eager_twin", lambda model, dtype=None: model)
    with pytest.raises(ExportError, match="cannot bring along: segmenter"):
        trace(model)


def test_default_sizes():
    assert default_check_sizes(tiny_model(**MASK)) == [(64, 64), (49, 72), (32, 128)]
    sizes = default_check_sizes(tiny_model(n_layers=1, image_size=(16, 16)))
    assert sizes == [(32, 32), (24, 40)]


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda model: model.train(), {}, RuntimeError, "call model.eval"),
        (lambda model: nn.Linear(2, 2), {}, TypeError, "not a Linear; segmenter.load_any"),
        (lambda model: setattr(model, "encoder", nn.Identity()), {}, TypeError, "Segmenter with a Identity"),
        (lambda model: setattr(model.info, "normalization", "x"), {}, ValueError, "'x', not vit or deit"),
        (None, {"format": "tflite"}, ValueError, "choose one of torch, onnx, aoti"),
        (None, {"format": "onnx"}, ValueError, "has to end in .onnx"),
        (None, {"path": "none/model.pt2"}, OSError, "no such folder"),
        (None, {"output": "colours"}, ValueError, "choose one of labels, logits, masks"),
        (None, {"dtype": "int8"}, ValueError, "choose one of float32"),
        (None, {"format": "onnx", "path": "x.onnx", "dtype": "bfloat16"}, ValueError, "choose float16"),
        (None, {"check_sizes": [(64, 64)]}, ValueError, "at least two sizes"),
        (None, {"check_sizes": [(64, 64), (16, 64)]}, ValueError, "more than a patch, 16"),
    ],
)
def test_errors(change, options, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model(**MASK)
    changed = change(model) if change else None
    model = changed if isinstance(changed, nn.Module) else model
    arguments = {"path": "model.pt2", "format": "torch", **options}
    with pytest.raises(error, match=message):
        export_model(model, **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("version", ["2.6.0+cu124", "2.7.0", "2.15.0"])
def test_onnx_needs_a_pytorch_that_can(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)(version))
    monkeypatch.setattr(formats.importlib, "import_module", lambda name: None)
    if version.startswith("2.6"):
        with pytest.raises(ExportError, match=r"onnx needs PyTorch 2.7 or newer, this is 2.6.0\+cu124"):
            formats.require("onnx")
    else:
        formats.require("onnx")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "ONNX_TORCH", "2.6")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r'needs onnxruntime.*pip install "segmenter-triton\[export\]"'):
        export_model(tiny_model(**MASK), tmp_path / "model.onnx", "onnx")


def test_errors_of_the_exporters_are_export_errors(tmp_path, monkeypatch, traced):
    def fail(*arguments):
        (tmp_path / next(tmp_path.iterdir()).name / "half").write_text("x")
        raise KeyError("no such thing")

    monkeypatch.setitem(export.WRITERS, "torch", fail)
    with pytest.raises(ExportError, match="could not be written as torch: KeyError: 'no such thing'"):
        export_model(tiny_model(**LINEAR), tmp_path / "model.pt2", "torch")
    assert list(tmp_path.iterdir()) == []
