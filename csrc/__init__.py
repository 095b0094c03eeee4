"""Faster attention for ScalableViT, used only where `fuse` is called: fuse(scalablevit_s())"""
from .fuse import FusedIWSA, FusedSSA, devices, fuse, unfuse
__all__ = ["FusedIWSA", "FusedSSA",
           "devices", "fuse", "unfuse"]
