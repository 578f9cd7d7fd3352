"""The k largest of each row, exactly, on Hopper: a row of up to 32,768 scores stays in one program's registers.

Digits of 11, 11 and 10 bits of the scores are counted in shared memory, each pass among the scores that agree with the
digits found so far, until the k-th largest is known. A bit per score then says who wins; 32 such masks of a warp,
transposed, are in order of position, so one sum over the threads gives every winner its place. Longer rows are cut into
pieces whose winners a second launch selects from.

Counting is one `red.shared.add` per score, which the hardware merges for equal addresses; it needs addresses in shared
memory, hence the inline assembly. Digits are numbered from the top: digit 0 holds the largest scores.

Any data is right; what is slower is the number of passes: one where the k-th largest ends its first digit, at most
three. Of equal scores the lowest position wins; -inf is never chosen. NaN is not allowed: it is never chosen, but may
keep another from being so. Contract: `ops.topk.top_k_positions`.

Legend: R rows, L candidates, k winners.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tilery.ops.hopper.variant import Variant

MOST = 8192
"""The largest k: the winners' places stand where the tables stood."""

MOST_HELD = 32768
"""Scores that a program holds."""

PROGRAMS = 132
"""Programs that an H100 runs at a time. While there are no more of them, rows that do not fit into a program are cut
into pieces of half of what fits: 4 rows of 131,072 take 12.0 us so, 13.6 in pieces of 32,768 and 13.1 of 8,192; 64 rows
33.7, 24.6 and 34.5 us."""

REGISTERS = 64
"""What 1,024 threads can have each."""

TABLE = gl.constexpr(8320)
"""Bytes of a table: 2,048 counts, one for all that does not belong, and room to 128 bytes."""
SCRATCH = gl.constexpr(32768)
"""Where words for the threads to share begin, 256 bytes for each of four uses."""

_ADD_UP = "\n".join(f"shfl.sync.up.b32 t|p, v, {n}, 0, -1; @p add.u32 v, v, t;" for n in (1, 2, 4, 8, 16))

_SCAN = gl.constexpr(f"""{{
    .reg .pred p;
    .reg .b32 t, v, w, a, lane, warp;
    mov.u32 lane, %laneid; mov.u32 warp, %tid.x; shr.u32 warp, warp, 5; mov.b32 v, $3;
    {_ADD_UP}
    setp.eq.u32 p, lane, 31; mad.lo.u32 a, warp, 4, $2; @p st.shared.b32 [a], v;
    bar.sync 0;
    mad.lo.u32 a, lane, 4, $2; mov.b32 w, 0; mov.u32 t, %ntid.x; shr.u32 t, t, 5;
    setp.lt.u32 p, lane, t; @p ld.shared.b32 w, [a];
    redux.sync.add.u32 $1, w, -1;
    setp.lt.u32 p, lane, warp; selp.b32 w, w, 0, p; redux.sync.add.u32 w, w, -1;
    add.u32 v, v, w; sub.u32 $0, v, $3;
}}""")

_REVERSE = " ".join(f"selp.b32 s{i}, r{7 - i}, r{i}, q;" for i in range(8))
_DROP = " ".join(f"@q mov.b32 s{i}, 0;" for i in range(4, 8))
_OWN = " ".join(f"add.u32 v, v, s{i};" for i in range(8))
_BEFORE = "\n".join(
    f"add.u32 all, all, w{i}; setp.gt.u32 p, warp, {i}; @p add.u32 before, before, w{i};" for i in range(8)
)
_WALK = "\n".join(
    f"add.u32 t, before, count; setp.gt.u32 q, wanted, t; @q mov.b32 before, t; @q mov.b32 count, s{i}; "
    "@q add.u32 digit, digit, 1;"
    for i in range(1, 8)
)

