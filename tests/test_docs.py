"""What help(), editors and type checkers see of the library, and the examples of docs/."""

import doctest
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from torch import nn

import batchnorm_ext
from batchnorm_ext import backend, functional, preprocessing, reference

pytestmark = pytest.mark.only("cpu", reason="of the documentation")

DOCS = Path(__file__).parents[1] / "docs"
LAYERS = [
    kind
    for kind in vars(batchnorm_ext).values()
    if isinstance(kind, type) and issubclass(kind, nn.Module)
]
FUNCTIONS = [
    *(batchnorm_ext.convert, batchnorm_ext.convert_sync_batchnorm, batchnorm_ext.revert),
    *(batchnorm_ext.show_config, functional.batch_norm, functional.instance_norm),
    *(functional.group_norm, functional.layer_norm, functional.rms_norm),
    *(functional.batch_norm_act, functional.instance_norm_act, functional.group_norm_act),
    *(batchnorm_ext.update_population_stats, batchnorm_ext.as_affine, batchnorm_ext.weight_norm),
    *(batchnorm_ext.fold, batchnorm_ext.fuse, batchnorm_ext.fuse_graph),
    *(batchnorm_ext.recompute_activations, backend.backend),
    *(reference.batch_norm, reference.batch_norm_backward),
]


# Docstrings


@pytest.mark.parametrize("kind", LAYERS)
def test_each_layer_documents_itself(kind):
    """help(BatchNorm2d) once said no more than to see BatchNorm1d."""
    text = inspect.getdoc(kind)
    for section in ("Source: ", "Args:\n", "Raises:\n", "Example::\n"):
        assert section in text
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        assert dtype in text
    for name in inspect.signature(kind.__init__).parameters.keys() - {"self", "kwargs"}:
        assert re.search(rf"^    ([a-z_]+, )*{name}(, [a-z_]+)*: ", text, re.M), name


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if "Sync" not in kind.__name__])
def test_defaults_in_docstrings(kind):
    """Lazy instance normalization is affine and tracks, and said that it does not."""
    text = re.sub(r"\s+", " ", inspect.getdoc(kind))
    for name in ("affine", "track_running_stats"):
        if name in (parameters := inspect.signature(kind).parameters):
            stated = re.search(rf" {name}: [^:]*Default: (True|False)\.", text)
            assert stated and stated[1] == str(parameters[name].default), name


@pytest.mark.parametrize(
    "documented",
    [kind for kind in LAYERS if "Sync" not in kind.__name__]
    + FUNCTIONS
    + [preprocessing.StandardScaler, preprocessing.MinMaxScaler],
)
def test_examples_of_docstrings(documented):
    names = {"batchnorm_ext": batchnorm_ext, "torch": torch, "nn": nn, **vars(reference)}
    (test,) = doctest.DocTestFinder(recurse=False).find(documented, globs=names)
    assert test.examples
    failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    assert failed == 0


# Types


def test_package_is_marked_as_typed():
    assert (Path(batchnorm_ext.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("function", [*FUNCTIONS, *(kind.forward for kind in LAYERS)])
def test_public_functions_have_types(function):
    hints = typing.get_type_hints(inspect.unwrap(function))
    names = inspect.signature(function).parameters.keys() - {"self"}
    assert names | {"return"} <= hints.keys()


# Pages


def _sections(page: str) -> dict[str, str]:
    """The Python code of each section, after that of the introduction."""
    first, *others = re.split(r"^## ", (DOCS / page).read_text(), flags=re.M)
    code = [
        "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.S | re.M))
        for text in (first, *others)
    ]
    return {
        text.partition("\n")[0]: code[0] + later
        for text, later in zip(others, code[1:], strict=True)
    }


EXPORT = _sections("export.md")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own
@pytest.mark.parametrize("section", EXPORT)
def test_export(section, tmp_path, monkeypatch, fresh_dynamo):
    monkeypatch.chdir(tmp_path)
    exec(compile(EXPORT[section], f"docs/export.md, {section}", "exec"), {})


def test_import_without_docstrings():
    """The shared docstrings of the layers have nothing to complete under python -OO."""
    subprocess.run([sys.executable, "-OO", "-c", "import batchnorm_ext"], check=True)
