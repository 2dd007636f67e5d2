"""What the checks of all chapters share: one line in an exercise asks, compares and says which mistake it is.

A check tries random shapes and compares with an answer of its own, never with the reader's; it refuses the
library's own code handed in; it says "not attempted yet" of an empty stub; a wrong answer raises `Wrong`.
"""

import functools
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

LIBRARY = Path(__file__).resolve().parents[2] / "minqwen"
STATES: dict[str, dict[str, str]] = {}  # module of checks -> exercise -> "open", "done" or "skipped"


class Wrong(AssertionError):
    """An answer that is not right; the message says how."""


class Answers(tuple):
    """Several answers to one check that takes several."""


class Skipped(Exception):
    """This exercise needs what is not here; the message says what."""


def exercise(number: str):
    """Makes a check of a function that raises `Wrong` on a wrong answer, and returns nothing or a remark."""

    def decorate(function):
        states = STATES.setdefault(function.__module__, {})
        states[number] = "open"

        @functools.wraps(function)
        def check(*answers):
            states[number] = "open"
            try:
                if any(answer is None for answer in answers):
                    raise NotImplementedError
                remark = function(*answers)
            except NotImplementedError:
                print(f"{number}: not attempted yet")
            except Skipped as reason:
                states[number] = "skipped"
                print(f"{number}: skipped, {reason}")
            except Wrong as wrong:
                raise Wrong(f"{number}: {wrong}") from None
            else:
                states[number] = "done"
                print(f"{number}: right. {remark or ''}".strip())

        check.number = number
        return check

    return decorate


def ask(answer, *args, library: str | None = None, **kwargs):
    """Call the reader's function, class or module, refusing code of the library's file `library` ("timestep.py")."""
    file = str(LIBRARY / library) if library else None

    def watch(frame, event, _):
        if event == "call" and frame.f_code.co_filename == file:
            raise Wrong(f"this calls minqwen/{library}: write it yourself")

    before = sys.getprofile()
    sys.setprofile(watch if file else before)
    try:
        return answer(*args, **kwargs)
    except (NotImplementedError, Wrong, Skipped):
        raise
    except Exception as error:
        sizes = ", ".join(str(tuple(a.shape)) if isinstance(a, torch.Tensor) else repr(a)[:60] for a in args)
        raise Wrong(f"your code raised {type(error).__name__}: {error} (called with {sizes})") from error
    finally:
        sys.setprofile(before)


def expect(got, want, wrong: dict | None = None, tolerance: float = 1e-5, where: str = "") -> None:
    """Raise `Wrong` unless got equals want: which mistake it is, or else the first place where they differ.

    got, want: tensors, numbers, strings or tuples of them. wrong: diagnosis -> what that mistake gives.
    """
    where = f" ({where})" if where else ""
    if _equal(got, want, tolerance):
        return
    for diagnosis, value in (wrong or {}).items():
        if _equal(got, value, tolerance):
            raise Wrong(f"{diagnosis}{where}")
    if isinstance(want, tuple | list):
        if not isinstance(got, tuple | list) or len(got) != len(want):
            raise Wrong(f"expected {len(want)} results, got {_short(got)}{where}")
        for number, pair in enumerate(zip(got, want, strict=True), 1):
            expect(*pair, None, tolerance, f"result {number}{where}")
    if not isinstance(want, torch.Tensor):
        raise Wrong(f"{_short(got)} is not right{where}")
    if not isinstance(got, torch.Tensor):
        raise Wrong(f"expected a tensor of shape {tuple(want.shape)}, got {_short(got)}{where}")
    if got.shape != want.shape:
        raise Wrong(f"expected the shape {tuple(want.shape)}, got {tuple(got.shape)}{where}")
    apart = (got.double() - want.double()).abs().nan_to_num(nan=float("inf"))
    place = tuple(int(i[0]) for i in torch.where(apart > tolerance))
    raise Wrong(
        f"{int((apart > tolerance).sum())} of {want.numel()} numbers differ; the first at {list(place)}: "
        f"yours {got[place].item():.6g}, expected {want[place].item():.6g}{where}"
    )


def expect_five(answer, right: tuple, wrong: list[dict], names: Sequence[str], tolerance: float = 1e-5) -> None:
    """Raise `Wrong` unless a prediction holds these five numbers; wrong: of each, diagnosis -> what it gives."""
    if not isinstance(answer, tuple | list) or len(answer) != 5:
        raise Wrong(f"expected five numbers, got {str(answer)[:60]}")
    for got, want, mistakes, name in zip(answer, right, wrong, names, strict=True):
        expect(got, want, mistakes, tolerance, name)


WHOLE = "that is a whole of several parts: which part of it is the first to differ?"


def expect_finding(finding, form: str, **parts: tuple[str, dict[str, str]]) -> None:
    """Raise `Wrong` unless the finding of an exercise to debug is right, part by part: a name, say, then a letter.

    form: what the finding should be, in words, for one of another length ("two: the sub-module's name, a letter").
    parts: for each part in order, what is right and {what is wrong: its diagnosis}, where * stands for anything and
    the first that fits speaks. Case and spaces around do not count.
    """
    if not isinstance(finding, tuple | list) or len(finding) != len(parts):
        raise Wrong(f"expected {form}")
    for got, (part, (want, mistakes)) in zip(finding, parts.items(), strict=True):
        word = got.strip().lower() if isinstance(got, str) else None
        if word == want.lower():
            continue
        for mistake, diagnosis in mistakes.items():
            if word is not None and fnmatchcase(word, mistake.lower()):
                raise Wrong(f"{diagnosis} ({part})")
        raise Wrong(f"{_short(got)} is not right ({part})")


def _equal(got, want, tolerance: float) -> bool:
    if isinstance(want, tuple | list):
        fits = isinstance(got, tuple | list) and len(got) == len(want)
        return fits and all(_equal(g, w, tolerance) for g, w in zip(got, want, strict=True))
    if isinstance(want, str):
        return isinstance(got, str) and got.strip().lower() == want.lower()
    if isinstance(want, bool) or want is None:
        return got is want
    if isinstance(want, torch.Tensor):
        if not isinstance(got, torch.Tensor) or got.shape != want.shape:
            return False
        return bool(((got.double() - want.double()).abs() <= tolerance).all())
    got = got.item() if isinstance(got, torch.Tensor) and got.numel() == 1 else got
    return isinstance(got, int | float) and not isinstance(got, bool) and abs(got - want) <= tolerance


def _short(value) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:80]


def report(checks) -> None:
    """Done, open, skipped: of all exercises of a chapter's module of checks."""
    states, parts = STATES[checks.__name__], []
    for state in ("done", "open", "skipped"):
        numbers = [number for number, current in states.items() if current == state]
        parts.append(f"{state} {len(numbers)}" + (f" ({', '.join(numbers)})" if numbers else ""))
    print("; ".join(parts))