_PICK = gl.constexpr(f"""{{
    .reg .pred p, q;
    .reg .b32 r<8>, s<8>, w<8>, a, t, v, own, lane, warp, tid, all, wanted, before, count, digit;
    mov.u32 tid, %tid.x; mov.u32 lane, %laneid; shr.u32 warp, tid, 5;
    setp.ge.u32 p, tid, 256; @p bra PICKED;
    setp.ne.u32 q, $7, 0; setp.lt.and.u32 q, tid, 128, q;
    sub.u32 t, 127, tid; selp.b32 t, t, tid, q; mad.lo.u32 a, t, 32, $4;
    ld.shared.v4.b32 {{r0, r1, r2, r3}}, [a];
    ld.shared.v4.b32 {{r4, r5, r6, r7}}, [a + 16];
    {_REVERSE}
    setp.ne.u32 q, $7, 0; setp.eq.and.u32 q, tid, 255, q;
    {_DROP}
    mov.b32 v, 0;
    {_OWN}
    mov.b32 own, v;
    {_ADD_UP}
    setp.eq.u32 p, lane, 31; mad.lo.u32 a, warp, 4, $5; @p st.shared.b32 [a + 32], v;
    bar.sync 1, 256;
    ld.shared.v4.b32 {{w0, w1, w2, w3}}, [$5 + 32];
    ld.shared.v4.b32 {{w4, w5, w6, w7}}, [$5 + 48];
    sub.u32 before, v, own; mov.b32 all, 0;
    {_BEFORE}
    min.u32 wanted, all, $6;
    add.u32 v, before, own; setp.lt.u32 p, before, wanted; setp.le.and.u32 p, wanted, v, p;
    or.b32 t, tid, wanted; setp.eq.or.u32 p, t, 0, p;
    shl.b32 digit, tid, 3; mov.b32 count, s0;
    {_WALK}
    sub.u32 t, wanted, before;
    @p st.shared.v4.b32 [$5], {{digit, t, count, all}};
    PICKED:
    bar.sync 0;
    ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$5];
}}""")

_SWAPS = "\n".join(
    f"shfl.sync.bfly.b32 y, x, {n}, 31, -1; and.b32 t, lane, {n}; setp.eq.u32 p, t, 0; "
    f"@p shl.b32 y, y, {n}; @!p shr.u32 y, y, {n}; selp.b32 t, {low:#x}, {low << n:#x}, p; "
    "and.b32 x, x, t; not.b32 t, t; and.b32 y, y, t; or.b32 x, x, y;"
    for n, low in ((16, 0x0000FFFF), (8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555))
)

_TRANSPOSE = gl.constexpr(f"""{{
    .reg .pred p;
    .reg .b32 x, y, t, lane;
    mov.u32 lane, %laneid; mov.b32 x, $1;
    {_SWAPS}
    mov.b32 $0, x;
}}""")

_COMPARE = gl.constexpr(
    tuple(
        f"{{ .reg .pred p; setp.{how} p, $2, $3; mov.b32 $0, $1; @p or.b32 $0, $0, $4; }}"
        for how in ("ge.f32", "gt.f32", "eq.u32")
    )
)

_LOWEST = gl.constexpr("""{
    .reg .pred p;
    .reg .b32 c, h, x;
    mov.b32 x, $1; popc.b32 c, x;
    MORE: setp.le.s32 p, c, $2; @p bra DONE;
    bfind.u32 h, x; shl.b32 h, 1, h; xor.b32 x, x, h; sub.u32 c, c, 1; bra MORE;
    DONE: mov.b32 $0, x;
}""")

_PLACE = gl.constexpr("""{
    .reg .pred p;
    .reg .b32 a, x, t, h;
    mov.b32 a, $1; mov.b32 x, $2;
    MORE: setp.eq.u32 p, x, 0; @p bra DONE;
    brev.b32 t, x; bfind.shiftamt.u32 h, t; add.u32 h, h, $3; st.shared.b32 [a], h; add.u32 a, a, 4;
    sub.u32 t, x, 1; and.b32 x, x, t; bra MORE;
    DONE: mov.b32 $0, 0;
}""")

# ---- steps in assembly; addresses are those of shared memory, words are u32 ------------------------------------------


@gluon.jit
def effect(asm: gl.constexpr, constraints: gl.constexpr, args):
    """A step for each thread that is done in any case; its only result is 0."""
    gl.inline_asm_elementwise(asm, constraints, args, dtype=gl.uint32, is_pure=False, pack=1)


@gluon.jit
def memory(zero):
    """The address of the program's shared memory."""
    return gl.inline_asm_elementwise(
        "{ .shared .align 16 .b8 top_k_memory[33792]; mov.u32 $0, top_k_memory; add.u32 $0, $0, $1; }",
        "=r,r", [zero], dtype=gl.uint32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def clear(address):
    effect("st.shared.v4.b32 [$1], {0, 0, 0, 0}; mov.b32 $0, 0;", "=r,r", [address])


@gluon.jit
def read(address):
    return gl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];", "=r,r", [address], dtype=gl.uint32, is_pure=False, pack=1
    )


