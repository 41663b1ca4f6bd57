"""The one place from which the parts take the comparison with the reference."""

try:
    from asvit_deploy.parity import compare
except ImportError:  # where it stood before
    from asvit_deploy.evaluate.parity import compare  # type: ignore[no-redef]

__all__ = ["compare"]
