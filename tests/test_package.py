"""The package keeps its promises: one list of dependencies, a README that is true, a library that a reader finishes."""

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import floors
import pytest
import tables
import timings

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "minqwen").rglob("*.py"))
READMES = sorted(path for place in ("", "[a-z]*/", "data/*/") for path in ROOT.glob(f"{place}README.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
IMPORTED_AS = {"pillow": "PIL", "huggingface-hub": "huggingface_hub"}

MOST_LINES, MOST_IN_A_FILE, MOST_IN_A_FUNCTION = 4270, 250, 60  # of the library without its drawn world
LARGEST_FILE = 16 * 2**20
# Where somebody's files happened to lie when a notebook or a log was made.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/~-])/(?:(?:work|root|opt|home/[\w.-]+|Users/[\w.-]+)/|tmp/ipykernel)|\b[A-Z]:\\+Users\\"
)


def requirement_name(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


def imports(path: Path) -> set[str]:
    """The top-level packages that a file imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def code_lines(source: str) -> int:
    """Lines that hold code: no blank lines, no comments, no docstrings."""
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in nothing:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def files_for_git() -> list[Path]:
    """What git holds, and what it would take with `git add --all`."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


# ---------------------------------------------------------------------------------------------- dependencies


def test_the_library_imports_what_pyproject_declares_and_nothing_else():
    declared = {requirement_name(r) for r in PYPROJECT["project"]["dependencies"]}
    allowed = {IMPORTED_AS.get(name, name) for name in declared} | {"minqwen"} | set(sys.stdlib_module_names)
    for path in LIBRARY:
        assert imports(path) <= allowed, f"{path.name} imports {sorted(imports(path) - allowed)}"


def test_the_library_imports_neither_diffusers_nor_transformers():
    for path in LIBRARY:
        assert not imports(path) & {"diffusers", "transformers"}, path.name


def test_the_yardsticks_are_pinned_and_torch_has_both_ends():
    requirements = {requirement_name(r): r for r in PYPROJECT["project"]["optional-dependencies"]["test"]}
    assert "==" in requirements["diffusers"] and "==" in requirements["transformers"]
    torch = next(r for r in PYPROJECT["project"]["dependencies"] if requirement_name(r) == "torch")
    assert ">=" in torch and "<=" in torch, "an open range pulls gigabytes of untested builds"


def test_what_is_not_installed_is_named():
    bare = [sys.executable, "-S", "-c", "import course"]
    done = subprocess.run(bare, cwd=ROOT / "notebooks", capture_output=True, text=True, encoding="utf-8")
    declared = {requirement_name(r) for r in PYPROJECT["project"]["dependencies"]} | {"minqwen", "matplotlib"}
    named = re.search(r"not installed for [^:]+: (.*?)\. Choose", done.stderr)[1].split(", ")
    assert set(named) == {IMPORTED_AS.get(name, name) for name in declared}


def test_every_dependency_has_a_floor_and_tests_need_what_the_course_needs():
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert sorted(extras) == ["course", "test"] and "minqwen[course]" in extras["test"]
    assert all("==" in floors.lowest(requirement) for requirement in floors.ALL)


def test_the_table_of_floors_is_read_as_it_is_written():
    shown = ["–"] * len(floors.SHOWN)
    rows = {("3.13", "highest"): ["3.13.0", "highest", *shown, "9", "0", "0"]}
    rows |= {("3.11", step): ["3.11.7", step, *shown, "not installed", "", ""] for step in ("yardsticks", "lowest")}
    lines = floors.table(rows)
    assert [line.split()[1:4:2] for line in lines[2:]] == [
        ["3.11.7", "lowest"],
        ["3.11.7", "yardsticks"],
        ["3.13.0", "highest"],
    ]
    assert floors.table_of("\n".join(lines)) == rows
    assert floors.table(floors.table_of(floors.PAGE.read_text(encoding="utf-8")))[0] == lines[0]
    suite = '<testsuite tests="9" skipped="1" failures="2" errors="3" />'
    assert floors.counts(f"<testsuites>{suite}</testsuites>") == (3, 1, 5)


def test_environment_yml_is_thin():
    yaml = pytest.importorskip("yaml")
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, pip = environment["dependencies"]
    assert [requirement_name(r) for r in conda] == ["python", "pip"]
    assert pip == {"pip": ["-e .[test]"]}, "packages belong into pyproject.toml, and only there"
    oldest = PYPROJECT["project"]["requires-python"].removeprefix(">=")
    version = conda[0].partition("=")[2]
    assert tuple(map(int, version.split("."))) >= tuple(map(int, oldest.split(".")))


def test_ci_runs_what_a_reader_runs():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "exec make test"


# ---------------------------------------------------------------------------------------------------- README


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.relative_to(ROOT).as_posix())
def test_what_a_readme_links_to_is_there(path):
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    local = [link.split("#")[0] for link in links if "://" not in link and not link.startswith(("#", "mailto:"))]
    missing = [link for link in local if not (path.parent / link).exists()]
    assert not missing, f"{path} links to {missing}"


def test_paths_that_the_readme_names_are_there():
    named = set(re.findall(r"\b(?:minqwen|notebooks|data|tests)/[\w./-]*\w", README))
    missing = sorted(path for path in named if not (ROOT / path).exists())
    assert not missing, f"README.md names {missing}"


def test_the_file_guide_lists_every_file_once():
    guide = README.split("## The files")[1].split("\n## ")[0]
    listed = re.findall(r"^\| \[`(\w+(?:\.py|/))`\]\(minqwen/\1\)", guide, re.MULTILINE)
    places = [path.relative_to(ROOT / "minqwen") for path in LIBRARY]  # of a package, its folder
    there = {place.name if len(place.parts) == 1 else f"{place.parts[0]}/" for place in places} - {"__init__.py"}
    assert sorted(listed) == sorted(there)


def test_make_help_and_the_readme_name_what_make_does():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    for target in set(targets) - {"help", "setup", "setup-test"}:
        assert f'@echo "make {target} ' in makefile, f"make help does not say what make {target} does"
    assert set(re.findall(r"`make (\w+)`", README)) <= set(targets)


@pytest.mark.slow
def test_the_timings_have_their_place_in_the_readme():
    printed = "95.00s call     notebooks/10_a.ipynb::\n11.04s call     notebooks/01_b.ipynb::\n"
    seconds = timings.chapter_seconds(printed) | {"06": 50.0}
    assert timings.chapter_memory().keys() == {f"{number:02}" for number in range(12)}
    table = timings.table(0.23, {"test": 500.0}, seconds, {"01": 0.5, "06": 1.4, "10": 0.9})
    lines = "\n".join(table)
    assert "| 0.2 s |" in lines and "11 s (01) to 95 s (10), all together 3 minutes" in lines
    assert "0.5 GB (01) to 1.4 GB (06)" in lines and "`make test`, once everything is installed | 8 minutes |" in lines
    assert lines in tables.written(README, "timings", table)
    with pytest.raises(ValueError, match="once each"):
        tables.written(README + "<!-- what make timings writes -->\n", "timings", table)


def test_nothing_is_left_to_fill_in():
    assert "TODO" not in README


# ------------------------------------------------------------------------------------------------- the files


def test_no_file_is_too_large_for_a_clone():
    large = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in files_for_git()}
    large = {name: size for name, size in large.items() if size > LARGEST_FILE}
    assert not large, f"over {LARGEST_FILE} bytes: {large}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("saved in /" + "home/jo/minqwen/data", True),
        ('"' + "/" + 'root/.cache"', True),
        ("C:\\" + "Users\\jo", True),
        ("https://example.org/" + "work/index.html", False),
        ("tests/" + "work/of art, and/or/opt/in", False),
    ],
)
def test_machine_paths_are_told_from_others(text, found):
    assert bool(MACHINE_PATH.search(text)) == found


