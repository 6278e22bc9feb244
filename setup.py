"""Extension modules; everything else about the package is in pyproject.toml.

Environment:
  CXX                         the C++ compiler, by default c++
  DEBUG=1                     no optimization, debug symbols
  BATCHNORM_EXT_CUDA=0|1      leave the CUDA kernels out / insist on them; by default they are built
                              where both nvcc and a CUDA build of torch are found
  TORCH_CUDA_ARCH_LIST        architectures to build the CUDA kernels for; by default those of the
                              GPUs that are visible, or all if there are none
  CUDA_HOME, CUDA_PATH        the CUDA toolkit; by default that of the nvcc on the PATH, or
                              /usr/local/cuda
"""

import copy
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools

INSTALL = (
    '`pip install "torch>=2.11" "setuptools>=77" ninja` first, then '
    "`pip install --no-build-isolation .`"
)
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"batchnorm_ext needs setuptools >= 77 and found {setuptools.__version__}: run {INSTALL}"
    )


def is_toolkit(path: Path) -> bool:
    return (path / "bin" / "nvcc").exists() and (path / "include" / "cuda_runtime_api.h").exists()


def toolkit() -> str | None:
    """The toolkit of the nvcc on the PATH, where torch would look for it in vain.

    torch takes the folder above that of nvcc, which is no toolkit if that nvcc is a wrapper.
    """
    nvcc = shutil.which("nvcc")
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not nvcc or named or os.environ.get("BATCHNORM_EXT_CUDA") == "0":
        return None
    if is_toolkit(Path(nvcc).parents[1]):
        return None
    dry_run = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        said = subprocess.run(dry_run, **pipes, text=True, errors="replace", timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    top = re.search(r"^#\$ TOP=(.+)$", said, re.M)
    return os.path.realpath(top[1]) if top and is_toolkit(Path(top[1])) else None


if found := toolkit():
    os.environ["CUDA_HOME"] = found  # which torch reads as it is imported
try:
    import torch
    from torch.utils.cpp_extension import (
        CUDA_HOME,
        BuildExtension,
        CppExtension,
        CUDAExtension,
        include_paths,
    )
except ImportError as error:
    raise SystemExit(
        "batchnorm_ext is compiled for the installed torch, and none can be imported here (build "
        f"isolation hides it): run {INSTALL}"
    ) from error

ROOT = Path(__file__).parent
PACKAGE = "batchnorm_ext"
DEBUG = os.environ.get("DEBUG", "0") == "1"
# errno would keep sqrt from being vectorized; contraction would round the same expression
# differently in vector and scalar code, and with it the result for different numbers of threads
FLAGS = ["-O0", "-g"] if DEBUG else ["-O3", "-g0", "-fno-math-errno", "-ffp-contract=off"]
FLAGS += ["-std=c++20"]
# calls between the kernels need not go through the linkage table
FLAGS += ["-fvisibility=hidden", "-fvisibility-inlines-hidden"]
# psabi: vectors are passed between functions of one build only.
WARNINGS = [
    *("-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas"),
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi"),
]
# at::parallel_for is inlined into the kernels, and serial there without it.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
# A thread may have a stack of 128 KB (musl, OMP_STACKSIZE), most of it for its other callers.
KERNELS = [*OPENMP, "-Werror=frame-larger-than=16384"]


def runtime() -> list[str]:
    """The C++ library that torch has loaded, which is linked ahead of the compiler's own.

    A compiler without a shared one silently puts a copy into each module. The text of an error is
    then begun with one copy and continued with the other, in libc10, which ends the process.
    """
    try:
        mapped = Path("/proc/self/maps").read_text(errors="surrogateescape")
    except OSError:
        return []
    return re.findall(r"/.*/libstdc\+\+\.so\.6\S*$", mapped, re.M)[:1]


# Symbols that only debuggers and profilers read.
STRIP = ["-Wl,-s"] if sys.platform == "linux" and not DEBUG else []
LINK = [*STRIP, *runtime()]

# The first of each major compute capability since Ampere: later ones of it run its code. Without
# 11, of embedded systems.
ARCHITECTURES = [(8, 0), (9, 0), (10, 0), (12, 0)]
BLACKWELL = (10, 0)  # which CUDA knows from 12.8 on
NVCC_FLAGS = ["-g", "-O0"] if DEBUG else ["-O3", "--threads=2"]
NVCC_FLAGS += ["-std=c++20"]


def count_jobs() -> int:
    """Compilers at once: MAX_JOBS, which torch reads as well, or one for each processor."""
    asked = os.environ.get("MAX_JOBS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0))


# One build of the CPU kernels per instruction set; at run time the one that torch itself would
# choose is loaded, or the last where there are instructions for bfloat16.
INSTRUCTION_SETS = {"default": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"]
    INSTRUCTION_SETS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        *("-mprefer-vector-width=512", "-DCPU_CAPABILITY_AVX512"),
    ]
    INSTRUCTION_SETS["avx512_bf16"] = [*INSTRUCTION_SETS["avx512"], "-mavx512bf16"]


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def check_compiler() -> None:
    """Exit with one sentence if the compiler, its C++20, or headers that it needs are missing."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    name = " ".join(command)
    if not command or shutil.which(command[0]) is None:
        raise SystemExit(
            f"batchnorm_ext needs a C++20 compiler, and there is no `{name}`: install one (Debian, "
            "Ubuntu: apt install g++) or name one in the environment variable CXX"
        )

    def error_of(code: str, *paths: str) -> str | None:
        flags = " ".join(os.environ.get(f"{kind}FLAGS", "") for kind in ("C", "CPP", "CXX"))
        include = [*shlex.split(flags), *(f"-I{path}" for path in paths)]
        probe = [*command, "-std=c++20", *include, "-fsyntax-only", "-x", "c++", "-"]
        english = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run(probe, input=code, capture_output=True, text=True, env=english)
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        return None if done.returncode == 0 else (lines or [f"exit code {done.returncode}"])[0]

    if error := error_of("#include <compare>\nstatic_assert(__cplusplus >= 202002L);\n"):
        raise SystemExit(
            f"batchnorm_ext needs a C++20 compiler, such as GCC 11, and `{name}` is none: {error}"
        )
    if error := error_of("#include <Python.h>\n", sysconfig.get_path("include")):
        version = platform.python_version()
        raise SystemExit(
            f"batchnorm_ext needs the C headers of Python {version} (Debian, Ubuntu: apt install "
            f"python3-dev): {error}"
        )
    header = "#include <cuda_runtime_api.h>\n"
    if with_cuda() and (error := error_of(header, *include_paths("cuda"))):
        raise SystemExit(
            f"batchnorm_ext needs a CUDA toolkit with its C headers, and {CUDA_HOME} has none: "
            "name another in the environment variable CUDA_HOME, or build without CUDA kernels by "
            f"BATCHNORM_EXT_CUDA=0: {error}"
        )


def with_cuda() -> bool:
    asked = os.environ.get("BATCHNORM_EXT_CUDA", "")
    possible = torch.version.cuda is not None and CUDA_HOME is not None
    if asked == "1" and not possible:
        raise SystemExit(
            "BATCHNORM_EXT_CUDA=1 needs nvcc (CUDA_HOME) and a CUDA build of torch, found "
            f"CUDA_HOME={CUDA_HOME} and torch {torch.__version__}"
        )
    return possible and asked != "0" and bool(sources("csrc/cuda/*.cu"))


def architectures() -> str:
    """What to compile the CUDA kernels for, in the notation of TORCH_CUDA_ARCH_LIST."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if asked not in ("", "native"):
        if not re.fullmatch(r"(\d+\.\d+[a-z]?(\+PTX)?[ ;]*)+", asked):
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST must list numbers, as in '8.0 9.0+PTX', and is '{asked}'"
            )
        return asked
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = sorted({torch.cuda.get_device_capability(index) for index in range(count)})
    if for_gpus := [covering(gpu) for gpu in gpus if gpu >= ARCHITECTURES[0]]:
        return " ".join(dict.fromkeys(for_gpus))
    version = tuple(map(int, torch.version.cuda.split(".")))
    known = [each for each in ARCHITECTURES if each < BLACKWELL or version >= (12, 8)]
    return " ".join(map(covering, known)) + "+PTX"


def covering(gpu: tuple[int, int]) -> str:
    """The architecture that a GPU runs the code of, or, without its generation, compiles itself."""
    major, minor = max(known for known in ARCHITECTURES if known <= gpu)
    return f"{major}.{minor}" + ("" if major == gpu[0] else "+PTX")


def index_readme() -> str:
    """The README for a package index, where relative links and pictures lead nowhere."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^]]+)\]\((?!https?:)[^)]*\)", r"\1", text)


def extensions() -> list:
    flags = [*FLAGS, *WARNINGS]
    modules = []
    if with_cuda():
        modules.append(
            CUDAExtension(
                f"{PACKAGE}._cuda",
                [*sources("csrc/cuda/*.cu"), *sources("csrc/cuda/*.cpp")],
                extra_compile_args={"cxx": flags, "nvcc": NVCC_FLAGS},
                extra_link_args=LINK,
            )
        )
    for name, isa in INSTRUCTION_SETS.items():
        modules.append(
            CppExtension(
                f"{PACKAGE}._cpu_{name}",
                sources("csrc/cpu/*.cpp"),
                extra_compile_args=[*flags, *KERNELS, f"-DCPU_CAPABILITY={name.upper()}", *isa],
                extra_link_args=[*OPENMP, *LINK],
            )
        )
    modules.append(
        CppExtension(
            f"{PACKAGE}._C",
            sources("csrc/*.cpp"),
            extra_compile_args=flags,
            extra_link_args=LINK,
        )
    )
    return modules


class Build(BuildExtension):
    """Leaves beside the modules what they were built for, to be read before any is loaded."""

    def build_extensions(self):
        """The many files of CUDA kernels, then the other modules side by side: of most, one file
        takes twice as long as all others together."""
        modules, jobs = self.extensions, self.parallel or count_jobs()
        cuda = [module for module in modules if module.name == f"{PACKAGE}._cuda"]
        others = [module for module in modules if module not in cuda]
        for some, together in ((cuda, 1), (others, min(jobs, len(others)))):
            if self.use_ninja:  # without it, torch keeps the compiler of a file in what they share
                self.parallel = together
                os.environ["MAX_JOBS"] = str(jobs // together)
            self.extensions = some
            if some:
                super().build_extensions()
        self.extensions = modules

    def build_extension(self, ext):
        """On a copy of its own, since threads build modules. The same sources are compiled for
        several modules: each has its objects for itself."""
        own = copy.copy(self)
        own.build_temp = os.path.join(self.build_temp, ext.name)
        super(Build, own).build_extension(ext)

    def run(self):
        check_compiler()
        built_for = cuda = None
        if with_cuda():
            cuda = torch.version.cuda
            os.environ["TORCH_CUDA_ARCH_LIST"] = built_for = architectures()
        kernels = (
            f"for architectures {built_for} (TORCH_CUDA_ARCH_LIST names others)"
            if cuda
            else f"none (CUDA of torch: {torch.version.cuda}, CUDA_HOME: {CUDA_HOME})"
        )
        print(f"{PACKAGE}: for torch {torch.__version__}, CUDA kernels {kernels}")
        super().run()
        path = Path(self.get_ext_fullpath(f"{PACKAGE}._C")).parent / "_build.py"
        path.write_text(
            '"""Written by setup.py."""\n\n'
            f"TORCH = {str(torch.__version__)!r}\n"
            f"CUDA = {cuda!r}\n"
            f"CUDA_ARCHITECTURES = {built_for!r}\n"
        )


setuptools.setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    long_description=index_readme(),
    long_description_content_type="text/markdown",
)
