"""The short table at the end of `gpu.py`: every figure against the ceiling measured in the same run."""

from __future__ import annotations

from typing import Any


def summary(results: dict[str, Any]) -> str:
    """Lines of text."""
    machine = results.get("machine", {})
    copy = machine.get("copy", {}).get("bytes_per_s")
    matrix = machine.get("matrix", {}).get("flop_per_s", {}).get("fp16")
    lines = [f"{machine.get('identity', {}).get('name', 'unknown device')}"]
    if copy and matrix:
        lines.append(f"copy {copy / 1e9:.0f} GB/s, fp16 matrix product {matrix / 1e12:.0f} TFLOP/s")
    lines += _table("kernel", results.get("kernels", {}), lambda job: _kernel(job, copy))
    lines += _table("kernel in CUDA C", results.get("kernels_cuda_c", {}), lambda job: _kernel(job, copy))
    lines += _table("form of a kernel", results.get("variants", {}), lambda job: _kernel(job, copy))
    lines += _table("engine", results.get("engines", {}), lambda job: _engine(job, matrix))
    lines += _table("whole case", results.get("case", {}), lambda job: _case(job, results["case"].get("nnunet", {})))
    lines += _table("plans", results.get("plans", {}), lambda job: f"{job['seconds']:.0f} s" if "seconds" in job else "")
    lines += _table("repeats", results.get("repeats", {}), _repeats)
    lines += _table("the same labels", results.get("same", {}), _same)
    for name, title in (("sanitizer", "sanitizer"), ("sanitizer_cuda_c", "sanitizer, CUDA C")):
        checks = results.get(name, {})
        clean = [job for job in checks.values() if isinstance(job, dict) and "largest_error" in job]
        lines.append(f"{title}: {checks.get('skipped') or checks.get('incomplete') or f'{len(clean)} checks clean'}")
    return "\n".join(lines)


def _table(title: str, jobs: dict[str, Any], shown: Any) -> list[str]:
    lines = [f"-- {title}"]
    for name, job in jobs.items():
        if not isinstance(job, dict):
            lines += [f"{name}: {job}"] if name == "incomplete" else []
            continue
        reason = next((f"{state}: {str(job[state]).strip()[-160:]}" for state in ("failed", "skipped") if state in job), None)
        text = reason or shown(job)
        if text:
            lines.append(f"{name:44s} {' '.join(text.split())}")
    return lines


def _kernel(job: dict[str, Any], copy: float | None) -> str:
    if "bytes_per_s" not in job:
        return ""
    share = f" {100 * job['bytes_per_s'] / copy:4.0f} %" if copy else ""
    return f"{job['median_ms']:9.3f} ms {job['bytes_per_s'] / 1e9:7.0f} GB/s{share}"


def _engine(job: dict[str, Any], matrix: float | None) -> str:
    if "flop_per_s" not in job:
        return ""
    share = f" {100 * job['flop_per_s'] / matrix:4.0f} %" if matrix else ""
    return f"{job['ms_per_window']:8.2f} ms a window {job['flop_per_s'] / 1e12:6.1f} TFLOP/s{share} error {job['relative_error']:.1e}"


def _case(job: dict[str, Any], rival: dict[str, Any]) -> str:
    if "seconds" not in job:
        return str(job)
    stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in job["stages"].items())
    ratio = f" = 1/{rival['seconds'] / job['seconds']:.1f} of nnU-Net's" if "seconds" in rival and job is not rival else ""
    peak = f", {job['peak_device_bytes'] / 1e9:.1f} GB at most" if job.get("peak_device_bytes") else ""
    return f"{job['seconds']:.2f} s{ratio} ({stages}){peak}"


def _same(job: dict[str, Any]) -> str:
    if "label_agreement" in job:
        return f"labels are the CPU's in {', '.join(f'{name} {share:.5f}' for name, share in job['label_agreement'].items())}"
    return "equal" if job.get("labels_that_differ") == 0 or "arrays" in job else ""


def _repeats(job: dict[str, Any]) -> str:
    return f"{job['runs']} runs, {job['different']} label map" if "runs" in job else ""
