"""Launches of Triton kernels, and sequences of them that are repeated.

For each launch Triton finds the kernel by the types, the alignment and the values of all arguments, which takes longer
than the launch itself. `repeated` records a sequence of launches when it is first computed: the compiled kernels, and
where each argument is. Later it allocates the results and a workspace, and launches the same kernels with the new
addresses.

A sequence is repeated if it is made of launches and allocations alone, and the addresses of its inputs are multiples of
16, as Triton distinguishes them. Anything else is computed as written: in Triton's interpreter, while a profiler uses
Triton's hooks, in versions of Triton not tested, and where operators of PyTorch are among the launches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from mcl_kernels.backends.triton import current_device, triton_version

ALIGNMENT = 16  # bytes: kernels are specialised on whether an address is a multiple of it
BUFFER_ALIGNMENT = 128  # bytes, of the buffers of a workspace
TESTED = (3, 6) <= triton_version() <= (3, 9)
MAX_KEPT = 1024
STREAM, STREAM_ARGUMENT = 0, object()  # index in the table of a repetition, and what stands for it

Tensors = Sequence[Tensor | None]


class NotRepeatableError(Exception):
    """A sequence of launches that cannot be repeated."""


class Address:
    """Memory that a tensor descriptor describes."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        """Returns the address, as a tensor's method."""
        return self.address


class Descriptor:
    """A TensorDescriptor as a launch reads it: the fields of another one, whose checks are not repeated."""

    def __init__(self, address: int, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)
        self.base = Address(address)


class Launch(NamedTuple):
    """A launch as it was recorded."""

    compiled: Any  # the kernel
    blocks: tuple[int, ...]  # of the grid
    arguments: list[Any]
    constants: list[Any]  # which follow the arguments

    def call(self) -> list[Any]:
        """Arguments of the compiled kernel's `run`: three of hooks come before the kernel's own."""
        kernel = self.compiled
        no_hooks = None, None, None
        before = *self.blocks, STREAM_ARGUMENT, kernel.function, kernel.packed_metadata
        return [*before, *no_hooks, *self.arguments, *self.constants]


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records launches, and the tensors that are allocated. Notices what cannot be repeated."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[Launch] = []
        self.allocated: dict[int, Tensor] = {}  # by the address of their storage, and kept: each has its own
        self.is_repeatable = True
        self.is_launching = False  # operators are those of Triton

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if self.is_launching or not self.is_repeatable:
            return result
        if "empty" in function.__name__:
            self.allocated[result.untyped_storage().data_ptr()] = result
        elif not any(x.alias_info is not None and not x.alias_info.is_write for x in function._schema.returns):
            self._give_up()  # it is no view
        return result

    def add(self, kernel: Any, grid: tuple[int, ...], compiled: Any, arguments: Any, constants: dict[str, Any]) -> None:
        """Records a launch, if Triton has compiled the kernel."""
        if not self.is_repeatable:
            return
        if getattr(compiled, "_run", None) is None or kernel.pre_run_hooks:
            self._give_up()
            return
        named = {name: value for name, value in constants.items() if name in kernel.signature.parameters}
        bound = kernel.signature.bind(*arguments, **named).arguments
        values = [bound[parameter.name] for parameter in kernel.params]
        is_constant = [parameter.is_constexpr for parameter in kernel.params]
        count = is_constant.index(True) if True in is_constant else len(values)
        self.launches.append(Launch(compiled, (*grid, 1, 1)[:3], values[:count], values[count:]))

    def _give_up(self) -> None:
        """Records no more, and holds no memory longer than the sequence does."""
        self.is_repeatable = False
        self.launches.clear()
        self.allocated.clear()


_recording = threading.local()
_record_lock = threading.Lock()  # modes of PyTorch's dispatch that threads leave in another order stay on


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """Launches a kernel, whose constants come last in its signature; options of the launch are given by name too."""
    recorder = getattr(_recording, "recorder", None)
    if recorder is None:
        kernel[grid](*arguments, **named)
    else:
        recorder.is_launching = True
        compiled = kernel[grid](*arguments, **named)
        recorder.is_launching = False
        recorder.add(kernel, grid, compiled, arguments, named)


