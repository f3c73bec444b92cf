"""Before the first test on a card, several processes run the same tests at once, only to fill Triton's cache.

A card waits while a kernel compiles, and one process compiles one kernel at a time. Here every process takes tests that
no other has taken, beginning at a place of its own, so that neighbours, which share kernels, stay together. Results are
thrown away: the run that is judged follows, in one process, and finds its kernels compiled. Running the tests rather
than compiling a list of launches misses nothing that a test reaches through a model. A process that fails, hangs or
dies leaves its tests to the others or to the judged run, and all are ended at the time limit, so nothing is blocked.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

SECONDS = 120.0
COMPILED: list[str] = []  # kernels that this process compiled, not those that it found in the cache
SUMMARY = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    help_ = f"compile in parallel for at most so long before tests/gpu; 0: not at all; default {SECONDS:.0f} on a card"
    parser.addoption("--compile-first", type=float, metavar="SECONDS", help=help_)
    parser.addoption("--compile-processes", type=int, default=os.cpu_count() or 1, help="for it; default: one a CPU")
    parser.addoption("--compile-share", help="FOLDER:NUMBER/PROCESSES of such a process; not to be given by hand")


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Compiles, then leaves the tests to pytest; in a process that compiles, runs its share of them."""
    config = session.config
    if config.option.collectonly or session.testsfailed or hasattr(config, "workerinput"):  # xdist is parallel itself
        return None
    if share := config.option.compile_share:
        folder, place = share.rsplit(":", 1)
        _run_share(session, Path(folder), *map(int, place.split("/")))
        return True
    seconds = config.option.compile_first
    if seconds is None:
        seconds = SECONDS if torch.cuda.is_available() else 0.0
    items = [item for item in session.items if not item.get_closest_marker("skip")]
    here = [item for item in items if Path(__file__).parent in item.path.parents or not torch.cuda.is_available()]
    if seconds > 0 and here:
        _listen()
        with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            config.stash[SUMMARY] = compile_first(here, seconds, config.option.compile_processes)
    return None


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if SUMMARY in config.stash:
        names = f": {', '.join(COMPILED)}" if COMPILED else ""
        terminalreporter.write_line(f"{config.stash[SUMMARY]}; {len(COMPILED)} more by the tests themselves{names}")


def compile_first(items: list[pytest.Item], seconds: float, processes: int) -> str:
    """Runs `items` in `processes` processes for at most `seconds`. Returns a line that says what they compiled."""
    processes = max(1, min(processes, len(items)))
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tests").write_text("\n".join(item.nodeid for item in items))
        (folder / "taken").mkdir()
        paths = dict.fromkeys(str(item.path) for item in items)
        command = [sys.executable, "-m", "pytest", *paths, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        command += ["--rootdir", str(items[0].config.rootpath)]
        children, quiet = [], subprocess.DEVNULL
        try:
            for i in range(processes):
                share = [*command, "--compile-share", f"{folder}:{i}/{processes}"]
                children.append(subprocess.Popen(share, stdout=quiet, stderr=quiet, start_new_session=True))
            _wait(children, folder, len(items), start + seconds)
        finally:
            for child in children:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        each = [len(path.read_text().split()) for path in sorted(folder.glob("compiled-*"))]
        taken = len(list((folder / "taken").iterdir()))
    took = time.monotonic() - start
    lost = "" if taken == len(items) else f", {len(items) - taken} of {len(items)} tests not reached"
    return f"kernels compiled: {sum(each)} first, by {processes} processes {each} in {took:.0f} s{lost}"


def _wait(children: list[subprocess.Popen], folder: Path, tests: int, end: float) -> None:
    with tqdm(total=tests, desc="compiling first", unit="test", mininterval=1) as bar:
        while any(child.poll() is None for child in children) and time.monotonic() < end:
            time.sleep(0.2)
            bar.update(len(list((folder / "taken").iterdir())) - bar.n)


def _run_share(session: pytest.Session, folder: Path, number: int, shares: int) -> None:
    _listen()
    tests = {name: i for i, name in enumerate((folder / "tests").read_text().split("\n"))}
    items = sorted((item for item in session.items if item.nodeid in tests), key=lambda item: tests[item.nodeid])
    first, parent = number * len(items) // shares, os.getppid()
    if torch.cuda.is_available():  # together they have one card's memory
        torch.cuda.set_per_process_memory_fraction(1 / shares)
    for item in items[first:] + items[:first]:
        if os.getppid() != parent:  # killed: nobody waits for this any more
            return
        try:
            (folder / "taken" / str(tests[item.nodeid])).open("x").close()
        except FileExistsError:
            continue
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        (folder / f"compiled-{number}").write_text("\n".join(COMPILED))
        try:
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
                torch.cuda.synchronize()
        except RuntimeError:  # an illegal access spoils a process for good; it would take all tests and fail each
            return


def _listen() -> None:
    """Notes in COMPILED what Triton compiles in this process from now on."""
    import triton  # not before TRITON_INTERPRET is set

    def note(src, metadata, metadata_group, times, cache_hit):
        if not cache_hit:
            COMPILED.append(src.name)

    triton.knobs.compilation.listener = note
