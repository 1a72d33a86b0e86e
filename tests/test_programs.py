"""The programs of ``experiments``: where they import, and what ``--help`` needs."""

import ast
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {path: path.read_text() for path in sorted(ROOT.glob("experiments/**/*.py"))}
PROGRAMS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for path, text in MODULES.items()
    if 'if __name__ == "__main__"' in text and "peers" not in path.parts
)


def functions(text: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_only_a_main_imports_inside_a_function() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {function.name}"
        for path, text in MODULES.items()
        for function in functions(text)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
        if function.name != "main" or "__main__" not in text
    }
    assert found == set()


def test_modules_and_functions_are_short() -> None:
    assert [path for path, text in MODULES.items() if len(text.splitlines()) > 400] == []
    long = [
        f"{path.relative_to(ROOT)}: {function.name}"
        for path, text in MODULES.items()
        for function in functions(text)
        if (function.end_lineno or 0) - function.lineno >= 60
    ]
    assert long == []


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_needs_neither_torch_nor_what_draws(program: str) -> None:
    missing = "import sys, runpy; sys.argv = ['x', '--help']; " + "".join(
        f"sys.modules[{package!r}] = None; "
        for package in ("torch", "numpy", "pandas", "matplotlib", "sklearn", "tqdm")
    )
    run = f"runpy.run_module({program!r}, run_name='__main__', alter_sys=True)"
    done = subprocess.run(
        [sys.executable, "-c", missing + run], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: python -m {program} ")


def test_an_interrupt_in_a_destructor_is_not_lost() -> None:
    code = """
        import os, signal, sys, time
        from sfl.program import run_program

        class Interrupted:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)

        def program():
            Interrupted()
            time.sleep(60)

        sys.exit(run_program("p", program))
    """
    began_at = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (3, "p: error: interrupted\n")
    assert time.monotonic() - began_at < 30
