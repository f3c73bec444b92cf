"""The pages are true: their commands run, or at least parse; Python blocks run; links, files, flags and names exist.

Commands of the shipped package run on tiny models and data that are put where the pages say (`place`). Those that
train, compile or need several processes, GPUs or hours are held against the real parsers (`parsed`).
"""

import argparse
import functools
import importlib
import importlib.util
import inspect
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import segmenter
from segmenter.cli import main
from segmenter.cli.arguments import build_parser
from segmenter.weights.settings import as_published
from tests.support import eomt, pages
from tests.support.data_sets import make_data_set, paths
from tests.support.pages import PAGES, ROOT
from tests.support.tiny import tiny_model

README = ROOT / "README.md"
RUN = {"predict", "eval", "info", "convert", "attention", "compare", "data", "figures"}  # of segmenter's commands
PYTEST = ("-k", "-m")  # options of pytest itself that pages use, beside those of bench/conftest.py
SAMPLE = Path(paths("camvid", "test", 0)[0]).stem
NOT_OURS = {"show_attn_map.py"}  # files of the published code that pages name
NEED_TRITON = ("bench.compile_report", "bench.first_hour", "bench.memory", "bench.tune", "tests.random_cases")
MODULES = ("bench.run_all", "bench.report", "bench.profile_long", "bench.patch_sizes", *NEED_TRITON)

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def text_of(page):
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that holds what the pages name."""
    root = tmp_path_factory.mktemp("place")
    (root / "examples").symlink_to(ROOT / "examples")
    street = Image.open(ROOT / "examples" / "street.jpg")
    (root / "photos").mkdir()
    for name, size in (("photo.jpg", (96, 72)), ("photos/a.jpg", (96, 72)), ("photos/b.jpg", (70, 91))):
        street.resize(size).save(root / name)
    for name, patch in (("MODEL", 16), ("P32", 32), ("P16", 16), ("P8", 8)):
        model = tiny_model(n_cls=11, patch_size=patch)
        model.info.weights, model.info.classes = "trained", "camvid"
        model.save_pretrained(root / name)
    (root / "seg_tiny_mask").mkdir()
    torch.save({"model": model.state_dict()}, root / "seg_tiny_mask" / "checkpoint.pth")
    settings = as_published(model)
    settings["net_kwargs"]["image_size"] = [64, 64]
    (root / "seg_tiny_mask" / "variant.yml").write_text(yaml.safe_dump(settings))
    encoder = {name: tensor.contiguous() for name, tensor in tiny_model().encoder.state_dict().items()}
    save_file(encoder, root / "timm_vit.safetensors")
    make_data_set(root / "CAMVID", "camvid", n=1)
    (root / "script.py").touch()
    if eomt.why_not() is None:
        eomt.write(root / "EOMT")
        eomt.write(root / "EOMT_PANOPTIC", split=False)
    return root


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@functools.cache
def extras() -> set[str]:
    """What `pip install -e ".[NAME]"` takes, by setup.py or pyproject.toml."""
    text = "".join((ROOT / name).read_text() for name in ("setup.py", "pyproject.toml"))
    optional = re.split(r"optional-dependencies]|extras_require=", text)[1].split("\n[")[0]
    return set(re.findall(r"^ *\"?(\w+)\"?(?: =|:) \[", optional, re.MULTILINE))


class Parsed(Exception):
    """A program has parsed its command line, and is not to go on."""


def program(module_or_file: str, words: list[str]) -> argparse.ArgumentParser:
    """Starts a program up to the end of its parsing; its parser. SystemExit of status 2: the words are wrong."""
    if module_or_file in NEED_TRITON:
        pytest.importorskip("triton")
    parse, found = argparse.ArgumentParser.parse_args, []

    def stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        found.append(self)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [module_or_file, *words])
        patch.delitem(sys.modules, module_or_file, raising=False)  # runpy warns of what is imported already
        run = runpy.run_path if module_or_file.endswith(".py") else runpy.run_module
        with pytest.raises(Parsed):
            run(module_or_file, run_name="__main__")
    return found[0]


def pytest_parser() -> argparse.ArgumentParser:
    """What `pytest bench` understands of what pages say."""
    from bench import conftest

    parser = argparse.ArgumentParser()
    for name in PYTEST:
        parser.add_argument(name)
    group = argparse.Namespace(addoption=parser.add_argument)
    conftest.pytest_addoption(argparse.Namespace(getgroup=lambda title: group))
    parser.add_argument("tests", nargs="?", choices=["bench"])
    return parser


def parsed(words: list[str]) -> None:
    """Raises, or ends the process with status 2 (SystemExit), if a command is none."""
    match words:
        case ["segmenter", *rest]:
            build_parser().parse_args(rest)
        case ["torchrun", *rest]:
            from torch.distributed.run import get_args_parser

            args = get_args_parser().parse_args(rest)
            if args.module:
                assert args.training_script == "segmenter"
                build_parser().parse_args(args.training_script_args)
            else:
                program(str(ROOT / args.training_script), args.training_script_args)
        case ["pytest", *rest] | ["python", "-m", "pytest", *rest]:
            args = pytest_parser().parse_args(rest)
            assert args.k is None or any(selects(args.k, name) for name in benchmarks())
        case ["python", "-m", module, *rest]:
            program(module, rest)
        case ["python", script, *rest] if script.startswith("examples/"):
            program(str(ROOT / script), rest)
        case ["pip", "install", "-e", what]:
            assert re.fullmatch(r"\.|\.\[(\w+)\]", what)
            assert set(re.findall(r"\w+", what)) <= extras()
        case ["pip", "install", "torch", "torchvision", "--index-url", url]:
            assert url == "https://download.pytorch.org/whl/cpu"
        case ["make", *targets]:
            assert set(targets) <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        case ["sed", *_]:
            pass  # run for real, below
        case _:
            raise AssertionError(f"no test knows this command: {' '.join(words)}")


def benchmarks() -> list[str]:
    """Names of benchmarks, as -k sees them."""
    from bench import shapes

    sources = "".join(path.read_text() for path in (ROOT / "bench").glob("bench_*.py"))
    functions = re.findall(r"^(?:def )?(bench_\w+)", sources, re.MULTILINE)
    return [f"{function}[{shape.id}]" for function in functions for shape in shapes.sweep("full", True)]


def selects(expression: str, name: str) -> bool:
    return eval(re.sub(r"\b(?!and\b|or\b|not\b)\w+", lambda word: str(word[0].lower() in name.lower()), expression))


@by_page
def test_commands_parse(page):
    for words in pages.commands(text_of(page)):
        try:
            parsed(words)
        except SystemExit as end:
            pytest.fail(f"{' '.join(words)}: exit status {end.code}")


def to_run(page: Path) -> list[list[str]]:
    """What of a page is run: segmenter's quick commands, unless the README has the same."""
    before = [] if page == README else to_run(README)
    found = [words for words in pages.commands(text_of(page)) if words[:1] == ["sed"] or words[1] in RUN]
    return [words for words in found if words[0] in ("sed", "segmenter") and words not in before]


