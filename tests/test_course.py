"""The notebooks hold the library to the letter; every check passes its solution and fails each stored mistake."""

import importlib
import io
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import nbformat
import pytest
import situations
import tools
import torch

import checks

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
CHAPTERS, APPENDICES = tools.lessons(), tools.appendices()
BUILT = [path for path in CHAPTERS if path.name[:2] in tools.SHOWN]  # those that have exercises
SOLUTIONS = sorted((NOTEBOOKS / "solutions").glob("*.ipynb"))
NUMBERS = [path.name[:2] for path in SOLUTIONS]
EXERCISES = sorted((NOTEBOOKS / "exercises").glob("*.ipynb"))
ALL = [*CHAPTERS, *sorted(NOTEBOOKS.glob("[a-z]*/[0-9][0-9]_*.ipynb"))]
MOST_BYTES = 1_500_000


def code(path: Path) -> list:
    return [cell for cell in tools.read(path).cells if cell.cell_type == "code"]


def name(path: Path) -> str:
    return path.stem


# ------------------------------------------------------------------------------------ notebook and library agree


def test_there_is_a_chapter_for_every_file_that_should_be_shown():
    assert list(tools.holders()) == list(tools.SHOWN) == [path.name[:2] for path in BUILT]


@pytest.mark.parametrize("path", tools.holders().values(), ids=name)
def test_every_definition_stands_in_its_chapter_to_the_letter(path):
    _, faults = tools.sync(tools.read(path), path.name[:2])
    assert not faults, f"{faults}: run python notebooks/tools.py"


LIBRARY = '"""A file."""\n\nLIMIT = 3\n\n\ndef double(x: int) -> int:\n    """Twice."""\n    return 2 * x  # why\n'


@pytest.fixture
def library(tmp_path, monkeypatch):
    (tmp_path / "small.py").write_text(LIBRARY)
    monkeypatch.setitem(tools.SHOWN, "99", ["small"])
    return tmp_path


def chapter(*cells: str):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])


def test_a_chapter_in_step_has_no_faults(library):
    shown = "# minqwen/small.py: LIMIT, double\nLIMIT = 3\n\n\ndef double(x: int) -> int:\n    return 2 * x  # why"
    assert tools.sync(chapter(shown), "99", library)[1] == []


@pytest.mark.parametrize(
    ("cells", "fault"),
    [
        (["# minqwen/small.py: LIMIT\nLIMIT = 4", "# minqwen/small.py: double\n"], "drift: # minqwen/small.py: LIMIT"),
        (["# minqwen/small.py: LIMIT\nLIMIT = 3"], "not shown: double of minqwen/small.py"),
        (["# minqwen/small.py: LIMIT, double, gone\n"], "orphan: 'minqwen/small.py defines no gone'"),
        (["# minqwen/small.py: LIMIT, double", "# minqwen/small.py: LIMIT"], "shown twice: LIMIT"),
        (["# minqwen/other.py: LIMIT"], "orphan: "),
    ],
)
def test_drift_orphans_and_gaps_are_found_and_mended(library, cells, fault):
    mended, faults = tools.sync(chapter(*cells), "99", library)
    assert any(found.startswith(fault) for found in faults), faults
    again = tools.sync(mended, "99", library)[1]
    assert not [found for found in again if found.startswith("drift")]


def test_docstrings_do_not_count_but_comments_do(library):
    shown = tools.sync(chapter("# minqwen/small.py: LIMIT, double"), "99", library)[0]
    (library / "small.py").write_text(LIBRARY.replace("Twice.", "Two times."))
    assert tools.sync(shown, "99", library)[1] == []
    (library / "small.py").write_text(LIBRARY.replace("# why", "# because"))
    assert tools.sync(shown, "99", library)[1] == ["drift: # minqwen/small.py: LIMIT, double"]


# ---------------------------------------------------------------------------------------------------- chapters


