"""The examples run from top to bottom, and the notebook is the script."""

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
SCRIPT, NOTEBOOK = ROOT / "examples/first_run.py", ROOT / "examples/first_run.ipynb"


def code_of(source: str) -> list[str]:
    """Return the statements of a script, without comments and its docstring."""
    tree = ast.parse(source)
    statements = tree.body[ast.get_docstring(tree) is not None :]
    return [ast.unparse(statement) for statement in statements]


def test_the_notebook_has_the_code_of_the_script() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert code_of(code) == code_of(SCRIPT.read_text())
    assert [cell for cell in cells if cell.get("outputs")] == []


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": tmp_path}})
    client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert any("image/png" in out.get("data", {}) for out in outputs)  # the curves, in place
    (said,) = (out.text for out in outputs if "computed now" in out.get("text", ""))
    (line,) = (line for line in said.splitlines() if "computed now" in line)
    computed, recorded = line.split()[2], line.split()[5]
    assert computed == recorded
    (folder,) = (tmp_path / "shared_files/server").iterdir()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