def skip_without_libraries(page: Path) -> None:
    if page.name == "eomt.md" and (reason := eomt.why_not()) is not None:
        pytest.skip(reason)


@by_page
def test_commands_run(page, place, monkeypatch, tmp_path):
    if ROOT / "examples" in page.parents:
        pytest.skip("a model card: needs the model's training run")
    if not (ROOT / "examples" / "camvid-seg-s-mask-16" / "model.safetensors").exists():
        pytest.skip("the source archive holds no weights; the repository does")
    skip_without_libraries(page)
    monkeypatch.chdir(shutil.copytree(place, tmp_path / "place", symlinks=True))
    for words in to_run(page):
        words = [SAMPLE if word == "NAME" else word for word in words]
        if words[0] == "segmenter":
            assert main(words[1:]) == 0, words
        else:
            subprocess.run(words, check=True)
        outputs = [words[i + 1] for i, word in enumerate(words) if word in ("-o", "--output")]
        assert all(Path(output).exists() for output in outputs), words


def test_every_kind_of_command_is_run():
    assert {words[1] for page in PAGES for words in to_run(page) if words[0] == "segmenter"} == RUN


def test_the_replacement_of_the_published_name(tmp_path, monkeypatch):
    (words,) = [words for words in pages.commands(text_of(ROOT / "docs/drop-in.md")) if words[0] == "sed"]
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text("from segm.model.factory import load_model\nimport segmentation\n")
    subprocess.run(words, check=True)
    assert Path("script.py").read_text() == "from segmenter.segm.model.factory import load_model\nimport segmentation\n"


def test_a_training_run_of_the_pages(place, monkeypatch, tmp_path):
    """With the page's own flags, and small numbers after them: what comes later on a command line wins."""
    monkeypatch.chdir(place)
    (words,) = [words for words in pages.commands(text_of(ROOT / "docs/train.md")) if "--recipe" in words]
    small = {
        "--epochs": 1,
        "--warmup-steps": 0,
        "--crop-size": 64,
        "--im-size": 64,
        "--batch-size": 1,
        "--output": tmp_path / "run",
    }
    assert main([*words[1:], *(str(word) for pair in small.items() for word in pair), "--device", "cpu"]) == 0
    assert (tmp_path / "run" / "final").is_dir()


# ---------------------------------------------------------------------------------------------------------------------
# Python


def python_of(page: Path) -> list[pages.Block]:
    return [block for block in pages.blocks(text_of(page)) if block.language == "python"]


@pytest.mark.parametrize("page", [*filter(python_of, PAGES)], ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, place, monkeypatch, tmp_path):
    skip_without_libraries(page)
    monkeypatch.chdir(shutil.copytree(place, tmp_path / "place", symlinks=True))
    names = {}
    for block in python_of(page):
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)


def test_the_three_lines_give_labels(place, monkeypatch):
    monkeypatch.chdir(place)
    exec(python_of(README)[0].text, names := {})
    assert (tuple(names["labels"].shape), names["labels"].dtype) == ((72, 96), torch.uint8)


