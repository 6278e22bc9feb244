"""What setup.py and the import say where something is missing, each in one sentence."""

import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import setuptools
import torch

import batchnorm_ext
from batchnorm_ext import _library

pytestmark = pytest.mark.only("cpu", reason="of the installation")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup(monkeypatch):
    """The names that setup.py defines."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # which it may change
    return runpy.run_path(str(ROOT / "setup.py"))


# What is missing


def test_build_isolation_hides_torch():
    """It once fetched another torch and built for that."""
    without = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('setup.py')"
    command = [sys.executable, "-c", without]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "`pip install --no-build-isolation .`" in done.stderr
    listed = re.search(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert listed[1] == '"setuptools>=77"'


def test_old_setuptools(monkeypatch):
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match="^batchnorm_ext needs setuptools >= 77 and found 65.5.0"):
        runpy.run_path(str(ROOT / "setup.py"))


def test_no_compiler(setup, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match="C[+][+]20 compiler, and there is no `no-such-compiler`"):
        setup["check_compiler"]()


def test_old_compiler(setup, monkeypatch, tmp_path):
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho \"error: unknown option '-std=c++20'\" >&2\nexit 1\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    message = rf"C\+\+20 compiler, such as GCC 11, and `{old}` is none: error: unknown option"
    with pytest.raises(SystemExit, match=message):
        setup["check_compiler"]()


def test_no_headers_of_python(setup, monkeypatch, tmp_path):
    setup["check_compiler"]()  # those of this Python are there: the library was built with them
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    message = r"needs the C headers of Python 3.*python3-dev\): .*Python\.h"
    with pytest.raises(SystemExit, match=message):
        setup["check_compiler"]()


@pytest.fixture
def wrapper(monkeypatch, tmp_path):
    """Puts an nvcc on the PATH that calls the one of a toolkit elsewhere."""
    for name in ("CUDA_HOME", "CUDA_PATH", "BATCHNORM_EXT_CUDA"):
        monkeypatch.delenv(name, raising=False)
    for file in ("cuda/bin/nvcc", "cuda/include/cuda_runtime_api.h", "bin/nvcc"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ _SPACE_= \n#$ TOP={tmp_path}/cuda/bin/..' >&2\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(nvcc.parent))
    return nvcc


def test_toolkit_of_a_wrapped_nvcc(setup, wrapper, monkeypatch):
    """The headers of CUDA were once looked for beside the wrapper."""
    home = wrapper.parents[1] / "cuda"
    assert setup["toolkit"]() == str(home)
    for name, value in {"CUDA_PATH": "elsewhere", "BATCHNORM_EXT_CUDA": "0"}.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert setup["toolkit"]() is None
    (home / "include" / "cuda_runtime_api.h").unlink()
    assert setup["toolkit"]() is None


@pytest.mark.parametrize("nvcc", ["#!/bin/sh\nexit 1\n", "no program", "#!/bin/sh\necho TOP=\n"])
def test_nvcc_that_does_not_say_its_toolkit(nvcc, setup, wrapper):
    wrapper.write_text(nvcc)
    assert setup["toolkit"]() is None


def test_no_headers_of_cuda(setup, monkeypatch, tmp_path):
    (tmp_path / "cuda_runtime_api.h").write_text("#error none\n")  # found before all others
    names = setup["check_compiler"].__globals__
    monkeypatch.setitem(names, "with_cuda", lambda: True)
    monkeypatch.setitem(names, "include_paths", lambda device: [str(tmp_path)])
    monkeypatch.setitem(names, "CUDA_HOME", "cuda")
    message = "CUDA toolkit with its C headers, and cuda has none: .*BATCHNORM_EXT_CUDA=0"
    with pytest.raises(SystemExit, match=message):
        setup["check_compiler"]()


# What is built


EVERYTHING = "8.0 9.0 10.0 12.0+PTX"


@pytest.mark.parametrize(
    "visible, expected",
    [
        ([], EVERYTHING),
        ([(9, 0)], "9.0"),
        ([(9, 0), (8, 0), (9, 0)], "8.0 9.0"),
        ([(8, 7)], "8.0"),  # runs the code of 8.0
        ([(11, 0)], "10.0+PTX"),  # of no major one that is known
        ([(13, 1)], "12.0+PTX"),
        ([(7, 5), (8, 9)], "8.0"),
        ([(7, 5)], EVERYTHING),  # no kernels for this one
    ],
    ids=str,
)
def test_architectures_are_those_of_the_visible_gpus(visible, expected, setup, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(visible))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: visible[index])
    for unset in ("", "native"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", unset)
        assert setup["architectures"]() == expected
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a+PTX")
    assert setup["architectures"]() == "8.0;9.0a+PTX"


def test_architectures_that_cuda_knows(setup, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert setup["architectures"]() == "8.0 9.0+PTX"


def test_architectures_by_name_are_refused(setup, monkeypatch):
    """The import reads numbers: with names it once found no GPU that the kernels are for."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere Hopper")
    with pytest.raises(SystemExit, match="numbers, as in '8.0 9.0[+]PTX', and is 'Ampere Hopper'"):
        setup["architectures"]()