@gluon.jit
def count_first(table, x):
    """Counts the upper 11 bits of x, f32, as they are (the order is `pick`'s matter); returns the bits, of -0 those of
    0."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 a; add.f32 $0, $2, 0f00000000; shr.u32 a, $0, 19; and.b32 a, a, 0x1ffc; add.u32 a, a, $1; "
        "red.shared.add.u32 [a], 1; }",
        "=&r,r,r", [table, x], dtype=gl.uint32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def count_middle(table, x):
    """Counts the digit above bit 10 of x below 2^21, 0 for the largest; others in the count that nobody reads."""
    effect(
        "{ .reg .b32 a; shr.u32 a, $2, 8; min.u32 a, a, 8192; and.b32 a, a, -4; add.u32 a, a, $1; "
        "red.shared.add.u32 [a], 1; mov.b32 $0, 0; }",
        "=r,r,r", [table, x],
    )  # fmt: skip


@gluon.jit
def count_last(table, x):
    """Counts x below 2^10 in every second count, so that `pick` finds 2,048; others in the count that nobody reads."""
    effect(
        "{ .reg .b32 a; min.u32 a, $2, 1024; mad.lo.u32 a, a, 8, $1; red.shared.add.u32 [a], 1; mov.b32 $0, 0; }",
        "=r,r,r", [table, x],
    )  # fmt: skip


@gluon.jit
def pick(table, scratch, k, FIRST: gl.constexpr):
    """(the digit that holds the k-th largest, how many of that digit's are wanted, how many it has, all counted).

    With fewer than k counted: of the smallest; with none: (0, 0, 0, 0). FIRST: the table is of the upper 11 bits of
    floats, whose last four digits from the top, -inf and NaN, do not count.
    """
    return gl.inline_asm_elementwise(
        _PICK, "=r,=r,=r,=r,r,r,r,r", [table, scratch, k, (k * 0 + FIRST).to(gl.uint32)],
        dtype=(gl.uint32, gl.uint32, gl.uint32, gl.uint32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def sums(scratch, v):
    """(the sum over the threads before, the sum over all)."""
    return gl.inline_asm_elementwise(
        _SCAN, "=&r,=&r,r,r", [v * 0 + scratch, v], dtype=(gl.uint32, gl.uint32), is_pure=False, pack=1
    )


@gluon.jit
def transpose(m):
    """Bit j of lane l becomes bit l of lane j."""
    return gl.inline_asm_elementwise(_TRANSPOSE, "=r,r", [m], dtype=gl.uint32, is_pure=False, pack=1)


@gluon.jit
def bit_if(m, x, t, j: gl.constexpr, OP: gl.constexpr):
    """m with bit j set where x is at least t (OP 0), above t (1), both as floats, or has the bits of t (2)."""
    bit = gl.full(m.shape, 1 << j, gl.uint32, m.type.layout)
    COMPARE: gl.constexpr = _COMPARE[OP]
    return gl.inline_asm_elementwise(COMPARE, "=&r,r,r,r,r", [m, x, t, bit], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def population(win, tie):
    """How many bits of each, the second's in the upper half."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 a, b; popc.b32 a, $1; popc.b32 b, $2; shl.b32 b, b, 16; or.b32 $0, a, b; }",
        "=r,r,r", [win, tie], dtype=gl.uint32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def lowest(m, n):
    """The n lowest set bits of m."""
    return gl.inline_asm_elementwise(_LOWEST, "=r,r,r", [m, n], dtype=gl.uint32, is_pure=False, pack=1)


@gluon.jit
def place(address, m, first):
    """Writes first + the number of each set bit of m, one word after the other."""
    effect(_PLACE, "=r,r,r,r", [address, m, first])


# ---- the kernel ------------------------------------------------------------------------------------------------------


@gluon.jit
def threshold(scores, base, k, N: gl.constexpr):
    """(the scores' bits, T, wanted, there): winners are the scores from T on where wanted == there, else those above T
    and the first `wanted` of the `there` equal ones.
    """
    bits = ()
    for j in gl.static_range(N):
        bits = bits + (count_first(base, scores[j]),)  # type: ignore[assignment]  # noqa: RUF005
    gl.thread_barrier()
    digit, wanted, there, _all = pick(base, base + SCRATCH, k, True)
    highest = gl.where(digit < 1024, ((1023 - digit) << 21) | 0x1FFFFF, digit << 21)
    least = highest ^ 0x1FFFFF
    if wanted != there:
        for j in gl.static_range(N):
            count_middle(base + TABLE, bits[j] ^ highest)
        gl.thread_barrier()
        digit, wanted, there, _all = pick(base + TABLE, base + SCRATCH + 256, wanted, False)
        highest = highest ^ (digit << 10)
        least = highest ^ 0x3FF
        if wanted != there:
            for j in gl.static_range(N):
                count_last(base + 2 * TABLE, bits[j] ^ highest)
            gl.thread_barrier()
            digit, wanted, there, _all = pick(base + 2 * TABLE, base + SCRATCH + 512, wanted, False)
            least = highest ^ (digit >> 1)
    return bits, least, wanted, there


@gluon.jit(do_not_specialize=["length", "stride", "k"])
def top_k_kernel(
    scores, lens, names, out, values, length, stride, k,
    N: gl.constexpr, WARPS: gl.constexpr, PIECES: gl.constexpr, LENS: gl.constexpr, NAMES: gl.constexpr,
    VALUES: gl.constexpr, WIDE: gl.constexpr, WAIT: gl.constexpr,
):  # fmt: skip
    """One piece of 32 * WARPS * N scores of one row. A warp has consecutive scores, its lanes every 32nd of them."""
    THREADS: gl.constexpr = 32 * WARPS
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    row = gl.program_id(0) // PIECES
    start = gl.program_id(0) % PIECES * (THREADS * N)
    tid = gl.arange(0, THREADS, layout=flat).to(gl.uint32)
    valid = length
    if LENS:
        valid = gl.minimum(gl.maximum(gl.load(lens + row), 0), length).to(gl.int32)
    valid -= start
    base = memory((row * 0).to(gl.uint32))
    for at in gl.static_range(0, 3 * TABLE, THREADS * 16):
        clear(base + at + tid * 16)
    gl.thread_barrier()
    if WAIT:
        effect("griddepcontrol.wait; mov.b32 $0, 0;", "=r,r", [tid])
    first = (tid >> 5) * (32 * N)
    own = (first + (tid & 31)).to(gl.int32)
    source = scores + row.to(gl.int64) * stride + start
    mine = ()
    for j in gl.static_range(N):
        x = gl.load(source + own + 32 * j, mask=own + 32 * j < valid, other=float("-inf"))
        mine = mine + (x,)  # type: ignore[assignment]  # noqa: RUF005
    bits, least, wanted, there = threshold(mine, base, k.to(gl.uint32), N)
    effect("griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r,r", [tid])
    win = tid * 0
    tie = tid * 0
    if wanted == there:
        for j in gl.static_range(N):
            win = bit_if(win, bits[j], least, j, 0)
        win = transpose(win)
    else:
        for j in gl.static_range(N):
            win = bit_if(win, bits[j], least, j, 1)
            tie = bit_if(tie, bits[j], least, j, 2)
        win = transpose(win)
        tie = transpose(tie)
    before, total = sums(base + SCRATCH + 768, population(win, tie))
    ties = before >> 16
    if wanted != there:
        win |= lowest(tie, gl.maximum(wanted.to(gl.int32) - ties.to(gl.int32), 0).to(gl.uint32))
    at = (before & 0xFFFF) + gl.minimum(ties, wanted)
    place(base + at * 4, win, first + (tid & 31) * 32)
    gl.thread_barrier()
    found = ((total & 0xFFFF) + gl.minimum(total >> 16, wanted)).to(gl.int32)
    target = gl.program_id(0).to(gl.int64) * k
    for begin in gl.static_range(0, WIDE, THREADS):
        slot = (begin + tid).to(gl.int32)
        winner = slot < found
        position = read(base + 4 * slot.to(gl.uint32)).to(gl.int32)
        if VALUES:
            value = gl.load(source + position, mask=winner, other=float("-inf"))
            gl.store(values + target + slot, value, mask=slot < k)
        position += start
        if NAMES:
            position = gl.load(names + row.to(gl.int64) * stride + position, mask=winner, other=-1)
        gl.store(out + target + slot, gl.where(winner, position, -1), mask=slot < k)


# ---- on the host -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One launch: programs of `warps` warps with `each` scores per thread for `length` candidates in `pieces`."""

    length: int
    warps: int
    each: int
    pieces: int


@functools.cache
def plan(rows: int, length: int, k: int) -> tuple[Launch, ...]:
    """The launches for rows of `length`; none if there is no way: pieces must have fewer winners than candidates.

    k = 2048: a row of 32,768 is one program; one of 131,072 is 8 pieces, whose 16,384 winners are one program.
    """
    launches: list[Launch] = []
    if not 0 < k <= MOST:
        return ()
    while length > MOST_HELD:
        piece = MOST_HELD // 2 if rows * -(-length // (MOST_HELD // 2)) <= PROGRAMS else MOST_HELD
        pieces = -(-length // piece)
        if pieces * k >= length:
            return ()
        launches.append(Launch(length, 32, piece // 1024, pieces))
        length = pieces * k
    warps = 8 if length <= 8192 else 32
    each = max(-(-length // (32 * warps)) - 1, 3).bit_length()
    return (*launches, Launch(length, warps, 1 << each, 1))


def top_k(scores: Tensor, k: int, lens: Tensor | None = None) -> Tensor:
    """Positions of the k largest of each row's first lens[r] (without lens: all L) scores: [R, L] f32 -> [R, k] i32.

    In order of position, -1 at the end of a row with fewer winners. lens: [R] i32. Rows may be strided, a row's scores
    may not. Raises `ValueError` where `plan` has no way.
    """
    rows, length = scores.shape
    launches = plan(rows, length, k)
    if not launches:
        raise ValueError(f"no plan for the top {k} of {length}: k is 1 to {MOST}, and pieces must shrink it")
    if scores.dtype is not torch.float32 or scores.stride(1) != 1:
        raise ValueError(f"scores must be f32 with dense rows, got {scores.dtype} with strides {scores.stride()}")
    names = None
    for number, launch in enumerate(launches):
        out = torch.empty(rows, launch.pieces * k, dtype=torch.int32, device=scores.device)
        values = torch.empty_like(out, dtype=torch.float32) if number + 1 < len(launches) else None
        if rows:
            with torch.cuda.device_of(scores):
                _run(launch, scores, lens, names, out, values, k, number > 0)
        names, lens = out, None
        scores = values if values is not None else scores
    return out


def _run(
    launch: Launch, scores: Tensor, lens: Tensor | None, names: Tensor | None, out: Tensor, values: Tensor | None,
    k: int, wait: bool,
) -> None:  # fmt: skip
    absent = scores
    threads = 32 * launch.warps
    top_k_kernel[(scores.shape[0] * launch.pieces,)](
        scores, absent if lens is None else lens, absent if names is None else names, out,
        absent if values is None else values, launch.length, scores.stride(0), k,
        N=launch.each, WARPS=launch.warps, PIECES=launch.pieces, LENS=lens is not None, NAMES=names is not None,
        VALUES=values is not None, WIDE=-(-k // threads) * threads, WAIT=wait, num_warps=launch.warps,
        launch_pdl=wait, maxnreg=REGISTERS,
    )  # fmt: skip


def variants() -> list[Variant]:
    """The launches for rows of 1,000, 32,768 and 131,072."""
    found = []
    for length in (1000, 32768, 131072):
        launches = plan(4, length, 2048)
        for number, launch in enumerate(launches):
            more, after = number + 1 < len(launches), number > 0
            pointers = {"scores": "*fp32", "lens": "*i32", "names": "*i32", "out": "*i32", "values": "*fp32"}
            signature = {**pointers, "length": "i32", "stride": "i32", "k": "i32"}
            constexprs = {
                "N": launch.each, "WARPS": launch.warps, "PIECES": launch.pieces, "LENS": not after, "NAMES": after,
                "VALUES": more, "WIDE": 2048, "WAIT": after,
            }  # fmt: skip
            options = {"maxnreg": REGISTERS, "launch_pdl": after}
            name = f"top_k_{length}_{number}"
            found.append(Variant(name, top_k_kernel, signature, constexprs, launch.warps, options))
    return found