@by_page
def test_yaml_blocks_are_data_sets(page, tmp_path):
    for block in pages.blocks(text_of(page)):
        if block.language == "yaml":
            make_data_set(tmp_path)
            (tmp_path / "dataset.yml").write_text(block.text.replace("]", ", tree, sky]", 1))
            assert main(["data", "check", str(tmp_path)]) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Links and names


@by_page
def test_links_lead_somewhere(page):
    text, missing = text_of(page), []
    for link in pages.links(text):
        path, _, anchor = link.partition("#")
        if link.startswith("https://"):
            continue
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in pages.anchors(text_of(target))):
            missing.append(link)
    assert not missing


@by_page
def test_files_exist(page):
    """Paths from the root or from the page's folder; a bare name of a Python file is one that the project has."""
    known = {path.name for directory in ("segmenter", "kernels", "bench", "tests", "examples") for path in
             (ROOT / directory).rglob("*.py")} | {"setup.py"}  # fmt: skip
    missing = []
    for name in pages.quoted(text_of(page)):
        if re.fullmatch(r"(segmenter|kernels|bench|tests|docs|examples)/[\w./-]*", name):
            exists = any((directory / name).exists() for directory in (ROOT, page.parent))
            missing += [] if exists or "NAME" in name else [name]
        elif re.fullmatch(r"\w+\.py", name) and name not in known | NOT_OURS:
            missing.append(name)
    assert not missing


@by_page
def test_dotted_names_resolve(page):
    for name in pages.quoted(text_of(page)):
        if match := re.match(r"(segmenter|bench)((?:\.\w+)+)", name):
            if match[1] == "bench":
                assert importlib.util.find_spec(match[0]), name
            else:
                resolve(match[0])


def resolve(path: str) -> None:
    """Imports a dotted path: the longest part that is a module, then attributes."""
    names = path.split(".")
    for n in range(len(names), 0, -1):
        module = ".".join(names[:n])
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # its parent is no package
            continue
        if spec:
            functools.reduce(getattr, names[n:], importlib.import_module(module))
            return
    raise ModuleNotFoundError(path)


@functools.cache
def flags() -> set[str]:
    """Every option of every program that pages speak of."""
    from torch.distributed.run import get_args_parser

    parsers = [build_parser(), get_args_parser(), pytest_parser()]
    needed = {"bench.run_all": ["--out", "x"], "bench.report": ["x.json", "--out", "x.html"]}
    needed["bench.profile_long"] = needed["bench.tune"] = needed["bench.first_hour"] = ["--out", "x"]
    parsers += [program(module, needed.get(module, [])) for module in MODULES]
    parsers += [program(str(script), []) for script in sorted((ROOT / "examples").glob("*.py"))]
    found = {"--index-url", "--collect-only", "--compile-first"}  # of pip, of pytest, of tests/conftest.py
    while parsers:
        for action in parsers.pop()._actions:
            found.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return found


@by_page
def test_flags_exist(page):
    named = {word for name in pages.quoted(text_of(page)) for word in name.split() if re.match(r"--\w", word)}
    assert named <= flags()


def test_readme_stays_short():
    text = re.sub(r"<!-- bench:.*?:end -->", "", text_of(README), flags=re.DOTALL)
    assert len(text.split()) < 1000


def test_public_names_say_what_they_are():
    """The API pages show it."""
    for name in segmenter.__all__:
        found = getattr(segmenter, name)
        assert not callable(found) or inspect.getdoc(found), name


# ---------------------------------------------------------------------------------------------------------------------
# The tests themselves


@pytest.mark.parametrize(
    "line",
    [
        "segmenter predict photos --model MODEL --ouput out",
        "segmenter fly",
        "torchrun --nprocs-per-node 8 -m segmenter predict photos --model MODEL",
        "torchrun --nproc-per-node 8 -m segmenter predict photos",
        "python -m bench.run_all --output results",
        "python -m bench.nothing",
        "pytest bench --swep full",
        'pytest bench -k "attention and patch7"',
        "python examples/drop_in.py --modle x",
        'pip install -e ".[all]"',
        "make tests",
        "rm -r out",
    ],
)
def test_wrong_commands_are_found(line):
    (words,) = pages.commands(f"```sh\n{line}\n```\n")
    with pytest.raises((SystemExit, AssertionError, ImportError)):
        parsed(words)


def test_blocks_and_commands_of_a_page():
    page = "# A b\n\n    make a  # why\n    make b && make c\n\n```sh\npip x \\\n  y\n```\n```python\n1 / 0\n```\n"
    page += "- `z`\n    w\n"
    assert [*pages.commands(page)] == [["make", "a"], ["make", "b"], ["make", "c"], ["pip", "x", "y"]]
    assert [(block.language, block.line) for block in pages.blocks(page)] == [("sh", 3), ("sh", 7), ("python", 11)]
    assert (pages.anchors(page), pages.quoted(page)) == ({"a-b"}, ["z"])
