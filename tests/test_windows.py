"""What is known to differ on Windows, simulated here: nobody has run this project there yet.

    modules and functions that only Unix has    consoles that cannot print every character (cp1252)
    no fork                                     text files of another encoding, wherever none is named
    files that cannot be replaced or deleted while anyone has them open or mapped

Each test starts a process of its own, takes these things away from it, and runs the commands as a user would.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minqwen.world import sample_edit

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data" / "tiny"
OURS = [path for place in ("minqwen", "notebooks", "data/recipes") for path in sorted((ROOT / place).rglob("*.py"))]
linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux which files are open")

AS_ON_WINDOWS = r"""
import os, runpy, sys, warnings
from pathlib import Path
import filelock  # has a lock of its own for Windows
import tqdm.utils

tqdm.utils.IS_WIN, tqdm.utils.IS_NIX = True, False  # old ones fail where neither Windows nor termios is

for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None  # importing it is an ImportError
for name in ("fork", "forkpty", "getuid", "geteuid", "getpgid", "sched_getaffinity", "statvfs", "mkfifo"):
    delattr(os, name)
warnings.filterwarnings("error", category=EncodingWarning, module=r"minqwen|course|tools|checks|__main__|make_|train_")

def is_open(path):
    path = os.path.realpath(path)
    opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    return path in opened or path in Path("/proc/self/maps").read_text(encoding="utf-8")

def only_if_closed(function):
    def call(path, *more, **options):
        for file in (path, *more):
            if os.path.isabs(file) and os.path.isfile(file) and is_open(file):
                raise PermissionError(13, "another program has it open", str(file))
        return function(path, *more, **options)
    return call

for name in ("replace", "rename", "remove", "unlink"):
    setattr(os, name, only_if_closed(getattr(os, name)))

def command(module, *words):
    sys.argv = [module, *map(str, words)]
    try:
        if module.endswith(".py"):
            runpy.run_path(module, run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        assert not end.code, f"{sys.argv}: {end.code}"
"""


def as_on_windows(code: str, *words, cwd: Path = ROOT) -> str:
    """Runs code in a process that lacks what Windows lacks, its output redirected into a pipe; what it printed."""
    path = os.pathsep.join(str(ROOT / place) for place in (".", "notebooks", "data/recipes"))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "cp1252", "MPLBACKEND": "Agg"}
    line = [sys.executable, "-X", "warn_default_encoding", "-c", AS_ON_WINDOWS + code, *map(str, words)]
    done = subprocess.run(line, env=environment, cwd=cwd, capture_output=True, text=True, encoding="cp1252")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


IMPORTS = """
for path in map(Path, sys.argv[1:]):
    if path.name != "__init__.py":
        __import__(".".join(path.with_suffix("").parts))
import course, minqwen.world
course.start()
course.ledger()
"""
HELP = """
for module in sys.argv[1:]:
    command(module, "--help")
"""
TRAINING = """
folder, tiny = Path(sys.argv[1]), sys.argv[2]
cache, out = folder / "缓存", folder / "训练"
make = ["minqwen.precompute", folder / "图像", "--control", folder / "控制", "--cache", cache, "--model", tiny]
train = ["minqwen.finetune", cache, "--out", out, "--model", tiny, "--rank", 2, "--save-every", 1, "--batch-size", 1]
command(*make)
command(*train, "--steps", 2)
command(*train, "--steps", 2)  # there is nothing left to do
(folder / "图像" / "圆形.txt").write_text("把圆形变成蓝色", encoding="utf-8")
command(*make, "--prune")  # replaces the index, deletes a sample
command(*make)
train[3] = folder / "再次"  # another run: the data are others
command(*train, "--steps", 2)
"""


HELD = """
import mmap
old, new = Path(sys.argv[1]), Path(sys.argv[2])
def replaced():
    try:
        os.replace(new, old)
    except PermissionError:
        return False
    return True
with open(old, "rb") as file:
    print(replaced(), end=" ")
    kept = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
print(replaced(), end=" ")
kept.close()
print(replaced())
"""


@linux
def test_the_simulation_holds_open_and_mapped_files(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).write_bytes(b"bytes")
    assert as_on_windows(HELD, tmp_path / "old", tmp_path / "new").split() == ["False", "False", "True"]


@linux
@pytest.mark.slow
def test_everything_imports_without_what_only_unix_has():
    places = [path.relative_to(ROOT / "notebooks" if "notebooks" in path.parts else ROOT) for path in OURS]
    places = [path.relative_to("data/recipes") if path.parts[0] == "data" else path for path in places]
    printed = as_on_windows(IMPORTS, *places)
    assert "tier tiny" in printed.splitlines()[-1] and "peak memory" not in printed  # the ledger leaves it out


@linux
@pytest.mark.slow
def test_the_commands_explain_themselves_on_a_console_of_cp1252():
    asked = [path for path in OURS if all(word in read(path) for word in ("Parser(", "__main__"))]
    commands = [path.stem for path in asked if path.parent.name == "minqwen"]
    scripts = [path.relative_to(ROOT) for path in asked if path.parent.name != "minqwen"]
    printed = as_on_windows(HELP, *(f"minqwen.{name}" for name in commands), *scripts)
    assert printed.count("usage:") == len(commands) + len(scripts) >= 6


@linux
@pytest.mark.slow
def test_precompute_and_finetune_work_with_chinese_names_and_files_that_are_held_open(tmp_path):
    edit = sample_edit(np.random.default_rng(0))
    for part, picture in (("图像", edit.target), ("控制", edit.source)):
        (tmp_path / part).mkdir()
        picture.save(tmp_path / part / "圆形.png")
    (tmp_path / "图像" / "圆形.txt").write_text(edit.instruction, encoding="utf-8")
    printed = as_on_windows(TRAINING, tmp_path, TINY)
    assert "1 computed, 0 reused" in printed and "0 computed, 1 reused" in printed
    assert (tmp_path / "训练" / "lora.safetensors").is_file()


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def without_encoding(source: str) -> list[str]:
    """Calls in a file that read or write text in whatever encoding this machine prefers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        named = {keyword.arg for keyword in node.keywords}
        words = [
            value.value for value in (*node.args, *(k.value for k in node.keywords)) if isinstance(value, ast.Constant)
        ]
        text = name.endswith((".read_text", ".write_text")) or "text" in named
        opens = name == "open" or name.endswith((".fdopen", "TemporaryFile"))
        if (text or opens and not any("b" in str(word)[:3] for word in words)) and "encoding" not in named:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_text_files_name_their_encoding(path):
    assert not without_encoding(read(path))


def test_a_missing_encoding_is_seen():
    missing = ["open(p)", "open(p, 'w')", "p.read_text()", "p.write_text('b')", "subprocess.run(c, text=True)"]
    named = ["open(p, 'rb')", "open(p, encoding='utf-8')", "p.read_bytes()", "Image.open(p)", "open(p, mode='wb')"]
    assert without_encoding("\n".join(missing + named)) == missing


@pytest.mark.slow
def test_nothing_forks_and_nothing_needs_unix():
    for path in OURS:
        tree = ast.parse(read(path))
        used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not {name for name in used if name in ("os.fork", "os.killpg", "os.setsid", "signal.SIGKILL")}, path
        assert "'fork'" not in ast.unparse(tree), path