def words(path: Path) -> str:
    return "\n".join(cell.source for cell in tools.read(path).cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("path", BUILT, ids=name)
def test_a_chapter_leads_to_its_exercises(path):
    assert f"exercises/{path.name}" in words(path)


@pytest.mark.parametrize("path", APPENDICES, ids=name)
def test_a_lesson_leads_to_its_appendix_and_back(path):
    assert f"](appendix/{path.name})" in words(NOTEBOOKS / path.name) and f"](../{path.name})" in words(path)


def test_the_glossary_holds_what_its_chapters_explain():
    rows = re.findall(r"^\| (.+?) \|.*\| ([\d, ]+) \|$", (NOTEBOOKS / "glossary.md").read_text("utf-8"), re.MULTILINE)
    lessons = {path.name[:2]: words(path).lower() for path in CHAPTERS}
    terms = [(term, n) for of_row, numbers in rows for term in of_row.split(", ") for n in numbers.split(", ")]
    assert len(rows) > 40 and not [(t, n) for t, n in terms if t.lower().removesuffix(" σ") not in lessons[n]]
    assert [row for row, _ in rows] == sorted((row for row, _ in rows), key=str.lower)


def test_the_glossary_holds_the_chinese_of_the_lessons():
    glossary = (NOTEBOOKS / "glossary.md").read_text("utf-8")
    found = {path.stem: re.findall(r"\(([^()]*[\u4e00-\u9fff][^()]*)\)", words(path)) for path in CHAPTERS}
    assert not {stem: names for stem, names in found.items() if len(names) > 5}
    named = {name.strip() for names in found.values() for told in names for name in told.split(",")}
    assert not [name for name in named if re.fullmatch(r"[\u4e00-\u9fff]+", name) and name not in glossary]


def test_what_a_lesson_holds_is_counted(tmp_path):
    cells = nbformat.v4.new_code_cell("import sys\n\nx = 1"), nbformat.v4.new_markdown_cell("one two *three*")
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "99_a.ipynb")
    assert tools.measured(tmp_path / "99_a.ipynb") == {"words": 3, "lines": 2, "longest": 10, "before": 2}


