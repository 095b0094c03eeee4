"""Faster attention for ScalableViT, with C++/CUDA kernels, used only where `fuse` is called:

    from scalablevit_kernels import fuse, unfuse
    model = fuse(scalablevit_s())       # same parameters, same state dict

scalablevit.py does not depend on this package.
"""
from .fuse import FusedIWSA, FusedSSA, devices, fuse, unfuse

__all__ = ["FusedIWSA", "FusedSSA", "devices", "fuse", "unfuse"]