class Repetition:
    """A recorded sequence with everything but its addresses, which are offsets to bases.

    Bases are the inputs, the results that are allocated, and the workspace. Launches take their arguments from a table
    of the stream, constants, addresses, and tuples and descriptors of these.
    """

    def __init__(self, recorder: Recorder, inputs: Tensors, results: Tensors) -> None:
        if not recorder.is_repeatable:
            raise NotRepeatableError("an operator, or a kernel that is not compiled")
        self.device = next(x.device for x in inputs if x is not None)
        given = {x.data_ptr(): i for i, x in enumerate(inputs) if x is not None and x.numel()}
        self.results: list[int | tuple[torch.Size, torch.dtype] | None] = []  # an input, or a new tensor
        storages: dict[int, tuple[int, int]] = {}  # base and offset of allocated memory, by address
        base = len(inputs)
        for result in results:
            kind = _kind_of(result, inputs, recorder)
            self.results.append(kind)
            if isinstance(kind, tuple) and result is not None:
                if result.numel() and storages.setdefault(result.data_ptr(), (base, 0)) != (base, 0):
                    raise NotRepeatableError("two results share memory")
                base += 1
        self.size = _place_workspace(recorder, storages, base)
        table = Table(given, storages)
        self.launches = [
            (x.compiled.run, itemgetter(*[table.index(argument) for argument in x.call()])) for x in recorder.launches
        ]
        self.kernels = [x.compiled for x in recorder.launches]  # Triton unloads those that nothing holds
        self.values, self.makers = table.values, table.makers
        self.addresses = [(index, *place) for place, index in table.addresses.items()]

    def __call__(self, inputs: Tensors, addresses: list[int]) -> Tensors:
        """Launches everything for other inputs. Returns the results."""
        results: list[Tensor | None] = []
        bases = list(addresses)
        new_empty = next(x for x in inputs if x is not None).new_empty  # faster than torch.empty
        for kind in self.results:
            if isinstance(kind, tuple):
                result = new_empty(kind[0], dtype=kind[1])
                bases.append(result.data_ptr())
                results.append(result)
            else:
                results.append(None if kind is None else inputs[kind])
        workspace = new_empty(self.size, dtype=torch.uint8)
        bases.append(workspace.data_ptr())
        values = self.values.copy()
        values[STREAM] = driver.active.get_current_stream(self.device.index)
        for index, base, offset in self.addresses:
            values[index] = bases[base] + offset
        for index, make in self.makers:
            values[index] = make(values)
        for run, arguments_in in self.launches:
            run(*arguments_in(values))
        return results


class Table:
    """Arguments of all launches, each once. Addresses are filled in later, then what is made of them."""

    def __init__(self, given: dict[int, int], storages: dict[int, tuple[int, int]]) -> None:
        self.given, self.storages = given, storages
        self.values: list[Any] = [None]  # the first is the stream
        self.addresses: dict[tuple[int, int], int] = {}  # by base and offset
        self.constants: dict[tuple[type, Any], int] = {}
        self.tuples: dict[tuple[int, ...], int] = {}  # by the indices of their fields
        self.makers: list[tuple[int, Callable[[Sequence[Any]], Any]]] = []

    def index(self, x: Any) -> int:
        """Index of an argument, which is added if it is not there."""
        if x is STREAM_ARGUMENT:
            return STREAM
        if isinstance(x, TensorDescriptor):
            address = self._address(x.base)
            fields = {name: value for name, value in vars(x).items() if name != "base"}
            return self._add_maker(lambda values: Descriptor(values[address], fields))
        if isinstance(x, tuple) and x:
            indices = tuple(self.index(field) for field in x)
            if indices not in self.tuples:
                get = itemgetter(*indices)
                self.tuples[indices] = self._add_maker(get if len(x) > 1 else lambda values: (get(values),))
            return self.tuples[indices]
        if isinstance(x, Tensor):
            return self._address(x) if x.numel() else self._constant(0)
        return self._constant(x)

    def _address(self, x: Tensor) -> int:
        address, storage = x.data_ptr(), x.untyped_storage().data_ptr()
        if address in self.given:
            place = self.given[address], 0
        elif storage in self.storages:
            base, offset = self.storages[storage]
            place = base, offset + address - storage
        else:
            raise NotRepeatableError("memory that is neither given nor allocated")
        if place not in self.addresses:
            self.addresses[place] = self._add(None)
        return self.addresses[place]

    def _constant(self, x: Any) -> int:
        if (type(x), x) not in self.constants:
            self.constants[type(x), x] = self._add(x)
        return self.constants[type(x), x]

    def _add_maker(self, make: Callable[[Sequence[Any]], Any]) -> int:
        self.makers.append((self._add(None), make))
        return self.makers[-1][0]

    def _add(self, x: Any) -> int:
        self.values.append(x)
        return len(self.values) - 1


