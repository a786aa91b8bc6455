"""The two packages and the one C++ extension; metadata lives in pyproject.toml.

The extension uses only LibTorch's stable ABI and Python's limited API, so one wheel serves every Python >= 3.11 and
torch >= 2.11.
"""

from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError as error:
    raise SystemExit(
        "fibecfed compiles a C++ extension against torch, and torch is not installed here.\n"
        "Do it in two lines:\n"
        "  pip install -c constraints.txt torch triton setuptools wheel ninja\n"
        "  pip install -c constraints.txt --no-build-isolation -e ."
    ) from error

TORCH_STABLE_ABI = "0x020a000000000000"  # torch 2.10's stable ABI: the oldest one that has all we call

setup(
    ext_modules=[
        CppExtension(
            "fibecfed_kernels._C",
            sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            py_limited_api=True,
            extra_compile_args=[
                "-O3",
                "-std=c++20",
                "-fvisibility=hidden",
                "-ffp-contract=off",  # an update must round as torch's does; where FMA is wanted it is written
                "-fno-math-errno",  # or a square root is a call that nothing vectorises
                f"-DTORCH_TARGET_VERSION={TORCH_STABLE_ABI}",
                "-Wall",
                "-Wno-psabi",
            ],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
