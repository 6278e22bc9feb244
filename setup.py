"""Extension modules; everything else about the package is in pyproject.toml.

Environment:
  DEBUG=1                     no optimisation, debug symbols
  BATCHNORM_EXT_CUDA=0|1      leave the CUDA kernels out / insist on them; by default they are built
                              where both nvcc and a CUDA build of torch are found
  TORCH_CUDA_ARCH_LIST        architectures to build the CUDA kernels for
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    raise SystemExit(
        "batchnorm_ext builds against the torch that is installed, and none can be imported here: "
        "install torch >= 2.11 and ninja first, then run `pip install --no-build-isolation .`"
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
WARNINGS = [
    *("-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas"),
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),
]
# at::parallel_for is inlined into the kernels, and serial there without it.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
# A thread may have a stack of 128 KB (musl, OMP_STACKSIZE), most of it for its other callers.
KERNELS = [*OPENMP, "-Werror=frame-larger-than=16384"]

# Every architecture since Ampere; PTX of the last lets later ones compile it themselves.
ARCHITECTURES = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0 8.6 8.9 9.0 10.0 12.0+PTX")
NVCC_FLAGS = ["-g", "-O0"] if DEBUG else ["-O3", "--threads=2"]
NVCC_FLAGS += ["-std=c++20"]

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


def with_cuda() -> bool:
    asked = os.environ.get("BATCHNORM_EXT_CUDA", "")
    possible = torch.version.cuda is not None and CUDA_HOME is not None
    if asked == "1" and not possible:
        raise SystemExit(
            "BATCHNORM_EXT_CUDA=1 needs nvcc (CUDA_HOME) and a CUDA build of torch, found "
            f"CUDA_HOME={CUDA_HOME} and torch {torch.__version__}"
        )
    return possible and asked != "0" and bool(sources("csrc/cuda/*.cu"))


def extensions() -> list:
    flags = [*FLAGS, *WARNINGS]
    modules = [CppExtension(f"{PACKAGE}._C", sources("csrc/*.cpp"), extra_compile_args=flags)]
    for name, isa in INSTRUCTION_SETS.items():
        modules.append(
            CppExtension(
                f"{PACKAGE}._cpu_{name}",
                sources("csrc/cpu/*.cpp"),
                extra_compile_args=[*flags, *KERNELS, f"-DCPU_CAPABILITY={name.upper()}", *isa],
                extra_link_args=OPENMP,
            )
        )
    if with_cuda():
        modules.append(
            CUDAExtension(
                f"{PACKAGE}._cuda",
                [*sources("csrc/cuda/*.cu"), *sources("csrc/cuda/*.cpp")],
                extra_compile_args={"cxx": flags, "nvcc": NVCC_FLAGS},
            )
        )
    return modules


class Build(BuildExtension):
    """Leaves beside the modules what they were built for, to be read before any is loaded."""

    def build_extension(self, ext):
        """The same sources are compiled for several modules: each has its objects for itself."""
        build_temp = self.build_temp
        self.build_temp = os.path.join(build_temp, ext.name)
        super().build_extension(ext)
        self.build_temp = build_temp

    def run(self):
        super().run()
        cuda = torch.version.cuda if with_cuda() else None
        path = Path(self.get_ext_fullpath(f"{PACKAGE}._C")).parent / "_build.py"
        path.write_text(
            '"""Written by setup.py."""\n\n'
            f"TORCH = {str(torch.__version__)!r}\n"
            f"CUDA = {cuda!r}\n"
            f"CUDA_ARCHITECTURES = {ARCHITECTURES if cuda else None!r}\n"
        )


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
