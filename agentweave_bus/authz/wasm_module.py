"""One compiled policy in WebAssembly: checked when it is loaded, evaluated in a sandbox.

:class:`PolicyModule` is what is shared (compiled code, immutable); :class:`PolicyInstance` is a sandbox
with its own memory, for one thread at a time, to be thrown away after any error. This module follows
OPA's documented ABI 1.2 and later (https://www.openpolicyagent.org/docs/wasm): one ``opa_eval`` a
decision. It knows nothing of files, packages' meaning or the event loop.

A sandbox has bounds: memory, instructions (``wasmtime`` counts them as fuel), and the host functions
of ``host_builtins``.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from agentweave_bus.authz.engine import unavailable
from agentweave_bus.authz.host_builtins import (
    SUPPORTED_BUILTINS,
    UNDEFINED,
    BuiltinRefusedError,
    HostBuiltins,
)
from agentweave_bus.authz.policy_input import MAX_INPUT_BYTES, PolicyInput, parse_strict, write_input
from agentweave_bus.exceptions import PayloadError, PolicyLoadError

try:
    import wasmtime
except ModuleNotFoundError:  # an extra: who asks OPA servers needs none
    wasmtime = None

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["ModuleLimits", "PolicyInstance", "PolicyModule"]

_ABI_MAJOR: Final = 1
_ABI_MINOR: Final = 2
_PAGE_BYTES: Final = 65536
_EXPORTS: Final = (
    "opa_malloc",
    "opa_json_parse",
    "opa_json_dump",
    "opa_heap_ptr_get",
    "opa_eval",
)
_NO_VALUE: Final = 0
_JSON_RESULT: Final = 0


@dataclass(frozen=True, slots=True)
class ModuleLimits:
    """Bounds of one sandbox.

    Attributes:
        memory_bytes: all that a sandbox may hold: program, data, input and work.
        instructions: WebAssembly instructions of one decision, nearly (fuel); a million take about
            0.1 ms.
        instructions_per_byte: as many more for each byte of the input, which has to be parsed.
        load_instructions: the same for taking in the data, once for a sandbox.
        result_bytes: length of one answer as JSON.

    """

    memory_bytes: int = 128 * 1024 * 1024
    instructions: int = 100_000_000
    instructions_per_byte: int = 500
    load_instructions: int = 5_000_000_000
    result_bytes: int = 64 * 1024


class PolicyModule:
    """Compiled code and its tables.

    Attributes:
        digest: SHA-256 of the module.
        size_bytes: its length.
        entrypoints: rule path (``order/authz/allow``) to the number that ``opa_eval`` takes.
        builtins: names of the host functions that it calls, by number.

    Raises:
        PolicyLoadError: these bytes are no policy that this host can run; the message says why.

    """

    def __init__(self, wasm: bytes, limits: ModuleLimits) -> None:
        if wasmtime is None:
            raise PolicyLoadError(
                "the embedded policy engine needs wasmtime: install 'agentweave-bus[embedded]', "
                "or use an OPA server (provider: opa)"
            )
        self.limits = limits
        self.digest = hashlib.sha256(wasm).digest()
        self.size_bytes = len(wasm)
        self.engine = wasmtime.Engine(_engine_settings())
        try:
            self.module = wasmtime.Module(self.engine, wasm)
        except wasmtime.WasmtimeError as error:
            raise PolicyLoadError(f"the policy is no valid WebAssembly: {error}") from error
        self.builtins: dict[int, str] = {}
        self.entrypoints: dict[str, int] = {}
        self._read_tables()

    def _read_tables(self) -> None:
        probe = PolicyInstance(self, b"{}", HostBuiltins(time.time_ns))
        probe.check_abi()
        self.entrypoints = {str(name): int(number) for name, number in probe.table("entrypoints").items()}
        builtins = {int(number): str(name) for name, number in probe.table("builtins").items()}
        missing = sorted(set(builtins.values()) - SUPPORTED_BUILTINS)
        if missing:
            raise PolicyLoadError(
                f"the policy uses built-ins that the embedded engine does not offer: {', '.join(missing)}. "
                f"It offers {', '.join(sorted(SUPPORTED_BUILTINS))} and what OPA compiles to WebAssembly; "
                "use an OPA server (provider: opa) for the others."
            )
        self.builtins = builtins


class PolicyInstance:
    """One sandbox with the policy's data in it. Not to be used by two threads at once."""

    def __init__(self, module: PolicyModule, data: bytes, builtins: HostBuiltins) -> None:
        self._names: Mapping[int, str] = module.builtins
        self._builtins = builtins
        self._limits = module.limits
        self._program_bytes = module.size_bytes
        self._failure = ""
        self._store = wasmtime.Store(module.engine)
        self._store.set_fuel(module.limits.load_instructions)
        try:
            self._link(module.module)
            self._take_in(data)
        except PolicyLoadError:
            raise
        except Exception as error:  # a module of unknown make may break in any way
            raise PolicyLoadError(f"the policy can't be set up: {self._failure or _cause(error)}") from error

    # --- asking ----------------------------------------------------------------------------------

    def evaluate(self, entrypoint: int, question: PolicyInput, *, clock_allowed: bool = True) -> Any:
        """Return the value of the rule behind ``entrypoint``, or UNDEFINED.

        Raises:
            PolicyUnavailableError: no answer, for whatever reason. The instance is broken after it:
                throw it away.

        """
        self._builtins.begin(clock_allowed=clock_allowed)
        try:
            results = json.loads(self._ask(entrypoint, question))
        except Exception as error:  # whatever went wrong in there, there is no answer
            raise unavailable(self._failure or _cause(error)) from error
        return results[0]["result"] if results else UNDEFINED

    def _ask(self, entrypoint: int, question: PolicyInput) -> bytes:
        store = self._store
        limits = self._limits
        store.set_fuel(limits.instructions + limits.instructions_per_byte * len(question))
        self._write(self._input_at, question)
        # opa_eval takes what it can't parse for no input at all, and then "not input.x" holds.
        if self._parse(store, self._input_at, len(question)) == _NO_VALUE:
            raise ValueError("OPA's parser refuses the input")
        answer = self._eval(
            store, 0, entrypoint, self._data_at, self._input_at, len(question), self._work_at, _JSON_RESULT
        )
        return self._read_text(answer)

    # --- setting up ------------------------------------------------------------------------------

    def _link(self, module: wasmtime.Module) -> None:
        imported = next(item.type for item in module.imports if item.name == "memory")
        # OPA declares less than its own data segments need, and leaves the difference to the host.
        least = imported.limits.min + self._program_bytes // _PAGE_BYTES + 1
        most = self._limits.memory_bytes // _PAGE_BYTES
        pages = wasmtime.Limits(min(least, most), most)
        self._memory = wasmtime.Memory(self._store, wasmtime.MemoryType(pages))
        linker = wasmtime.Linker(self._store.engine)
        linker.define(self._store, "env", "memory", self._memory)
        for name, function, arity in self._host_functions():
            returns = [] if name == "opa_abort" else [wasmtime.ValType.i32()]
            kind = wasmtime.FuncType([wasmtime.ValType.i32()] * arity, returns)
            linker.define(self._store, "env", name, wasmtime.Func(self._store, kind, function))
        self._exports = linker.instantiate(self._store, module).exports(self._store)
        self._malloc, self._parse, self._dump, self._heap, self._eval = (
            self._exports[name] for name in _EXPORTS
        )

    def _host_functions(self) -> list[tuple[str, Callable[..., int | None], int]]:
        """Name, function and number of parameters of everything that a policy may import."""
        builtins = [(f"opa_builtin{count}", self._call_builtin, count + 2) for count in range(5)]
        return [*builtins, ("opa_abort", self._abort, 1)]

    def _take_in(self, data: bytes) -> None:
        """Put the data into the sandbox, then a place for inputs; work begins above both."""
        self._data_at = self._parse_into(data)
        if self._data_at == _NO_VALUE:
            raise PolicyLoadError("OPA's parser refuses the policy's data")
        self._input_at = self._malloc(self._store, MAX_INPUT_BYTES)
        self._work_at = self._heap(self._store)

    def _parse_into(self, text: bytes) -> int:
        address: int = self._malloc(self._store, len(text))
        self._write(address, text)
        value: int = self._parse(self._store, address, len(text))
        return value

    def check_abi(self) -> None:
        """Refuse a module of another ABI.

        Raises:
            PolicyLoadError: it is not version 1.2 or later.

        """
        major, minor = (
            self._exports[name].value(self._store)
            for name in ("opa_wasm_abi_version", "opa_wasm_abi_minor_version")
        )
        if major != _ABI_MAJOR or minor < _ABI_MINOR:
            raise PolicyLoadError(
                f"the policy was compiled for ABI {major}.{minor}; compile it with OPA 1.x (ABI 1.2 or later)"
            )

    def table(self, name: str) -> dict[str, Any]:
        """Return one of the module's own tables: ``entrypoints`` or ``builtins``."""
        text = self._read_text(self._dump(self._store, self._exports[name](self._store)))
        table: dict[str, Any] = json.loads(text)
        return table

    # --- called from inside ----------------------------------------------------------------------

    def _abort(self, address: int) -> None:
        self._failure = self._read_text(address).decode(errors="replace")
        raise BuiltinRefusedError(self._failure)

    def _call_builtin(self, number: int, _context: int, *addresses: int) -> int:
        name = self._names.get(number, f"number {number}")
        try:
            arguments = [parse_strict(self._read_text(self._dump(self._store, at))) for at in addresses]
            value = self._builtins.call(name, arguments)
        except (BuiltinRefusedError, PayloadError) as error:
            self._failure = str(error)
            raise
        return _NO_VALUE if value is UNDEFINED else self._parse_into(write_input(value))

    # --- memory ------------------------------------------------------------------------------------

    def _write(self, address: int, text: bytes) -> None:
        if not 0 < address <= self._memory.data_len(self._store) - len(text):
            raise ValueError("an address outside of the sandbox")
        ctypes.memmove(self._base() + address, text, len(text))

    def _read_text(self, address: int) -> bytes:
        room = self._memory.data_len(self._store) - address
        if address <= 0 or room <= 0:
            raise ValueError("an address outside of the sandbox")
        text, end, _ = ctypes.string_at(
            self._base() + address, min(room, self._limits.result_bytes)
        ).partition(b"\0")
        if not end:
            raise ValueError(f"an answer of more than {self._limits.result_bytes} bytes")
        return text

    def _base(self) -> int:
        """Where the sandbox's memory lies now: growing it may move it."""
        return ctypes.addressof(self._memory.data_ptr(self._store).contents)


def _cause(error: Exception) -> str:
    """Return wasmtime's cause without the backtrace before it."""
    cause = str(error).rpartition("Caused by:")[2].strip() or type(error).__name__
    return cause.partition("\n")[0]


def _engine_settings() -> wasmtime.Config:
    settings = wasmtime.Config()
    settings.consume_fuel = True
    settings.parallel_compilation = False  # one small module: threads save no time, and take memory
    return settings
