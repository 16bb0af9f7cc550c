"""The error tree: drawn as it is, raised somewhere, and able to travel between ranks."""

from __future__ import annotations

import inspect
import json
import pickle
import re
from pathlib import Path

import pytest

import dcp_resume
from dcp_resume import errors
from dcp_resume.errors import DcpResumeError, Problem
from dcp_resume.session.error_wire import decode_error, encode_error

CLASSES = [
    cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, DcpResumeError)
]
EXAMPLES = {
    "problems": (Problem("a.b", "kind", "expected 1, found 2"),),
    "errors": {0: "ValueError: x", 3: "OSError: y"},
    "ranks": (1, 2),
    "written_fqns": ("a", "b"),
}


def example(cls: type[DcpResumeError]) -> DcpResumeError:
    facts = {name: EXAMPLES.get(name, 7) for name in cls.fact_names()}
    return cls("what failed; what to do", **facts)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_errors_survive_pickle_and_our_own_wire(cls):
    error = example(cls)
    for copy in (
        pickle.loads(pickle.dumps(error)),
        decode_error(json.loads(json.dumps(encode_error(error)))),
    ):
        assert type(copy) is cls
        assert str(copy) == str(error)
        for name in cls.fact_names():
            assert getattr(copy, name) == getattr(error, name)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_errors_insist_on_their_facts(cls):
    with pytest.raises(TypeError, match="takes facts"):
        cls("message", nonsense=1)


def test_the_tree_is_drawn_as_it_is():
    drawn = re.findall(r"^ {4}([│ ]*)(?:[├└]── )?([A-Z]\w+)", errors.__doc__, re.MULTILINE)
    parents: list[str] = []
    found = {}
    for indent, name in drawn:
        depth = len(indent) // 4 + (name != "DcpResumeError")
        found[name] = parents[depth - 1] if depth else None
        parents[depth:] = [name]
    assert set(found) == {cls.__name__ for cls in CLASSES}
    for cls in CLASSES:
        ours = [base.__name__ for base in cls.__mro__[1:] if base in CLASSES]
        assert found[cls.__name__] == (ours[0] if ours else None)


def test_every_error_is_raised_somewhere():
    text = "\n".join(
        path.read_text()
        for path in Path(dcp_resume.__file__).parent.rglob("*.py")
        if path.name != "errors.py"
    )
    leaves = [cls for cls in CLASSES if not cls.__subclasses__()]
    unused = [cls.__name__ for cls in leaves if not re.search(rf"\b{cls.__name__}\b", text)]
    assert not unused
