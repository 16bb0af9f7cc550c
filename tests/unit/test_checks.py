import pytest

from dcp_resume.manifest.checks import checkpoint_problems
from dcp_resume.manifest.models import LeafEntry, MeshEntry, Padding

from .test_wire import CATALOG, MANIFEST

ITEMSIZES = {"float32": 4, "int8": 1}
TENSOR = CATALOG.tensors[0]
FILE = CATALOG.files[0]


def found(manifest=MANIFEST, catalog=CATALOG):
    problems = checkpoint_problems(manifest, catalog, ITEMSIZES)
    return [(problem.where.partition(":")[2], problem.kind) for problem in problems]


def with_tensors(*changes):
    tensors = tuple(TENSOR.model_copy(update=change) for change in changes)
    counts = MANIFEST.counts.model_copy(update={"tensors": len(tensors)})
    manifest = MANIFEST.model_copy(update={"counts": counts})
    return found(manifest, CATALOG.model_copy(update={"tensors": tensors}))


def with_files(*changes):
    files = tuple(FILE.model_copy(update=change) for change in changes)
    sizes = {"files": len(files), "num_bytes": sum(file.size for file in files)}
    manifest = MANIFEST.model_copy(update={"counts": MANIFEST.counts.model_copy(update=sizes)})
    return found(manifest, CATALOG.model_copy(update={"files": files}))


def with_manifest(**change):
    return found(MANIFEST.model_copy(update=change))


def with_meshes(*meshes):
    topology = MANIFEST.topology.model_copy(update={"meshes": meshes})
    return with_manifest(topology=topology)


def test_a_sound_checkpoint_has_no_problems():
    assert found() == []
    assert with_files({}, {"base": "step-00000020/old"}) == []
    assert with_tensors({"global_shape": (0, 2**62, 2**62)}) == []
    assert with_tensors({"placements": ("SS(1,4)",)}, {"fqn": "b", "placements": ("R",)}) == []


@pytest.mark.parametrize(
    "key",
    ["../x", "/x", "a//b", "", "a/../b", ".hidden", "UPPER", "a\\b", "ä", "a" * 101, "x/" * 500],
)
def test_keys_that_escape(key):
    assert ("files[0].key", "path_escape") in with_files({"key": key})
    document = MANIFEST.catalog.model_copy(update={"key": key})
    assert ("catalog.key", "path_escape") in with_manifest(catalog=document)


@pytest.mark.parametrize("key", ["manifest.json", "catalog.json", "chunk-index"])
def test_data_files_are_not_documents(key):
    assert with_files({"key": key}) == [("files[0].key", "duplicate")]


def test_documents_are_three_files():
    both = {"key": "catalog.json"}
    assert with_manifest(chunk_index=MANIFEST.chunk_index.model_copy(update=both)) == [
        ("chunk_index.key", "duplicate")
    ]
    own = MANIFEST.catalog.model_copy(update={"key": "manifest.json"})
    assert with_manifest(catalog=own) == [("catalog.key", "duplicate")]


@pytest.mark.parametrize(
    "base",
    ["", "Self", "step-1/a", "step-00000020", "step-00000020/A", "step-000000020/a", "../step",
     "step-00000020/a/", "step-00000040/a1"],
)  # fmt: skip
def test_malformed_bases(base):
    assert with_files({"base": base}) == [("files[0].base", "base")]


def test_one_file_is_listed_once_whatever_the_case():
    assert with_files({}, {}) == [("files[1].key", "duplicate")]
    assert ("files[1].key", "duplicate") in with_files({}, {"key": FILE.key.upper()})
    assert with_files({}, {"base": "step-00000020/old"}) == []


def test_file_numbers_and_digests():
    assert with_files({"header_bytes": 65}) == [("files[0].header_bytes", "range")]
    for digest in ("0" * 32, "md5:" + "0" * 32, "xxh3-128:" + "0" * 31, "xxh3-128:" + "F" * 32):
        assert with_files({"digest": digest}) == [("files[0].digest", "digest_form")]
        part = MANIFEST.parts["model"].model_copy(update={"digest": digest})
        assert with_manifest(parts={"model": part}) == [("parts.model.digest", "digest_form")]


def test_parts_exist():
    assert with_files({"part": "optim"}) == [("files[0].part", "dangling")]
    assert with_tensors({"part": "optim"}) == [("tensors[0].part", "dangling")]


@pytest.mark.parametrize(
    ("fqn", "kind"),
    [("__metadata__", "fqn_reserved"), ("a\0b", "fqn_nul"), ("ä" * 2049, "fqn_length")],
)
def test_names(fqn, kind):
    assert with_tensors({"fqn": fqn}) == [("tensors[0].fqn", kind)]
    leaf = LeafEntry(fqn=fqn, path=("x",), value=1)
    assert with_manifest(leaves=(leaf,)) == [("leaves[0].fqn", kind)]


def test_names_at_the_limit():
    assert with_tensors({"fqn": "ä" * 2048}) == []


def test_duplicate_names():
    assert with_tensors({}, {}) == [("tensors[1].fqn", "duplicate")]


