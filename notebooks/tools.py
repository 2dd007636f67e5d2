"""Keeps the notebooks and the library the same: python notebooks/tools.py [--check | --count]

Writes the definitions of the library into the chapters' cells that begin with "# minqwen/FILE.py: NAME, NAME", and the
exercises, which are the solutions without what stands between "# solution" and "# end". With --check it changes
nothing, says what is out of date, and ends with 1 if anything is.
"""

import argparse
import ast
import copy
import itertools
import re
import sys
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent
LIBRARY = HERE.parent / "minqwen"
SHOWN = {  # chapter -> the files whose definitions it shows, all of them
    "01": ["timestep"],
    "02": ["rope"],
    "03": ["attention"],
    "04": ["block"],
    "05": ["transformer"],
    "06": ["images", "vae", "tiling"],
    "07": ["tokenizer", "prompt", "text_encoder", "vision"],
    "08": ["precompute"],
    "09": ["sampling"],
    "10": ["lora"],
    "11": ["quantize", "memory"],
}
HEAD = re.compile(r"# minqwen/(\w+)\.py: ([\w, ]+)\n?")
REGION = re.compile(r"^(?P<indent>[ ]*)# solution\n(?:.*\n)*?[ ]*# end$", re.MULTILINE)


def definitions(path: Path) -> dict[str, str]:
    """What a file of the library defines at its top level, in order: name -> source without docstrings."""
    source = path.read_text(encoding="utf-8")
    lines, drop, found = source.splitlines(), set(), {}
    for node in ast.walk(tree := ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            drop |= set(range(node.body[0].lineno - 1, node.body[0].end_lineno))
            if not lines[node.body[0].end_lineno].strip():
                drop.add(node.body[0].end_lineno)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            first, names = min([node.lineno, *(d.lineno for d in node.decorator_list)]), [node.name]
        elif isinstance(node, ast.Assign):
            first = node.lineno
            names = [n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        else:
            continue
        text = "\n".join(lines[k] for k in range(first - 1, node.end_lineno) if k not in drop)
        found |= dict.fromkeys(names, text)
    return found


def cell_text(head: re.Match, library: Path = LIBRARY) -> str:
    """What a cell with this first line must hold. Raises KeyError for a definition that is not there."""
    there = definitions(library / f"{head[1]}.py")
    names = [name.strip() for name in head[2].split(",")]
    if unknown := [name for name in names if name not in there]:
        raise KeyError(f"minqwen/{head[1]}.py defines no {', '.join(unknown)}")
    text = f"# minqwen/{head[1]}.py: {', '.join(names)}\n{there[names[0]]}"
    for before, name in itertools.pairwise(names):
        short = "\n" not in there[before] + there[name]  # constants of one line stand together
        text += ("\n" if short else "\n\n\n") + there[name]
    return text


def sync(notebook, chapter: str, library: Path = LIBRARY) -> tuple[object, list[str]]:
    """A chapter with the library's definitions, and what was out of date in it: drift, orphans, what is not shown."""
    notebook, faults, seen = copy.deepcopy(notebook), [], {}
    for cell in notebook.cells:
        head = HEAD.match(cell.source) if cell.cell_type == "code" else None
        if not head:
            continue
        try:
            text = cell_text(head, library)
        except (KeyError, FileNotFoundError) as error:
            faults.append(f"orphan: {error}")
            continue
        if cell.source != text:
            faults.append(f"drift: {head[0].strip()}")
            cell.source = text
        seen.setdefault(head[1], []).extend(name.strip() for name in head[2].split(","))
    for file in SHOWN.get(chapter, ()):
        missing = [name for name in definitions(library / f"{file}.py") if name not in seen.get(file, ())]
        faults += [f"not shown: {name} of minqwen/{file}.py" for name in missing]
        faults += [f"shown twice: {name}" for name in set(seen.get(file, ())) if seen[file].count(name) > 1]
    return notebook, faults


def stubs(solutions):
    """The exercises of a notebook of solutions: marked regions and outputs removed."""
    notebook = copy.deepcopy(solutions)
    notebook.metadata.pop("language_info", None)  # running the solutions writes it
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = REGION.sub(_empty, cell.source)
            cell.outputs, cell.execution_count = [], None
            cell.metadata.pop("execution", None)
        else:
            cell.source = re.sub(r" · solutions$", " · exercises", cell.source, flags=re.MULTILINE)
    return notebook


def _empty(region: re.Match) -> str:
    indent = region["indent"]
    return f"{indent}raise NotImplementedError  # your code here" if indent else "# your code here"


def lessons() -> list[Path]:
    """The chapters, in order."""
    return sorted(HERE.glob("[0-9][0-9]_*.ipynb"))


def appendices() -> list[Path]:
    """What proves the lessons: the file to the letter, other programs, released weights, cost. Not all have one yet."""
    return sorted((HERE / "appendix").glob("*.ipynb"))


def holders() -> dict[str, Path]:
    """Of each chapter that shows definitions, the notebook in which they stand: its appendix, or itself."""
    found = {path.name[:2]: path for path in [*lessons(), *appendices()]}
    return {number: found[number] for number in SHOWN}


def measured(path: Path) -> dict[str, int]:
    """How long a lesson is: words, lines of code, the longest of them, lines of code before the first explanation."""
    words, lines, before = 0, [], None
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            words += len(cell.source.split())
            before = len(lines) if before is None and lines else before
        else:
            lines += [line for line in cell.source.splitlines() if line.strip()]
    return {"words": words, "lines": len(lines), "longest": max(map(len, lines)), "before": before}


def read(path: Path):
    return nbformat.read(path, as_version=4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    parser.add_argument("--count", action="store_true", help="only say how long the lessons are")
    asked, late = parser.parse_args(), []
    if asked.count:
        for path in lessons():
            told = "{words} words, {lines} lines of code (longest {longest}), {before} of them before the first word"
            print(f"{path.stem}: {told.format(**measured(path))}")
        return 0
    check, whole = asked.check, set(holders().values())
    for path in [*lessons(), *appendices()]:
        notebook, faults = sync(read(path), path.name[:2] if path in whole else "")
        late += [f"{path.name}: {fault}" for fault in faults]
        if faults and not check:
            nbformat.write(notebook, path)
    for path in sorted((HERE / "solutions").glob("*.ipynb")):
        target, wanted = HERE / "exercises" / path.name, stubs(read(path))
        if not target.exists() or read(target) != wanted:
            late.append(f"exercises/{path.name}: not those of its solutions")
            if not check:
                nbformat.write(wanted, target)
    print("\n".join(late) if late else "Library, chapters, exercises and solutions agree.")
    stays = [fault for fault in late if not fault.split(": ")[1].startswith(("drift", "not those"))]
    return 1 if (late if check else stays) else 0


if __name__ == "__main__":
    sys.exit(main())
