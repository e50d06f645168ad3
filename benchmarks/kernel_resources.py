"""Compile the Triton kernels for Hopper (sm_90), which needs no GPU: registers, spills, atomics, waits.

Prints a line a kernel. "waits" is how often a row, or tile of rows, has its program wait for memory: once if
all that is read is asked for before any of it is waited for; 0 for kernels without a loop over rows. Ends
with status 1 if one of them spills registers to memory or uses an atomic operation, on which the gradients'
bits would depend.

    python benchmarks/kernel_resources.py
    python benchmarks/kernel_resources.py --hidden-sizes 4096 --output resources.json
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from machine import command, machine
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.disasm import BRA_RE, FLINE_RE, parseCtrl

from megatron_periln.norms.kernels import fused, plans
from megatron_periln.norms.kernels.launch_config import (
    MAX_NORM_ADD_NORM_HIDDEN_SIZE,
    LaunchConfig,
    choose_launch_config,
)

HIDDEN_SIZES = (64, 1024, 2048, 2560, 3072, 4096, 5120, 8192, 12288, 16384)
SM_90 = GPUTarget("cuda", 90, 32)
REGISTERS_PER_SM, WARPS_PER_SM = 65536, 64


@dataclass(frozen=True)
class Variant:
    """What a model may ask of the kernels; learned scales are one ``number`` each, or one a ``channel``."""

    name: str
    dtype: str = "*bf16"
    residual: str = "*bf16"
    layer_norm: bool = False
    sublayer_bias: bool = False
    dropout: bool = False
    with_next: bool = False
    scales: bool = False
    learned: str = ""

    def launch_config(self, hidden_size: int) -> LaunchConfig:
        """Return its launch config for rows of this length."""
        plain = not (self.layer_norm or self.sublayer_bias or self.dropout or self.learned)
        return choose_launch_config(hidden_size, plain, self.with_next)

    def takes(self, hidden_size: int) -> bool:
        """Tell whether there are kernels for rows of this length."""
        return not self.with_next or hidden_size <= MAX_NORM_ADD_NORM_HIDDEN_SIZE


VARIANTS = (
    Variant("RMSNorm"),
    Variant("RMSNorm, fp32 stream", residual="*fp32"),
    Variant("RMSNorm, fp32", dtype="*fp32", residual="*fp32"),
    Variant("LayerNorm, bias, dropout", layer_norm=True, sublayer_bias=True, dropout=True),
    Variant("the same in fp32", "*fp32", "*fp32", layer_norm=True, sublayer_bias=True, dropout=True),
    Variant("RMSNorm, and the next", with_next=True),
    Variant("all, and the next", layer_norm=True, sublayer_bias=True, dropout=True, with_next=True),
    Variant("all and next in fp32", "*fp32", "*fp32", True, True, True, with_next=True),
    Variant("RMSNorm, scaled", scales=True),
    Variant("all, scaled", layer_norm=True, sublayer_bias=True, dropout=True, scales=True),
    Variant(
        "all and next, scaled", layer_norm=True, sublayer_bias=True, dropout=True, with_next=True, scales=True
    ),
    Variant("RMSNorm, learned", learned="number"),
    Variant("all, learned", layer_norm=True, sublayer_bias=True, dropout=True, learned="number"),
    Variant("RMSNorm, gates", learned="channel"),
    Variant("all, gates", layer_norm=True, sublayer_bias=True, dropout=True, learned="channel"),
)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses.

    Attributes
    ----------
    memory_waits
        See `count_memory_waits`.
    programs_on_sm
        How many fit a multiprocessor.
    """

    kernel: str
    variant: str
    hidden_size: int
    warps: int
    registers: int
    spills: int
    atomics: int
    widest_load_bits: int
    memory_waits: int
    programs_on_sm: int


