"""Random kernels whose results are exact: the meaning of the language, against everything it is lowered to.

Floats are kept to multiples of 1/8 of magnitude at most 64, so that no sum or product rounds and results can be compared
bit by bit; what the language leaves open (division by zero, NaN in max, shifts past the width) is not generated.
"""

# ruff: noqa: E501
import importlib.util
import random

import torch

HEAD = '''"""Generated kernels."""
from tilery import tile
from tilery.tile import Dim, InOut, Tensor, b1, bf16, f16, f32, i8, i32, i64, u8

N, M, K = Dim("N"), Dim("M"), Dim("K")


def q(v):
    return tile.floor(tile.minimum(tile.maximum(v.to(f32), -64.0), 64.0) * 8.0) * 0.125


'''
FLOATS, INTS = ("f32", "bf16", "f16"), ("i32", "i8", "u8", "i64")
SHAPES = {"tm": "[t.extent, M]", "t": "[t.extent]", "m": "[M]", "s": "[]"}


class Body:
    """Statements of one kernel. `pool`: (name, shape, dtype) of the values in scope."""

    def __init__(self, rand):
        self.rand, self.lines, self.pool, self.count, self.depth, self.labels = rand, [], [], 0, 2, 0
        self.adds = rand.random() < 0.5

    def put(self, line):
        self.lines.append("    " * self.depth + line)

    def new(self, text, shape, dtype):
        self.count += 1
        name = f"v{self.count}"
        self.put(f"{name} = {text}")
        self.pool.append((name, shape, dtype))
        return name

    def pick(self, shape=None, kinds=None):
        found = [v for v in self.pool if shape in (None, v[1]) and (kinds is None or v[2] in kinds)]
        return self.rand.choice(found[-8:]) if found else None

    def float(self, shape):
        """An f32 value of a shape, by cast and broadcast."""
        found = self.pick(shape, (*FLOATS, *INTS)) or self.pick("s", FLOATS)
        if found is None:
            return f"tile.full({SHAPES[shape]}, {self.rand.randint(-9, 9) / 4}, f32)"
        return f"q({found[0]})" if found[1] == shape else f"tile.full({SHAPES[shape]}, q({found[0]}), f32)"

    def load(self):
        rand, shift, other = self.rand, self.rand.randint(-4, 4), self.rand.choice(["0", "0", "2.5", "-0.125"])
        text, shape = rand.choice([
            ("x[t, :]", "tm"), ("x[t, :]", "tm"), ("x[tile.span(t.start, t.extent), :]", "tm"),
            (f"x[tile.span(t.start + {shift}, t.extent), :]", "tm"), (f"x[t, tile.span({shift}, M)]", "tm"),
            (f"x[t, tile.span(n + {shift}, M)]", "tm"), (f"x[t, tile.span({shift}, M, 2)]", "tm"), ("w[:]", "m"),
            (f"w[tile.span(n * {shift}, M)]", "m"), ("x[t, 0]", "t"), ("x[t, M - 1]", "t"),
            (f"x.load((idx[t], slice(None)), where=(idx[t] >= 0)[:, None], other={other})", "tm"),
            (f"x.load((t, 0), where=x[t, 0] > {shift}.0, other={other})", "t"), ("z[t, :]", "tm"), ("z[t, 0]", "t"),
            ("x.view(f32 if x.dtype == f32 else x.dtype, [M], offset=0)[:]", "m"),
        ])  # fmt: skip
        self.new(text, shape, "f32" if text[0] in "wz" else self.xtype)
        text, shape = rand.choice([("e[t, :]", "tm"), (f"e[t, tile.span({shift}, M)]", "tm"), ("idx[t]", "t")])
        self.new(text, shape, "i32" if text[0] == "i" else self.etype)

    def step(self, deep=0):
        rand = self.rand
        kind = rand.choice(["load", "binary", "binary", "unary", "cast", "spread", "reduce", "scan", "where", "int", "int"]
                           + ["if", "for", "blocks", "store", "dot"] * (deep < 2))  # fmt: skip
        getattr(self, f"do_{kind}")(*([deep] if kind in ("if", "for", "blocks") else []))

    do_load = load

    def do_binary(self):
        shape = self.rand.choice(list(SHAPES))
        a, b = self.float(shape), self.float(shape)
        literal = self.rand.randint(-16, 16) / 8
        op = self.rand.choice(["{a} + {b}", "{a} - {b}", "{a} * {b}", "tile.maximum({a}, {b})", "tile.minimum({a}, {b})",
                               "{a} * {l}", "{l} - {a}", "{a} + 0.0", "{a} * 1.0", "{a} / 2.0"])  # fmt: skip
        self.new(f"q({op.format(a=a, b=b, l=literal)})", shape, "f32")

    def do_unary(self):
        shape = self.rand.choice(list(SHAPES))
        op = self.rand.choice(
            ["-{0}", "tile.abs({0})", "tile.floor({0})", "tile.ceil({0})", "tile.trunc({0})", "tile.round({0})"]
        )
        self.new(op.format(self.float(shape)), shape, "f32")

    def do_cast(self):
        a = self.pick(None, (*FLOATS, *INTS))
        if a is None:
            return
        dtype = self.rand.choice((*FLOATS, *INTS))
        text = a[0]
        if a[2] in FLOATS and dtype in INTS:
            text = f"tile.abs(q({text}))" if dtype == "u8" else f"q({text})"
        elif a[2] in INTS and dtype in FLOATS:
            text = f"q({text})"
        self.new(f"{text}.to({dtype})", a[1], dtype)

    def do_spread(self):
        a = self.pick(self.rand.choice(["t", "m"]), (*FLOATS, *INTS))
        if a is not None:
            side = "[:, None]" if a[1] == "t" else "[None, :]"
            self.new(f"{a[0]}{side}.broadcast_to(t.extent, M)", "tm", a[2])

    def do_reduce(self):
        kind = self.rand.choice(["sum", "max", "min", "argmax", "argmin", "any", "all", "inf", "mean"])
        if kind in ("any", "all"):
            self.new(f"tile.{kind}({self.float('tm')} > 0.5, axis=1).to(i32)", "t", "i32")
        elif kind == "inf":
            big = f"tile.where({self.float('tm')} > 1.0, float('inf'), 1.0)"
            self.new(
                f"(tile.sum(x[t, :] .to(f32) * 0.0 + {big} * {self.rand.choice(['2.0', 's * s + 0.5'])}, axis=1) > 1e9).to(i32)",
                "t",
                "i32",
            )
        elif kind == "mean":
            self.new(f"(tile.mean({self.float('tm')}, axis=1) > 100.0).to(i32)", "t", "i32")
        elif kind.startswith("arg") or self.rand.random() < 0.5:
            self.new(f"tile.{kind}({self.float('tm')}, axis=1)", "t", "i32" if kind.startswith("arg") else "f32")
        else:
            a = self.pick("tm", INTS)
            if a is not None:
                dtype = "i32" if kind == "sum" and a[2] in ("i8", "u8") else a[2]
                self.new(f"tile.{kind}({a[0]}, axis=1)", "t", dtype)

    def do_scan(self):
        reverse = f", reverse={self.rand.random() < 0.5}"
        text = self.rand.choice(["tile.cumsum({0}, axis=1{1})", "tile.cummax({0}, axis=1{1})", "tile.sort({0})",
                                 "tile.sort({0}, descending=True)", "tile.histogram({2}, 8)"])  # fmt: skip
        if "histogram" in text:
            a = self.pick("m", FLOATS)
            if a is not None:
                self.new(f"tile.sum({text.format(0, 0, f'q({a[0]}).to(i32)')} * tile.arange(8))", "s", "i32")
            return
        self.new(f"q({text.format(self.float('tm'), reverse, 0)})", "tm", "f32")

    def do_where(self):
        shape = self.rand.choice(list(SHAPES))
        a, dtype = self.float(shape), self.rand.choice(FLOATS)
        other = self.rand.choice([f"{self.float(shape)}.to({dtype})", "0.1", "-3.0"])
        self.new(
            f"tile.where({self.float(shape)} > {self.rand.randint(-2, 2)}.0, {a}.to({dtype}), {other})", shape, dtype
        )

    def do_int(self):
        a = self.pick(None, INTS)
        if a is None:
            return
        b = self.pick(a[1], (a[2],))
        small = self.rand.randint(1, 7)
        minus = -small if a[2] != "u8" else small
        op = self.rand.choice(["{a} + {b}", "{a} - {b}", "{a} * {b}", "{a} // {m}", "{a} % {m}", "{a} // ({b} | 1)", "{a} % ({b} | 1)",
                               "{a} & {b}", "{a} | {s}", "{a} ^ {b}", "~{a}", "{a} << {s}", "{a} >> {s}", "-{a}", "tile.abs({a})",
                               "tile.maximum({a}, {b})", "tile.minimum({a}, {s})", "{a} + 0", "{a} * 1", "{a} // 1", "{s} - {a}",
                               "tile.where({a} > {b}, {a}, {s})", "{m} // ({a} | 1)", "{s} % ({b} | 1)"])  # fmt: skip
        self.new(op.format(a=a[0], b=b[0], s=small, m=minus), a[1], a[2])

    def nested(self, deep, carried):
        """A block of statements; the values made in it end with it, `carried` are rebound."""
        kept, self.depth = list(self.pool), self.depth + 1
        for _ in range(self.rand.randint(1, 3)):
            self.step(deep + 1)
        for name, shape, dtype in carried:
            if dtype in INTS:
                other = self.pick(shape, (dtype,))
                self.put(f"{name} = {name} + {other[0]}")
            else:
                self.put(f"{name} = q({name} * 0.5 + {self.float(shape)}).to({dtype})")
        self.pool, self.depth = kept, self.depth - 1

    def some(self):
        return [v for v in dict.fromkeys(self.pick() for _ in range(2)) if v is not None and v[0].isidentifier()]

    def do_if(self, deep):
        value = self.pick("s", INTS)
        test = self.rand.choice(["n > 1", "n % 2 == 0", "s > 0.0"]) if value is None else f"{value[0]} > n"
        carried = self.some()
        self.put(f"if {test}:")
        self.nested(deep, carried)
        if self.rand.random() < 0.6:
            self.put("else:")
            self.nested(deep, self.some())

    def do_for(self, deep):
        low = self.rand.randint(-2, 2)
        loop = self.rand.choice([f"{low}, n", "n", f"n, {low}, -1", f"{low}, {low + 5}, 2", "3, -2, -1"])
        self.labels += 1
        name = f"i{self.labels}"
        self.put(f"for {name} in tile.range({loop}):")
        self.depth += 1
        kept = list(self.pool)
        self.pool.append((f"({name} * 1)", "s", "i32"))
        if self.rand.random() < 0.5:
            self.new(f"x[t, tile.span({name}, M)]", "tm", self.xtype)
        self.depth -= 1
        self.nested(deep, [v for v in self.some() if v in kept])
        self.pool = kept

    def do_blocks(self, deep):
        self.labels += 1
        k = f"k{self.labels}"
        shift = self.rand.randint(-3, 3)
        low, high = (
            self.rand.choice(["0", "0", "1", "-2", "n"]),
            self.rand.choice(["M", "M", f"M + {shift}", "n + 2", "4"]),
        )
        bounds = high if low == "0" else f"{low}, {high}"
        acc = self.new(f"tile.zeros([t.extent], {self.rand.choice(['f32', 'i32'])})", "t", "f32")
        kind = "i32" if "i32" in self.lines[-1] else "f32"
        self.pool.pop()
        self.put(f'for {k} in tile.range(tile.blocks({bounds}, "{k}")):')
        self.depth += 1
        load = self.rand.choice([f"x[t, {k}]", f"x[t, {k}]", f"x[t, tile.span({k}.start + {shift}, {k}.extent)]", f"z[t, {k}]"])  # fmt: skip
        tail = self.rand.choice(
            ["", f" + ({k} % 3).to(f32)", f" * {self.rand.choice(['2.0', '(s + 1.0)', 'n.to(f32)'])}", f" * w[{k}]"]
        )
        if "w[" in tail and load.startswith("z"):
            tail = ""
        self.put(f"c{k} = q({load}.to(f32){tail})")
        self.put({
            "f32": self.rand.choice([f"{acc} = q({acc} + tile.sum(c{k} * 0.0, axis=1))", f"{acc} = tile.maximum({acc}, tile.max(c{k}, axis=1))"]),
            "i32": self.rand.choice([f"{acc} = {acc} + tile.sum((c{k} > 0.25).to(i32), axis=1)",
                                     f"{acc} = {acc} + tile.sum((c{k} * 8.0).to(i32), axis=1) + {k}.count * 0"]),
        }[kind])  # fmt: skip
        self.depth -= 1
        self.pool.append((acc, "t", kind))

    def do_store(self):
        self.put(self.rand.choice([
            f"z[t, :] = {self.float('tm')}", f"z[t, :] = q(z[t, :] + {self.float('tm')})",
            f"z.store((t, slice(None)), {self.float('tm')}, where={self.float('tm')} > 0.0)",
            f"z[t, tile.span({self.rand.randint(-2, 2)}, M)] = {self.float('tm')}",
            "h.atomic_add((tile.minimum(tile.abs(idx[t]), 3),), 1)" if self.adds else
            f"h.atomic_max((idx[t],), q({self.float('t')}).to(i32), where=(idx[t] >= 0) & (idx[t] < 4))",
        ]))  # fmt: skip

    def do_dot(self):
        dtype = self.rand.choice(["f32", "bf16"])
        self.new(
            f"q(tile.dot(tile.floor({self.float('tm')}).to({dtype}), tile.floor(ww[:, :]).to({dtype})))", "tm", "f32"
        )