def _kind_of(result: Tensor | None, inputs: Tensors, recorder: Recorder) -> int | tuple[torch.Size, torch.dtype] | None:
    """The index of a result among the inputs, or shape and dtype of one that is allocated."""
    if result is None:
        return None
    for i, x in enumerate(inputs):
        if x is result:
            return i
    storage = result.untyped_storage()
    if result.numel() and storage.data_ptr() not in recorder.allocated:
        raise NotRepeatableError("a result that is neither given nor allocated")
    if storage.nbytes() != result.numel() * result.itemsize or not result.is_contiguous():
        raise NotRepeatableError("a result that is a part of a tensor")
    return result.shape, result.dtype


def _place_workspace(recorder: Recorder, storages: dict[int, tuple[int, int]], base: int) -> int:
    """Places allocated memory that holds no result in a workspace. Returns its size.

    Launches that do not need it at once share memory.
    """
    lives: dict[int, tuple[int, int]] = {}  # first and last launch that needs it
    for i, recorded in enumerate(recorder.launches):
        for x in _tensors_of(recorded.arguments):
            address = x.untyped_storage().data_ptr()
            if address in recorder.allocated and address not in storages:
                lives[address] = lives.get(address, (i, i))[0], i
    placed: list[tuple[int, int, tuple[int, int]]] = []
    for address, life in lives.items():
        nbytes = recorder.allocated[address].untyped_storage().nbytes()
        size, start = -(-nbytes // BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT, 0
        for begin, end, other in sorted(placed):
            if life[0] <= other[1] and other[0] <= life[1] and begin < start + size:
                start = max(start, end)
        placed.append((start, start + size, life))
    storages.update({address: (base, start) for address, (start, *_) in zip(lives, placed, strict=True)})
    return max((end for _, end, _ in placed), default=0)


_kept: dict[Hashable, Repetition | None] = {}  # None: the sequence cannot be repeated


def repeated(key: tuple[Hashable, ...], inputs: Tensors, compute: Callable[[], Tensors]) -> Tensors:
    """Returns `compute()`, or what it would return, by repeating an earlier call with the key.

    Args:
        key: all that `compute` depends on but addresses: sizes, strides and dtypes of the inputs, and options.
        inputs: the tensors that `compute` reads, on one device.
        compute: returns tensors that it allocates or is given, or None, and writes to none that it is given.
    """
    first = next(x for x in inputs if x is not None)
    key = *key, first.device, knobs.runtime.debug, knobs.compilation.instrumentation_mode
    is_known, kept = key in _kept, _kept.get(key)
    if (is_known and kept is None) or not TESTED or _has_hooks():
        return compute()
    addresses = _addresses(inputs)
    if addresses is None:
        return compute()
    if kept is not None:
        with current_device(first):
            return kept(inputs, addresses)
    given = [address for address in addresses if address]
    # Two inputs in one place could not be told apart.
    if len(set(given)) < len(given) or not _record_lock.acquire(blocking=False):
        return compute()
    try:
        results, found = _record(inputs, compute)
    finally:
        _record_lock.release()
    if len(_kept) >= MAX_KEPT:
        _kept.clear()
    _kept[key] = found
    return results


def _record(inputs: Tensors, compute: Callable[[], Tensors]) -> tuple[Tensors, Repetition | None]:
    """Results of a sequence, and what repeats it if anything can."""
    with Recorder() as recorder:
        _recording.recorder = recorder
        try:
            results = compute()
        finally:
            _recording.recorder = None
    try:
        return results, Repetition(recorder, inputs, results)
    except (NotRepeatableError, AttributeError, LookupError, TypeError):  # or a field that some Triton lacks
        return results, None


def _addresses(tensors: Tensors) -> list[int] | None:
    """Addresses of tensors, 0 for None; None if not all are aligned."""
    found = [0 if x is None else x.data_ptr() for x in tensors]
    bits = 0
    for address in found:
        bits |= address
    return None if bits % ALIGNMENT else found


def _has_hooks() -> bool:
    """Returns whether Triton calls a function, a profiler's for example, around each launch."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _tensors_of(arguments: Any) -> list[Tensor]:
    """Tensors among arguments."""
    if isinstance(arguments, Tensor):
        return [arguments] if arguments.numel() else []
    if isinstance(arguments, TensorDescriptor):
        return [arguments.base]
    if isinstance(arguments, (list, tuple)):
        return [x for argument in arguments for x in _tensors_of(argument)]
    return []
