"""The loops in which a kernel multiplies, read from machine code: by what, from where, and how much
beside it. ``python -m tests.support.machine_code`` prints a table of the layers' kernels.

No GPU is needed. Assemblers are Triton's own (``TRITON_PTXAS_PATH`` names another) and that of the
package ``nvidia-cuda-nvcc`` where it is installed.
"""

import re
import subprocess
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import triton

from tests.support.launches import KINDS, NETWORKS, TARGETS, recorded, run_all, run_network

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
ARCHITECTURE = {"sm_80": "sm_80", "sm_90": "sm_90a"}
# Multiply-adds a clock of a quarter of a multiprocessor, on 16-bit operands; half as many on TF32.
RATE = {"sm_80": 256, "sm_90": 512}
PRODUCT = re.compile(r"(HGMMA|HMMA|DMMA)\.(\S+)\s+R\d+(?:\.reuse)?, (\w+)")
SHAPE = {"1688": (16, 8, 8), "16816": (16, 8, 16), "1684": (16, 8, 4), "884": (8, 8, 4)}
WANTED = "_contract", "_outer", "_hyper_mlp"


class Loop(NamedTuple):
    """The instructions of an innermost loop, of one warp and turn."""

    code: tuple[str, ...]

    def count(self, *names):
        return sum(line.split(".")[0].split()[0] in names for line in self.code)

    @property
    def products(self):
        """The unit, and where its left operand lies: ``R`` are registers."""
        return [(m[1], m[3][0]) for line in self.code if (m := PRODUCT.match(line))]

    @property
    def generates(self):
        """Whether what is multiplied is applied, too: by the fp32 units, or those of fp64."""
        return self.count("FFMA", "FMUL", "DFMA", "DMUL") > 3

    @property
    def steps(self):
        """Products that are waited for apart: of more than one where a compiler has unrolled."""
        return max(sum("WARPGROUP.ARRIVE" in line for line in self.code), 1)

    @property
    def local(self):
        """Accesses to local memory: spilled registers."""
        return self.count("LDL", "STL")

    def clocks(self, target):
        """Of the matrix unit."""
        total = 0
        for line in self.code:
            if m := PRODUCT.match(line):
                shape = m[2].split(".")[0]
                if m[1] == "HGMMA":  # of four warps
                    rows, columns, depth = map(int, shape.split("x"))
                    work = rows * columns * depth // 4
                else:
                    rows, columns, depth = SHAPE[shape]
                    work = rows * columns * depth
                total += work / RATE[target] * (2 if "TF32" in line or m[1] == "DMMA" else 1)
        return total


def assemblers():
    """By version."""
    found = [triton.knobs.nvidia.ptxas.path]
    try:
        files = metadata.files("nvidia-cuda-nvcc") or []
    except metadata.PackageNotFoundError:
        files = []
    found += [str(f.locate()) for f in files if f.name == "ptxas"]
    return {_version(path): path for path in found}


def _version(path):
    told = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", told)[1]


@cache
def compiled(launch, target):
    return launch.compile(TARGETS[target].gpu)


def disassembled(binary):
    command = [TOOLS / "nvdisasm", "-c", binary]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def assemble(launch, target, ptxas):
    """The machine code of a kernel, and the registers of a thread."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(compiled(launch, target).asm["ptx"])
        command = [ptxas, f"--gpu-name={ARCHITECTURE[target]}", "-v", source, "-o", binary]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        code = disassembled(binary)
    return code, int(re.search(r"Used (\d+) registers", told)[1])


def loops(code):
    """The innermost loops."""
    lines, labels, jumps = [], {}, []
    for line in code.splitlines():
        if m := re.match(r"\s*(\.L_x_\d+):", line):
            labels[m[1]] = len(lines)
        elif m := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            if "BRA" in m[1] and (to := re.search(r"\.L_x_\d+", m[1])):
                jumps.append((len(lines), to[0]))
            lines.append(m[1])
    spans = [(labels[to], at + 1) for at, to in jumps if labels[to] <= at]
    inner = [
        (a, b)
        for a, b in spans
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)
    ]
    return [Loop(tuple(lines[a:b])) for a, b in inner]


FEW = ((20000, 1, 128, 128, 64, False),)


def layers(kind="bf16", target="sm_90", sizes=FEW, networks=NETWORKS):
    """The kernels of layers, and of networks: rows, sizes, activations, ragged."""

    def work():
        for size in sizes:
            run_all(KINDS[kind], *size)
        for network in networks:
            run_network(KINDS[kind], *network)

    made = recorded(kind, target, work)
    return [launch for launch in made if launch.kernel.__name__ in WANTED]


COLUMNS = (
    "kind",
    "kernel",
    "registers",
    "unit",
    "left operand",
    "instructions",
    "barriers",
    "clocks",
)


def main():
    """Of each kernel the loop of its widest products, by the newest assembler."""
    version, ptxas = max(assemblers().items())
    columns = *COLUMNS, "alone", "overlapped"
    print(f"By ptxas {version}, sm_90.\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for kind in ("bf16", "fp32", "high"):
        for launch in {str(one): one for one in layers(kind)}.values():
            code, registers = assemble(launch, "sm_90", ptxas)
            loop = max(loops(code), key=lambda one: one.clocks("sm_90") / one.steps)
            if not loop.products:  # so little work that numbers are not split
                continue
            unit, left = loop.products[0]
            clocks, issued = loop.clocks("sm_90"), len(loop.code)
            row = (
                *(kind, launch, registers, f"{len(loop.products)} {unit}"),
                "registers" if left == "R" else "shared memory",
                *(issued, loop.count("BAR"), round(clocks)),
                f"{clocks / (clocks + issued):.0%}",
                f"{min(1, clocks / issued):.0%}",
            )
            print(f"| {' | '.join(map(str, row))} |")


if __name__ == "__main__":
    main()
