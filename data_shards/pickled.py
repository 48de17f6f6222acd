"""Pickled tables from elsewhere, read without running anything in them.

A pickle names functions and classes and calls them, so it may do anything. Here each name that a table needs
has a stand-in below, which takes plain values only; every other name ends the reading. Neither numpy nor
pandas unpickles: numpy.ndarray itself would make objects from any bytes it is given, and what pandas writes
changes with its version. Read: numpy arrays of numbers, text and objects; data frames with an index of
numbers or names, of pandas 1.0 to 3 (text columns of pandas 3 are pyarrow's and are refused); list, tuple,
dict, set, OrderedDict and defaultdict of these.
"""

import pickle
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from data_shards.errors import DataError

KINDS = "biufOSU"  # of arrays: bool, integers, floats, objects, bytes, text
Frame = dict[str, np.ndarray]  # a data frame: its columns, [rows] each


def read_pickle(path: Path) -> Any:
    """The object in a pickle; a data frame as a dict of its columns. Raises DataError naming the file where
    it holds anything else or is cut short. Call it in a process of its own: a pickle may be as large as it
    likes."""
    try:
        with open(path, "rb") as file:
            value = _Unpickler(file).load()
        return value.columns() if isinstance(value, _Frame) else value
    except _Refused as error:
        raise DataError(
            f"{path} holds {error}, which no table of numpy, pandas and built-in containers needs. Nothing "
            "in it was run. Take another file."
        ) from error
    except MemoryError as error:
        raise DataError(f"{path}: memory is too small for it.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}. Copy it again.") from error
    except (
        pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, ImportError, LookupError,
        RecursionError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise DataError(
            f"{path}: no pickled table that can be read ({type(error).__name__}: {error}). Nothing in it was "
            "run. Copy or download it again."
        ) from error


class _Refused(pickle.UnpicklingError):
    """What is refused, as words that follow "holds"."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            text = " (text columns of pandas 3: save them as objects)" if name == "ArrowStringArray" else ""
            raise _Refused(f"{module}.{name}{text}")
        return _STAND_INS[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _Refused("a reference to something outside of it")


class _StandIn:
    """A name of a pickle. It has __setstate__ because a pickle could set attributes of anything that has
    none."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise _Refused(f"a state for {type(self).__name__.strip('_')}")


class _Name(_StandIn):
    """A class that is only named: the kind of an array or of an index."""

    __slots__ = ()


class _Function(_StandIn):
    __slots__ = ("call",)

    def __init__(self, call: Any) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


# ---- numpy -------------------------------------------------------------------------------------------------


class _Dtype(_StandIn):
    """numpy.dtype(text, align, copy), then its byte order as a state."""

    __slots__ = ("dtype",)

    def __init__(self, text: Any, align: Any = False, copy: Any = True) -> None:
        if not isinstance(text, str):
            raise _Refused(f"an array of {text!r:.40}")
        dtype = np.dtype(text)
        if dtype.kind not in KINDS or dtype.fields is not None or dtype.subdtype is not None:
            raise _Refused(f"an array of {text!r:.40}")
        self.dtype = dtype

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if any(part is not None for part in state[2:5]):  # of arrays, or with fields
            raise _Refused("an array of records")
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """An array that takes its content as a pickle has it, once the content has been checked."""

    def __setstate__(self, state: Any) -> None:
        version, shape, dtype, by_column, content = state
        if not isinstance(dtype, _Dtype):
            raise _Refused("an array without a type")
        if (dtype.dtype.kind == "O") != isinstance(content, list):
            raise _Refused("objects of an array as bytes")
        super().__setstate__((version, shape, dtype.dtype, by_column, content))


def _empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """numpy's _reconstruct: an array without content; its state follows."""
    if kind is not _NDARRAY:
        raise _Refused("an array of a class of its own")
    return np.ndarray.__new__(_Array, (0,))


def _from_bytes(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """numpy's _frombuffer, of protocol 5."""
    if not isinstance(dtype, _Dtype) or dtype.dtype.kind == "O" or order not in ("C", "F"):
        raise _Refused("an array of another kind")
    return np.frombuffer(content, dtype.dtype).reshape(shape, order=order)


def _scalar(dtype: Any, content: Any) -> Any:
    """A number of numpy, as one of Python."""
    if not isinstance(dtype, _Dtype) or dtype.dtype.kind == "O" or not isinstance(content, bytes):
        raise _Refused("a number of another kind")
    return np.frombuffer(content, dtype.dtype, count=1)[0].item()


def _latin1(text: Any, encoding: Any) -> bytes:
    """_codecs.encode: how protocols 0 to 2 write bytes."""
    if encoding != "latin1" or not isinstance(text, str):
        raise _Refused("text in another encoding")
    return text.encode("latin1")


# ---- pandas ------------------------------------------------------------------------------------------------


class _Block(_StandIn):
    """Columns of one type: values [columns, rows] and their places among the frame's columns."""

    __slots__ = ("places", "values")

    def __init__(self, values: Any, places: Any, ndim: Any = 2) -> None:
        if not isinstance(values, np.ndarray) or values.ndim != 2:
            raise _Refused("columns that are no plain array")
        self.values = values
        self.places = places


class _Partial(_StandIn):
    """functools.partial(new_block, ndim=2): how pandas 1.3 names a block."""

    __slots__ = ()

    def __init__(self, function: Any) -> None:
        if function is not _BLOCK:
            raise _Refused("functools.partial of anything but a block")

    def __setstate__(self, state: Any) -> None:
        if state[0] is not _BLOCK or state[1] or set(state[2] or {}) - {"ndim"}:
            raise _Refused("functools.partial of anything but a block")

    def __call__(self, values: Any, places: Any) -> _Block:
        return _Block(values, places)


class _Manager(_StandIn):
    """The blocks of a frame and its axes: the names of the columns, and of the rows."""

    __slots__ = ("axes", "blocks")

    def __init__(self, blocks: Any = (), axes: Any = ()) -> None:
        self.blocks, self.axes = list(blocks), list(axes)

    def __setstate__(self, state: Any) -> None:
        """As pandas before 1.3 writes it."""
        parts = state[3]["0.14.1"]
        self.axes = list(parts["axes"])
        self.blocks = [_Block(part["values"], part["mgr_locs"]) for part in parts["blocks"]]


class _Frame(_StandIn):
    __slots__ = ("manager",)

    def __setstate__(self, state: Any) -> None:
        self.manager = state.get("_mgr", state.get("_data"))
        if not isinstance(self.manager, _Manager):
            raise _Refused("a data frame without columns")

    def columns(self) -> Frame:
        names = [str(name) for name in self.manager.axes[0]]
        found: Frame = {}
        for block in self.manager.blocks:
            places = np.arange(len(names))[block.places]
            found.update({names[place]: block.values[row] for row, place in enumerate(places)})
        if set(found) != set(names) or len({len(column) for column in found.values()}) > 1:
            raise ValueError(f"columns {names} do not fit its blocks")
        return {name: found[name] for name in names}


def _new_index(kind: Any, parts: Any) -> np.ndarray | range:
    if "data" in parts:
        return np.asarray(parts["data"])
    return range(parts["start"], parts["stop"], parts["step"])


def _without_arguments(kind: Any, base: Any, state: Any) -> Any:
    """copyreg._reconstructor: a frame, in protocols 0 and 1."""
    if kind is not _Frame or base is not _OBJECT:
        raise _Refused("an object of another class")
    return _Frame()


_NDARRAY, _OBJECT, _INDEX = _Name(), _Name(), _Name()
_BLOCK = _Function(_Block)
_CORE = ("numpy.core", "numpy._core")  # before numpy 2, and from it on
_INDEXES = {
    "base": ("Index",),
    "numeric": ("Int64Index", "UInt64Index", "Float64Index"),
    "range": ("RangeIndex",),
}
_STAND_INS: dict[tuple[str, str], Any] = {
    **{
        (module, kind.__name__): kind
        for module in ("builtins", "__builtin__")
        for kind in (list, tuple, dict, set, frozenset, bytes, bytearray, slice, range, int, float, bool)
    },
    **{(module, "object"): _OBJECT for module in ("builtins", "__builtin__")},
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("_codecs", "encode"): _Function(_latin1),
    ("copy_reg", "_reconstructor"): _Function(_without_arguments),
    ("copyreg", "_reconstructor"): _Function(_without_arguments),
    ("functools", "partial"): _Partial,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _NDARRAY,
    **{(f"{core}.multiarray", "_reconstruct"): _Function(_empty_array) for core in _CORE},
    **{(f"{core}.multiarray", "scalar"): _Function(_scalar) for core in _CORE},
    **{(f"{core}.numeric", "_frombuffer"): _Function(_from_bytes) for core in _CORE},
    ("pandas", "DataFrame"): _Frame,
    ("pandas.core.frame", "DataFrame"): _Frame,
    ("pandas.core.internals.managers", "BlockManager"): _Manager,
    ("pandas._libs.internals", "_unpickle_block"): _BLOCK,
    ("pandas.core.internals.blocks", "new_block"): _BLOCK,
    ("pandas.core.indexes.base", "_new_Index"): _Function(_new_index),
    **{
        (f"pandas.core.indexes.{module}", name): _INDEX
        for module, names in _INDEXES.items()
        for name in names
    },
    **{("pandas", name): _INDEX for names in _INDEXES.values() for name in names},
}
