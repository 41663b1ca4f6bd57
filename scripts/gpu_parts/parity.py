"""The one place from which the parts take the comparison with the reference."""

from asvit_deploy.evaluate.parity import compare

__all__ = ["compare"]
