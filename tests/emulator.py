"""A GPU in plain Python: runs the CUDA backend, host code and kernels, on a machine that has none.

Unlike numba's simulator it runs the very source that is compiled for hardware, warps of 32 lanes included. The
threads of a block go through a kernel together: its syntax tree is walked once, every value that differs from thread
to thread is a NumPy vector of one element per thread, and a mask says which threads a branch or loop concerns.
So the instructions of `hardware.py`, matrix products and shuffles among them, are formulas on whole vectors. Memory is
one array, filled with NaN, whose addresses the host cannot use by mistake; reading beside what was allocated
raises, and so does float64, a barrier that not all threads reach and a shuffle out of a lane that is not there.

`cuda_backend()` is the package ``kvnumba.backends.cuda`` as it is when such a GPU is found.
"""

# ruff: noqa: N802 (methods are named after kinds of nodes, and after functions of the driver)

import ast
import builtins
import contextlib
import ctypes
import functools
import importlib
import importlib.machinery
import inspect
import math
import struct
import sys
import textwrap
import types
from unittest import mock

import numba
import numpy as np
from numba import types as numba_types

from kvnumba.formats import FORMATS, float_to_bfloat16, float_to_fp8_e4m3, fp8_e4m3_to_float

WARP = 32
PACKAGE = "kvnumba.backends.cuda"


# ---------------------------------------------------------------------------------------------------- memory


