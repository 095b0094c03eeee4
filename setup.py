"""Installs scalablevit.py and scalablevit_kernels (csrc/), with its compiled part if that can be built.

    pip install .                              without it: pip hides PyTorch from the build
    pip install --no-build-isolation .         with it, built against the installed PyTorch
    pip install --no-build-isolation -e .      the same, for working on the code
    FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 pip install --no-build-isolation .    with CUDA, without a GPU present

The installation never fails for lack of the compiled part; `fuse` then says why it is missing.
"""
import glob
import os
import pathlib
import shutil
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    torch = None
    BuildExtension = build_ext


class SourceDist(sdist):
    """A source distribution with everything needed to build, test and train."""

    def make_release_tree(self, base_dir, files):
        own = [file for folder in ("csrc", "docs", "tests") for file in glob.glob(f"{folder}/**/*.*", recursive=True)
               if os.path.isfile(file) and "__pycache__" not in file]
        super().make_release_tree(base_dir, sorted({*files, "train_minimal.py", *own}))


class BuildIfPossible(BuildExtension):
    """Build the extension, or leave a note beside the package that says why there is none."""

    def run(self):
        reason = self.try_to_build()
        extension_file = pathlib.Path(self.get_ext_fullpath("scalablevit_kernels._C"))
        note = extension_file.with_name("not_built.txt")
        note.unlink(missing_ok=True)
        if reason:
            print(f"scalablevit: installing without the compiled kernels: {reason}", file=sys.stderr)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(reason + "\n")
            extension_file.unlink(missing_ok=True)                      # of an earlier build
            self.extensions = []                                        # nothing to copy in an editable install

    def try_to_build(self):
        """Returns why the extension could not be built, or None."""
        compiler = os.environ.get("CXX", "c++").split()[0]
        if torch is None:
            return "PyTorch could not be imported in the build (pip hides it without --no-build-isolation)"
        if shutil.which(compiler) is None:
            return f"there is no C++ compiler {compiler}"
        try:
            super().run()
        except Exception as error:
            return f"compiling failed: {str(error).splitlines()[0]}" if str(error) else "compiling failed"
        return None


def extension():
    """The compiled part of scalablevit_kernels, with CUDA if there is a GPU or FORCE_CUDA=1."""
    sources = ["csrc/ops.cpp", "csrc/partition_merge_cpu.cpp", "csrc/iwsa_cpu.cpp"]
    if torch is None:
        return Extension("scalablevit_kernels._C", sources)
    forced = os.environ.get("FORCE_CUDA") == "1"
    cuda = CUDA_HOME and torch.version.cuda and (torch.cuda.is_available() or forced)
    if forced and not cuda:
        print("scalablevit: building CPU kernels only: FORCE_CUDA=1 needs a CUDA build of PyTorch and a CUDA toolkit",
              file=sys.stderr)
    openmp = ["-fopenmp"] if sys.platform == "linux" else []            # for at::parallel_for
    nvcc = ["-O3", "-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__"]     # PyTorch sets them
    kind = CUDAExtension if cuda else CppExtension
    return kind("scalablevit_kernels._C", sources + ["csrc/partition_merge_cuda.cu"] * bool(cuda),
                depends=glob.glob("csrc/*.h"), define_macros=[("WITH_CUDA", None)] * bool(cuda),
                extra_compile_args={"cxx": ["-O3", "-Wno-psabi", *openmp], "nvcc": nvcc}, extra_link_args=openmp)


setup(
    name="scalablevit",
    version="1.0",
    description="ScalableViT in one file, with C++/CUDA kernels",
    long_description=pathlib.Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    project_urls={"Paper": "https://arxiv.org/abs/2203.10790"},
    license="MIT",
    py_modules=["scalablevit"],
    packages=["scalablevit_kernels"],
    package_dir={"scalablevit_kernels": "csrc"},
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildIfPossible, "sdist": SourceDist},
    python_requires=">=3.10",
    install_requires=["torch>=2.11"],
    extras_require={"train": ["torchvision", "pillow>=10.1"],           # 10.1: fonts of any size
                    "figures": ["matplotlib", "torchvision"],
                    "detection": ["torchvision", "pycocotools"],
                    "test": ["pytest", "hypothesis", "torchvision", "pillow>=10.1", "matplotlib", "pycocotools", "nbclient", "nbconvert",
                             "ipykernel"]},
)
