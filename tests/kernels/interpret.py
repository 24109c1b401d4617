"""Rung 3, run by test_triton.py in a process of its own: every case of one op in Triton's interpreter.

TRITON_INTERPRET=1 python tests/kernels/interpret.py OP DTYPE
"""

import sys

import torch

from grassland.kernels.testing import check_backend, specs

name, dtype = sys.argv[1], getattr(torch, sys.argv[2])
torch.set_num_threads(1)
spec = next(spec for spec in specs() if spec.name == name)
for case in spec.cases:
    check_backend(spec, case, "triton", dtype)
    print(f"{case.id}: ok")