class DeviceMemory:
    """Memory that only kernels and the driver's copies reach."""

    BASE = 1 << 40
    SIZE = 1 << 27

    def __init__(self):
        self.bytes = np.empty(self.SIZE, np.uint8)
        self._views = {np.dtype(name): self.bytes.view(name) for name in ("u1", "u2", "u4", "i4", "f4")}
        self._used = 256
        self._begins, self._ends = np.empty(0, np.int64), np.empty(0, np.int64)

    def allocate(self, nbytes):
        at = self._used
        self._used = at + -(-nbytes // 256) * 256 + 256
        if self._used > self.SIZE:
            raise MemoryError("the emulated device is full")
        self.bytes[at : self._used] = 0xFF  # a NaN in every float format
        self._begins, self._ends = np.append(self._begins, at), np.append(self._ends, at + nbytes)
        return self.BASE + at

    def free(self, address):
        """Let nobody reach it any more; it is not given to anybody else."""
        kept = self._begins != address - self.BASE
        assert kept.sum() == len(kept) - 1
        self._begins, self._ends = self._begins[kept], self._ends[kept]

    def where(self, address, nbytes):
        """Offsets of addresses, after the check that so many bytes are allocated and aligned there."""
        at = np.asarray(address) - self.BASE
        found = np.searchsorted(self._begins, at, side="right") - 1
        bad = (found < 0) | (at + nbytes > self._ends[found])
        if bad.any():
            raise IndexError(f"{nbytes} bytes at {np.asarray(at)[bad]} are not allocated")
        return at

    def load(self, address, dtype, count, mask):
        """`count` neighbours of a type: a list of vectors, or of numbers where the address is one."""
        dtype = np.dtype(dtype)
        view = self._views[dtype]
        if not isinstance(address, np.ndarray):
            at = int(self._aligned(address, dtype, count)) // dtype.itemsize
            return [_value(view[at + n]) for n in range(count)]
        active = address if mask is None else address[mask]
        at = self._aligned(active, dtype, count) // dtype.itemsize
        found = []
        for n in range(count):
            values = view[at + n]
            if mask is not None:
                whole = np.zeros(mask.shape, dtype)
                whole[mask] = values
                values = whole
            found.append(values if dtype == np.float32 else values.astype(np.int64))
        return found

    def store(self, address, dtype, values, mask, threads):
        """The values of all active threads, neighbours in memory."""
        dtype = np.dtype(dtype)
        address = np.broadcast_to(address, threads)
        active = address if mask is None else address[mask]
        at = self._aligned(active, dtype, len(values)) // dtype.itemsize
        for n, value in enumerate(values):
            value = np.broadcast_to(value, threads)
            value = value if mask is None else value[mask]
            if dtype != np.float32:
                value = value.astype(np.int64) & ((1 << 8 * dtype.itemsize) - 1)
            self._views[dtype][at + n] = value.astype(dtype if dtype != np.int32 else np.uint32).view(dtype)

    def _aligned(self, address, dtype, count):
        nbytes = dtype.itemsize * count
        at = self.where(address, nbytes)
        if (at % nbytes).any():
            raise IndexError(f"an access of {nbytes} bytes is not aligned")
        return at


def _value(x):
    return np.float32(x) if isinstance(x, np.float32) else int(x)


# ------------------------------------------------------------------------------------------- a block of threads


class Block:
    """The threads of one block: their indices, shared memory, and which of them are active now (None: all)."""

    def __init__(self, device, threads, index, grid, shared_bytes):
        self.memory = device.memory
        self.threads = threads
        self.index, self.grid = index, grid
        self.lanes = np.arange(threads, dtype=np.int64)
        self.shared = np.full(shared_bytes // 4, np.nan, np.float32)
        self.mask = None

    def vector(self, x):
        return x if isinstance(x, np.ndarray) else np.full(self.threads, x)

    def whole_warps(self):
        """Raise unless each warp is active as a whole or not at all."""
        if self.mask is not None:
            warps = self.mask.reshape(-1, WARP)
            if (warps.any(axis=1) != warps.all(axis=1)).any():
                raise RuntimeError("an operation of a warp is not reached by all of its lanes")

    @contextlib.contextmanager
    def only(self, condition):
        """Those of the active threads for which a vector is true; yields whether there are any."""
        before = self.mask
        self.mask = condition if before is None else before & condition
        try:
            yield bool(self.mask.any())
        finally:
            self.mask = before

    def merged(self, new, old):
        """A variable's value where the active threads assign one."""
        if self.mask is None or old is None or not _is_number(new):
            return new
        if new is old or (not isinstance(new, np.ndarray) and not isinstance(old, np.ndarray) and new == old):
            return new
        return np.where(self.mask, new, old)


_current = []  # the block that runs


def _block():
    return _current[-1]


def _is_number(x):
    return isinstance(x, (int, float, bool, np.generic, np.ndarray))


class Local:
    """An array of each thread's own: one value, or a vector of them, for each element."""

    def __init__(self, size, dtype):
        self.dtype = dtype
        self.values = [np.float32(np.nan) if dtype == numba.float32 else 0xBADBAD for _ in range(size)]

    def __getitem__(self, i):
        if isinstance(i, np.ndarray):
            return np.stack([_block().vector(x) for x in self.values])[i, _block().lanes]
        if not 0 <= i < len(self.values):
            raise IndexError(f"element {i} of {len(self.values)}")
        return self.values[i]

    def __setitem__(self, i, value):
        if isinstance(i, np.ndarray):
            for n in np.unique(i):
                with _block().only(i == n):
                    self[int(n)] = value
            return
        if not 0 <= i < len(self.values):
            raise IndexError(f"element {i} of {len(self.values)}")
        self.values[i] = _block().merged(_cast(self.dtype, value), self.values[i])


class Shared:
    """The block's memory, as elements of a type."""

    def __init__(self, dtype):
        self._memory = _block().shared.view(np.int32 if dtype == numba.int32 else np.float32)

    def __getitem__(self, i):
        block = _block()
        if not isinstance(i, np.ndarray):
            self._check(i)
            return _value(self._memory[i])
        i = i if block.mask is None else np.where(block.mask, i, i[block.mask][0])
        self._check(i)
        found = self._memory[i]
        return found if found.dtype == np.float32 else found.astype(np.int64)

    def __setitem__(self, i, value):
        block = _block()
        i, value = block.vector(i), block.vector(value)
        if block.mask is not None:
            i, value = i[block.mask], value[block.mask]
        self._check(i)
        self._memory[i] = value

    def _check(self, i):
        if np.min(i) < 0 or np.max(i) >= len(self._memory):
            raise IndexError(f"shared memory at {np.min(i)} to {np.max(i)} of {len(self._memory)}")


def _cast(dtype, x):
    """What assigning to a type of Numba's makes of a value."""
    if dtype == numba.float32:
        return x.astype(np.float32) if isinstance(x, np.ndarray) else np.float32(x)
    if isinstance(x, np.ndarray):
        x = x.astype(np.int64)
    elif not isinstance(x, int):
        x = int(x)
    if dtype == numba.int64:
        return x
    x = x & 0xFFFFFFFF
    return x if dtype == numba.uint32 else (x ^ 0x80000000) - 0x80000000


# ---------------------------------------------------------------------------------------------- the interpreter

_OPERATIONS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.LShift: lambda a, b: a << b,
    ast.RShift: lambda a, b: a >> b,
    ast.BitAnd: lambda a, b: a & b,
    ast.BitOr: lambda a, b: a | b,
    ast.BitXor: lambda a, b: a ^ b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.USub: lambda a: -a,
    ast.Not: lambda a: ~a if isinstance(a, np.ndarray) else not a,
}


def _single(x):
    """Kernels compute in float32; anything wider is slow on the device, and a mistake."""
    if isinstance(x, (float, np.float64)) or (isinstance(x, np.ndarray) and x.dtype == np.float64):
        raise TypeError("float64 in a kernel")
    return x if isinstance(x, (np.ndarray, np.float32)) else bool(x) if isinstance(x, np.bool_) else x


def _extreme(vectors, numbers):
    def choose(*given):
        if any(isinstance(x, (np.ndarray, np.float32)) for x in given):
            return functools.reduce(vectors, given)
        return numbers(given)

    return choose


def _unary(function):
    return lambda x: function(x) if isinstance(x, np.ndarray) else np.float32(function(np.float32(x)))


_REPLACED = {
    builtins.min: _extreme(np.fmin, min),
    builtins.max: _extreme(np.fmax, max),
    builtins.abs: np.abs,
    math.exp: _unary(np.exp),
    math.log: _unary(np.log),
    math.tanh: _unary(np.tanh),
}


@functools.cache
def _parsed(code):
    """The syntax tree of a function. A body's `private` are the names that mean nothing outside of it.

    Such a name is set first where it occurs in the body, where it next occurs after it, and in all loops around it.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(code))).body[0]
    used = []  # (name, whether it is set) in the order of their use

    def first(names):
        return dict(reversed(names))

    def visit(node, loops):
        if isinstance(node, ast.Name):
            used.append((node.id, isinstance(node.ctx, ast.Store)))
        elif isinstance(node, ast.AugAssign):
            begin = len(used)
            visit(node.target, loops)
            used[begin:] = [(name, False) for name, _ in used[begin:]]
            visit(node.value, loops)
        elif isinstance(node, ast.Assign):
            for part in (node.value, *node.targets):
                visit(part, loops)
        elif isinstance(node, (ast.If, ast.For, ast.While)):
            if isinstance(node, ast.For):
                visit(node.iter, loops)
            if isinstance(node, (ast.For, ast.While)):
                loops = [*loops, (len(used), node)]
            visit(node.target if isinstance(node, ast.For) else node.test, loops)
            for body in (node.body, node.orelse):
                begin = len(used)
                for statement in body:
                    visit(statement, loops)
                if body:
                    bodies.append((body, begin, len(used), [number for number, _ in loops]))
            if isinstance(node, (ast.For, ast.While)):
                ends[loops[-1][0]] = len(used)
        else:
            for part in ast.iter_child_nodes(node):
                visit(part, loops)

    bodies, ends = [], {}
    visit(tree, [])
    for body, begin, end, loops in bodies:
        around = [first(used[start : ends[start]]) for start in loops] + [first(used[end:])]
        body[0].private = {
            name
            for name, is_set in first(used[begin:end]).items()
            if is_set and all(seen.get(name, True) for seen in around)
        }
    return tree


class _Returned(Exception):  # noqa: N818
    """A value on its way out of a call."""


class Frame:
    """A call of a kernel, or of a device function out of it."""

    def __init__(self, function, arguments):
        self.tree = _parsed(function.__code__)
        names = [argument.arg for argument in self.tree.args.args]
        self.outer = dict(builtins.__dict__)
        self.outer.update(function.__globals__)
        self.outer.update(inspect.getclosurevars(function).nonlocals)
        if len(names) != len(arguments):
            raise TypeError(f"{function.__name__}: {len(arguments)} arguments for {len(names)}")
        self.names = dict(zip(names, arguments, strict=True))
        self.block = _block()
        self.private = None  # names that only the active threads ever see; None: all, as when the call begins

    def run(self):
        try:
            self.statements(self.tree.body)
        except _Returned as returned:
            return returned.args[0]
        return None

    def Return(self, node):
        assert self.private is None  # all threads of the call return together
        raise _Returned(self.value(node.value))

    def statements(self, body):
        for node in body:
            getattr(self, type(node).__name__)(node)

    def value(self, node):
        return getattr(self, type(node).__name__)(node)

    # statements

    def Expr(self, node):
        self.value(node.value)

    def Assign(self, node):
        value = self.value(node.value)
        for target in node.targets:
            self.assign(target, value)

    def AugAssign(self, node):
        before = self.value(node.target)
        self.assign(node.target, _single(_OPERATIONS[type(node.op)](before, self.value(node.value))))

    def assign(self, target, value):
        if isinstance(target, ast.Tuple):
            for part, each in zip(target.elts, value, strict=True):
                self.assign(part, each)
        elif isinstance(target, ast.Subscript):
            self.value(target.value)[self.value(target.slice)] = value
        elif self.private is None or target.id in self.private:
            self.names[target.id] = value
        else:
            self.names[target.id] = self.block.merged(value, self.names.get(target.id))

    @contextlib.contextmanager
    def some(self, body):
        """Statements that only some of the threads run."""
        before = self.private, self.block.mask
        self.private = body[0].private
        try:
            yield
        finally:
            self.private, self.block.mask = before

    def If(self, node):
        condition = self.value(node.test)
        if not isinstance(condition, np.ndarray):
            self.statements(node.body if condition else node.orelse)
            return
        for chosen, body in ((condition, node.body), (~condition, node.orelse)):
            if body:
                with self.some(body), self.block.only(chosen) as some:
                    if some:
                        self.statements(body)

    def While(self, node):
        with self.some(node.body):
            while True:
                condition = self.value(node.test)
                if isinstance(condition, np.ndarray):
                    self.block.mask = condition if self.block.mask is None else self.block.mask & condition
                    if not self.block.mask.any():
                        break
                elif not condition:
                    break
                self.statements(node.body)

    def For(self, node):
        limits = [self.value(argument) for argument in node.iter.args]
        assert node.iter.func.id == "range"
        if not any(isinstance(x, np.ndarray) for x in limits):
            for i in range(*limits):
                self.names[node.target.id] = i
                self.statements(node.body)
            return
        start, stop, step = (0, *limits, 1) if len(limits) == 1 else (*limits, 1)[:3]
        i, before = self.block.vector(start), self.block.mask
        with self.some(node.body):
            while True:
                inside = self.block.vector(i < stop)
                self.block.mask = inside if before is None else before & inside
                if not self.block.mask.any():
                    break
                self.names[node.target.id] = i
                self.statements(node.body)
                i = i + step

    # expressions

    def Constant(self, node):
        return node.value

    def Name(self, node):
        return self.names[node.id] if node.id in self.names else self.outer[node.id]

    def Attribute(self, node):
        return getattr(self.value(node.value), node.attr)

    def Tuple(self, node):
        return tuple(self.value(each) for each in node.elts)

    def Subscript(self, node):
        return self.value(node.value)[self.value(node.slice)]

    def BinOp(self, node):
        return _single(_OPERATIONS[type(node.op)](self.value(node.left), self.value(node.right)))

    def UnaryOp(self, node):
        return _OPERATIONS[type(node.op)](self.value(node.operand))

    def Compare(self, node):
        assert len(node.ops) == 1
        return _single(_OPERATIONS[type(node.ops[0])](self.value(node.left), self.value(node.comparators[0])))

    def BoolOp(self, node):
        both = isinstance(node.op, ast.And)
        found = self.value(node.values[0])
        for each in node.values[1:]:
            if not isinstance(found, np.ndarray):
                if bool(found) != both:
                    return found
                found = self.value(each)
                continue
            with self.block.only(found if both else ~found) as some:
                following = self.value(each) if some else not both
            found = found & following if both else found | following
        return found

    def IfExp(self, node):
        condition = self.value(node.test)
        if not isinstance(condition, np.ndarray):
            return self.value(node.body if condition else node.orelse)
        found = None
        for chosen, each in ((condition, node.body), (~condition, node.orelse)):
            with self.block.only(chosen) as some:
                if some:
                    found = self.block.merged(self.value(each), found)
        return found

    def Call(self, node):
        function = self.value(node.func)
        arguments = []
        for each in node.args:
            if isinstance(each, ast.Starred):
                arguments += self.value(each.value)
            else:
                arguments.append(self.value(each))
        if isinstance(function, numba_types.Type):
            return _cast(function, arguments[0])
        if isinstance(function, types.FunctionType) and function.__module__.startswith(PACKAGE):
            return Frame(function, arguments).run()
        return _REPLACED.get(function, function)(*arguments)


# ------------------------------------------------------------------------------------------ what kernels call


class _Index:
    def __init__(self, of):
        self._of = of

    x = property(lambda self: self._of(_block())[0])
    y = property(lambda self: self._of(_block())[1])


def _shuffle(x, source):
    block = _block()
    block.whole_warps()
    lanes = block.vector(source).reshape(-1, WARP) % WARP
    return np.take_along_axis(block.vector(x).reshape(-1, WARP), lanes, axis=1).reshape(-1)


def _any(x):
    block = _block()
    block.whole_warps()
    return np.repeat(block.vector(x).reshape(-1, WARP).any(axis=1), WARP)


def _all_lanes(mask):
    assert mask == 0xFFFFFFFF


def _load(dtype):
    return lambda address: _block().memory.load(address, dtype, 1, _block().mask)[0]


def _store(dtype):
    return lambda address, value: _block().memory.store(
        address, dtype, [value], _block().mask, _block().threads
    )


def _count_up(address):
    block = _block()
    assert block.mask is not None
    assert block.mask.sum() == 1
    before = _load(np.int32)(address)
    _store(np.int32)(address, before + 1)
    return before


def _bits(x):
    """float32 -> its bits as an integer."""
    return (
        x.view(np.uint32).astype(np.int64)
        if isinstance(x, np.ndarray)
        else int(np.float32(x).view(np.uint32))
    )


def _float(x):
    return (
        x.astype(np.uint32).view(np.float32) if isinstance(x, np.ndarray) else np.uint32(x).view(np.float32)
    )


def _halves(kind, bits):
    """The float32 values of 16-bit floats in the low halves of integers."""
    bits = np.asarray(bits, np.int64) & 0xFFFF
    if kind == "bfloat16":
        return (bits << 16).astype(np.uint32).view(np.float32)
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def _half_bits(kind, x):
    x = np.atleast_1d(np.asarray(x, np.float32))
    made = float_to_bfloat16(x) if kind == "bfloat16" else x.astype(np.float16).view(np.uint16)
    return made.astype(np.int64)


def _pack(kind):
    return lambda low, high: _half_bits(kind, low) | _half_bits(kind, high) << 16


def _permute(a, b, digits):
    both = (b << 32) | a
    found = 0
    for n in range(4):
        digit = digits >> 4 * n & 15
        assert not np.any(digit & 8)
        found = found | (both >> 8 * digit & 255) << 8 * n
    return found


def _two_e4m3(shift):
    def convert(word):
        low, high = (fp8_e4m3_to_float(np.asarray(word) >> shift + n & 255) for n in (0, 8))
        return _pack("float16")(low, high)

    return convert


def _multiply_halves(a, b):
    halves = [_half_bits("float16", _halves("float16", a >> n) * _halves("float16", b >> n)) for n in (0, 16)]
    return halves[0] | halves[1] << 16


def _multiply_matrices(kind):
    def multiply(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
        block = _block()
        block.whole_warps()

        def part(word, shift):
            return _halves(kind, block.vector(word) >> shift).reshape(-1, 8, 4)

        def sums(x):
            return block.vector(x).reshape(-1, 8, 4)

        warps = block.threads // WARP
        a, b = np.empty((warps, 16, 16), np.float32), np.empty((warps, 16, 8), np.float32)
        c = np.empty((warps, 16, 8), np.float32)
        for n in range(2):
            a[:, :8, n:8:2], a[:, 8:, n:8:2] = part(a0, 16 * n), part(a1, 16 * n)
            a[:, :8, 8 + n :: 2], a[:, 8:, 8 + n :: 2] = part(a2, 16 * n), part(a3, 16 * n)
            b[:, n:8:2], b[:, 8 + n :: 2] = (part(w, 16 * n).swapaxes(1, 2) for w in (b0, b1))
        c[:, :8, 0::2], c[:, :8, 1::2], c[:, 8:, 0::2], c[:, 8:, 1::2] = map(sums, (c0, c1, c2, c3))
        d = a @ b + c
        parts = (d[:, :8, 0::2], d[:, :8, 1::2], d[:, 8:, 0::2], d[:, 8:, 1::2])
        return tuple(np.ascontiguousarray(each).reshape(-1) for each in parts)

    return multiply


def _array_loader(dtype, count):
    def load(address, values, at):
        for n, value in enumerate(_block().memory.load(address, dtype, count, _block().mask)):
            values[at + n] = value

    return load


def _loader(fmt, width):
    bits = FORMATS[fmt].bits
    decoded = {"float32": _float, "float16": functools.partial(_halves, "float16")}
    decoded["fp8_e4m3"] = fp8_e4m3_to_float
    decoded["bfloat16"] = functools.partial(_halves, "bfloat16")

    def load(address, values):
        nbytes = bits * width // 8
        size = min(4, nbytes)
        words = _block().memory.load(address, f"u{size}", nbytes // size, _block().mask)
        for i in range(width):
            at = bits * i ^ (4 if bits == 4 else 0)  # the first of a pair is the high nibble
            code = words[at // (8 * size)] >> at % (8 * size) & (1 << bits) - 1
            values[i] = decoded.get(fmt, functools.partial(_cast, numba.float32))(code)

    return load


def _encoded(fmt, x):
    if fmt in ("float16", "bfloat16"):
        return _half_bits(fmt, x)
    return (float_to_fp8_e4m3(x) if fmt == "fp8_e4m3" else x).astype(np.int64)


def _storer(fmt, width):
    bits = FORMATS[fmt].bits

    def store(address, values):
        block = _block()
        given = [block.vector(values[i]) for i in range(width)]
        if fmt == "float32":
            block.memory.store(address, "u4", [_bits(x) for x in given], block.mask, block.threads)
            return
        codes = [_encoded(fmt, x) for x in given]
        if bits == 4:
            codes = [high << 4 | low for high, low in zip(codes[0::2], codes[1::2], strict=True)]
        each = max(bits, 8)
        size = min(4, each * len(codes) // 8)
        per_word = 8 * size // each
        words = [
            functools.reduce(
                lambda a, b: a | b, (code << each * n for n, code in enumerate(codes[i : i + per_word]))
            )
            for i in range(0, len(codes), per_word)
        ]
        block.memory.store(address, f"u{size}", words, block.mask, block.threads)

    return store


def _barrier():
    if _block().mask is not None and not _block().mask.all():
        raise RuntimeError("not all threads of the block reach a barrier")


def _over_warp(combine):
    def reduce(x):
        for distance in (16, 8, 4, 2, 1):
            x = combine(x, _shuffle(x, _block().lanes ^ distance))
        return x

    return reduce


def _quotient(a, b):
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        b = np.where(np.equal(b, 0), 1, b)  # lanes that are not active
    assert np.all(np.asarray(a) >= 0)
    return a // b


def _hardware():
    """The names of `hardware.py`."""
    both = ("float16", "bfloat16")
    return {
        "load_int": _load(np.int32),
        "load_float": _load(np.float32),
        "load_fresh": _load(np.float32),
        "store_float": _store(np.float32),
        "store_int": _store(np.int32),
        "load_half": lambda address: _single(np.float32(_halves("float16", _load(np.uint16)(address)))),
        "store_half": lambda address, x: _store(np.uint16)(address, _half_bits("float16", x)),
        "round_to_half": _unary(lambda x: x.astype(np.float16).astype(np.float32)),
        "multiply": lambda a, b: a * b,
        "count_up": _count_up,
        "as_float": _float,
        "as_bits": _bits,
        "permute": _permute,
        "first_two_e4m3": _two_e4m3(0),
        "last_two_e4m3": _two_e4m3(16),
        "multiply_halves": _multiply_halves,
        "low_half": {kind: functools.partial(_halves, kind) for kind in both},
        "high_half": {kind: lambda word, kind=kind: _halves(kind, word >> 16) for kind in both},
        "pack_halves": {kind: _pack(kind) for kind in both},
        "multiply_matrices": {kind: _multiply_matrices(kind) for kind in both},
        "fetcher": lambda count, shared=False: _array_loader(np.uint32, count),
        "fresh_loader": lambda width: _array_loader(np.float32, width),
        "loader": _loader,
        "storer": _storer,
        "quotient": _quotient,
        "remainder": lambda a, b: a - _quotient(a, b) * b,
        "round_to_int": lambda x: _cast(numba.int32, np.rint(x)),
        "exp2": _unary(np.exp2),
        "index": lambda i: i,
        "barrier": _barrier,
        "warp_barrier": lambda: _block().whole_warps(),
        "warp_min": _over_warp(np.fmin),
        "warp_max": _over_warp(np.fmax),
        "warp_sum": _over_warp(lambda a, b: a + b),
        **dict.fromkeys(("bytes_at", "floats_at"), _only_compiled),
    }


def _only_compiled(address, count):
    raise NotImplementedError("formats of the user's own are not run here")


# --------------------------------------------------------------------------------- the device and its driver


class Device:
    """What stands in the place of `numba.cuda` and of the driver."""

    def __init__(self, multiprocessors):
        self.memory = DeviceMemory()
        self.kernels = []
        self.launched = []  # names of kernels, in order
        self._rng = np.random.default_rng(1)
        self._multiprocessors = multiprocessors

    def numba_cuda(self):
        made = types.ModuleType("numba.cuda")
        made.jit = self._jit
        made.current_context = lambda: types.SimpleNamespace(
            get_memory_info=lambda: (DeviceMemory.SIZE, DeviceMemory.SIZE)
        )
        device = types.SimpleNamespace(
            compute_capability=(9, 0), name="emulated", id=0, MULTIPROCESSOR_COUNT=self._multiprocessors
        )
        made.get_current_device = lambda: device
        made.threadIdx = _Index(lambda block: (block.lanes, 0))
        made.blockIdx = _Index(lambda block: block.index)
        made.gridDim = _Index(lambda block: block.grid)
        made.local = types.SimpleNamespace(array=Local)
        made.shared = types.SimpleNamespace(array=lambda size, dtype: Shared(dtype))
        made.shfl_sync = lambda mask, x, lane: (_all_lanes(mask), _shuffle(x, lane))[1]
        made.shfl_xor_sync = lambda mask, x, bits: (_all_lanes(mask), _shuffle(x, _block().lanes ^ bits))[1]
        made.any_sync = lambda mask, x: (_all_lanes(mask), _any(x))[1]
        return made

    def _jit(self, signature=None, *, device=False, **_):
        if device:
            return lambda function: function

        def compiled(function):
            self.kernels.append((function, signature.args))
            handle = types.SimpleNamespace(handle=len(self.kernels) - 1)
            library = types.SimpleNamespace(get_cufunc=lambda: handle)
            return types.SimpleNamespace(overloads={0: types.SimpleNamespace(_codelibrary=library)})

        return compiled

    # the driver: each returns (0, result)

    def cuMemAlloc(self, nbytes):
        return 0, self.memory.allocate(nbytes)

    def cuMemFree(self, address):
        self.memory.free(address)
        return (0,)

    def cuMemsetD8(self, address, value, nbytes):
        if nbytes:
            at = int(self.memory.where(address, nbytes))
            self.memory.bytes[at : at + nbytes] = value
        return (0,)

    def cuMemcpyHtoDAsync(self, address, host, nbytes, stream):
        at = int(self.memory.where(address, nbytes))
        ctypes.memmove(self.memory.bytes.ctypes.data + at, host, nbytes)
        return (0,)

    def cuMemcpyDtoHAsync(self, host, address, nbytes, stream):
        at = int(self.memory.where(address, nbytes))
        ctypes.memmove(host, self.memory.bytes.ctypes.data + at, nbytes)
        return (0,)

    def cuStreamSynchronize(self, stream):
        return (0,)

    def cuCtxSynchronize(self):
        return (0,)

    def cuLaunchKernel(self, handle, gx, gy, gz, bx, by, bz, shared_bytes, stream, _, extra):
        function, kinds = self.kernels[handle]
        _, buffer, _, size, _ = (ctypes.c_void_p * 5).from_address(extra)
        size = ctypes.c_size_t.from_address(size).value
        letters = {numba.int64: "q", numba.int32: "i", numba.float32: "f"}
        numbers = [kind for group in kinds for kind in group.types]
        packed = struct.unpack("".join(letters[kind] for kind in numbers), ctypes.string_at(buffer, size))
        packed = iter(np.float32(x) if isinstance(x, float) else x for x in packed)
        arguments = [group.instance_class(*(next(packed) for _ in group.types)) for group in kinds]
        self.launched.append(function.__name__)
        indices = [(x, y) for y in range(gy) for x in range(gx)]
        with np.errstate(all="ignore"):
            for n in self._rng.permutation(len(indices)):  # blocks run in any order
                _current.append(Block(self, bx, indices[n], (gx, gy), shared_bytes))
                try:
                    Frame(function, arguments).run()
                finally:
                    _current.pop()
        return (0,)


@contextlib.contextmanager
def cuda_backend(multiprocessors=3):
    """The package `kvnumba.backends.cuda` and the device that it runs on.

    Within the context its modules are those that ``import`` finds; `registry` is not told of it.
    """
    device = Device(multiprocessors)
    numba_cuda = device.numba_cuda()
    driver = types.ModuleType("driver")
    for name in dir(device):
        if name.startswith("cu") and name[2].isupper():
            setattr(driver, name, getattr(device, name))
    bindings = types.ModuleType("cuda.bindings")
    bindings.driver = driver
    hardware = types.ModuleType(f"{PACKAGE}.hardware")
    hardware.__dict__.update(_hardware())
    found = types.ModuleType("numba_cuda")
    found.__spec__ = importlib.machinery.ModuleSpec("numba_cuda", None)
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(PACKAGE)}
    import kvnumba.backends as parent

    before = getattr(parent, "cuda", None)
    modules = {
        "numba.cuda": numba_cuda,
        "numba_cuda": found,
        "cuda": types.ModuleType("cuda"),
        "cuda.bindings": bindings,
        f"{PACKAGE}.hardware": hardware,
    }
    try:
        with (
            mock.patch.dict(sys.modules, modules),
            mock.patch.object(numba, "cuda", numba_cuda, create=True),
            mock.patch.object(numba.config, "ENABLE_CUDASIM", 0),
        ):
            yield importlib.import_module(PACKAGE), device
    finally:
        for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
            del sys.modules[name]
        sys.modules.update(kept)
        if before is not None:
            parent.cuda = before
