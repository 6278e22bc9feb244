"""Checks an installed build of the CUDA kernels without a GPU, given what `ptxas -v` said of it.

Every operator has to run on CUDA; no kernel may have a stack frame, which is where spilled
registers and arrays that are indexed at run time live.
"""

import re
import sys
from pathlib import Path

import torch

import batchnorm_ext

print(batchnorm_ext.show_config())
names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("batchnorm_ext::")]
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
# a composite operator is made of others, on any device
keys = "CUDA", "CompositeImplicitAutograd"
missing = [name for name in names if not any(has_kernel(name, key) for key in keys)]
if missing or not names:
    raise SystemExit(f"no CUDA kernel for {', '.join(missing) or 'anything'}")
print(f"CUDA kernels registered for {', '.join(names)}")

USE = re.compile(
    r"Compiling entry function '(?P<kernel>\S+)' for '(?P<architecture>\w+)'\s.*?"
    r"(?P<frame>\d+) bytes stack frame.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
kernels = [use.groupdict() for use in USE.finditer(Path(sys.argv[1]).read_text())]
if not kernels:
    raise SystemExit(f"{sys.argv[1]} says nothing of any kernel")
on_stack = [k for k in kernels if k["frame"] != "0"]
for k in on_stack:
    print(f"{k['frame']} bytes of stack: {k['kernel']} for {k['architecture']}")
if on_stack:
    raise SystemExit(f"{len(on_stack)} of {len(kernels)} kernels have a stack frame")
most = max(int(k["registers"]) for k in kernels)
architectures = ", ".join(sorted({k["architecture"] for k in kernels}))
print(f"{len(kernels)} kernels for {architectures}: no stack frames, at most {most} registers")