@pytest.mark.parametrize("path", ALL, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_what_a_notebook_links_to_is_there(path):
    links = re.findall(r"\]\(([^)\s]+)\)", words(path)) + re.findall(r"(?:src|href)=\"([^\"]+)\"", words(path))
    local = [link.split("#")[0] for link in links if "://" not in link and not link.startswith(("#", "attachment:"))]
    assert not [link for link in local if not (path.parent / link).exists()]


@pytest.mark.parametrize("path", [*CHAPTERS, *APPENDICES, *SOLUTIONS], ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_outputs_are_committed_small_and_quiet(path):
    assert path.stat().st_size < MOST_BYTES
    counts = [cell.execution_count for cell in code(path)]
    assert counts == list(range(1, len(counts) + 1)), "run from top to bottom: make notebooks"
    outputs = [output for cell in code(path) for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not [o for o in outputs if o.get("name") == "stdout" and re.search(r"Warning|it/s\]", o.text)]
    assert not [o for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]  # a bar at 0 %


# ---------------------------------------------------------------------------------------------- the first cell

FIRST = re.compile(r"import sys\n\nsys\.path .*\ntry:\n(?:    from .* import .*\n)+(except .*(?:\n    .*)+)")


@pytest.mark.parametrize("path", ALL, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_notebook_opened_alone_says_how_to_get_its_repository(path, tmp_path):
    first, other = (code(each)[0].source for each in (path, CHAPTERS[0]))
    assert FIRST.match(first)[1] == FIRST.match(other)[1], "the same in all notebooks"
    bare = [sys.executable, "-I", "-S", "-c", first]  # without any packages
    done = subprocess.run(bare, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    said = done.stderr.split("ModuleNotFoundError: ")[1]
    readme = (NOTEBOOKS.parent / "README.md").read_text(encoding="utf-8")
    assert said.startswith("No module named")
    assert "!" + re.search(r"^git clone \S+ minqwen", readme, re.MULTILINE)[0] + "\n" in said


@pytest.mark.slow
def test_a_notebook_works_in_every_situation():
    found = situations.faults(EXERCISES[0].relative_to(NOTEBOOKS.parent).as_posix(), situations.SITUATIONS)
    assert found == {situation: [] for situation in situations.SITUATIONS}


# --------------------------------------------------------------------------------------------------- exercises


def solved(path: Path, code_of) -> str:
    """Runs the code cells of a notebook of solutions or exercises; what its last cell prints."""
    printed, space = io.StringIO(), {"__name__": "exercise"}
    with redirect_stdout(printed):
        for cell in code_of:
            exec(compile(cell.source, str(path), "exec"), space)
    return printed.getvalue().strip().splitlines()[-1]


@pytest.fixture
def in_solutions(monkeypatch):
    monkeypatch.chdir(NOTEBOOKS / "solutions")
    monkeypatch.setattr(sys, "path", [*sys.path])  # exercises add the folder of the checks to it


def checks_of(number: str) -> dict:
    module = importlib.import_module(f"checks.chapter_{number}")
    return {key: value for key, value in vars(module).items() if isinstance(getattr(value, "number", None), str)}


def wrong_answers() -> list:
    cases = []
    for number in NUMBERS:
        wrong = importlib.import_module(f"wrong_answers.chapter_{number}").WRONG
        cases += [pytest.param(number, key, *case, id=f"{number}-{key}-{i}")
                  for key in wrong for i, case in enumerate(wrong[key])]  # fmt: skip
    return cases


def test_every_chapter_has_exercises():
    assert NUMBERS == list(tools.SHOWN)


@pytest.mark.parametrize("path", SOLUTIONS, ids=name)
def test_exercises_are_the_solutions_without_the_answers(path):
    assert tools.read(NOTEBOOKS / "exercises" / path.name) == tools.stubs(tools.read(path)), "python notebooks/tools.py"


@pytest.mark.slow
@pytest.mark.parametrize("path", SOLUTIONS, ids=name)
def test_solutions_pass_and_stubs_are_open(path, in_solutions):
    names = sorted(check.number for check in checks_of(path.name[:2]).values())
    assert len(names) >= 4
    assert solved(path, code(path)) == f"done {len(names)} ({', '.join(names)}); open 0; skipped 0"
    stubs = code(NOTEBOOKS / "exercises" / path.name)
    assert solved(path, stubs) == f"done 0; open {len(names)} ({', '.join(names)}); skipped 0"


@pytest.mark.parametrize("number", NUMBERS)
def test_every_check_has_three_stored_wrong_answers(number):
    wrong = importlib.import_module(f"wrong_answers.chapter_{number}").WRONG
    assert sorted(wrong) == sorted(checks_of(number))
    assert all(len(cases) >= 3 for cases in wrong.values())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "key", "words", "answer"), wrong_answers())
def test_a_wrong_answer_fails_with_its_diagnosis(number, key, words, answer, in_solutions):
    with pytest.raises(checks.Wrong, match=re.escape(words)):
        checks_of(number)[key](*answer if isinstance(answer, checks.Answers) else (answer,))


# ------------------------------------------------------------------------------------------------- the harness


@pytest.fixture
def doubled():
    @checks.exercise("0.1")
    def doubled(answer):
        from minqwen.timestep import get_timestep_embedding as library

        t = torch.rand(3)
        want = library(t, 8)
        checks.expect(checks.ask(answer, t, 8, library="timestep.py"), want, {"sines last": want.roll(4, 1)})

    return doubled


def test_the_librarys_own_function_is_refused_under_any_name(doubled):
    from minqwen import timestep

    for handed_in in (timestep.get_timestep_embedding, lambda *a: timestep.get_timestep_embedding(*a)):
        with pytest.raises(checks.Wrong, match="write it yourself"):
            doubled(handed_in)


def test_what_a_check_says(doubled, capsys):
    def stub(t, dim):
        raise NotImplementedError

    doubled(stub)
    doubled(None)
    assert capsys.readouterr().out == "0.1: not attempted yet\n" * 2
    for answer, words in [
        (lambda t, dim: torch.zeros(3, 9), "expected the shape (3, 8), got (3, 9)"),
        (lambda t, dim: torch.full((3, 8), float("nan")), "24 of 24 numbers differ; the first at [0, 0]"),
        (lambda t, dim: None, "expected a tensor"),
        (lambda t: t, "your code raised TypeError"),
    ]:
        with pytest.raises(checks.Wrong, match=re.escape(words)):
            doubled(answer)


@pytest.mark.parametrize(
    ("got", "want", "right"),
    [(3, 3, True), (3.0, 3, True), (True, 1, False), ("A ", "a", True), ((1, 2), (1, 2), True), ([1], (1, 2), False),
     (torch.tensor(2.0), 2, True), (None, 1, False), (False, True, False)],
)  # fmt: skip
def test_plain_answers_are_compared(got, want, right):
    if right:
        return checks.expect(got, want)
    with pytest.raises(checks.Wrong):
        checks.expect(got, want)


@pytest.mark.slow
def test_the_command_says_that_all_agrees():
    done = subprocess.run([sys.executable, NOTEBOOKS / "tools.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
