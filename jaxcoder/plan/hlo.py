"""What a compiled program does, read from its text: collectives with their mesh axes and bytes, FLOPs, cycles.

The text is XLA's optimised HLO (`compiled.as_text()`), of one device. Computations call one another (loops, fusions);
a loop's body counts as often as its condition says: XLA's own `cost_analysis` counts it once. Reference: XLA's
"Operation semantics" and `hlo_cost_analysis.cc`, whose rules for dots and convolutions these are.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
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
    """As written; a tuple in parentheses."""
    operands: tuple[str, ...]
    text: str
    """The whole line."""

    @property
    def called(self) -> list[str]:
        return [name.strip().lstrip("%") for found in _CALLED.findall(self.text) for name in found.split(",")]

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.text)
        return found[1] if found else None

    @property
    def source(self) -> str:
        """The JAX operation it comes from."""
        return self.attribute(r'op_name="([^"]*)"') or ""


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Transfers of one kind between the devices along some mesh axes, of a whole step.

    bytes: that one device sends, as a ring algorithm does: of n devices (n - 1) / n of what is gathered or scattered,
    twice that of what is summed, all of what is permuted.
    """

    kind: str
    axes: tuple[str, ...]
    asynchronous: bool
    """Whether the program computes between its start and its end; if not, the device waits for it."""
    count: int
    bytes: float


class Program:
    """A compiled program. Its computations, and how often each runs in a step."""

    def __init__(self, text: str):
        self.computations, self.entry = _parse(text)

    @cached_property
    def runs(self) -> dict[str, int]:
        """Computation -> how often it runs."""
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
        """(instruction, its computation, how often it runs) of everything that runs."""
        for name, times in self.runs.items():
            computation = self.computations[name]
            for instruction in computation.values():
                yield instruction, computation, times

    @cached_property
    def _begun(self) -> set[str]:
        """Computations that begin a transfer which is waited for elsewhere."""
        return self._called_by(lambda i: i.op == "async-start" or i.name.startswith("async-collective-start"))

    @cached_property
    def _continued(self) -> set[str]:
        """Computations that repeat a transfer begun elsewhere: the matmuls beside it (v5e), and the wait for it."""
        ends = self._called_by(lambda i: i.op == "async-done" or i.name.startswith("async-collective-done"))
        return ends - self._begun | {name for name in self.computations if name.startswith("async_collective_fusion")}

    def _called_by(self, is_one: Callable[[Instruction], bool]) -> set[str]:
        everything = (i for computation in self.computations.values() for i in computation.values())
        return {called for instruction in everything if is_one(instruction) for called in instruction.called}

    def trip_count(self, loop: Instruction) -> int:
        """From XLA's own annotation, else from the condition `counter < constant`; 1 where it cannot be known."""
        known = loop.attribute(r'known_trip_count"?:\{"n":"(\d+)"')
        if known:
            return int(known)
        condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
        everything = dict(condition)
        for instruction in list(condition.values()):
            for called in instruction.called:
                everything |= self.computations.get(called, {})
        constants = [
            int(value)
            for instruction in everything.values()
            if instruction.op == "constant" and (value := instruction.attribute(r"constant\((\d+)\)"))
            and instruction.shape.startswith("s32[]")
        ]  # fmt: skip
        return constants[0] if len(constants) == 1 else 1

    def collectives(self, mesh: dict[str, int]) -> list[Collective]:
        """Those of a step, by kind and axes. mesh: axis -> size, in the order of the program's devices."""
        totals: dict[tuple[str, tuple[str, ...], bool], list[float]] = defaultdict(lambda: [0, 0.0])
        for name, times in self.runs.items():
            if name in self._continued:
                continue
            # A TPU's fusion of a sum and the part that the device keeps of it moves what a reduce-scatter moves.
            is_scatter = "all-reduce-scatter" in name
            for instruction in self.computations[name].values():
                kind = instruction.op.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                groups = _groups(instruction, math.prod(mesh.values()))
                sent = _sent(kind, instruction, max(len(group) for group in groups))
                if kind == "all-reduce" and is_scatter:
                    kind, sent = "reduce-scatter", sent / 2
                is_beside = instruction.op.endswith("-start") or name in self._begun
                total = totals[kind, _axes_of(groups, mesh), is_beside]
                total[0] += times
                total[1] += times * sent
        found = [
            Collective(kind=kind, axes=axes, asynchronous=is_beside, count=int(count), bytes=sent)
            for (kind, axes, is_beside), (count, sent) in totals.items()
            if axes
        ]
        return sorted(found, key=lambda c: (-c.bytes, c.kind, c.axes))

    def matmul_flops(self) -> float:
        """FLOPs of all dots and convolutions (a TPU's form of a dot) of a step on one device; kernels not counted."""
        total = 0.0
        for instruction, computation, times in self.instructions():
            if instruction.op == "convolution":
                total += times * _convolution_flops(instruction, computation)
            elif instruction.op == "dot":
                total += times * _dot_flops(instruction, computation)
            elif instruction.op == "custom-call" and "cublas" in instruction.text and "gemm" in instruction.text:
                total += times * _gemm_flops(instruction, computation)
        return total

    def estimated_cycles(self) -> float | None:
        """Cycles of a core, as the TPU compiler estimates its fusions, not kernels and transfers; None: no TPU."""
        total, found = 0.0, False
        for instruction, _, times in self.instructions():
            cycles = instruction.attribute(r'"estimated_cycles":"(\d+)"')
            if cycles and instruction.op == "fusion":
                total, found = total + times * int(cycles), True
        return total if found else None

    def kernels(self) -> dict[str, int]:
        """Names of hand-written kernels (Pallas) -> how often they run."""
        counts: dict[str, int] = defaultdict(int)
        for instruction, _, times in self.instructions():
            if instruction.op == "custom-call" and _KERNEL.search(instruction.text):
                counts[re.sub(r"[.\d]+$", "", instruction.name)] += times
        return dict(counts)