def source(seed):
    """(name, text) of a kernel."""
    rand = random.Random(seed)
    body = Body(rand)
    body.xtype, body.etype = rand.choice(FLOATS), rand.choice(INTS)
    body.load()
    for _ in range(rand.randint(4, 12)):
        body.step()
    stored = [v for v in body.pool if v[1] in ("tm", "t")][-4:]
    outs, lines = [], []
    for at, (name, shape, dtype) in enumerate(stored):
        outs.append(f"    y{at} = tile.empty([{'N, M' if shape == 'tm' else 'N'}], {dtype})")
        lines.append(f"        y{at}[t{', :' if shape == 'tm' else ''}] = {name}")
    scalars = [v for v in body.pool if v[1] == "s"][-1:]
    for name, _, dtype in scalars:
        outs.append(f"    ys = tile.empty([N], {dtype})")
        lines.append(f"        ys[t] = tile.full([t.extent], {name}, {dtype})")
    returned = ", ".join([f"y{at}" for at in range(len(stored))] + ["ys"] * len(scalars))
    text = [
        "@tile.kernel",
        f"def fuzz_{seed}(x: Tensor[N, M, {body.xtype}], e: Tensor[N, M, {body.etype}], w: Tensor[M, f32], ww: Tensor[M, M, f32],",
        "    idx: Tensor[N, i32], z: InOut[N, M, f32], h: InOut[4, i32], n: int, s: float):",
        *outs, '    for t in tile.parallel(tile.blocks(N, "t")):', *body.lines, *lines, f"    return {returned}", "", "",
    ]  # fmt: skip
    return f"fuzz_{seed}", "\n".join(text)


