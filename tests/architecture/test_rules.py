"""Rules of the house that import-linter cannot see: an ``ast`` walk over the package."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dcp_resume

ROOT = Path(dcp_resume.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in SOURCES}
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "base"}


def imports(tree: ast.AST) -> set[str]:
    """Every module that a tree imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def calls(tree: ast.AST) -> set[str]:
    """Dotted names of everything that a tree calls."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def is_under(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_nothing_is_ever_pickled_or_executed():
    banned_modules = ("pickle", "dill", "cloudpickle", "marshal", "shelve", "torch.serialization")
    banned_calls = {"torch.load", "torch.save", "eval", "exec", "np.load", "numpy.load", "compile"}
    found = {
        (name, what)
        for name, tree in TREES.items()
        for what in (
            *(m for m in imports(tree) if any(is_under(m, b) for b in banned_modules)),
            *(calls(tree) & banned_calls),
        )
    }
    assert not found


def test_opcodes_of_pickles_are_looked_at_in_one_file():
    """It reads them as a tree and calls nothing; no other file knows that there are any."""
    users = {name for name, tree in TREES.items() if "pickletools" in imports(tree)}
    assert users == {"interop/inert_pickle.py"}


def test_fsspec_enters_in_one_file():
    users = {
        name
        for name, tree in TREES.items()
        if any(is_under(m, lib) for m in imports(tree) for lib in ("fsspec", "s3fs"))
    }
    assert users == {"storage/fsspec_bridge.py"}


def test_torch_distributed_stays_in_planning_session_and_manager():
    users = {
        name.split("/")[0]
        for name, tree in TREES.items()
        if any(is_under(m, "torch.distributed.checkpoint") for m in imports(tree))
    }
    assert users <= {"planning", "session", "manager"}
    assert not any(
        "torch.distributed.checkpoint._" in m for t in TREES.values() for m in imports(t)
    )


@pytest.mark.parametrize("name", TREES)
def test_modules_and_functions_stay_small(name):
    lines = (ROOT / name).read_text().count("\n")
    assert lines <= 400, f"{name} has {lines} lines: split it by subject"
    for node in ast.walk(TREES[name]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            length = (node.end_lineno or 0) - first.lineno + 1
            assert length <= 60, f"{name}: {node.name} has {length} lines"


def test_35_the_library_knows_no_model():
    """What belongs to one model is in ``examples/``, which the library never imports."""
    examples = {path.stem for path in (ROOT.parent / "examples").glob("*.py")}
    assert {"gpt2", "llama3"} <= examples
    found = {
        (name, word)
        for name, tree in TREES.items()
        for word in (*(imports(tree) & examples), *model_words(tree))
    }
    assert not found


def model_words(tree: ast.AST) -> set[str]:
    """Names and strings of the code, docstrings apart, that speak of a certain model."""
    docs = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
    }
    fields = ("id", "attr", "name", "arg", "value")
    words = {
        text
        for node in ast.walk(tree)
        if node not in docs
        for field in fields
        if isinstance(text := getattr(node, field, None), str)
    }
    return {word for word in words if re.search(r"gpt|llama|bert|mistral|qwen", word.lower())}


def test_no_module_has_a_vague_name():
    parts = {part.removesuffix(".py") for name in TREES for part in name.split("/")}
    assert not {part.strip("_") for part in parts} & VAGUE


@pytest.mark.parametrize("name", TREES)
def test_no_exception_is_swallowed(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ExceptHandler):
            is_silent = all(isinstance(s, (ast.Pass, ast.Continue)) for s in node.body)
            is_broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            assert not (is_silent and is_broad), f"{name}:{node.lineno}"


def test_public_names_are_sorted_and_importable():
    assert dcp_resume.__all__ == sorted(dcp_resume.__all__)
    for name in dcp_resume.__all__:
        assert getattr(dcp_resume, name).__doc__, name
    with pytest.raises(AttributeError):
        dcp_resume.Nope  # noqa: B018


def loaded_modules(statement: str) -> set[str]:
    """Modules that a fresh interpreter has loaded after ``statement``."""
    code = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import dcp_resume", {"torch", "numpy", "fsspec", "s3fs", "pydantic"}),
        ("import dcp_resume.manifest.models", {"torch", "numpy", "fsspec", "s3fs"}),
        ("import dcp_resume.storage", {"torch", "numpy", "fsspec", "s3fs"}),
        ("import dcp_resume.session.commit", {"torch", "numpy", "fsspec"}),
        ("import dcp_resume.cli.main", {"torch", "numpy", "fsspec"}),
    ],
)
def test_imports_stay_light(statement, absent):
    assert not loaded_modules(statement) & absent


def test_declared_layers_hold():
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")],
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
