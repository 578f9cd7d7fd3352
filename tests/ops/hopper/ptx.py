"""Runs the PTX of a small kernel on a CPU: all threads of one program side by side, one instruction at a time.

Threads that lag behind go first, so that a warp is together again where its branches meet; a barrier holds threads
until all that it waits for are there. Shared memory starts as garbage. Only what the kernels tested here use is known;
anything else raises `NotImplementedError`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SHARED = 4096
"""Where the program's one shared array begins: a pointer is not 0."""
SPACE = 40
"""Tensor i is at address (i + 1) << SPACE."""
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
ARITHMETIC = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "min": np.minimum, "max": np.maximum, "shl": np.left_shift, "shr": np.right_shift,
}  # fmt: skip
TYPES = {
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "b64": np.uint64, "u64": np.uint64,
    "s64": np.int64, "pred": np.bool_,
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """`guard`: (predicate, the value it must have) or None. Names of an inner block carry its number."""

    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of the one entry, and the position of each label."""
    text = re.sub(r"//[^\n]*|^\s*\.(loc|file|section|b\d+|pragma)\b[^\n;]*;?$", "", text, flags=re.M)
    body = text[text.index("{", text.index(".entry")) + 1 :]
    blocks: list[tuple[int, set[str]]] = [(0, set())]
    numbers = iter(range(1, 10**6))
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: list[tuple[Instruction, tuple[tuple[int, set[str]], ...]]] = []

    def scoped(word: str, where: Sequence[tuple[int, set[str]]]) -> str:
        return next((f"{word}@{number}" for number, names in reversed(where) if word in names and number), word)

    at = 0
    while blocks:
        while body[at].isspace():
            at += 1
        if body[at] in "{}":
            blocks = [*blocks, (next(numbers), set())] if body[at] == "{" else blocks[:-1]
            at += 1
            continue
        if label := re.match(r"([$\w]+):", body[at:]):
            blocks[-1][1].add(label[1])
            labels[scoped(label[1], blocks)] = len(pending)
            at += label.end()
            continue
        stop = body.index(";", at)
        statement, at = body[at:stop].strip(), stop + 1
        if statement.startswith((".reg", ".shared")):
            for name, several in re.findall(r"([%\w]+)(?:<(\d+)>)?\s*(?:\[\d+\])?(?:,|$)", statement.split(None, 2)[2]):
                blocks[-1][1].update([name] if not several else [f"{name}{i}" for i in range(int(several))])
            continue
        guard = None
        if statement.startswith("@"):
            word, statement = statement.split(None, 1)
            guard = (word.lstrip("@!"), "!" not in word)
        opcode, _, rest = statement.partition(" ") if " " in statement else statement.partition("\t")
        operands = tuple(o.strip() for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest.strip()))
        pending.append((Instruction(tuple(opcode.strip().split(".")), operands, guard), tuple(blocks)))
    word = re.compile(r"[%$A-Za-z_][\w.]*")
    for instruction, where in pending:
        operands = tuple(word.sub(lambda m: scoped(m[0], where), o) for o in instruction.operands)  # noqa: B023
        guard = instruction.guard and (scoped(instruction.guard[0], where), instruction.guard[1])
        code.append(Instruction(instruction.opcode, operands, guard))
    return code, labels


def run(ptx: str, program: int, threads: int, arguments: Sequence[np.ndarray | int], shared_bytes: int) -> None:
    """One program. Arguments: contiguous arrays of 4-byte elements, changed in place, and integers."""
    Machine(ptx, program, threads, arguments, shared_bytes).run()


class Machine:
    def __init__(
        self, ptx: str, program: int, threads: int, arguments: Sequence[np.ndarray | int], shared_bytes: int
    ) -> None:
        self.code, self.labels = parse(ptx)
        self.threads = threads
        self.memory = [a.reshape(-1).view(np.uint32) if isinstance(a, np.ndarray) else None for a in arguments]
        self.parameters = [(i + 1) << SPACE if isinstance(a, np.ndarray) else a for i, a in enumerate(arguments)]
        self.shared = np.full(shared_bytes // 4, 0xDEADBEEF, np.uint32)
        tid = np.arange(threads)
        self.special = {
            "%tid.x": tid, "%laneid": tid % 32, "%ntid.x": np.full(threads, threads),
            "%ctaid.x": np.full(threads, program),
        }  # fmt: skip
        self.registers: dict[str, np.ndarray] = {}
        self.pc = np.zeros(threads, np.int64)
        self.waits = np.full(threads, -1)
        self.done = np.zeros(threads, np.bool_)

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while not self.done.all():
                free = ~self.done & (self.waits < 0)
                if not free.any():
                    raise RuntimeError("every thread waits")
                at = int(self.pc[free].min())
                mask = free & (self.pc == at)
                instruction = self.code[at]
                self.pc[mask] += 1
                if instruction.guard:
                    name, wanted = instruction.guard
                    mask = mask & (self.read(name, np.bool_) == wanted)
                if mask.any():
                    self.step(instruction, mask)

    # --- operands ---------------------------------------------------------------------------------------------

    def read(self, operand: str, dtype: Any) -> np.ndarray:
        if operand in self.special:
            return self.special[operand].astype(dtype)
        if operand.startswith("0f"):
            return np.full(self.threads, np.array(int(operand[2:], 16), np.uint32).view(np.float32))
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand):
            value = int(operand, 0)
            if dtype is np.bool_:
                return np.full(self.threads, value != 0)
            return np.full(self.threads, value & (2**64 - 1), np.uint64).astype(dtype)
        if operand.startswith("top_k_memory"):
            return np.full(self.threads, SHARED, dtype)
        value = self.registers[operand]
        if dtype is np.bool_:
            return value
        return value.astype(np.uint32).view(dtype) if _size(dtype) == 4 else value.view(dtype)

    def write(self, name: str, value: np.ndarray, mask: np.ndarray) -> None:
        if name == "_":
            return
        if value.dtype != np.bool_:
            value = value.view(np.uint32 if value.dtype.itemsize == 4 else np.uint64).astype(np.uint64)
        old = self.registers.get(name)
        self.registers[name] = value.copy() if old is None else np.where(mask, value, old)

    def address(self, operand: str) -> np.ndarray:
        base, _, offset = operand.strip("[] ").partition("+")
        return self.read(base.strip(), np.uint64) + np.uint64(int(offset or "0", 0))

    def cells(self, address: np.ndarray, space: str, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the memory, the word of each thread). Raises `IndexError` outside it."""
        if space == "shared":
            memory, offset = self.shared, address - np.uint64(SHARED)
        else:
            (number,) = set((address[mask] >> np.uint64(SPACE)).tolist())
            memory, offset = self.memory[number - 1], address & np.uint64((1 << SPACE) - 1)
        if (offset[mask] % 4).any() or (offset[mask] // 4 >= memory.size).any():
            raise IndexError(f"{space} memory: byte {int(offset[mask].max())} of {memory.nbytes}")
        return memory, np.where(mask, offset // np.uint64(4), 0).astype(np.int64)

    # --- instructions -----------------------------------------------------------------------------------------

    def step(self, instruction: Instruction, mask: np.ndarray) -> None:
        (name, *suffixes), o = instruction.opcode, instruction.operands
        dtype = TYPES.get(suffixes[-1]) if suffixes else None
        if name in ("ld", "st", "red"):
            self.move(name, suffixes, o, mask)
        elif name == "setp":
            values = COMPARE[suffixes[0]](self.read(o[1], dtype), self.read(o[2], dtype))
            if len(suffixes) == 3:
                values = {"and": np.logical_and, "or": np.logical_or}[suffixes[1]](values, self.read(o[3], np.bool_))
            self.write(o[0], values, mask)
        elif name in ("shfl", "redux"):
            self.exchange(name, suffixes, o, mask)
        elif name == "bra":
            self.pc[mask] = self.labels[o[0]]
        elif name == "bar":
            number, wanted = int(o[0]), int(o[1]) if len(o) > 1 else int((~self.done).sum())
            self.waits[mask] = number
            if (self.waits == number).sum() == wanted:
                self.waits[self.waits == number] = -1
        elif name in ("ret", "exit"):
            self.done[mask] = True
        elif name != "griddepcontrol":
            self.write(o[0], self.compute(name, suffixes, dtype, o), mask)

    def compute(self, name: str, suffixes: list[str], dtype: Any, o: tuple[str, ...]) -> np.ndarray:
        if name in ("mov", "cvt"):
            return self.read(o[1], dtype).astype(TYPES[suffixes[0]]) if name == "cvt" else self.read(o[1], dtype)
        if name in ("shl", "shr"):
            count = np.minimum(self.read(o[2], np.uint32), 31 if _size(dtype) == 4 else 63).astype(dtype)
            return ARITHMETIC[name](self.read(o[1], dtype), count)
        if name in ARITHMETIC:
            return ARITHMETIC[name](self.read(o[1], dtype), self.read(o[2], dtype))
        if name in ("mul", "mad"):
            wide = suffixes[0] == "wide"
            kind = {np.uint32: np.uint64, np.int32: np.int64}[dtype] if wide else dtype
            product = self.read(o[1], dtype).astype(kind) * self.read(o[2], dtype).astype(kind)
            return product + self.read(o[3], kind) if name == "mad" else product
        if name == "selp":
            return np.where(self.read(o[3], np.bool_), self.read(o[1], dtype), self.read(o[2], dtype))
        if name == "not":
            return ~self.read(o[1], dtype)
        bits = np.unpackbits(self.read(o[1], np.uint32).astype(">u4").view(np.uint8)).reshape(-1, 32)  # highest first
        if name == "popc":
            return bits.sum(1).astype(np.uint32)
        if name == "brev":
            return np.packbits(bits[:, ::-1]).view(">u4").astype(np.uint32)
        if name == "bfind":
            shift = np.where(bits.any(1), bits.argmax(1), 2**32 - 1).astype(np.uint32)
            return shift if "shiftamt" in suffixes else np.where(bits.any(1), 31 - shift, shift).astype(np.uint32)
        raise NotImplementedError(".".join((name, *suffixes)))

    def move(self, name: str, suffixes: list[str], o: tuple[str, ...], mask: np.ndarray) -> None:
        space = suffixes[0]
        if space == "param":
            value = self.parameters[int(o[1].strip("[]").rsplit("_", 1)[1])]
            size = np.uint64 if suffixes[-1].endswith("64") else np.uint32
            self.write(o[0], np.full(self.threads, value & (2**64 - 1), np.uint64).astype(size), mask)
            return
        listed, place = (o[0], o[1]) if name == "ld" else (o[1], o[0])
        for number, register in enumerate(r.strip() for r in listed.strip("{} ").split(",")):
            memory, cell = self.cells(self.address(place) + np.uint64(4 * number), space, mask)
            if name == "ld":
                self.write(register, memory[cell], mask)
            elif name == "st":
                memory[cell[mask]] = self.read(register, np.uint32)[mask]
            else:
                np.add.at(memory, cell[mask], self.read(register, np.uint32)[mask])

    def exchange(self, name: str, suffixes: list[str], o: tuple[str, ...], mask: np.ndarray) -> None:
        if not (mask.reshape(-1, 32).all(1) | ~mask.reshape(-1, 32).any(1)).all():
            raise RuntimeError(f"{name} with a warp that is not together")
        value = self.read(o[1], np.uint32)
        if name == "redux":
            sums = value.reshape(-1, 32).sum(1, dtype=np.uint32)
            self.write(o[0], np.repeat(sums, 32), mask)
            return
        tid = np.arange(self.threads)
        by = self.read(o[2], np.uint32).astype(np.int64)
        lane = {"up": tid % 32 - by, "bfly": (tid % 32) ^ by}[suffixes[1]]
        inside = (lane >= 0) & (lane < 32)
        target, _, predicate = o[0].partition("|")
        self.write(target, value[tid // 32 * 32 + np.where(inside, lane, tid % 32)], mask)
        if predicate:
            self.write(predicate, inside, mask)


def _size(dtype: Any) -> int:
    return int(np.dtype(dtype).itemsize)
