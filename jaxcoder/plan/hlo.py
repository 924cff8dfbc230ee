"""Analysis of optimized HLO (`compiled.as_text()`): collectives with their mesh axes and bytes, FLOPs, cycles.

All figures are per device and step. The body of a loop counts once per iteration, unlike in XLA's `cost_analysis`.
Reference: XLA's "Operation semantics", and `hlo_cost_analysis.cc` for the FLOPs of dots and convolutions.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+?\[[^\]]*\](?:\{[^}]*\})?) ([\w\-]+)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_KERNEL = re.compile(r'custom_call_target="(tpu_custom_call|mosaic_gpu|__gpu\$xla\.gpu\.triton)')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?([^,}\s]+(?:, ?%[^,}\s]+)*)\}?")


@dataclass(frozen=True, kw_only=True)
class Instruction:
    name: str
    op: str
    shape: str
    """As in the text; a tuple in parentheses."""
    operands: tuple[str, ...]
    text: str
    """The line."""

    @property
    def called(self) -> list[str]:
        return [name.strip().lstrip("%") for found in _CALLED.findall(self.text) for name in found.split(",")]

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.text)
        return found[1] if found else None


@dataclass(frozen=True, kw_only=True)
class Collective:
    """All transfers of one kind along some mesh axes in a step. bytes: sent by one device."""

    kind: str
    axes: tuple[str, ...]
    asynchronous: bool
    """Whether the program computes between its start and its end; otherwise it is exposed."""
    count: int
    bytes: float


class Program:
    """A compiled program. text: optimized HLO."""

    def __init__(self, text: str):
        self.computations, self.entry = _parse(text)

    @cached_property
    def runs(self) -> dict[str, int]:
        """Computation -> number of runs per step."""
        runs: dict[str, int] = defaultdict(int)

        def run(name: str, times: int) -> None:
            runs[name] += times
            for instruction in self.computations.get(name, {}).values():
                trips = self.trip_count(instruction) if instruction.op == "while" else 1
                for called in instruction.called:
                    if called in self.computations:
                        run(called, times * trips)

        run(self.entry, 1)
        return dict(runs)

    def instructions(self) -> Iterator[tuple[Instruction, dict[str, Instruction], int]]:
        """(instruction, its computation, number of runs) of all instructions."""
        for name, times in self.runs.items():
            for instruction in self.computations[name].values():
                yield instruction, self.computations[name], times

    @cached_property
    def _async_starts(self) -> set[str]:
        """Computations that start an asynchronous transfer."""
        return self._called_by("async-start", "async-collective-start")

    @cached_property
    def _async_repeats(self) -> set[str]:
        """Computations that repeat a transfer started elsewhere: at its end, or fused with matmuls (TPU v5e)."""
        ends = self._called_by("async-done", "async-collective-done")
        return ends - self._async_starts | {
            name for name in self.computations if name.startswith("async_collective_fusion")
        }

    def _called_by(self, op: str, prefix: str) -> set[str]:
        """Computations called by instructions of this op or with names of this prefix."""
        instructions = (i for computation in self.computations.values() for i in computation.values())
        return {called for i in instructions if i.op == op or i.name.startswith(prefix) for called in i.called}

    def trip_count(self, loop: Instruction) -> int:
        """From XLA's annotation, else from the condition `counter < constant`; 1 if unknown."""
        known = loop.attribute(r'known_trip_count"?:\{"n":"(\d+)"')
        if known:
            return int(known)
        condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)") or ""]
        instructions = list(condition.values())
        for called in [name for instruction in instructions for name in instruction.called]:
            instructions += self.computations.get(called, {}).values()
        constants = [
            int(value)
            for instruction in instructions
            if instruction.op == "constant" and instruction.shape.startswith("s32[]")
            and (value := instruction.attribute(r"constant\((\d+)\)"))
        ]  # fmt: skip
        return constants[0] if len(constants) == 1 else 1

    def collectives(self, mesh: dict[str, int]) -> list[Collective]:
        """By kind, axes and overlap, most bytes first. mesh: axis -> size, in the order of the program's devices."""
        totals: dict[tuple[str, tuple[str, ...], bool], list[float]] = defaultdict(lambda: [0, 0.0])
        for name, times in self.runs.items():
            if name in self._async_repeats:
                continue
            for instruction in self.computations[name].values():
                kind = instruction.op.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                groups = _groups(instruction, math.prod(mesh.values()))
                sent = _sent(kind, instruction, max(len(group) for group in groups))
                # A TPU fuses an all-reduce with the slice of this device: half of the all-reduce's bytes.
                if kind == "all-reduce" and "all-reduce-scatter" in name:
                    kind, sent = "reduce-scatter", sent / 2
                is_async = instruction.op.endswith("-start") or name in self._async_starts
                total = totals[kind, _axes_of(groups, mesh), is_async]
                total[0] += times
                total[1] += times * sent
        found = [
            Collective(kind=kind, axes=axes, asynchronous=is_async, count=int(count), bytes=sent)
            for (kind, axes, is_async), (count, sent) in totals.items()
            if axes
        ]
        return sorted(found, key=lambda c: (-c.bytes, c.kind, c.axes))

    def matmul_flops(self) -> float:
        """FLOPs of all dots, convolutions (dots on a TPU) and cuBLAS calls; hand-written kernels are not counted."""
        total = 0.0
        for instruction, computation, times in self.instructions():
            if instruction.op == "convolution":
                total += times * _convolution_flops(instruction, computation)
            elif instruction.op == "dot":
                total += times * _dot_flops(instruction, computation, r"lhs_contracting_dims=\{([\d,]*)\}")
            elif instruction.op == "custom-call" and "cublas" in instruction.text and "gemm" in instruction.text:
                total += times * _dot_flops(instruction, computation, r'"lhs_contracting_dimensions":\[([^\]]*)\]')
        return total

    def estimated_cycles(self) -> float | None:
        """Cycles per core of all fusions (not kernels, transfers) by the TPU compiler's estimate; None: no TPU."""
        total, found = 0.0, False
        for instruction, _, times in self.instructions():
            cycles = instruction.attribute(r'"estimated_cycles":"(\d+)"')
            if cycles and instruction.op == "fusion":
                total, found = total + times * int(cycles), True
        return total if found else None

    def kernels(self) -> dict[str, int]:
        """Names of hand-written kernels (Pallas) -> number of runs."""
        counts: dict[str, int] = defaultdict(int)
        for instruction, _, times in self.instructions():
            if instruction.op == "custom-call" and _KERNEL.search(instruction.text):
                counts[re.sub(r"[.\d]+$", "", instruction.name)] += times
        return dict(counts)


