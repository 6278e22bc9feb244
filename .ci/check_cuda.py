"""Fails unless every operator of the installed package has a CUDA kernel; needs no GPU."""

import torch

import batchnorm_ext

print(batchnorm_ext.show_config())
names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("batchnorm_ext::")]
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
missing = [name for name in names if not has_kernel(name, "CUDA")]
if missing or not names:
    raise SystemExit(f"no CUDA kernel for {', '.join(missing) or 'anything'}")
print(f"CUDA kernels registered for {', '.join(names)}")
