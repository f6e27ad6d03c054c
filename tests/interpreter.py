"""Set-up of the process in which Triton interprets kernels: it reads its mode when it is imported."""

import os

import torch


def interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
