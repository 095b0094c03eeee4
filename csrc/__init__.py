"""Faster attention for ScalableViT, used only where `fuse` is called: model = fuse(scalablevit_s())"""
from .fuse import FusedIWSA, FusedSSA, devices, fuse, unfuse

__all__ = ["FusedIWSA", "FusedSSA", "devices", "fuse", "unfuse"]