def kernels(folder, seeds):
    """The kernels of some seeds, in order, from one file in `folder`."""
    made = [source(seed) for seed in seeds]
    path = folder / f"fuzz_{seeds[0]}_{len(seeds)}.py"
    path.write_text(HEAD + "".join(text for _, text in made))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [getattr(module, name) for name, _ in made]


def arguments(kernel, seed):
    """Arguments for a kernel, of ragged sizes."""
    rand, torch_rand = random.Random(seed + 1), torch.Generator().manual_seed(seed)
    rows, columns = rand.choice([1, 2, 3, 5, 7, 8, 9]), rand.choice([2, 3, 4, 5, 7, 8, 11])
    specs = {p.name: p.spec for p in kernel.signature.parameters}

    def eighths(*shape):
        return torch.randint(-64, 65, shape, generator=torch_rand) / 8

    integers = specs["e"].dtypes[0].torch
    low = 0 if integers == torch.uint8 else -100
    return {
        "x": eighths(rows, columns).to(specs["x"].dtypes[0].torch),
        "e": torch.randint(low, 101, (rows, columns), generator=torch_rand).to(integers),
        "w": eighths(columns), "ww": eighths(columns, columns), "z": eighths(rows, columns),
        "idx": torch.randint(-3, rows, (rows,), generator=torch_rand).int(), "h": torch.zeros(4, dtype=torch.int32),
        "n": rand.randint(-2, 4), "s": rand.randint(-4, 4) / 2,
    }  # fmt: skip
