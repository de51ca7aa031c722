"""Packaging: the top-level folders install as one import package, ``anomalygpt_edge``.

``runtime/`` is ``anomalygpt_edge.runtime`` and so on. The runtime's own requirements stay small and never
contain torch; everything heavy is an extra.
"""

from setuptools import setup

PACKAGES = {
    "anomalygpt_edge.export": "export",
    "anomalygpt_edge.kernels": "kernels",
    "anomalygpt_edge.models": "models",
    "anomalygpt_edge.models.nano": "models/nano",
    "anomalygpt_edge.runtime": "runtime",
    "anomalygpt_edge.runtime.cameras": "runtime/cameras",
    "anomalygpt_edge.runtime.engines": "runtime/engines",
}

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
]

EXPORT = [
    "torch>=2.10,<3",  # weights_only loading is only sound from 2.10 on (CVE-2026-24747)
    "onnx>=1.21,<2",
    "onnxscript>=0.5,<1",
    "gguf>=0.17,<1",
    "safetensors>=0.5,<1",
    "sentencepiece>=0.2,<1",
]

EXTRAS = {
    "export": EXPORT,
    "cuda": ["onnxruntime-gpu>=1.20,<2", "pycuda>=2024.1"],
    "tensorrt": ["tensorrt>=10.3,<12"],
    "tensorrt-rtx": ["tensorrt-rtx>=1.1,<2"],
    "dev": [
        *EXPORT,
        "pytest>=8,<10",
        "hypothesis>=6.100,<7",
        "ruff>=0.6,<1",
        "mypy>=1.10",
        "pillow>=10",
        "scikit-learn>=1.4,<2",
        "build>=1",
    ],
}

setup(
    name="anomalygpt-edge",
    version="0.1.0",
    description="Edge deployment runtime for AnomalyGPT: says whether a part is defective, where, and what it sees",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={"anomalygpt_edge.models.nano": ["bundle/*", "*.md"]},
    install_requires=RUNTIME,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["agpt = anomalygpt_edge.runtime.cli:main"]},
)