def test_dtypes_and_sizes():
    assert with_tensors({"dtype": "float13"}) == [("tensors[0].dtype", "dtype")]
    assert with_tensors({"global_shape": (2**61,)}) == [("tensors[0].global_shape", "too_large")]
    assert with_tensors({"global_shape": (2**61 - 1,)}) == []
    assert with_tensors({"global_shape": (2**63 - 1,), "dtype": "int8"}) == []


def test_a_hostile_shape_costs_nothing():
    shape = (2**62,) * 100_000
    assert with_tensors({"global_shape": shape}) == [("tensors[0].global_shape", "too_large")]
    mesh = MeshEntry(id="m", axes=("dp",), shape=shape, ranks=(0,))
    assert ("topology.meshes[0].ranks", "count") in with_meshes(mesh)


def alias(of, **change):
    return {"kind": "alias", "alias_of": of, **change}


def test_aliases():
    assert with_tensors({}, alias(TENSOR.fqn, fqn="b")) == []
    assert with_tensors(alias("nowhere")) == [("tensors[0].alias_of", "alias_dangling")]
    assert with_tensors(alias("b"), alias(TENSOR.fqn, fqn="b")) == [
        ("tensors[0].alias_of", "alias_cycle"),
        ("tensors[1].alias_of", "alias_cycle"),
    ]
    assert with_tensors(alias(TENSOR.fqn)) == [("tensors[0].alias_of", "alias_cycle")]
    assert with_tensors({}, alias(TENSOR.fqn, fqn="b"), alias("b", fqn="c")) == [
        ("tensors[2].alias_of", "alias_chain")
    ]
    assert with_tensors({}, alias(TENSOR.fqn, fqn="b", dtype="int8")) == [
        ("tensors[1].alias_of", "alias_mismatch")
    ]
    assert with_tensors({"kind": "alias"}) == [("tensors[0].alias_of", "alias")]
    assert with_tensors({}, {"fqn": "b", "alias_of": TENSOR.fqn}) == [
        ("tensors[1].alias_of", "alias")
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"mesh": "other"}, ("mesh", "dangling")),
        ({"mesh": None}, ("placements", "dangling")),
        ({"placements": ("R", "R")}, ("placements", "count")),
        ({"placements": ("S(2)",)}, ("placements", "placement")),
        ({"placements": ("P(sum)",)}, ("placements", "placement")),
        ({"placements": ("SS(0,0)",)}, ("placements", "placement")),
        ({"rule": {"tp": 2}}, ("rule", "range")),
        ({"padding": Padding(dim=2, logical_size=1)}, ("padding", "range")),
        ({"padding": Padding(dim=0, logical_size=5)}, ("padding", "range")),
        ({"composite": {}}, ("composite", "composite")),
    ],
)
def test_what_describes_a_tensor_fits_it(change, problem):
    assert with_tensors(change) == [(f"tensors[0].{problem[0]}", problem[1])]


def test_facts_of_an_optimizer_are_named():
    assert with_manifest(optimizer={"o": 1, "p": {}}) == [("optimizer.o", "facts")]


def test_meshes():
    mesh = MANIFEST.topology.meshes[0]
    assert with_meshes(mesh, mesh) == [("topology.meshes", "duplicate")]
    for change, problem in [
        ({"shape": (2, 1)}, ("shape", "count")),
        ({"ranks": (0, 2)}, ("ranks", "range")),
        ({"ranks": (0,)}, ("ranks", "count")),
    ]:
        place = (f"topology.meshes[0].{problem[0]}", problem[1])
        assert with_meshes(mesh.model_copy(update=change)) == [place]
    square = MeshEntry(id="m2", axes=("dp", "dp"), shape=(1, 2))
    assert with_meshes(mesh, square) == [("topology.meshes[1].axes", "duplicate")]


def test_counts():
    for name in ("tensors", "files", "num_bytes"):
        counts = MANIFEST.counts.model_copy(update={name: 7})
        assert with_manifest(counts=counts) == [(f"counts.{name}", "count")]


def test_the_manifest_itself():
    assert with_manifest(attempt="../x") == [("attempt", "attempt")]
    digest = MANIFEST.digest.model_copy(update={"block_size": 2**16 + 1})
    assert with_manifest(digest=digest) == [("digest.block_size", "block_size")]
    huge = MANIFEST.catalog.model_copy(update={"size": 2**40})
    assert with_manifest(catalog=huge) == [("catalog.size", "too_large")]
    for change, problem in [
        ({"block_digests": ()}, ("block_digests", "count")),
        ({"block_digests": ("x",)}, ("block_digests[0]", "digest_form")),
        ({"block_size": 2**16 + 1}, ("block_size", "block_size")),
    ]:
        index = MANIFEST.chunk_index.model_copy(update=change)
        assert with_manifest(chunk_index=index) == [(f"chunk_index.{problem[0]}", problem[1])]


def test_every_problem_is_listed_at_once():
    assert len(with_tensors({"dtype": "x", "part": "y", "mesh": "z", "fqn": "\0"})) == 4