def arguments(kernel: Any, variant: Variant, hidden_size: int) -> dict[str, Any]:
    """Return the types of a kernel's arguments, and the values of those that are compiled in."""
    config = variant.launch_config(hidden_size)
    forward = "eps" in kernel.arg_names
    bias = variant.dtype if variant.layer_norm else None
    types: dict[str, Any] = {
        "sublayer_output": variant.dtype,
        "sublayer_bias": variant.dtype if variant.sublayer_bias else None,
        "weight": variant.dtype,
        "seed": "*i64" if variant.dropout else None,
        "mean": "*fp32" if variant.layer_norm else None,
        "rstd": "*fp32",
        "n_rows": "i32",
        "sublayer_output_stride": "i32",
        "dropout": "fp32",
        "dropout_scale": "fp32",
        "scales_per_channel": variant.learned == "channel",
        "weight_offset": 0.0,
        "hidden": hidden_size,
        "block": config.block,
        "tile_rows": config.tile_rows,
        "stages": config.stages,
        "compute_dtype": tl.float32,
    }
    if forward:
        types |= {"residual": variant.residual, "bias": bias, "out": variant.residual}
        types |= {"residual_stride": "i32", "eps": "fp32"}
    else:
        types |= {"grad_out": variant.residual, "grad_sublayer_output": variant.dtype}
        types |= {"grad_out_stride": "i32", "weight_partials": "*fp32", "bias_partials": bias and "*fp32"}
        types |= {"sublayer_bias_partials": "*fp32" if variant.sublayer_bias else None}
    if variant.scales:
        types |= {"residual_scale": "fp32", "output_scale": "fp32", "grad_residual": variant.residual}
    if variant.learned:
        scale = "*fp32" if variant.learned == "channel" else variant.dtype
        types |= {"residual_scales": scale, "output_scales": scale, "grad_residual": variant.residual}
        if not forward:
            types |= {"residual": variant.residual, "residual_stride": "i32", "bias": bias}
            types |= {"scale_partials": "*fp32"}
    if variant.with_next:
        mean = types["mean"]
        types |= {"next_weight": variant.dtype, "next_mean": mean, "next_rstd": "*fp32"}
        if forward:
            types |= {"next_bias": bias, "next_eps": "fp32", "normed": variant.dtype}
        else:
            types |= {"grad_normed": variant.dtype, "grad_normed_stride": "i32", "out": variant.residual}
            types |= {"grad_residual": variant.residual, "next_weight_partials": "*fp32"}
            types |= {"next_bias_partials": bias and "*fp32"}
    return {name: types.get(name) for name in kernel.arg_names}


def compile_kernel(kernel: Any, types: dict[str, Any], num_warps: int) -> Any:
    """Compile for sm_90, as a launch with aligned tensors and a multiple of 16 rows would."""
    runtime = {name: value for name, value in types.items() if isinstance(value, str)}
    constants = {name: value for name, value in types.items() if name not in runtime}
    signature = {name: runtime.get(name, "constexpr") for name in types}
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(types)
        if name in runtime and runtime[name] != "fp32"
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=SM_90, options={"num_warps": num_warps, "enable_fp_fusion": True})


def registers(cubin: bytes) -> int:
    """Return the registers of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]


def machine_code(cubin: bytes) -> bytes:
    """Return the instructions of a kernel, 16 bytes each: the ELF section that is named for it."""
    (sections,) = struct.unpack_from("<Q", cubin, 40)
    count, of_names = struct.unpack_from("<HH", cubin, 60)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + 64 * index) for index in range(count)]
    names = headers[of_names][4]
    (code,) = (
        cubin[start : start + size]
        for name, _, _, _, start, size in headers
        if cubin.startswith(b".text.", names + name)
    )
    return code


def disassemble(cubins: Sequence[bytes]) -> list[str]:
    """Return the machine code of each kernel as Triton's ``asm["sass"]`` has it.

    NVIDIA's disassembler takes a third of a second to start, so that it is started once for all.
    """
    codes = [machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "--binary", "SM90a", "--print-instruction-encoding"]
        printed = subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
    lines = printed.splitlines()
    # An instruction takes two lines, the second with its control word.
    every = [
        (parseCtrl(lines[number + 1]), found[1].removesuffix(" ;").removesuffix(";") + ";")
        for number, found in enumerate(map(FLINE_RE.match, lines))
        if found
    ]
    starts = list(accumulate((len(code) // 16 for code in codes), initial=0))
    assert starts[-1] == len(every), "nvdisasm printed other instructions than it was given"
    return ["\n".join(labelled(every[first:last], first)) for first, last in pairwise(starts)]


def labelled(instructions: Sequence[tuple[str, str]], first: int) -> Iterator[str]:
    """Yield a kernel's lines, with a label before each instruction that is branched to by its address."""
    targets = {int(branch[2], 16) for _, code in instructions if (branch := BRA_RE.match(code))}
    for number, (control, code) in enumerate(instructions, first):
        if number * 16 in targets:
            yield f"LBB{number - first}:"
        if branch := BRA_RE.match(code):
            code = f"{branch[1]}LBB{int(branch[2], 16) // 16 - first};"
        yield f"{control}\t{code}"


