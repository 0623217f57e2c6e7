"""Launches of Triton kernels without a GPU: recorded, or compiled into Triton's cache.

    with capture(90) as launches:                  # of any code that calls impl="triton" with CPU tensors
        nt_xent(view_a, view_b, impl="triton").backward()
    launches[0].compile().asm["cubin"]

Launchers take CPU tensors here and choose as they would on a GPU of the architecture; nothing is computed, and results
hold what their memory held. A kernel is specialised on types, constants and divisibility by 16, all of them the same
for a tensor on a GPU: memory is aligned to 64 bytes on a CPU and to 512 on a GPU. TRITON_INTERPRET=1 excludes this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from mcl_kernels.backends import table

MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}  # of an A100, a H200 and a B200
L2_BYTES = {80: 40 << 20, 90: 60 << 20, 100: 126 << 20}
_devices = count(1000)  # of `dispatch`


class Launch(NamedTuple):
    """A launch of a kernel with its specialisation."""

    function: Any  # the triton.JITFunction
    arguments: dict[str, Any]  # by name, constants too
    grid: tuple[int, ...]
    signature: dict[str, Any]  # types by argument, "constexpr" for constants
    constants: dict[tuple[int, ...], Any]  # by position: tl.constexpr, None, and integers that are 1
    attributes: dict[tuple[int, ...], Any]  # by position: divisibility by 16
    options: Any  # of the backend: num_warps, num_stages, maxnreg, enable_fp_fusion, ...
    target: Any

    @property
    def name(self) -> str:
        name: str = self.function.fn.__name__
        return name

    def compile(self) -> Any:
        """Returns the compiled kernel; fills the cache with the key of the launch."""
        import triton
        from triton.compiler import ASTSource

        source = ASTSource(self.function, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=self.target, options=self.options.__dict__)


def _make_driver(architecture: int, device: int) -> Any:
    """Returns a driver of Triton for a device that does not exist; Triton keeps kernels by the number of the device."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class StandInDriver(DriverBase):  # type: ignore[misc]
        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self) -> int:
            return device

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

    return StandInDriver()


def _replace_everywhere(stack: ExitStack, function: Callable[..., Any], replacement: Callable[..., Any]) -> None:
    """Replaces a function in every module of the library that imported it by its name."""
    name = function.__name__
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("mcl_kernels") and vars(module).get(name) is function:
            stack.enter_context(patch.object(module, name, replacement))


@contextmanager
def stand_in(architecture: int = 90, device: int = 0) -> Iterator[None]:
    """Makes impl="triton" available for CPU tensors, with the choices of launchers on a GPU of this architecture."""
    import triton
    from triton.runtime.driver import driver

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 was set when Triton was imported: its kernels are not compiled")
    for modules in table.TABLE["triton"].modules:
        table.load(modules, "triton")
    from mcl_kernels.backends import triton as policy
    from mcl_kernels.backends import triton_launch
    from mcl_kernels.kmeans import gpu_common

    properties = SimpleNamespace(
        name=f"sm_{architecture}", major=architecture // 10, minor=architecture % 10,
        multi_processor_count=MULTIPROCESSORS[architecture], L2_cache_size=L2_BYTES[architecture],
    )  # fmt: skip
    available = table.TABLE["triton"]._replace(unavailable_reason=lambda device: None)
    before = driver._active
    with ExitStack() as stack:
        stack.enter_context(patch.dict(table.TABLE, {"triton": available}))
        stack.enter_context(patch.dict(triton_launch._kept, clear=True))
        stack.enter_context(patch("torch.cuda.get_device_properties", lambda device=None: properties))
        _replace_everywhere(stack, policy.compute_capability, lambda device: divmod(architecture, 10))
        if hasattr(policy, "multiprocessors"):
            _replace_everywhere(stack, policy.multiprocessors, lambda device: properties.multi_processor_count)
        programs = gpu_common.PROGRAMS * properties.multi_processor_count
        _replace_everywhere(stack, gpu_common.programs_at_a_time, lambda device: programs)
        driver.set_active(_make_driver(architecture, device))
        try:
            yield
        finally:
            driver._active = before


@contextmanager
def capture(architecture: int = 90) -> Iterator[list[Launch]]:
    """Records the launches of the block, in order, and runs none of them."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    now: dict[str, Any] = {}
    run = JITFunction.run

    def record_launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        own = {name: value for name, value in kwargs.items() if name in self.signature.parameters}
        bound = self.signature.bind(*args, **own)
        bound.apply_defaults()
        size = grid(bound.arguments) if callable(grid) else grid
        now.update(arguments=dict(bound.arguments), grid=tuple(size))
        run(self, *args, grid=size, warmup=True, **kwargs)

    def record_specialisation(
        self: Any, key: Any, signature: Any, device: int, constants: Any, options: Any, attributes: Any, warmup: bool
    ) -> None:
        target = self.device_caches[device][2]
        launches.append(Launch(self, now["arguments"], now["grid"], signature, constants, attributes, options, target))

    # A device of its own: kernels that `fill_cache` keeps for device 0 are not looked up.
    with (
        stand_in(architecture, device=architecture),
        patch.object(JITFunction, "run", record_launch),
        patch.object(JITFunction, "_do_compile", record_specialisation),
    ):
        yield launches


@contextmanager
def fill_cache(architecture: int = 90) -> Iterator[None]:
    """Compiles the kernels that the block launches into TRITON_CACHE_DIR, under the keys of their launches."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    with stand_in(architecture), patch.object(JITFunction, "run", compile_launch):
        yield


class StubKernel:
    """A kernel that is not compiled, whose launches are recorded by `dispatch`."""

    function, packed_metadata = 0, ()

    def __init__(self, name: str, specialisation: tuple[Any, ...], record: Callable[..., None] | None) -> None:
        self.name, self.specialisation = name, specialisation
        self.run = self._run = _ignore if record is None else partial(record, self)

    def launch_metadata(self, *arguments: Any) -> None:
        """Metadata for hooks: none."""


def _ignore(*arguments: Any) -> None:
    """Launches nothing."""


@contextmanager
def dispatch(architecture: int = 90, record: Callable[..., None] | None = None) -> Iterator[None]:
    """Dispatches the launches of the block as Triton does, to kernels that are not compiled and do nothing.

    Args:
        architecture: of the GPU.
        record: is called with the StubKernel and the arguments of its launcher: the grid, the stream, three fields
            about the kernel, two hooks, then all arguments of the kernel.
    """
    from triton.runtime.jit import JITFunction

    def find(
        self: Any, key: Any, signature: Any, device: int, constants: Any, options: Any, attributes: Any, warmup: bool
    ) -> StubKernel:
        specialisation = self, signature, constants, attributes, options
        kernel = self.device_caches[device][0][key] = StubKernel(self.fn.__name__, specialisation, record)
        return kernel

    # A device of its own, so that stubs are used by this context alone.
    with stand_in(architecture, device=next(_devices)), patch.object(JITFunction, "_do_compile", find):
        yield
