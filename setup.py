"""Installs scalablevit.py, and builds its C++/CUDA extension (csrc/) if PyTorch and a C++ compiler are available.

    pip install .                              only the Python module: pip's build isolation hides PyTorch
    pip install --no-build-isolation .         plus the kernels, built against the installed PyTorch
    FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 pip install --no-build-isolation .    plus CUDA kernels, without a GPU present
"""
import glob
import os
import shutil
import sys

from setuptools import setup
from setuptools.command.sdist import sdist


class SourceDist(sdist):
    """A source distribution with everything needed to build, test and train."""

    def make_release_tree(self, base_dir, files):
        own = [file for folder in ("csrc", "docs", "tests") for file in glob.glob(f"{folder}/**/*.*", recursive=True)
               if os.path.isfile(file) and "__pycache__" not in file]
        super().make_release_tree(base_dir, sorted({*files, "train_minimal.py", *own}))


def extension():
    """Arguments of `setup` that build the extension; if it cannot be built, none, and the reason is printed."""
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
        reason = shutil.which(os.environ.get("CXX", "c++").split()[0]) is None and "there is no C++ compiler"
    except ImportError:
        reason = "PyTorch cannot be imported (use pip install --no-build-isolation)"
    if reason:
        print(f"scalablevit: installing without the C++/CUDA kernels: {reason}", file=sys.stderr)
        return {}
    force_cuda = os.environ.get("FORCE_CUDA") == "1"
    cuda = CUDA_HOME and torch.version.cuda and (torch.cuda.is_available() or force_cuda)
    if force_cuda and not cuda:
        print("scalablevit: building CPU kernels only: FORCE_CUDA=1 needs a CUDA build of PyTorch and a CUDA toolkit",
              file=sys.stderr)
    openmp = ["-fopenmp"] if sys.platform == "linux" else []       # for at::parallel_for
    sources = ["csrc/ops.cpp", "csrc/cpu.cpp", "csrc/iwsa.cpp"] + (["csrc/cuda.cu"] if cuda else [])
    module = (CUDAExtension if cuda else CppExtension)(
        "scalablevit_kernels._C", sources, depends=glob.glob("csrc/*.h"),
        define_macros=[("WITH_CUDA", None)] if cuda else [],
        extra_compile_args={"cxx": ["-O3", "-Wno-psabi", *openmp], "nvcc": ["-O3"]}, extra_link_args=openmp)
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension, "sdist": SourceDist},
            "packages": ["scalablevit_kernels"], "package_dir": {"scalablevit_kernels": "csrc"}}


setup(
    name="scalablevit",
    version="1.0",
    description="ScalableViT in one file, with C++/CUDA kernels",
    py_modules=["scalablevit"],
    python_requires=">=3.10",
    install_requires=["torch>=2.11"],
    extras_require={"train": ["torchvision"], "figures": ["matplotlib", "torchvision"],
                    "detection": ["torchvision", "pycocotools"],
                    "test": ["pytest", "hypothesis", "torchvision", "matplotlib", "nbclient", "nbconvert", "ipykernel"]},
    **{"cmdclass": {"sdist": SourceDist}} | extension(),
)
