"""The profile that `isotherm bench` takes, as a table and as JSON."""

from typing import TYPE_CHECKING, Any

from isotherm.cli.console import markdown_table

if TYPE_CHECKING:
    from isotherm.evaluation.profile import KernelTime, Profile

_HEADER = ("test", "kernel", "calls", "us/call", "time", "GB/s", "GOP/s", "of limit")
_SHORT_LIMITS = {"read bandwidth": "read", "int8 rate": "int8"}


def profile_json(profile: "Profile") -> dict[str, Any]:
    """Keys are only ever added."""
    return {
        "test": profile.test,
        "num_runs": profile.num_runs,
        "total_s": profile.total_s,
        "kernels": [_kernel_json(kernel) for kernel in profile.kernels],
    }


def profile_text(profile: "Profile") -> str:
    """A Markdown table, a kernel a line."""
    return "\n".join(markdown_table(_HEADER, [_cells(profile.test, kernel) for kernel in profile.kernels], num_left=2))


def _kernel_json(kernel: "KernelTime") -> dict[str, Any]:
    return {
        "kernel": kernel.kernel,
        "calls": kernel.calls,
        "time_s": kernel.time_s,
        "share": kernel.share,
        "bytes": kernel.num_bytes,
        "operations": kernel.num_ops,
        "bytes_per_s": kernel.bytes_per_s,
        "operations_per_s": kernel.ops_per_s,
        "limit": kernel.limit,
        "limit_share": kernel.limit_share,
    }


def _cells(test: str, kernel: "KernelTime") -> tuple[str, ...]:
    limit = "" if kernel.limit is None else f"{kernel.limit_share:.0%} {_SHORT_LIMITS[kernel.limit]}"
    return (
        test,
        kernel.kernel,
        str(kernel.calls),
        f"{kernel.time_s / kernel.calls * 1e6:.1f}",
        f"{kernel.share:.1%}",
        "" if kernel.bytes_per_s is None else f"{kernel.bytes_per_s / 1e9:.1f}",
        "" if kernel.ops_per_s is None else f"{kernel.ops_per_s / 1e9:.1f}",
        limit,
    )
