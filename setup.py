"""Builds hyperfast._C, the CPU kernels, through the LibTorch Stable ABI: one abi3 wheel for every
Python >= 3.10 and torch >= 2.11. HYPERFAST_NO_EXT=1 leaves it out; otherwise a failed compile fails
the install. HYPERFAST_SANITIZE=1 builds it with sanitizers, for .ci/sanitize;
HYPERFAST_EMULATE_AMX=1 adds a build for tests, which emulates the matrix unit.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
AMX = X86 and platform.system() == "Linux"  # gcc or clang from 11 on

FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast"]
FLAGS += ["-Wall", "-Wextra", "-Wno-maybe-uninitialized"]
LINK = ["-Wl,--strip-all"] if platform.system() == "Linux" else []
if os.environ.get("HYPERFAST_SANITIZE") == "1":
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    FLAGS += [*SANITIZE, "-O1", "-g1", "-fno-omit-frame-pointer"]  # of two -O the last one counts
    LINK = SANITIZE
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
AVX512 += ["-Wno-uninitialized"]  # gcc 12 warns of its own headers

# This is compiled once for each, into its own namespace; the CPU chooses at run time.
KERNELS = Path("csrc/isa/table.cpp")
ISAS = {"portable": []}
if X86:
    ISAS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
if AMX:
    ISAS |= {"amx": [*AVX512, "-mamx-tile", "-mamx-bf16"]}
if os.environ.get("HYPERFAST_SANITIZE") == "1" and AMX:
    # The best that this machine runs: each takes minutes to compile.
    runs = Path("/proc/cpuinfo").read_text()
    asks = {"amx": "amx_bf16", "avx512_bf16": "avx512_bf16", "avx512": "avx512dq", "avx2": "avx2"}
    best = next((isa for isa, flag in asks.items() if flag in runs), "portable")
    # Where the kernel of the system may refuse the matrix unit, the portable one runs instead.
    ISAS = {isa: ISAS[isa] for isa in ([best, "portable"] if best == "amx" else [best])}
if os.environ.get("HYPERFAST_EMULATE_AMX") == "1" and AMX:
    ISAS |= {"amx_emulated": [*AVX512, "-DHF_EMULATE_AMX"]}


class BuildKernels(build_ext):
    """Compiles in parallel, and the kernels once for every instruction set."""

    def build_extension(self, ext):
        def compile_one(source, subdir="", flags=()):
            return self.compiler.compile(
                [source],
                output_dir=str(Path(self.build_temp) / subdir),
                macros=ext.define_macros,
                include_dirs=ext.include_dirs,
                extra_postargs=[*ext.extra_compile_args, *flags],
            )

        jobs = [(source,) for source in ext.sources]
        jobs += [
            (KERNELS.as_posix(), isa, [*flags, f"-DHF_ISA={isa}"]) for isa, flags in ISAS.items()
        ]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = [o for done in pool.map(lambda job: compile_one(*job), jobs) for o in done]
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects,
            target,
            libraries=ext.libraries,
            library_dirs=ext.library_dirs,
            extra_postargs=ext.extra_link_args,
            target_lang="c++",
        )


def sources():
    return [p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*.cpp")]


def extension():
    from torch.utils import cpp_extension

    return Extension(
        "hyperfast._C",
        sources=sorted(p.as_posix() for p in sources() if p != KERNELS),
        include_dirs=["csrc"],
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020b000000000000"),
            ("Py_LIMITED_API", "0x030a0000"),
            *([("HF_X86", None)] if X86 else []),
            *((f"HF_{isa.upper()}", None) for isa in ISAS),
        ],
        extra_compile_args=[*FLAGS, *(f"-isystem{path}" for path in cpp_extension.include_paths())],
        extra_link_args=LINK,
        py_limited_api=True,
        language="c++",
    )


setup(
    ext_modules=[] if os.environ.get("HYPERFAST_NO_EXT") == "1" else [extension()],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