# --- parsing ---------------------------------------------------------------------------------------------------------


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
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
    """What stands between the parenthesis before `start` and its partner."""
    depth = 1
    for position in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[position], 0)
        if depth == 0:
            return line[start:position]
    return line[start:]


def shape_bytes(shape: str) -> float:
    """Bytes of an array, or of all arrays of a tuple, without padding."""
    return sum(math.prod(dims) * item_bytes(dtype) for dtype, dims in shapes_of(shape))


def shapes_of(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    text = re.sub(r"\{[^}]*\}", "", shape)
    return [(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in _SHAPE.findall(text)]


def item_bytes(dtype: str) -> float:
    if dtype in _BYTES:
        return _BYTES[dtype]
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 0


# --- collectives -----------------------------------------------------------------------------------------------------


def _sent(kind: str, instruction: Instruction, size: int) -> float:
    """Bytes that one device sends for one collective."""
    arrays = shapes_of(instruction.shape)
    if instruction.op.endswith("-start") and kind != "all-reduce":
        # (operands, results, and what the runtime needs): results are the second half of the arrays.
        arrays = [array for array in arrays if array[1]]
        arrays = arrays[len(arrays) // 2 :]
    total = sum(math.prod(dims) * item_bytes(dtype) for dtype, dims in arrays)
    if kind == "reduce-scatter":
        total *= size  # what each device brings, not the part that it keeps
    if kind == "collective-permute":
        return total
    return total * (size - 1) / size * (2 if kind == "all-reduce" else 1)


def _groups(instruction: Instruction, devices: int) -> list[list[int]]:
    """Which devices (places in the mesh, flattened) talk to one another."""
    text = instruction.text
    if "collective-permute" in instruction.op:
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", text)
        return [_ints(pair) for pair in re.findall(r"(\d+,\d+)", pairs[1] if pairs else "")] or [[0]]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims = _ints(found[1]), _ints(found[2])
        order = _ints(found[3]) if found[3] else range(len(dims))
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape).tolist()
    if found := re.search(r"replica_groups=@?mesh\[([^\]]*)\](?:<=\[[\d,]*\])? ?\{([^}]*)\}", text):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", found[1])}
        along = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", found[2])]
        others = [i for i in range(len(sizes)) if i not in along]
        places = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        of_group = math.prod(places.shape[i] for i in along)
        return places.transpose(others + along).reshape(-1, of_group).tolist()
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
        places = coordinates[:, np.asarray(group)]
        differs |= (places != places[:, :1]).any(axis=1)
    return tuple(axis for axis, is_used in zip(mesh, differs, strict=True) if is_used)


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def _dims(name: str, computation: dict[str, Instruction]) -> tuple[int, ...]:
    return shapes_of(computation[name].shape)[0][1]


def _dot_flops(dot: Instruction, computation: dict[str, Instruction]) -> float:
    contracting = dot.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    left = _dims(dot.operands[0], computation)
    inner = math.prod(left[i] for i in map(int, filter(None, contracting.split(","))))
    return 2.0 * math.prod(shapes_of(dot.shape)[0][1]) * inner


def _gemm_flops(call: Instruction, computation: dict[str, Instruction]) -> float:
    contracting = call.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]') or ""
    left = _dims(call.operands[0], computation)
    inner = math.prod(left[i] for i in map(int, re.findall(r"\d+", contracting)))
    return 2.0 * math.prod(shapes_of(call.shape)[0][1]) * inner


def _convolution_flops(convolution: Instruction, computation: dict[str, Instruction]) -> float:
    """2 for every multiplication with an element that is there: positions of the window over padding do not count."""
    labels = convolution.attribute(r"dim_labels=([\w>\-]+)")
    left_labels, rest = labels.split("_")
    right_labels, out_labels = rest.split("->")
    left, right = (_dims(name, computation) for name in convolution.operands[:2])
    out = shapes_of(convolution.shape)[0][1]
    window = _window(convolution)
    pairs = 1.0
    for axis in sorted(label for label in out_labels if label.isdigit()):
        sizes = left[left_labels.index(axis)], right[right_labels.index(axis)], out[out_labels.index(axis)]
        pairs *= _pairs(*sizes, **{key: values[int(axis)] for key, values in window.items()})
    batch, features = out[out_labels.index("b")], out[out_labels.index("f")]
    groups = int(convolution.attribute(r"batch_group_count=(\d+)") or 1)
    return 2.0 * batch * features * pairs * right[right_labels.index("i")] / groups


def _window(convolution: Instruction) -> dict[str, list]:
    text = convolution.attribute(r"window=\{([^}]*)\}") or ""
    fields = dict(field.split("=") for field in text.split())
    rank = len(fields.get("size", "").split("x")) if fields.get("size") else 0

    def numbers(key, default):
        return [int(x) for x in fields[key].split("x")] if key in fields else [default] * rank

    pads = [tuple(map(int, p.split("_"))) for p in fields["pad"].split("x")] if "pad" in fields else [(0, 0)] * rank
    return {
        "stride": numbers("stride", 1),
        "pad": pads,
        "left_dilation": numbers("lhs_dilate", 1),
        "right_dilation": numbers("rhs_dilate", 1),
    }


def _pairs(left: int, right: int, out: int, *, stride: int, pad, left_dilation: int, right_dilation: int) -> int:
    """(position of the output, position in the window) that meet an element of the left side, along one axis."""
    first = np.arange(out)[:, None] * stride - pad[0]
    position = first + np.arange(right)[None] * right_dilation
    inside = (position >= 0) & (position < (left - 1) * left_dilation + 1)
    return int((inside & (position % left_dilation == 0)).sum())
