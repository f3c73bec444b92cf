"""Rules about the whole: who imports whom, what an import costs, what a wheel and a source archive hold."""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import segmenter

ROOT = Path(__file__).parent.parent
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
ALLOWED = {  # top-level directory -> what it may import of this project
    "kernels": {"segmenter.kernels"},
    "segmenter": {"segmenter"},
    # the rule of right and wrong, and the interpreter, are one for tests and benchmark
    "bench": {"segmenter", "bench", "tests.support.parity", "tests.support.quick_interpreter"},
    "tests": {"segmenter", "bench", "tests"},
}
# No room imports a later one. The first is what lies in segmenter/ itself: the network and what it needs.
ROOMS = (
    "",
    "weights",
    "inference",
    "analysis",
    "dropin",
    "eomt",
    "data",
    "evaluation",
    "figures",
    "training",
    "export",
    "segm",
    "cli",
)
LATER = {  # module -> later rooms that its functions import, for methods that a user expects on the model
    "segmenter.encoder": {"weights"},
    "segmenter.model": {"weights", "inference", "analysis"},
    "segmenter.segm.utils.torch": {"cli"},
}
MIRRORED = {"kernels", "bench", *ROOMS} - {"", "segm"}  # the published paths are tested with the other drop-ins
SAY_NOTHING = {"bands", "contract", "fusable", "remembered", "swapped", "trial", "folder", "variant", "own", "start"}


def sources(directory):
    files = (ROOT / directory).rglob("*.py")
    return [f for f in files if "kernels" not in f.parts[len(ROOT.parts) + 1 :] and "golden" not in f.parts]


@functools.cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """(module, names taken from it, whether it stands inside a function) of each import; not those for types only."""
    pending = [(parsed(path), False)]
    while pending:
        node, inside = pending.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, [], inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, [alias.name for alias in node.names], inside
        inside = inside or isinstance(node, (*FUNCTIONS, ast.Lambda))
        pending += [(child, inside) for child in ast.iter_child_nodes(node)]


def module(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"segmenter.{name}" if name.startswith("kernels.") else name


def imported(inside):
    """Module of the package -> the modules of it that it imports, at its top or inside functions."""
    known = {module(path): path for path in [*sources("segmenter"), *sources("kernels")]}
    found = {}
    for name, path in known.items():
        found[name] = set()
        for source, names, within in imports(path):
            submodules = {f"{source}.{n}" for n in names} & set(known)
            if within is inside:
                found[name] |= submodules or {source} & set(known)
    return found


def room(name):
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else ""


@pytest.mark.parametrize("directory", ALLOWED)
def test_import_rule(directory):
    files = sources(directory)
    assert files
    for path in files:
        for source, names, _ in imports(path):
            top = source.split(".")[0]
            assert top != "kernels", f"{path} imports {source}; say segmenter.kernels"
            if top not in {"segmenter", "bench", "tests"}:
                continue
            allowed = ALLOWED[directory]
            assert any(source == a or source.startswith(a + ".") for a in allowed), f"{path} imports {source}"
            if directory != "tests" and not source.startswith(directory):
                private = [n for n in [*names, *source.split(".")] if n.startswith("_") and n != "__version__"]
                assert not private, f"{path} imports {private} of another directory"


def later(inside):
    found = {}
    for name, targets in imported(inside).items():
        rooms = {room(target) for target in targets}
        after = {r for r in rooms if name != "segmenter.__main__" and ROOMS.index(r) > ROOMS.index(room(name))}
        if after:
            found[name] = after
    return found


def test_no_room_imports_a_later_one():
    assert {path.name for path in (ROOT / "segmenter").iterdir() if (path / "__init__.py").exists()} == {
        *ROOMS,
        "classes",  # class names and palettes, which the rooms read
    } - {""}
    assert later(inside=False) == {}
    assert later(inside=True) == LATER


def test_no_modules_import_each_other_in_a_circle():
    targets = imported(inside=False)
    left, before = set(targets), None
    while left != before:  # leaves out what imports none of the others, or is imported by none
        before = left
        left = {n for n in before if targets[n] & before and any(n in targets[m] for m in before)}
    assert left == set()


def test_tests_mirror_the_rooms():
    directories = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("test_*.py"))}
    assert directories == MIRRORED | {"gpu"}
    for name in MIRRORED:
        where = ROOT / name if (ROOT / name).exists() else ROOT / "segmenter" / name
        assert any(where.glob("*.py"))