@pytest.mark.parametrize("debug", [False, True])
def test_libraries_are_stripped(debug, monkeypatch):
    modules = []
    monkeypatch.setenv("DEBUG", str(int(debug)))
    monkeypatch.setattr(setuptools, "setup", lambda **named: modules.extend(named["ext_modules"]))
    runpy.run_path(str(ROOT / "setup.py"))
    assert len(modules) >= 2
    strips = sys.platform == "linux" and not debug
    assert all(("-Wl,-s" in module.extra_link_args) is strips for module in modules)


@pytest.mark.parametrize(
    "asked, jobs", [("1", 1), ("3", 3), ("16", 16), ("auto", None), ("", None)]
)
def test_no_more_compilers_at_once_than_jobs(asked, jobs, monkeypatch, request):
    monkeypatch.setenv("MAX_JOBS", asked)
    names = request.getfixturevalue("setup")
    rounds = []

    def build_extensions(self):
        rounds.append(([m.name for m in self.extensions], self.parallel, os.environ["MAX_JOBS"]))

    monkeypatch.setattr(names["BuildExtension"], "build_extensions", build_extensions)
    build = names["Build"](setuptools.Distribution())
    modules = [f"batchnorm_ext.{name}" for name in ("_C", "_cpu_default", "_cpu_avx2", "_cuda")]
    build.extensions = [setuptools.Extension(name, []) for name in modules]
    build.build_extensions()
    assert [rounds[0][0], rounds[1][0]] == [modules[3:], modules[:3]]
    for _, together, each in rounds:
        assert together * int(each) <= (jobs or len(os.sched_getaffinity(0)))
        assert int(each) >= 1


RUNTIME = b"\0libstdc++.so.6\0"


def test_runtime_is_that_of_torch(setup, tmp_path):
    """A compiler without a shared one put a copy of it into each module, and an error with a number
    in its text ended the process."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    source, module = tmp_path / "module.cpp", tmp_path / "module.so"
    source.write_text("#include <iostream>\nvoid say() { std::cout << 1; }\n")
    link = [*compiler, "-shared", "-fPIC", "-nodefaultlibs", str(source), "-o", str(module)]
    for arguments, shared in (([], False), (setup["LINK"], True)):
        subprocess.run([*link, *arguments], check=True)
        assert (RUNTIME in module.read_bytes()) is shared


def test_readme_for_an_index_has_no_relative_links(setup, monkeypatch, tmp_path):
    """An index has neither the pictures nor the pages."""
    page = (
        "Text.\n\n![A picture](docs/a.png)\n\n"
        "See [the page](docs/a.md) and [PyPI](https://pypi.org).\n"
    )
    (tmp_path / "README.md").write_text(page)
    monkeypatch.setitem(setup["index_readme"].__globals__, "ROOT", tmp_path)
    expected = "Text.\n\nSee the page and [PyPI](https://pypi.org).\n"
    assert setup["index_readme"]() == expected


# What the import says


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """Makes the import find a folder of sources without a build."""
    folder = tmp_path / "source" / "batchnorm_ext"
    folder.mkdir(parents=True)
    monkeypatch.delattr(batchnorm_ext, "_build", raising=False)
    monkeypatch.setitem(sys.modules, "batchnorm_ext._build", None)
    monkeypatch.setattr(_library, "__file__", str(folder / "_library.py"))
    monkeypatch.setattr(sys, "path", [str(folder.parent)])
    return folder


def test_source_folder_hides_the_installed_package(sources, monkeypatch, tmp_path):
    """After an installation, Python in the source folder was told to install once more."""
    installed = tmp_path / "site-packages" / "batchnorm_ext"
    installed.mkdir(parents=True)
    (installed / "_build.py").touch()
    monkeypatch.setattr(sys, "path", [str(sources.parent), str(installed.parent)])
    message = re.escape(f"{sources} is not built and hides the installed {installed}: start Python")
    with pytest.raises(ImportError, match=f"^{message} in another directory, or build this one"):
        _library._load()


def test_nothing_is_built(sources):
    message = re.escape(f"{sources} is not built: run `pip install --no-build-isolation --editable")
    with pytest.raises(ImportError, match=f"^{message}"):
        _library._load()


def test_built_for_another_python(monkeypatch):
    """The import once ended at a circular import."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="built for another Python than 3.*: rebuild it with"):
        _library._load()


def test_built_for_another_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "1.0.0")
    with pytest.raises(ImportError, match="cannot be loaded by torch 1.0.0: rebuild it with `pip"):
        _library._load()