# --- parsing ---------------------------------------------------------------------------------------------------------


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """({computation: {name: instruction}}, name of the entry computation)."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry = ""
    current: dict[str, Instruction] | None = None
    for line in text.splitlines():
        if current is None:
            found = _COMPUTATION.match(line)
            if found:
                current = computations.setdefault(found[1], {})
                entry = found[1] if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            operands = tuple(re.findall(r"%([\w.\-]+)", _arguments(line, found.end())))
            current[found[2]] = Instruction(name=found[2], op=found[4], shape=found[3], operands=operands, text=line)
    return computations, entry


def _arguments(line: str, start: int) -> str:
    """The text from `start`, behind an opening parenthesis, to the matching closing one."""
    depth = 1
    for position in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[position], 0)
        if depth == 0:
            return line[start:position]
    return line[start:]


def shapes_of(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dims) of an array, or of all arrays of a tuple."""
    text = re.sub(r"\{[^}]*\}", "", shape)
    return [(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in _SHAPE.findall(text)]


def item_bytes(dtype: str) -> float:
    if dtype in _BYTES:
        return _BYTES[dtype]
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 0


# --- collectives -----------------------------------------------------------------------------------------------------


def _sent(kind: str, instruction: Instruction, size: int) -> float:
    """Bytes that one device sends in one collective over groups of `size` devices, by ring algorithms."""
    arrays = shapes_of(instruction.shape)
    if instruction.op.endswith("-start") and kind != "all-reduce":
        # The tuple has operands, results and scalars of the runtime: results are the second half of the arrays.
        arrays = [array for array in arrays if array[1]]
        arrays = arrays[len(arrays) // 2 :]
    total = sum(math.prod(dims) * item_bytes(dtype) for dtype, dims in arrays)
    if kind == "reduce-scatter":
        total *= size  # the result is one shard of the operand
    if kind == "collective-permute":
        return total
    # (n - 1) / n of the array; an all-reduce is a reduce-scatter and an all-gather.
    return total * (size - 1) / size * (2 if kind == "all-reduce" else 1)


def _groups(instruction: Instruction, devices: int) -> list[list[int]]:
    """Groups of device indices, in the order of the flattened mesh, that communicate with each other."""
    text = instruction.text
    if "collective-permute" in instruction.op:
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
        return [_ints(pair) for pair in re.findall(r"(\d+,\d+)", pairs[1] if pairs else "")] or [[0]]
    # [4,2]<=[2,2,2]T(0,2,1): reshape, transpose, reshape of an iota.
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims = _ints(found[1]), _ints(found[2])
        order = _ints(found[3]) if found[3] else range(len(dims))
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape).tolist()
    # mesh['data'=2,'fsdp'=4] {'fsdp'}: all axes of the mesh, then those of a group.
    if found := re.search(r"replica_groups=@?mesh\[([^\]]*)\](?:<=\[[\d,]*\])? ?\{([^}]*)\}", text):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", found[1])}
        along = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", found[2])]
        others = [i for i in range(len(sizes)) if i not in along]
        indices = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        group_size = math.prod(indices.shape[i] for i in along)
        return indices.transpose(others + along).reshape(-1, group_size).tolist()
    # {{0,1},{2,3}}
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return [_ints(group) for group in re.findall(r"\{([\d,]+)\}", found[1])]
    return [list(range(devices))]


def _ints(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def _axes_of(groups: Sequence[Sequence[int]], mesh: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ; () for groups of one."""
    coordinates = np.stack(np.unravel_index(np.arange(math.prod(mesh.values())), tuple(mesh.values())))
    differs = np.zeros(len(mesh), bool)
    for group in groups:
        members = coordinates[:, np.asarray(group)]
        differs |= (members != members[:, :1]).any(axis=1)
    return tuple(axis for axis, is_used in zip(mesh, differs, strict=True) if is_used)


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def _dims(name: str, computation: dict[str, Instruction]) -> tuple[int, ...]:
    return shapes_of(computation[name].shape)[0][1]


def _dot_flops(dot: Instruction, computation: dict[str, Instruction], contracting: str) -> float:
    """2 per output element and element of the contracting dims, which the pattern `contracting` matches."""
    left = _dims(dot.operands[0], computation)
    inner = math.prod(left[int(i)] for i in re.findall(r"\d+", dot.attribute(contracting) or ""))
    return 2.0 * math.prod(shapes_of(dot.shape)[0][1]) * inner


def _convolution_flops(convolution: Instruction, computation: dict[str, Instruction]) -> float:
    """2 per multiplication with an element of the input: window positions over padding do not count."""
    labels = convolution.attribute(r"dim_labels=([\w>\-]+)") or ""
    left_labels, rest = labels.split("_")
    right_labels, out_labels = rest.split("->")
    left, right = (_dims(name, computation) for name in convolution.operands[:2])
    out = shapes_of(convolution.shape)[0][1]
    pairs, window = 1, _window(convolution)
    for label in sorted(label for label in out_labels if label.isdigit()):
        sizes = left[left_labels.index(label)], right[right_labels.index(label)], out[out_labels.index(label)]
        pairs *= _pairs(*sizes, *window[int(label)])
    batch, features = out[out_labels.index("b")], out[out_labels.index("f")]
    groups = int(convolution.attribute(r"batch_group_count=(\d+)") or 1)
    return 2.0 * batch * features * pairs * right[right_labels.index("i")] / groups


def _window(convolution: Instruction) -> list[tuple[int, int, int, int]]:
    """(stride, padding before, dilation of the left side, of the right side) for each spatial dim."""
    text = convolution.attribute(r"window=\{([^}]*)\}") or ""
    fields = {key: value.split("x") for key, value in (field.split("=") for field in text.split())}
    defaults = {"stride": "1", "pad": "0", "lhs_dilate": "1", "rhs_dilate": "1"}
    rank = len(fields.get("size", []))
    columns = [fields.get(key, [default] * rank) for key, default in defaults.items()]
    return [
        (int(stride), int(pad.split("_")[0]), int(left), int(right))
        for stride, pad, left, right in zip(*columns, strict=True)
    ]


def _pairs(left: int, right: int, out: int, stride: int, pad: int, left_dilation: int, right_dilation: int) -> int:
    """Pairs of an output position and a window position that meet an element of the left side, along one dim."""
    position = np.arange(out)[:, None] * stride - pad + np.arange(right)[None] * right_dilation
    is_inside = (position >= 0) & (position < (left - 1) * left_dilation + 1)
    return int((is_inside & (position % left_dilation == 0)).sum())
