"""Which backend and which kernel would run an op of a given shape, and why."""

from dataclasses import dataclass

import torch

from duqpp.format import BLOCK_SIZE
from duqpp.ops import dispatch, large_gemm
from duqpp.ops.backend import OPS as BACKEND_OPS
from duqpp.ops.backend import Backend
from duqpp.ops.crossover import Crossover, crossover
from duqpp.ops.native import CpuBackend, CudaBackend, compiled_library

# Each with the op whose backend it runs on.
_OPS = {
    "rotate_quantize": "rotate_quantize",
    "rmsnorm_rotate_quantize": "rotate_quantize",
    "silu_mul_rotate_quantize": "rotate_quantize",
    "mxfp4_gemm": "mxfp4_gemm",
}
OPS = tuple(_OPS)


@dataclass(frozen=True)
class Machine:
    """Where an op would run: the CPU, or a GPU, which need not be here.

    capability: of a GPU, (major, minor); None is the CPU. sm_count: its SMs. is_here: whether it is
    torch's current GPU, so that this machine's driver has a say.
    """

    capability: tuple[int, int] | None = None
    sm_count: int = 0
    is_here: bool = False

    @property
    def arch(self) -> int:
        """Of a GPU, its capability as the compiled library counts it: 103 for 10.3."""
        major, minor = self.capability
        return 10 * major + minor

    @property
    def name(self) -> str:
        if self.capability is None:
            return "cpu"
        return f"sm_{self.capability[0]}{self.capability[1]} ({self.sm_count} SMs)"


@dataclass(frozen=True)
class Kernel:
    """The kernel for one shape, and why that one; name is None where the shape is refused."""

    name: str | None
    why: str


def machines_here() -> list[Machine]:
    """The CPU, and the current GPU where there is one."""
    if not torch.cuda.is_available():
        return [Machine()]
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = properties.major, properties.minor
    return [Machine(), Machine(capability, properties.multi_processor_count, is_here=True)]


def unavailable(backend: Backend, op: str, machine: Machine) -> str | None:
    """Why a backend cannot run an op there; None when it can."""
    op = _OPS[op]
    if machine.capability is None:
        return backend.unavailable_reason(op, torch.device("cpu"))
    if isinstance(backend, CudaBackend) and not machine.is_here and compiled_library() is not None:
        return backend.unavailable_on(machine.capability)
    return backend.unavailable_reason(op, torch.device("cuda"))


def select(op: str, machine: Machine, backend: str = "auto") -> Backend:
    """The backend that would run an op there, as `duqpp.ops.dispatch.select` chooses.

    Raises: BackendUnavailableError.
    """
    return dispatch.choose(_OPS[op], machine.name, lambda b, o: unavailable(b, o, machine), backend)


def why_not(backend: Backend, op: str, machine: Machine) -> str:
    """Why a backend is not the one that is chosen there."""
    reason = unavailable(backend, op, machine)
    if reason is not None:
        return reason
    for other in BACKEND_OPS:
        reason = unavailable(backend, other, machine)
        if reason is not None:
            return f"could, but for {other}, which must read what it writes, it {reason}"
    return "can run, comes later"


def kernel(op: str, m: int, n: int, k: int, machine: Machine, backend: Backend) -> Kernel:
    """The kernel that `backend` runs for x [m, k] and a weight [n, k], x of 16-bit floats."""
    if k % BLOCK_SIZE:
        return Kernel(None, f"K must be a multiple of {BLOCK_SIZE}, got {k}")
    if isinstance(backend, CpuBackend):
        return _cpu_kernel(op, m)
    if isinstance(backend, CudaBackend):
        if op == "mxfp4_gemm":
            return _cuda_gemm(m, n, k, machine)
        return _cuda_rotate_quantize(op, m, k, machine, backend.code_for(machine.capability))
    return Kernel("torch operations", "the definition, slow: no kernel of duqpp's is used")


def _cpu_kernel(op: str, m: int) -> Kernel:
    library = compiled_library()
    isas, chosen = dict(library.cpu_isa_features()), library.cpu_isa()
    better = list(isas)[list(isas).index(chosen) + 1 :]
    why = [
        f"not {isa}: DUQPP_CPU_ISA={chosen}"
        if isa in library.cpu_isas()
        else f"not {isa}: this CPU or its system lacks some of {isas[isa]}"
        for isa in better
    ] or ["the best that there is"]
    if op != "mxfp4_gemm":
        code = library.cpu_rotate_quantize_isa()
        if code != chosen:
            why.append(f"{chosen} brings nothing to it")
        return Kernel(f"{code} code", "; ".join(why))
    if library.cpu_gemm_in_place(m):
        return Kernel(f"{chosen} code, weights as they lie", "; ".join([*why, "M is small"]))
    return Kernel(f"{chosen} code, weights expanded", "; ".join([*why, "for so many rows"]))


def _cuda_rotate_quantize(op: str, m: int, k: int, machine: Machine, code: str) -> Kernel:
    launch = compiled_library().rotate_quantize_launch(
        op, m, k, arch=machine.arch, sm_count=machine.sm_count
    )
    conversion = "hardware E2M1" if launch["hardware_e2m1"] else "E2M1 by integer arithmetic"
    ctas, threads = launch["ctas"], launch["threads"]
    return Kernel(f"sm_{code} code, {_count(ctas, 'CTA')} of {threads} threads", conversion)


def _cuda_gemm(m: int, n: int, k: int, machine: Machine) -> Kernel:
    if n % 8:
        return Kernel(None, f"N must be a multiple of 8, got {n}; pad the weight with zero rows")
    library = compiled_library()
    known = crossover(machine.capability)
    if known is not None and m >= known.at(n, k):
        return _large_gemm(m, n, k, machine, known)
    plan = library.select_gemm(m, n, k, arch=machine.arch, sm_count=machine.sm_count)
    if plan.arch == 80:
        launch = library.gemm_sm80_launch(plan, m, n, k, arch=machine.arch)
        warps, rounds, segments = (launch[key] for key in ("warps", "rounds", "segments"))
        return Kernel(
            f"{plan.kernel} of N x M, {_count(launch['ctas'], 'CTA')} of {_count(warps, 'warp')}, "
            f"K in {_count(segments, 'segment')}, {_count(rounds, 'round')}",
            plan.reason + (f"; from {known.at(n, k)} on, torch multiplies" if known else ""),
        )
    name = f"{plan.kernel}, GEMM tile {'x'.join(map(str, plan.tile))}"
    if plan.splits > 1:
        workspace = library.gemm_workspace_size(plan, m, n)
        name += f", K in {plan.splits} parts, {workspace} bytes of workspace"
    return Kernel(name, plan.reason)


def _large_gemm(m: int, n: int, k: int, machine: Machine, known: Crossover) -> Kernel:
    """Many rows on a GPU without block-scaled tensor cores, for a result in bfloat16."""
    route = large_gemm.route_for(machine.capability, torch.version.cuda)
    out = torch.empty((m, n), dtype=torch.bfloat16, device="meta")
    in_place = large_gemm.writes_in_place(route, None, out)
    row_bytes = large_gemm.bytes_per_row(route, m, k, in_place=in_place)
    parts = list(large_gemm.chunks(n, row_bytes, large_gemm.WORKSPACE_BYTES))
    name = (
        f"{route.value}, operands expanded to {str(route.dtype).removeprefix('torch.')}, weight in "
        f"{_count(len(parts), 'part')}, {parts[0].stop * row_bytes} bytes of workspace"
    )
    return Kernel(name, f"from {known.at(n, k)} rows of x on, by {known.source}")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