@pytest.mark.slow
def test_no_path_of_one_machine_is_left_in_a_text_file():
    found = []
    for path in files_for_git():
        if path.stat().st_size > LARGEST_FILE or b"\0" in path.open("rb").read(8192):
            continue
        text = path.read_text(encoding="utf-8", errors="replace").replace("\\n", "\n")  # JSON, and so notebooks
        match = MACHINE_PATH.search(text)
        if match:
            found.append(f"{path.relative_to(ROOT).as_posix()}: {match[0]}")
    assert not found, found


@pytest.mark.slow
def test_the_library_is_small_enough_to_read(capsys):
    lines = {path.relative_to(ROOT / "minqwen"): code_lines(path.read_text(encoding="utf-8")) for path in LIBRARY}
    world = sum(count for path, count in lines.items() if path.parts[0] == "world")
    total = sum(lines.values()) - world
    with capsys.disabled():
        print(f"\nminqwen: {total} lines of code in {len(lines)} files, and {world} of the drawn world")
    assert total <= MOST_LINES, lines
    assert not {path: count for path, count in lines.items() if count > MOST_IN_A_FILE}


def test_no_function_of_the_library_is_long():
    long = []
    for path in LIBRARY:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MOST_IN_A_FUNCTION:
                long.append(f"{path.name}: {node.name}, {node.end_lineno - node.lineno + 1} lines")
    assert not long, long


def test_lines_of_code_are_counted_without_words():
    source = '"""Doc\n\nmore."""\n\nx = """two\nlines"""  # a comment\n# another\n'
    source += 'def f():\n    "doc"\n    return (1 +\n\n  2)\n'
    assert code_lines(source) == 5