def count_memory_waits(code: str) -> int:
    """Return how often an iteration of a kernel's longest loop asks for memory after it waited for some.

    The compiler may put a load behind what waits for another, wherever it stands in the source, to use
    fewer registers: then the two are not in flight together.

    Parameters
    ----------
    code
        Machine code, each instruction behind its control word, ``waits:read:write:yield:stall``: the
        barriers, as bits, on which it waits, and that which it holds until its result is there.
    """
    lines = code.splitlines()
    labels = {line.strip(): index for index, line in enumerate(lines) if line.strip().endswith(":")}
    ends = {end: re.search(r"\bBRA (LBB\d+)", line) for end, line in enumerate(lines)}
    starts = {end: labels.get(f"{branch[1]}:", end) for end, branch in ends.items() if branch}
    end = max(starts, key=lambda end: end - starts[end], default=0)
    pending: set[int] = set()
    waits, waited = 0, True
    for line in lines[starts.get(end, end) : end]:
        control = re.match(r"\s*(--|\d\d):[-\d]:([-\d]):", line)
        if control is None:
            continue
        met = {number for number in pending if control[1] != "--" and int(control[1]) >> number & 1}
        pending -= met
        waited = waited or bool(met)
        if re.search(r"\bLDG\b", line):
            waits += waited
            waited = False
            pending.add(int(control[2]))
    return waits


@dataclass(frozen=True)
class Compiled:
    """A kernel's binary, and what it was compiled for."""

    kernel: str
    variant: Variant
    hidden_size: int
    cubin: bytes

    def measure(self, code: str) -> Resources:
        """Read its disassembled ``code``."""
        num_warps = self.variant.launch_config(self.hidden_size).num_warps
        per_thread = registers(self.cubin)
        fitting = REGISTERS_PER_SM // (-(-per_thread // 8) * 8 * 32 * num_warps)
        loads = [int(bits) for bits in re.findall(r"\bLDG\.E(?:\.[A-Z]+)*\.(64|128)\b", code)]
        return Resources(
            self.kernel,
            self.variant.name,
            self.hidden_size,
            num_warps,
            per_thread,
            len(re.findall(r"\b(?:STL|LDL)\b", code)),
            len(re.findall(r"\b(?:RED|REDG|ATOM|ATOMG|ATOMS)\b", code)),
            max(loads, default=32),
            count_memory_waits(code),
            min(WARPS_PER_SM // num_warps, fitting, 32),
        )


def compile_all(hidden_sizes: Sequence[int]) -> Iterator[Compiled]:
    """Compile each variant's kernels for rows of each length."""
    for number, variant in enumerate(VARIANTS, 1):
        for hidden_size in filter(variant.takes, hidden_sizes):
            config = variant.launch_config(hidden_size)
            for kernel in plans.kernels_for(config, hidden_size):
                types = arguments(kernel, variant, hidden_size)
                compiled = compile_kernel(kernel, types, config.num_warps)
                yield Compiled(kernel.__name__, variant, hidden_size, compiled.asm["cubin"])
        print(f"compiled {number} of {len(VARIANTS)} variants: {variant.name}", file=sys.stderr, flush=True)


def main() -> None:
    """Compile, print and write; end with status 1 if a kernel spills or uses atomics."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=HIDDEN_SIZES)
    parser.add_argument("--output", type=Path, default=None, help="a JSON file")
    options = parser.parse_args()
    if fused.INTERPRETED:
        sys.exit("unset TRITON_INTERPRET to compile the kernels")
    compiled = list(compile_all(options.hidden_sizes))
    codes = disassemble([one.cubin for one in compiled])
    results = [one.measure(code) for one, code in zip(compiled, codes, strict=True)]
    print(
        f"{'kernel':<24}{'variant':<28}{'hidden':>7}{'warps':>6}{'regs':>6}{'spills':>7}{'atomics':>8}{'load':>6}{'waits':>6}{'/SM':>5}"
    )
    for row in results:
        print(
            f"{row.kernel:<24}{row.variant:<28}{row.hidden_size:>7}{row.warps:>6}{row.registers:>6}"
            f"{row.spills:>7}{row.atomics:>8}{row.widest_load_bits:>6}{row.memory_waits:>6}{row.programs_on_sm:>5}"
        )
    if options.output:
        report = {"device": machine(), "command": command(), "results": [asdict(row) for row in results]}
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    failing = [row for row in results if row.spills or row.atomics]
    if failing:
        sys.exit(f"{len(failing)} of {len(results)} kernels spill registers or use atomics")


if __name__ == "__main__":
    main()
