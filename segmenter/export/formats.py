"""The files that a program of torch.export can become: how each is written, and loaded again.

The packages of ONNX and the compiler of AOTInductor are imported when they are needed and not before.
"""

import contextlib
import errno
import importlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from segmenter.export.program import ExportError
from segmenter.files import write_atomically

SUFFIXES = {"torch": ".pt2", "onnx": ".onnx", "aoti": ".pt2"}
FORMATS = tuple(SUFFIXES)
OPSET = 18  # the oldest that PyTorch writes by itself: the one that most runtimes read
ONNX_TORCH = "2.7"  # the oldest PyTorch whose ONNX exporter upsamples to sizes that are free
ONE_FILE_BYTES = 2_000_000_000  # a protobuf message ends at 2 GiB; weights beyond that go to a second file

Runner = Callable[[torch.Tensor], torch.Tensor]  # pixels (B, H, W, 3) uint8 on the CPU -> the output


def check_path(path: str | os.PathLike, format: str) -> Path:
    """The path of the file to write.

    Raises:
        ValueError: an unknown format, or a name that does not end as it needs. OSError: it cannot be written there.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; choose one of {', '.join(FORMATS)}")
    if path.suffix != SUFFIXES[format]:
        raise ValueError(f"{path}: a file of format {format} has to end in {SUFFIXES[format]}")
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; give a file", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "no permission to write here", str(path.parent))
    return path


def require(format: str) -> None:
    """Raises ExportError, saying what to install, if the packages that a format needs are not there."""
    if format == "onnx" and torch.__version__ < ONNX_TORCH:
        raise ExportError(f"format onnx needs PyTorch {ONNX_TORCH} or newer, this is {torch.__version__}")
    needed = ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ()
    missing = []
    for name in needed:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        hint = 'pip install "segmenter-triton[export]"'
        raise ExportError(f"format {format} needs {', '.join(missing)}, which cannot be imported here: {hint}")


@contextlib.contextmanager
def as_export_error(what: str) -> Iterator[None]:
    """Errors of the exporters, which are of every kind there is, as an ExportError; those of the system stay."""
    try:
        yield
    except (ExportError, OSError):
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ExportError(f"{what}: {type(error).__name__}: {reason.strip()}") from error


def _write_torch(program: torch.export.ExportedProgram, path: Path, output: str) -> None:
    write_atomically(path, lambda file: torch.export.save(program, file))


def _write_aoti(program: torch.export.ExportedProgram, path: Path, output: str) -> None:
    import torch._inductor

    # else a file that is asked to check what it is given (AOTI_RUNTIME_CHECK_INPUTS=1) refuses a batch of one
    known = hasattr(torch._inductor.config.aot_inductor, "check_lowerbound")
    options = {"aot_inductor.check_lowerbound": False} if known else {}
    compile_to = torch._inductor.aoti_compile_and_package
    write_atomically(path, lambda file: compile_to(program, package_path=file, inductor_configs=options))


def _write_onnx(program: torch.export.ExportedProgram, path: Path, output: str) -> None:
    exported = torch.onnx.export(
        program, dynamo=True, input_names=["pixels"], output_names=[output], opset_version=OPSET, verbose=False
    )
    graph = exported.model.graph
    _name_dimensions(graph)
    weights = sum(value.const_value.nbytes for value in graph.initializers.values())
    exported.save(path, external_data=weights > ONE_FILE_BYTES)


def _name_dimensions(graph: Any) -> None:
    """In an ONNX graph calls the free dimensions of the pixels batch, height and width, wherever they occur."""
    import onnx_ir  # comes with onnxscript

    names = dict(zip((dim.value for dim in graph.inputs[0].shape[:3]), ("batch", "height", "width"), strict=True))
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")

    def renamed(dim: Any) -> int | str | None:
        if isinstance(dim, int) or dim.value is None:  # a name for unknown ones would say that they are all alike
            return dim if isinstance(dim, int) else None
        return pattern.sub(lambda match: names[match[1]], dim.value)

    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        if value.shape is not None:
            value.shape = onnx_ir.Shape([renamed(dim) for dim in value.shape])


def _load_torch(path: str | os.PathLike, device: torch.device) -> Runner:
    program = torch.export.load(path).module()
    return lambda pixels: program(pixels.to(device))


def _load_aoti(path: str | os.PathLike, device: torch.device) -> Runner:
    import torch._inductor

    index = {"device_index": device.index or 0} if device.type == "cuda" else {}
    program = torch._inductor.aoti_load_package(str(path), **index)
    return lambda pixels: program(pixels.to(device))


def _load_onnx(path: str | os.PathLike, device: torch.device) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is in the exception too
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])


WRITERS = {"torch": _write_torch, "onnx": _write_onnx, "aoti": _write_aoti}
LOADERS = {"torch": _load_torch, "onnx": _load_onnx, "aoti": _load_aoti}