def test_names_of_modules_say_the_thing():
    found = [path for d in ALLOWED for path in sources(d) if SAY_NOTHING & {path.stem, path.stem.removeprefix("test_")}]
    assert found == []


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


def test_files_and_functions_stay_short():
    files = [path for directory in ALLOWED for path in sources(directory)]
    assert {str(path): n for path in files if (n := len(path.read_text().splitlines())) > 500} == {}
    definitions = [(path, node) for path in files for node in ast.walk(parsed(path)) if isinstance(node, FUNCTIONS)]
    assert {f"{p}:{d.lineno}": d.name for p, d in definitions if d.end_lineno - d.lineno >= 80} == {}


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
    names = {name for name, _, _ in imports(path)} | {f"{m}.{n}" for m, names, _ in imports(path) for n in names}
    through = {"segmenter.kernels.launch", "segmenter.kernels.operators"}
    return any(name.split(".")[0] == "triton" for name in names) or bool(names & through)


def test_definitions_and_tables_need_no_triton():
    assert {p.name for p in (ROOT / "kernels").glob("*.py") if not needs_triton(p)} == {
        "canvas_axis.py",
        "configs.py",
        "configs_backward.py",
        "configs_maps.py",
        "configs_queries.py",
        "device_tables.py",
        "reference.py",
        "reference_backward.py",
        "reference_maps.py",
        "reference_rotary.py",
        "reference_queries.py",
        "upsample_tiles.py",
    }


def test_public_names_resolve_and_stand_in_all_three_lists():
    code = "import segmenter; print(sorted(n for n in dir(segmenter) if getattr(segmenter, n) is None))"
    assert run(code).strip() == "[]"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = segmenter.nothing
    block = next(node for node in parsed(Path(segmenter.__file__)).body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == segmenter._PUBLIC
    assert sorted(segmenter.__all__) == sorted([*typed, "__version__"])


def test_kernels_directory_is_a_link_and_no_package():
    assert (ROOT / "segmenter" / "kernels").resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_archives_hold_what_is_tracked_and_no_top_level_kernels(tmp_path):
    """The source archive all but the weights, and its link; the wheel that is made of it the package alone."""
    pytest.importorskip("setuptools", reason="building a wheel offline needs setuptools")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout, so the list of files is unknown")
    tracked = {name for name in listed.stdout.split("\0") if name and os.path.lexists(ROOT / name)}
    tracked -= {name for name in tracked if re.fullmatch(r"examples/.*/model\.safetensors", name)}
    clone = tmp_path / "clone"
    for name in tracked:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name, follow_symlinks=False)
    build = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=clone, check=True, capture_output=True, timeout=300)
    (archive,) = tmp_path.glob("segmenter_triton-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    assert (unpacked / "segmenter" / "kernels" / "attention.py").is_file()
    made = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file() or path.is_symlink()}
    assert {name for name in made if not re.match(r"PKG-INFO|setup.cfg|\w+\.egg-info/", name)} == tracked

    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path]
    subprocess.run(command, cwd=unpacked, check=True, timeout=300)
    (wheel,) = tmp_path.glob("segmenter_triton-*.whl")
    assert wheel.name.split("-")[1] == segmenter.__version__
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name}
    expected = {name for name in tracked if re.match(r"(segmenter|kernels)/.*\.(py|yml|typed)$", name)}
    assert names == {re.sub("^kernels/", "segmenter/kernels/", name) for name in expected}
