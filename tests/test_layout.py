"""Rules about the whole: who imports whom, what an import costs, what a wheel holds."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {  # top-level folder -> what it may import of this project
    "kernels": {"segmenter.kernels"},
    "segmenter": {"segmenter"},
    "bench": {
        "segmenter",
        "bench",
        "tests.support.parity",
    },  # the rule of right and wrong is one for tests and benchmark
    "tests": {"segmenter", "bench", "tests"},
}
FOLDERS = [*ALLOWED]


def sources(folder):
    files = (ROOT / folder).rglob("*.py")
    return [f for f in files if "kernels" not in f.parts[len(ROOT.parts) + 1 :] and "golden" not in f.parts]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, [alias.name for alias in node.names]


@pytest.mark.parametrize("folder", FOLDERS)
def test_import_rule(folder):
    files = sources(folder)
    assert files
    for path in files:
        for module, names in imports(path):
            top = module.split(".")[0]
            assert top != "kernels", f"{path} imports {module}; say segmenter.kernels"
            if top not in {"segmenter", "bench", "tests"}:
                continue
            assert any(module == a or module.startswith(a + ".") for a in ALLOWED[folder]), f"{path} imports {module}"
            if folder not in ("tests",) and not module.startswith(folder):
                private = [n for n in [*names, *module.split(".")] if n.startswith("_") and n != "__version__"]
                assert not private, f"{path} imports {private} of another folder"


def test_no_environment_variable_is_read():
    torchrun = ROOT / "segmenter" / "cli" / "shards.py"  # it tells a process in no other way which one it is
    for folder in ("kernels", "segmenter"):
        for path in set(sources(folder)) - {torchrun}:
            assert not re.search(r"os\.environ|getenv", path.read_text()), path


def test_commands_print_in_one_way_only():
    """That of segmenter/cli/output.py, which prints nothing that steers a terminal, and goes on when it cannot."""
    for path in set(sources("segmenter/cli")) - {ROOT / "segmenter/cli/output.py"}:
        assert not re.search(r"\bprint\(|tqdm\.write|sys\.stdout|traceback\.print", path.read_text()), path


def test_files_are_written_in_one_way_only():
    """That of segmenter/files.py: whole or not at all."""
    written = r"\bopen\([^)]*[\"'][wax]b?\+?[\"']|write_bytes\(|os\.(replace|rename)\(|save_file\(|tempfile"
    allowed = {"files.py", "pretrained.py", "check.py"}  # the second and third rename what is whole
    for path in sources("segmenter"):
        assert path.name in allowed or not re.search(written, path.read_text()), path


def test_files_stay_short():
    long = {str(p): n for f in FOLDERS for p in sources(f) if (n := len(p.read_text().splitlines())) > 500}
    assert long == {}


def run(code, **env):
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_loads_nothing_heavy_and_prints_nothing():
    heavy = {"torch", "triton", "timm", "torchvision", "numpy", "PIL"}
    out = run(f"import sys, segmenter; loaded = {heavy} & set(sys.modules); assert not loaded, loaded")
    assert out == ""


def test_models_do_not_load_the_compiler():
    """torch._dynamo alone takes as long to import as the rest of torch."""
    run("import sys, segmenter.model, segmenter.dropin.accelerate; assert 'torch._dynamo' not in sys.modules")


def test_everything_imports_and_runs_without_triton_timm_and_torchvision():
    absent = ["triton", "timm", "torchvision", "matplotlib", "huggingface_hub"]
    kernels = [f"segmenter.kernels.{p.stem}" for p in (ROOT / "kernels").glob("*.py") if needs_triton(p)]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"  # None there makes an import fail
        "import importlib, pkgutil, segmenter\n"
        "for m in pkgutil.walk_packages(segmenter.__path__, 'segmenter.'):\n"
        f"    if m.name not in {['segmenter.__main__', *kernels]}: importlib.import_module(m.name)\n"
        "import torch, numpy\n"
        "assert not torch.cuda.is_initialized()\n"
        "model = segmenter.create_segmenter(segmenter.preset('Seg-T-Mask/16', n_cls=4, image_size=64)).eval()\n"
        "print(segmenter.segment_image(model, numpy.zeros((64, 64, 3), numpy.uint8)).shape)\n"
    )
    assert run(code).strip() == "torch.Size([64, 64])"


def needs_triton(path):
    """Whether a kernel file imports Triton, itself or through its own kind."""
    names = {name for name, _ in imports(path)} | {f"{m}.{n}" for m, names in imports(path) for n in names}
    own = {"segmenter.kernels.launch", "segmenter.kernels.operators"}
    return any(name.split(".")[0] == "triton" for name in names) or bool(names & own)


def test_definitions_and_tables_need_no_triton():
    assert {p.name for p in (ROOT / "kernels").glob("*.py") if not needs_triton(p)} == {
        "configs.py",
        "reference.py",
        "upsample_tiles.py",
    }


def test_public_names_resolve():
    code = "import segmenter; print(sorted(n for n in dir(segmenter) if getattr(segmenter, n) is None))"
    assert run(code).strip() == "[]"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        import segmenter

        _ = segmenter.nothing


def test_kernels_folder_is_a_link_and_no_package():
    assert (ROOT / "segmenter" / "kernels").resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_holds_the_package_and_no_top_level_kernels(tmp_path):
    pytest.importorskip("setuptools", reason="building a wheel offline needs setuptools")
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path]
    clone = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files", "-z", "setup.py", "pyproject.toml", "README.md", "LICENSE", "kernels",
                              "segmenter"], cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    if tracked.returncode:
        pytest.skip("not a git checkout, so the list of files is unknown")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(command, cwd=clone, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("segmenter_triton-")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"segmenter"}
    sources = {p.relative_to(ROOT) for p in (ROOT / "segmenter").rglob("*") if p.suffix in (".py", ".yml")}
    sources |= {Path("segmenter") / p.relative_to(ROOT) for p in (ROOT / "kernels").glob("*.py")}
    assert {str(source) for source in sources} <= set(names)
